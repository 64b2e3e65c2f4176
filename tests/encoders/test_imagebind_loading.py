"""What ImageBind reads, when, and what it says of a folder or an option that does not fit."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from jsonargparse import ArgumentParser
from safetensors.torch import load_file, save_file

from bindllm.encoders import Encoder
from bindllm.encoders.imagebind import ImageBind
from bindllm.errors import EncoderError, InputError, MediaError
from bindllm.media import Media
from bindllm.testing import check_encoder
from imagebind_small import write_small_imagebind

MODALITIES = ("image", "video", "text", "audio", "depth", "thermal", "imu")
SIGNAL = torch.linspace(-1, 1, 12_000).view(6, 2000)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_small_imagebind(tmp_path_factory.mktemp("imagebind") / "small")


@pytest.fixture
def copy(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "copy")


def test_a_missing_folder_names_the_command_that_makes_it(tmp_path):
    encoder = ImageBind(str(tmp_path / "imagebind"))
    assert encoder.modalities == MODALITIES
    assert encoder.embedding_size == 1024
    for use in (encoder.fingerprint, lambda: encoder.embed("imu", [SIGNAL])):
        with pytest.raises(EncoderError) as caught:
            use()
        command = f"bindllm convert imagebind imagebind_huge.pth --output {tmp_path / 'imagebind'}"
        assert command in str(caught.value)


def test_a_folder_serves_the_modalities_of_its_trunks(copy):
    assert ImageBind(str(copy)).modalities == MODALITIES
    assert ImageBind(str(copy)).embedding_size == 32
    config = json.loads((copy / "config.json").read_text())
    config["trunks"] = {name: config["trunks"][name] for name in ("vision", "imu")}
    (copy / "config.json").write_text(json.dumps(config))
    assert ImageBind(str(copy)).modalities == ("image", "video", "imu")
    with pytest.raises(InputError, match="has no audio trunk, so no 'audio'. Known: image, imu, video"):
        ImageBind(str(copy), modalities=["image", "audio"])


def test_options_that_do_not_exist(folder):
    for options, words in (
        ({"modalities": ["thermals"]}, "Did you mean 'thermal'"),
        ({"modalities": "image"}, "must be a list of names"),
        ({"modalities": []}, "must be a list of names"),
        ({"coverage": "ful"}, "unknown coverage 'ful'. Did you mean 'full'"),
        ({"dtype": "float8"}, "unknown dtype 'float8'"),
        ({"scale": "units"}, "Did you mean 'unit'"),
        ({"max_clips": 0}, "max_clips=0"),
        ({"depth_focal": float("nan")}, "depth_focal=nan must be above 0"),
    ):
        with pytest.raises(InputError, match=words):
            ImageBind(str(folder), **options)


def test_a_modality_that_is_not_served_is_refused(folder):
    encoder = ImageBind(str(folder), modalities=["imu"])
    for use in (lambda: encoder.prepare(Media.text("a dog")), lambda: encoder.embed("text", [SIGNAL])):
        with pytest.raises(InputError, match="does not serve 'text' media. Known: imu"):
            use()


def test_tensors_of_another_shape_are_refused(folder):
    encoder = ImageBind(str(folder))
    for modality, inputs, words in (
        ("imu", [], "there is no imu media"),
        ("imu", [SIGNAL, SIGNAL[:5]], r"number 1 has shape \[5, 2000\]; expected \[6, 2000\]"),
        ("imu", [torch.zeros(0, 6, 2000)], r"number 0 has shape \[0, 6, 2000\]"),
        ("image", [torch.zeros(3, 224, 225)], r"expected \[3, H, H\]"),
        ("image", [torch.zeros(3, 13, 13)], r"expected \[3, H, H\]"),
        ("image", [torch.zeros(3, 224, 224), torch.zeros(3, 252, 252)], "must have one size"),
        ("video", [torch.zeros(3, 3, 224, 224)], "with one or two frames"),
        ("audio", [torch.zeros(1, 128, 205)], r"expected \[1, 128, 204\]"),
        ("text", [torch.zeros(1, 1, 77, dtype=torch.int64)], r"expected \[77\]"),
    ):
        with pytest.raises(InputError, match=words):
            encoder.embed(modality, inputs)


def test_only_the_trunks_in_use_are_read(copy):
    for trunk in ("vision", "text", "audio", "depth", "thermal"):
        (copy / f"{trunk}.safetensors").unlink()
    encoder = ImageBind(str(copy), modalities=["imu"])
    assert encoder.embed("imu", [SIGNAL]).shape == (1, 32)
    assert len(encoder.fingerprint()) == 64
    whole = ImageBind(str(copy))
    assert whole.embed("imu", [SIGNAL]).shape == (1, 32)
    with pytest.raises(EncoderError, match=r"has no vision\.safetensors; `bindllm convert imagebind"):
        whole.embed("image", [torch.zeros(3, 224, 224)])


def test_a_folder_that_appears_later_is_read_or_refused(folder, tmp_path):
    early = ImageBind(str(tmp_path / "late"))
    shutil.copytree(folder, tmp_path / "late")
    # The small model does not have the sizes that were promised while there was no folder.
    with pytest.raises(EncoderError, match="create the encoder again"):
        early.embed("imu", [SIGNAL])


def test_weights_that_do_not_fit_are_all_listed(copy):
    tensors = load_file(copy / "imu.safetensors")
    del tensors["blocks.1.norm_2.bias"]
    tensors["stem.weight"] = torch.zeros(64, 47)
    tensors["blocks.2.norm_1.bias"] = torch.zeros(64)
    save_file(tensors, copy / "imu.safetensors")
    with pytest.raises(EncoderError) as caught:
        ImageBind(str(copy)).embed("imu", [SIGNAL])
    for words in (
        "missing blocks.1.norm_2.bias",
        "unexpected blocks.2.norm_1.bias",
        "stem.weight has shape [64, 47], expected [64, 48]",
        "bindllm convert imagebind",
    ):
        assert words in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("imu.safetensors", "\x10\0\0\0\0\0\0\0not json at all.", "not a readable safetensors file"),
        ("config.json", "{", "cannot be read"),
        ("config.json", '{"model": "imagebindery"}', "the folder of another model"),
        (
            "config.json",
            '{"model": "imagebind", "embedding_size": 32}',
            "does not describe ImageBind's trunks",
        ),
        (
            "config.json",
            '{"model": "imagebind", "embedding_size": 32, "trunks": {"nose": {}}}',
            "unknown trunk nose",
        ),
        (
            "config.json",
            '{"model": "imagebind", "embedding_size": 32, "trunks": {"imu": '
            '{"width": 64, "num_blocks": 2, "num_heads": 7}}}',
            "7 heads do not divide the width 64",
        ),
    ],
)
def test_damaged_folders(copy, name, content, words):
    (copy / name).write_text(content)
    with pytest.raises(EncoderError, match=words):
        ImageBind(str(copy)).embed("imu", [SIGNAL])


def test_the_fingerprint_follows_what_decides_the_embeddings(copy):
    def mark(modalities, **options):
        return ImageBind(str(copy), modalities=modalities, **options).fingerprint()

    imu, video, text, depth = mark(["imu"]), mark(["video"]), mark(["text"]), mark(["depth"])
    assert len({imu, video, text, depth, mark(None), mark(["imu", "depth"])}) == 6
    # Options of other modalities do not count, nor does the order, nor the other modality of the same trunk.
    assert mark(["imu"], coverage="full", depth_focal=600.0, max_clips=3) == imu
    assert mark(["depth"], coverage="full") == depth
    assert mark(["video"], max_clips=3) == video
    assert mark(["depth", "imu"]) == mark(["imu", "depth"])
    assert mark(["image"]) != video
    for changed, same in (
        (mark(["imu"], dtype="bfloat16"), imu),
        (mark(["imu"], scale="published"), imu),
        (mark(["video"], coverage="full"), video),
        (mark(["video"], coverage="full", max_clips=3), mark(["video"], coverage="full")),
        (mark(["depth"], depth_focal=600.0), depth),
    ):
        assert changed != same
    (copy / "tokenizer.json").write_text("{ }")
    assert mark(["text"]) != text
    config = json.loads((copy / "config.json").read_text())
    config["trunks"]["imu"]["num_heads"] = 4
    (copy / "config.json").write_text(json.dumps(config))
    assert mark(["imu"]) != imu
    tensors = load_file(copy / "depth.safetensors")
    tensors["head.project.weight"][0, 0] += 1
    save_file(tensors, copy / "depth.safetensors")
    assert mark(["depth"]) != depth


@pytest.mark.parametrize("modality", MODALITIES)
def test_keeps_the_contract(copy, modality):
    check_encoder(ImageBind(str(copy), modalities=[modality]))


def test_a_text_that_is_none_does_not_lose_the_others(copy):
    # Runs over many media go on after a MediaError alone.
    with pytest.raises(MediaError, match="lone surrogate"):
        ImageBind(str(copy)).prepare(Media.text("a \ud800 dog"))


def test_options_reach_the_preparation(folder):
    tone = np.sin(np.arange(16_000 * 9) / 20)
    for options, clips in (({}, 3), ({"coverage": "full"}, 5), ({"coverage": "full", "max_clips": 2}, 2)):
        sound = ImageBind(str(folder), **options).prepare(Media.audio(tone))
        assert sound.shape == (clips, 1, 128, 204)
    video = ImageBind(str(folder)).prepare(Media.video(np.zeros((30, 24, 32, 3), np.uint8)))
    assert video.shape == (15, 3, 2, 224, 224)
    near, far = np.full((30, 30), 2.0, np.float32), np.full((30, 30), 4.0, np.float32)
    # Only baseline times focal length over depth counts.
    wide = ImageBind(str(folder), depth_baseline=0.15).prepare(Media.depth(far))
    assert torch.allclose(wide, ImageBind(str(folder)).prepare(Media.depth(near)))


def test_a_folder_without_tokenizer_serves_all_but_texts(tmp_path):
    folder = write_small_imagebind(tmp_path / "mute", texts=False)
    encoder = ImageBind(str(folder))
    assert encoder.modalities == tuple(name for name in MODALITIES if name != "text")
    assert len(encoder.fingerprint()) == 64
    wanting = ImageBind(str(folder), modalities=["text"])
    for use in (lambda: encoder.prepare(Media.text("a dog")), wanting.fingerprint):
        with pytest.raises(EncoderError, match=r"tokenizer.json: texts need the tokenizer.*leave 'text' out"):
            use()
    # Ids that somebody else made need no tokenizer.
    assert wanting.embed("text", [torch.tensor([49406, 320, 49407] + [0] * 74)]).shape == (1, 32)


def test_a_recipe_reads_it_without_its_folder():
    # jsonargparse compares the annotations of a class with those of the protocol, word for word.
    parser = ArgumentParser()
    parser.add_argument("--encoders", type=list[Encoder])
    options = {"modalities": ["audio"], "coverage": "full"}
    given = {"class_path": "bindllm.encoders.ImageBind", "init_args": options}
    (made,) = parser.instantiate(parser.parse_object({"encoders": [given]})).encoders
    assert made.modalities == ("audio",)
    assert made.config == ImageBind(**options).config
    assert made.config["weights"] == "checkpoints/imagebind"
    assert ImageBind(**json.loads(json.dumps(made.config))).config == made.config


def test_weights_loaded_in_inference_mode_can_take_part_in_training(folder):
    encoder = ImageBind(str(folder))
    with torch.inference_mode():
        encoder.embed("imu", [SIGNAL])
    assert not any(tensor.is_inference() for tensor in encoder._trunk("imu").parameters())


def test_weights_are_kept_in_the_wanted_precision(folder):
    encoder = ImageBind(str(folder), dtype="bfloat16")
    encoder.embed("imu", [SIGNAL])
    kinds = {name: tensor.dtype for name, tensor in encoder._trunk("imu").named_parameters()}
    assert kinds.pop("log_scale") == torch.float32
    assert set(kinds.values()) == {torch.bfloat16}
