"""Encoders of different widths in one model, each in its own part of a wider vector."""

import pytest
import torch

from bindllm import BindLLM, Media
from bindllm.encoders import Padded, Tuned, alignment_warnings
from bindllm.encoders.fusion import common_size
from bindllm.errors import CheckpointError, EncoderError, InputError
from bindllm.model.memory import encoder_bytes
from bindllm.testing import check_encoder
from cache_parts import TEXT
from tiny import (
    BlockEncoder,
    ColorEncoder,
    TokenEncoder,
    color_images,
    save_tiny_decoder,
    tiny_model,
    tuned_encoder,
)
from tiny_run import run, tiny_recipe

ALLOW = ["tiny.TokenEncoder", "cache_parts.Words"]
PIXELS = torch.arange(192, dtype=torch.uint8).reshape(8, 8, 3).numpy()


def padded(kind: str, width: int, start: int, size: int = 20) -> Padded:
    return Padded({"class_path": kind, "init_args": {"embedding_size": width}}, start, size, allow=ALLOW)


@pytest.fixture
def encoders():
    return [padded("tiny.TokenEncoder", 8, 0), padded("cache_parts.Words", 12, 8)]


def test_the_blocks_of_a_padded_encoder_are_trained():
    kind = "tiny.BlockEncoder"
    entry = {"class_path": "bindllm.encoders.Padded", "init_args": {"start": 4, "size": 24, "allow": [kind]}}
    entry["init_args"]["encoder"] = {"class_path": kind, "init_args": {"embedding_size": 16}}
    encoder = Tuned(entry, blocks=1, allow=[kind])
    assert encoder.embedding_size == 24
    for parameter in encoder.parameters().values():
        parameter.requires_grad_(True)
    inputs = [encoder.prepare(Media.image(PIXELS))]
    encoder.embed("image", inputs)[:, 4:9].sum().backward()
    assert all(parameter.grad.any() for parameter in encoder.parameters().values())
    assert encoder_bytes(encoder) == encoder_bytes(BlockEncoder()) == 3 * 4 * 17 * 16
    with pytest.raises(InputError, match="put Tuned around Padded"):
        _ = Padded(
            {"class_path": "bindllm.encoders.Tuned", "init_args": tuned_encoder()["init_args"]}, 0, 20
        ).modalities
    with pytest.raises(InputError, match="TokenEncoder has no blocks"):
        padded("tiny.TokenEncoder", 8, 0).blocks("image")


def test_the_contract_is_kept(encoders):
    for encoder in encoders:
        check_encoder(encoder)
    image = encoders[0].embed("image", [encoders[0].prepare(Media.image(PIXELS))], tokens=True)
    own = TokenEncoder(8).embed("image", [TokenEncoder(8).prepare(Media.image(PIXELS))], tokens=True)
    torch.testing.assert_close(image.embeddings[:, :8], own.embeddings)
    assert not image.embeddings[:, 8:].any()
    torch.testing.assert_close(image.tokens, own.tokens)
    # Another place is another embedding, and another space.
    places = [padded("tiny.TokenEncoder", 8, start) for start in (0, 8)]
    assert places[0].fingerprint() != places[1].fingerprint()
    assert alignment_warnings(places)
    assert not alignment_warnings([places[0], padded("tiny.TokenEncoder", 8, 0)])


def test_a_model_has_a_projection_for_each_encoder(encoders, decoder, tmp_path):
    model = tiny_model(decoder, encoders=encoders)
    image, text = model.encode([Media.image(PIXELS), TEXT])
    # The first layer of the bind network: its columns of one encoder see nothing of the other.
    with torch.no_grad():
        model.bind.projection.weight[:, 8:] += 1
    assert torch.equal(model.encode([Media.image(PIXELS)])[0], image)
    both = model.encode([[Media.image(PIXELS), TEXT]])[0]
    torch.testing.assert_close(both, (image + text) / 2**0.5)
    model.save_pretrained(tmp_path / "model")
    # The classes outside bindllm are allowed by the caller, not by the folder.
    with pytest.raises((CheckpointError, EncoderError), match="not part of bindllm"):
        BindLLM.from_pretrained(tmp_path / "model")
    loaded = BindLLM.from_pretrained(tmp_path / "model", allow=ALLOW, device="cpu")
    question = "What?", [Media.image(PIXELS), TEXT]
    assert loaded.generate(*question, max_new_tokens=4) == model.generate(*question, max_new_tokens=4)


def test_parts_that_do_not_fit_are_refused():
    with pytest.raises(InputError, match="do not fit into a vector of 20 from position 16 on"):
        _ = padded("tiny.TokenEncoder", 8, 16).modalities
    with pytest.raises(InputError, match="an encoder with its class_path"):
        Padded({"name": "x"}, 0, 8)
    with pytest.raises(InputError, match=r"bindllm.encoders.Padded"):
        common_size([ColorEncoder(8), ColorEncoder(12)])


def test_a_recipe_names_it(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    save_tiny_decoder(tmp_path / "decoder")
    color_images(tmp_path / "pictures", per_color=3)
    inner = {"class_path": "tiny.ColorEncoder", "init_args": {"embedding_size": 8}}
    arguments = {"encoder": inner, "start": 4, "size": 20, "allow": ["tiny.ColorEncoder"]}
    recipe = tiny_recipe(tmp_path)
    recipe["model"]["encoders"] = [{"class_path": "bindllm.encoders.Padded", "init_args": arguments}]
    assert run("check", recipe) == 0, capsys.readouterr().out
