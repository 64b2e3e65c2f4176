"""Compiled layers: which parts are compiled, and that a training step stays the same."""

import shutil

import pytest
import torch
from torch import nn

from bindllm.errors import DecoderError
from bindllm.model.adapter import AdapterConfig
from bindllm.model.injection import InjectConfig
from bindllm.model.layers import compile_layers
from tiny import save_tiny_decoder, tiny_batch, tiny_decoder, tiny_model


@pytest.mark.parametrize(
    ("family", "parts"),
    [
        ("llama", ["input_layernorm", "mlp", "post_attention_layernorm"]),
        ("qwen3", ["input_layernorm", "mlp", "post_attention_layernorm"]),
        ("lfm2", ["feed_forward", "ffn_norm", "operator_norm"]),
        ("gpt2", ["mlp"]),
    ],
)
def test_norms_and_feed_forward_parts_are_compiled(family, parts, monkeypatch):
    compiled = []
    monkeypatch.setattr(nn.Module, "compile", lambda self, **options: compiled.append(self))
    monkeypatch.setattr(shutil, "which", lambda name: name)
    decoder = tiny_decoder(family)
    compile_layers(decoder)
    names = [name.rpartition(".")[2] for name, module in decoder.named_modules() if module in compiled]
    assert sorted({*names}) == parts
    assert len(compiled) == len(names) == len(parts) * decoder.config.num_hidden_layers


def test_without_a_compiler_the_setting_is_refused(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(DecoderError, match="needs a C\\+\\+ compiler on a CPU.*g\\+\\+, clang"):
        compile_layers(tiny_decoder("llama"))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["value", "residual", "cross"])
def test_a_compiled_training_step_is_the_same(kind, tmp_path):
    if not any(map(shutil.which, ("g++", "clang++"))):
        pytest.skip("no C++ compiler")
    folder = save_tiny_decoder(tmp_path / "decoder")
    found = []
    for is_compiled in (False, True):
        model = tiny_model(folder, inject=InjectConfig(kind=kind), adapter=AdapterConfig(rank=2)).train()
        model.set_trainable(["bind", "inject", "adapter"])
        if is_compiled:
            compile_layers(model.decoder)
        # Another length than the first: the same graphs serve it.
        for length in (4, 6):
            batch = {name: value[:, :length] for name, value in tiny_batch().items() if name != "embeddings"}
            output = model(**batch, embeddings=tiny_batch()["embeddings"], labels=batch["input_ids"])
        output.logits.logsumexp(-1).sum().backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    plain, compiled = found
    assert plain.keys() == compiled.keys()
    assert len(plain) > 4
    for name, gradient in plain.items():
        torch.testing.assert_close(compiled[name], gradient, atol=1e-4, rtol=1e-4)
