"""Decoders in 4 and 8 bits: the same model with rounded projections, through which gradients pass."""

from __future__ import annotations

import logging
import sys

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from bindllm import BindLLM
from bindllm.errors import InputError, MissingExtraError
from bindllm.model.adapter import AdapterConfig
from bindllm.model.decoder import DecoderConfig, load_decoder
from bindllm.model.export import export_decoder
from bindllm.model.quantize import num_weights, quiet_bitsandbytes
from tiny import IDS, save_tiny_decoder, tiny_batch, tiny_model, tiny_tokenizer

needs_bitsandbytes = pytest.mark.usefixtures("bitsandbytes")


@pytest.fixture
def bitsandbytes():
    return pytest.importorskip("bitsandbytes")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Of at least 64 weights a row, which share a scale in nf4."""
    sizes = {"hidden_size": 64, "head_dim": 16, "intermediate_size": 128}
    return str(save_tiny_decoder(tmp_path_factory.mktemp("decoder"), **sizes))


def build(folder, quantize=None, *, adapter=None) -> BindLLM:
    adapter = AdapterConfig(rank=4, **(adapter or {}))
    model = tiny_model(folder, gates=0.5, quantize=quantize, adapter=adapter)
    for name, parameter in model.adapter.parameters().items():
        if not name.endswith("lora_magnitude_vector"):
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def rounded_folder(folder, decoder, bitsandbytes, place) -> str:
    """Write the decoder with its rounded weights in full, and return its folder."""
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for name, module in decoder.named_modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            full = bitsandbytes.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
            plain.get_submodule(name.removesuffix(".base_layer")).weight.data = full.float()
    plain.save_pretrained(place)
    tiny_tokenizer().save_pretrained(place)
    return str(place)


def gradients(model):
    """Of a step that comes after a validation."""
    with torch.no_grad():
        model(**tiny_batch())
    model.set_trainable(["adapter", "bind", "inject"])
    model.train()
    model(**tiny_batch()).logits.square().mean().backward()
    return {name: p.grad for group in model.parameter_groups().values() for name, p in group}


@needs_bitsandbytes
@pytest.mark.parametrize(
    ("kind", "layer", "error"), [("nf4", "Linear4bit", 0.4), ("int8", "Linear8bitLt", 0.05)]
)
def test_the_projections_are_quantized_and_nothing_else(folder, kind, layer, error):
    decoder = load_decoder(DecoderConfig(folder, dtype="float32", quantize=kind), device="cpu")
    full = load_decoder(DecoderConfig(folder, dtype="float32"), device="cpu")
    kinds = {name: type(module).__name__ for name, module in decoder.named_modules()}
    assert {kinds[name] for name in kinds if name.endswith("_proj")} == {layer}
    assert kinds["lm_head"] == "Linear"
    assert sum(map(num_weights, decoder.parameters())) == sum(p.numel() for p in full.parameters())
    assert not any(parameter.requires_grad for parameter in decoder.parameters())
    expected = full(IDS).logits
    assert 0 < (decoder(IDS).logits - expected).norm() / expected.norm() < error


@pytest.mark.parametrize("adapter", [{}, {"bias": False, "dora": True}], ids=["lora", "dora"])
def test_nf4_is_the_decoder_with_rounded_weights(folder, tmp_path, bitsandbytes, adapter):
    """Logits with media and all gradients, after a forward without any, as in a validation."""
    model = build(folder, "nf4", adapter=adapter)
    rounded = build(rounded_folder(folder, model.decoder, bitsandbytes, tmp_path / "d"), adapter=adapter)
    torch.testing.assert_close(
        model(**tiny_batch()).logits, rounded(**tiny_batch()).logits, atol=1e-5, rtol=1e-4
    )
    found, expected = gradients(model), gradients(rounded)
    assert all(gradient.abs().max() > 0 for gradient in expected.values())
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-5, rtol=1e-3, msg=name)


@needs_bitsandbytes
def test_int8_learns_in_the_direction_of_the_full_decoder(folder, caplog):
    with caplog.at_level(logging.WARNING):
        model, full = build(folder, "int8"), build(folder)
        logits, expected = model(**tiny_batch()).logits, full(**tiny_batch()).logits
        assert (logits - expected).norm() / expected.norm() < 0.1
        a, b = (torch.cat([g.flatten() for g in gradients(m).values()]) for m in (model, full))
    assert nn.functional.cosine_similarity(a, b, dim=0) > 0.9
    # It would say so of every projection of every step.
    assert "cast" not in caplog.text


@needs_bitsandbytes
def test_checkpointed_gradients_through_nf4_are_the_same(folder):
    plain, checkpointed = build(folder, "nf4"), build(folder, "nf4")
    checkpointed.checkpoint_activations()
    found, expected = gradients(checkpointed), gradients(plain)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, msg=name)


@needs_bitsandbytes
def test_a_checkpoint_says_how_it_was_quantized_and_loads_otherwise_too(folder, tmp_path):
    model = build(folder, "nf4", adapter={"bias": False})
    model.save_pretrained(tmp_path / "m")
    options = {"device": "cpu", "allow": ["tiny.ColorEncoder"]}
    same = BindLLM.from_pretrained(tmp_path / "m", **options)
    assert same.config.quantize == "nf4"
    assert torch.equal(same(**tiny_batch()).logits, model(**tiny_batch()).logits)
    full = BindLLM.from_pretrained(tmp_path / "m", quantize=False, **options)
    assert full.config.quantize is None
    assert torch.equal(
        full(**tiny_batch()).logits, build(folder, adapter={"bias": False})(**tiny_batch()).logits
    )
    # Merged into the full decoder, not into the rounded one.
    done = export_decoder(tmp_path / "m", tmp_path / "plain")
    assert done.quantized == "nf4"
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype=torch.float32)
    torch.testing.assert_close(plain(IDS).logits, full.decoder(IDS).logits, atol=1e-4, rtol=1e-3)
    assert "held the decoder in nf4" in (tmp_path / "plain" / "README.md").read_text()


def test_without_bitsandbytes_the_message_says_how_to_get_it(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(MissingExtraError, match=r"hold a decoder in nf4.*bindllm\[qlora\]"):
        load_decoder(DecoderConfig(folder, quantize="nf4"), device="cpu")


def test_an_unknown_quantization_is_refused():
    with pytest.raises(InputError, match="unknown quantization 'nf8'. Did you mean 'nf4'"):
        DecoderConfig("decoder", quantize="nf8")


def test_what_bitsandbytes_tells_everyone_is_left_out_and_nothing_else(caplog):
    quiet_bitsandbytes()
    log = logging.getLogger("bitsandbytes.backends.cpu.ops")
    log.warning(
        "Failed to load CPU gemm_4bit_forward from kernels-community: %s", "No module named 'kernels'"
    )
    log.warning("out of memory")
    assert caplog.messages == ["out of memory"]
