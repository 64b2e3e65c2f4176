"""A stage goes on from a folder that was made for its base, and refuses every other."""

from __future__ import annotations

import json
import logging
from dataclasses import replace

import pytest
import torch
from torch import nn

from bindllm import BindLLM
from bindllm.errors import CheckpointError
from bindllm.model.adapter import AdapterConfig
from bindllm.model.bind_network import BindConfig
from bindllm.model.decoder import DecoderConfig
from bindllm.model.injection import InjectConfig
from bindllm.training.stages import check_base, init_from_checkpoint
from tiny import ColorEncoder, save_tiny_decoder

IDS = torch.arange(3, 11).reshape(1, 8)
LORA = AdapterConfig(rank=4, alpha=8.0)


@pytest.fixture(scope="module")
def decoder(tmp_path_factory):
    return DecoderConfig(str(save_tiny_decoder(tmp_path_factory.mktemp("decoder"))), dtype="float32")


def build(decoder, *, seed=0, **changes) -> BindLLM:
    """A model whose parts all have something to say."""
    torch.manual_seed(seed)
    options = {"encoders": [ColorEncoder()], "bind": BindConfig(depth=1, expansion=2), **changes}
    model = BindLLM.build(decoder, device="cpu", **options)
    nn.init.normal_(model.injection.gates)
    for parameter in model.adapter.parameters().values() if model.adapter else ():
        parameter.data += 0.2 * torch.randn_like(parameter)
    return model.eval()


def logits(model):
    ones = torch.ones_like(IDS)
    embedding = torch.full((1, 1, 16), 0.25)
    with torch.no_grad():
        return model(IDS, ones, 0 * ones, embedding).logits


def test_a_new_adapter_starts_from_nothing(decoder, tmp_path):
    first = build(decoder)
    first.save_pretrained(tmp_path / "first")
    torch.manual_seed(1)
    parts = {"encoders": [ColorEncoder()], "bind": first.bind_config}
    second = BindLLM.build(decoder, device="cpu", adapter=LORA, **parts).eval()
    init_from_checkpoint(second, tmp_path / "first")
    assert torch.equal(logits(second), logits(first))


@pytest.mark.parametrize(
    "adapter",
    [LORA, replace(LORA, bias=False, dora=True), AdapterConfig(rank=4, alpha=4.0, rslora=True)],
    ids=["lora", "dora", "rslora by the same scale"],
)
def test_the_same_adapter_goes_on(decoder, tmp_path, adapter):
    model = build(decoder, adapter=replace(adapter, alpha=8.0, rslora=False))
    model.save_pretrained(tmp_path / "m")
    again = build(decoder, seed=1, adapter=adapter)
    assert not torch.equal(logits(again), logits(model))
    init_from_checkpoint(again, tmp_path / "m")
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize(("there", "here"), [(2, [2, 1]), ([0, 1, 2], None), (None, 3)])
def test_layers_are_compared_by_their_meaning(decoder, tmp_path, there, here):
    parts = [
        {"inject": InjectConfig(layers=one), "adapter": replace(LORA, layers=one)} for one in (there, here)
    ]
    model, again = build(decoder, **parts[0]), build(decoder, seed=1, **parts[1])
    model.save_pretrained(tmp_path / "m")
    init_from_checkpoint(again, tmp_path / "m")
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bind": BindConfig(depth=2, expansion=2)}, r"bind\.depth is 1 there and 2 here"),
        ({"inject": InjectConfig(kind="residual")}, r"inject\.kind is value there and residual here"),
        ({"inject": InjectConfig(kind="attend")}, r"inject\.kind is value there and attend here"),
        ({"inject": InjectConfig(layers=2)}, r"inject\.layers is null there and 2 here"),
        ({"adapter": replace(LORA, layers=[0, 1])}, r"adapter\.layers is null there and \[0, 1\] here"),
        ({"encoders": [ColorEncoder(grid=3)]}, r"the encoders of .*tiny\.ColorEncoder"),
        (
            {"adapter": None},
            r"this recipe has none.*\{rank: 4, alpha: 8\.0, bias: true, norm: true, dora: false",
        ),
        ({"adapter": replace(LORA, rank=2)}, r"adapter\.rank is 4 there and 2 here"),
        ({"adapter": replace(LORA, norm=False)}, r"adapter\.norm is true there and false here"),
        ({"adapter": replace(LORA, bias=False, dora=True)}, r"adapter\.dora is false there and true here"),
        # Names and shapes of these fit.
        ({"adapter": AdapterConfig(rank=4)}, r"alpha is 8\.0 there, .* scale 2, and null here, .* it 1"),
        ({"adapter": replace(LORA, rslora=True)}, r"scale 2, and 8\.0 with rslora here, .* it 4"),
    ],
)
def test_another_base_is_refused_by_what_differs(decoder, tmp_path, changes, message):
    build(decoder, adapter=LORA).save_pretrained(tmp_path / "m")
    model = build(decoder, seed=1, **{"adapter": LORA, **changes})
    before = {name: tensor.clone() for name, tensor in model.trainable_state().items()}
    with pytest.raises(CheckpointError, match=message):
        init_from_checkpoint(model, tmp_path / "m")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.trainable_state().items())


def test_another_decoder_is_refused(decoder, tmp_path):
    build(decoder).save_pretrained(tmp_path / "m")
    other = DecoderConfig(str(save_tiny_decoder(tmp_path / "other", seed=1)), dtype="float32")
    with pytest.raises(CheckpointError, match="the decoder of .* differ"):
        init_from_checkpoint(build(other), tmp_path / "m")


def test_what_may_differ_is_said(decoder, tmp_path, caplog):
    model = build(decoder)
    model.save_pretrained(tmp_path / "m")
    parts = {"encoders": model.encoders, "bind": model.bind_config, "inject": model.inject_config}
    assert check_base(tmp_path / "m", decoder=decoder, adapter=LORA, **parts) == []
    on_bits = replace(decoder, quantize="nf4")
    (remark,) = check_base(tmp_path / "m", decoder=on_bits, adapter=LORA, **parts)
    assert "decoder.quantize null, this run has nf4" in remark
    in_other_words = replace(decoder, system="", template=None)
    (remark,) = check_base(tmp_path / "m", decoder=in_other_words, adapter=LORA, **parts)
    assert 'decoder.system null, this run has "": its prompts differ' in remark
    # A published checkpoint: media of one message fuse otherwise than in training.
    manifest = json.loads((tmp_path / "m" / "bindllm.json").read_text())
    manifest["bind"]["fusion"] = "mean"
    (tmp_path / "m" / "bindllm.json").write_text(json.dumps(manifest))
    with caplog.at_level(logging.WARNING):
        init_from_checkpoint(model, tmp_path / "m")
    assert "bind.fusion mean, this run with unit" in caplog.text
