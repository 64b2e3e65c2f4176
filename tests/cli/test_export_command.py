"""``bindllm export`` on the command line."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from bindllm import BindLLM
from bindllm.cli import main
from bindllm.model.adapter import AdapterConfig
from bindllm.model.bind_network import BindConfig
from bindllm.model.decoder import DecoderConfig
from tiny import ColorEncoder, save_tiny_decoder

PARTS = {"encoders": [ColorEncoder()], "bind": BindConfig(depth=1)}


@pytest.fixture
def decoder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return DecoderConfig(str(save_tiny_decoder(tmp_path / "decoder")), dtype="float32")


def test_it_says_what_is_in_the_folder_and_what_is_not(decoder, capsys):
    model = BindLLM.build(decoder, device="cpu", adapter=AdapterConfig(rank=2), **PARTS)
    model.save_pretrained("m")
    assert main(["export", "m", "plain", "--dtype", "bfloat16"]) == 0
    said = capsys.readouterr().out
    assert "plain: 21 projections merged, 7 norms replaced, bfloat16" in said
    assert "rounded to bfloat16" in said
    assert "--dtype float32 keeps them" in said
    assert "not included: bind network and injection" in said
    assert "BindLLM.from_pretrained('m')" in said
    assert AutoModelForCausalLM.from_pretrained("plain").dtype == torch.bfloat16


def test_mistakes_are_told(decoder, capsys):
    BindLLM.build(decoder, device="cpu", **PARTS).save_pretrained("m")
    assert main(["export", "m", "plain"]) == 1
    assert "m has no adapter" in capsys.readouterr().err
    assert main(["export", "m"]) == 2
    assert "output" in capsys.readouterr().err
    assert main(["export", "gone", "plain"]) == 1
    assert "'gone' does not exist" in capsys.readouterr().err
