"""All shipped encoders load alike: at the first use, once, and without a trace in the caller's chance and modes."""

from __future__ import annotations

import json
import pickle
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from jsonargparse import ArgumentParser
from safetensors.torch import save_file
from test_aligned import BEATS, LETTERS, save
from test_huggingface import clip

from align_parts import BeatTower, LetterEncoder
from bindllm.encoders import Aligned, EfficientNetLite, Encoder, HuggingFace, ImageBind, PointBind
from bindllm.media import Media
from imagebind_small import write_small_imagebind
from pointbind_parts import POINTS, bumpy, write_small
from tiny import ColorEncoder, synthetic_efficientnet

PICTURE = Media.image(np.arange(48 * 64 * 3, dtype=np.uint8).reshape(48, 64, 3))


class Case(NamedTuple):
    """An encoder by its class and keywords, a media, and the function that loads its weights."""

    kind: type
    keywords: dict[str, Any]
    media: Media
    loader: str

    def embed(self, encoder: Any = None) -> torch.Tensor:
        encoder = encoder or self.kind(**self.keywords)
        return encoder.embed(self.media.modality, [encoder.prepare(self.media)])


def efficientnet(folder):
    folder.mkdir()
    save_file(synthetic_efficientnet(), folder / "model.safetensors")
    return Case(EfficientNetLite, {"weights": str(folder)}, PICTURE, "efficientnet._load")


def pointbind(folder):
    keywords = {"weights": write_small(folder, "i2p-mae"), "points": POINTS}
    return Case(PointBind, keywords, Media.point(bumpy(0)), "pointbind.load_network")


def imagebind(folder):
    keywords = {"weights": str(write_small_imagebind(folder)), "modalities": ["image"]}
    return Case(ImageBind, keywords, PICTURE, "imagebind.load_trunk")


def huggingface(folder):
    return Case(HuggingFace, {"name": clip(folder)}, PICTURE, "huggingface.load_model")


def frozen_tower(folder):
    keywords = {"weights": str(save(folder, LetterEncoder(), LETTERS)), "allow": [LETTERS]}
    return Case(Aligned, keywords, Media.text("a dog"), "aligned.Head")


def trained_tower(folder):
    keywords = {"weights": str(save(folder, BeatTower(), BEATS)), "allow": [BEATS]}
    return Case(Aligned, keywords, Media("radar", np.arange(9.0)), "aligned.Head")


MAKERS = (efficientnet, pointbind, imagebind, huggingface, frozen_tower, trained_tower)


@pytest.fixture(scope="module", params=MAKERS, ids=lambda make: make.__name__)
def case(request, tmp_path_factory) -> Case:
    return request.param(tmp_path_factory.mktemp("encoder") / "folder")


def test_threads_share_the_loading_and_the_result_can_be_pickled(case, monkeypatch):
    loaded = []
    module, _, name = case.loader.rpartition(".")
    load = getattr(__import__(f"bindllm.encoders.{module}", fromlist=[name]), name)

    def slow(*args, **options):
        loaded.append(args)
        time.sleep(0.05)
        return load(*args, **options)

    encoder = case.kind(**case.keywords)
    with monkeypatch.context() as patch, ThreadPoolExecutor(4) as pool:
        patch.setattr(f"bindllm.encoders.{case.loader}", slow)
        rows = list(pool.map(lambda _: case.embed(encoder), range(4)))
    assert len(loaded) == 1
    assert all(torch.equal(row, rows[0]) for row in rows)
    # Unpickled weights lie elsewhere in memory, and some CPUs then add in another order.
    torch.testing.assert_close(case.embed(pickle.loads(pickle.dumps(encoder))), rows[0], rtol=0, atol=1e-6)


def test_loading_and_embedding_leave_the_random_state_alone(case):
    # Otherwise a seeded run would differ with and without stored embeddings.
    before = torch.get_rng_state()
    case.embed()
    assert torch.equal(torch.get_rng_state(), before)


def test_a_first_use_in_inference_mode_does_no_harm_and_embeddings_can_be_trained_on(case):
    encoder = case.kind(**case.keywords)
    with torch.inference_mode():
        first = case.embed(encoder)
    second = case.embed(encoder.to("cpu"))
    assert torch.equal(first, second)
    # An inference-mode tensor would be refused by the bind network's backward.
    assert not second.is_inference()
    weight = torch.ones(second.shape[1], requires_grad=True)
    (second * weight).sum().backward()
    assert torch.equal(weight.grad, second[0])


def test_a_recipe_names_it_by_import_path(case):
    # jsonargparse compares the annotations of a class with those of the protocol, word for word.
    parser = ArgumentParser()
    parser.add_argument("--encoders", type=list[Encoder])
    own = case.kind(**case.keywords)
    path = f"bindllm.encoders.{case.kind.__name__}"
    entries = [
        {"class_path": path, "init_args": json.loads(json.dumps(own.config))},
        {"class_path": "tiny.ColorEncoder"},
    ]
    built, other = parser.instantiate(parser.parse_object({"encoders": entries})).encoders
    assert built.config == own.config
    assert type(other) is ColorEncoder
