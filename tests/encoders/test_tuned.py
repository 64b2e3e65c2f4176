"""Tuned encoders: what is trained, what identifies them, and what is refused."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file
from transformers import CLIPConfig, CLIPModel, SwinConfig, SwinModel, Wav2Vec2Config, Wav2Vec2Model

from bindllm.encoders import EfficientNetLite, Tuned
from bindllm.encoders.families import find_blocks
from bindllm.errors import EncoderError, InputError
from bindllm.media import Media
from bindllm.testing import check_encoder
from tiny import BlockEncoder, synthetic_efficientnet

KIND = "tiny.BlockEncoder"
SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
TOWERS = {
    "text_config": {**SIZES, "num_hidden_layers": 3},
    "vision_config": {**SIZES, "num_hidden_layers": 4},
}
INPUTS = [torch.linspace(-1, 1, 48), torch.linspace(1, -1, 48)]


def tuned(**settings) -> Tuned:
    return Tuned({"class_path": KIND}, allow=[KIND], **settings)


@pytest.mark.parametrize("settings", [{"blocks": 2}, {"rank": 4}, {"blocks": 1, "rank": 2}])
def test_an_untrained_one_is_the_encoder(settings):
    encoder = tuned(**settings)
    assert torch.equal(encoder.embed("image", INPUTS), BlockEncoder().embed("image", INPUTS))
    assert check_encoder(encoder, modalities=["image"]) is None
    assert encoder.fingerprint() != BlockEncoder().fingerprint()
    # The same in every process, although the matrices are random.
    assert encoder.fingerprint() == tuned(**settings).fingerprint()


def test_gradients_reach_the_last_blocks_only():
    encoder = tuned(blocks=2)
    assert set(encoder.parameters()) == {"0.0.weight", "0.0.bias", "1.0.weight", "1.0.bias"}
    assert not encoder.embed("image", INPUTS).requires_grad
    for parameter in encoder.parameters().values():
        parameter.requires_grad_(True)
    encoder.embed("image", INPUTS)[:, 0].sum().backward()
    first, *last = encoder.base.blocks("image")
    assert all(parameter.grad is None for parameter in first.parameters())
    assert all(parameter.grad.any() for block in last for parameter in block.parameters())


def test_matrices_are_trained_next_to_the_projections():
    encoder = tuned(blocks=1, rank=4)
    assert set(encoder.parameters()) == {"0.0.lora_A.weight", "0.0.lora_B.weight"}
    before = encoder.embed("image", INPUTS)
    encoder.load({name: x + 1 for name, x in encoder.parameters().items()}, source="here")
    assert not torch.equal(encoder.embed("image", INPUTS), before)


def test_trained_tensors_are_part_of_the_fingerprint():
    encoder, again = tuned(blocks=2), tuned(blocks=2)
    before = encoder.fingerprint()
    encoder.load({name: x + 0.1 for name, x in encoder.parameters().items()}, source="here")
    assert encoder.fingerprint() != before
    again.load(encoder.parameters(), source="here")
    assert again.fingerprint() == encoder.fingerprint()
    assert torch.equal(again.embed("image", INPUTS), encoder.embed("image", INPUTS))
    with pytest.raises(EncoderError, match=r"here does not fit tiny\.BlockEncoder: missing 1\.0\.weight"):
        tuned(blocks=2).load(tuned(blocks=1).parameters(), source="here")


def test_one_of_several_convolutional_blocks(tmp_path):
    save_file(synthetic_efficientnet(), tmp_path / "model.safetensors")
    entry = {"class_path": "bindllm.encoders.EfficientNetLite", "init_args": {"weights": str(tmp_path)}}
    encoder = Tuned(entry, blocks=1)
    inputs = [encoder.prepare(Media.image(torch.zeros(8, 8, 3, dtype=torch.uint8).numpy()))] * 2
    assert torch.equal(encoder.embed("image", inputs), EfficientNetLite(str(tmp_path)).embed("image", inputs))
    for parameter in encoder.parameters().values():
        parameter.requires_grad_(True)
    encoder.embed("image", inputs)[:, :9].sum().backward()
    assert all(parameter.grad.any() for parameter in encoder.parameters().values())
    with pytest.raises(InputError, match="EfficientNetLite have no linear projections"):
        Tuned(entry, rank=4).parameters()


@pytest.mark.parametrize(
    ("make", "modality", "expected", "count"),
    [
        (lambda: CLIPModel(CLIPConfig(**TOWERS)), "image", "vision_model.encoder.layers", 4),
        (lambda: CLIPModel(CLIPConfig(**TOWERS)), "text", "text_model.encoder.layers", 3),
        # Two stages of one and six blocks; seven convolutions and two blocks.
        (
            lambda: SwinModel(SwinConfig(embed_dim=8, depths=[1, 6], num_heads=[1, 1])),
            "image",
            "encoder.layers",
            2,
        ),
        (lambda: Wav2Vec2Model(Wav2Vec2Config(**SIZES)), "audio", "encoder.layers", 2),
    ],
)
def test_blocks_are_found_in_models_of_transformers(make, modality, expected, count):
    with torch.device("meta"):
        model = make()
    found = find_blocks(model, modality, joint=isinstance(model, CLIPModel))
    assert found == list(model.get_submodule(expected))
    assert len(found) == count


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Tuned({"name": "x"}), "takes an encoder as {class_path: .*, not {'name': 'x'}"),
        (lambda: Tuned(BlockEncoder()), "takes an encoder as .*, not a BlockEncoder"),
        (
            lambda: Tuned({"class_path": "bindllm.encoders.Tuned", "init_args": tuned().config}).modalities,
            "around another Tuned",
        ),
        (lambda: tuned(blocks=0), "blocks 0, expected a whole number of at least 1"),
        (lambda: tuned(rank=2.5), "rank 2.5, expected"),
        (lambda: tuned(blocks=4).parameters(), "blocks 4, and BlockEncoder has 3 of them"),
        (lambda: tuned(modality="audio").modality, "serves image: .* not 'audio'"),
        (
            lambda: Tuned({"class_path": "tiny.ColorEncoder"}, allow=["tiny.ColorEncoder"]).modalities,
            "ColorEncoder has no blocks",
        ),
    ],
)
def test_settings_that_cannot_work_are_refused(make, words):
    with pytest.raises(InputError, match=words):
        make()


def test_an_encoder_that_computes_no_gradient_is_refused(monkeypatch):
    monkeypatch.setattr(BlockEncoder, "embed", torch.no_grad()(BlockEncoder.embed))
    encoder = tuned(blocks=1)
    assert encoder.embed("image", INPUTS).shape == (2, 16)
    encoder.parameters()["0.0.weight"].requires_grad_(True)
    with pytest.raises(
        EncoderError, match=r"embed of BlockEncoder computes no gradient.* remove torch\.no_grad"
    ):
        encoder.embed("image", INPUTS)
    with torch.no_grad():
        assert encoder.embed("image", INPUTS).shape == (2, 16)


def test_half_precision_is_refused():
    encoder = tuned(blocks=1)
    encoder.base._blocks.half()
    with pytest.raises(InputError, match="runs in half precision"):
        encoder.parameters()
