"""The published second stage is a recipe: its numbers, and a run of it on tiny parts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import nn

from bindllm import BindLLM
from bindllm.cli.recipes.recipe import RecipeCLI, quiet
from bindllm.model.bind_network import BindConfig
from bindllm.model.decoder import DecoderConfig
from bindllm.model.injection import InjectConfig
from tiny import ColorEncoder, tiny_tokenizer
from tiny_run import run, tiny_parts

FILE = Path(__file__).parents[1] / "recipes" / "stage2.yaml"


def rows(file: Path, records: list[dict]) -> str:
    file.write_text(json.dumps(records))
    return str(file)


@pytest.fixture
def recipe(tmp_path):
    """The recipe with tiny parts in the places of what a user brings."""
    parts = tiny_parts(tmp_path / "parts")
    tokenizer = tiny_tokenizer()
    # The template of the published weights starts with it.
    tokenizer.bos_token = "<|im_start|>"
    tokenizer.save_pretrained(parts / "decoder")
    alpaca = [
        {"instruction": f"Count to {n}.", "input": "", "output": " ".join("123"[:n])} for n in (1, 2, 3)
    ]
    turns = [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "Hi."}]
    look = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A red square."}]
    tables = {
        "alpaca": rows(tmp_path / "alpaca.json", alpaca),
        "sharegpt": rows(tmp_path / "sharegpt.json", [{"id": "1", "conversations": turns}]),
        "llava": rows(tmp_path / "llava.json", [{"id": "2", "image": "red0.png", "conversations": look}] * 3),
    }
    recipe = yaml.safe_load(FILE.read_text())
    model = recipe["model"]
    decoder = DecoderConfig(str(parts / "decoder"), dtype="bfloat16")
    first = BindLLM.build(
        decoder,
        device="cpu",
        encoders=[ColorEncoder()],
        bind=BindConfig(**model["bind"]),
        inject=InjectConfig(**model["inject"]),
    )
    nn.init.normal_(first.injection.gates)
    first.save_pretrained(tmp_path / "first")
    model["decoder"]["name"] = decoder.name
    model["encoders"] = [{"class_path": "tiny.ColorEncoder"}]
    model["init_from"] = str(tmp_path / "first")
    for source in recipe["data"]["sources"]:
        source |= {"path": tables[source["format"]], "held_out": 0.0}
        if "media" in source:
            source["media"] = str(parts / "pictures" / "images")
    one = {"accelerator": "cpu", "devices": 1, "strategy": "auto", "limit_train_batches": 2, "max_epochs": 1}
    recipe["trainer"] |= one
    return recipe


def test_its_numbers_are_the_published_ones():
    with quiet():
        text = RecipeCLI("fit", ["--config", str(FILE)], build=False).resolved()
    recipe = yaml.safe_load(text)
    model, data, trainer = recipe["model"], recipe["data"], recipe["trainer"]
    assert model["optim"]["lr"] == 1.25e-4
    assert model["adapter"] == {
        "rank": 16,
        "alpha": None,
        "bias": True,
        "norm": True,
        "dora": False,
        "layers": None,
        "targets": None,
        "media_only": False,
        "rslora": False,
    }
    assert model["trainable"] == ["adapter"]
    assert (model["bind"]["depth"], model["bind"]["expansion"]) == (3, 4)
    assert trainer["max_epochs"] == 4
    assert data["batch_size"] * trainer["devices"] * trainer["accumulate_grad_batches"] == 32
    assert [source["format"] for source in data["sources"]] == ["alpaca", "alpaca", "sharegpt", "llava"]


def test_its_header_names_all_that_the_user_brings():
    lines = FILE.read_text().splitlines()
    header = "\n".join(line for line in lines if line.startswith("#"))
    assert f"bindllm fit --config recipes/{FILE.name}" in header
    model = yaml.safe_load(FILE.read_text())["model"]
    brought = (model["decoder"]["name"], model["encoders"][0]["init_args"]["weights"], model["init_from"])
    assert all(place in header for place in brought)


def test_it_tunes_the_decoder_and_leaves_the_first_stage_as_it_is(recipe, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run("fit", recipe) == 0
    first, frozen = (
        load_file(place / "bind.safetensors") for place in (tmp_path / "first", Path(recipe["output"]))
    )
    assert first.keys() == frozen.keys()
    assert all(torch.equal(frozen[name], first[name]) for name in first)
    tuned = load_file(Path(recipe["output"]) / "adapter" / "adapter_model.safetensors")
    learned = [name for name in tuned if name.endswith(("lora_B.weight", "lora_B.bias"))]
    assert len(learned) == 2 * 3 * 7
    assert all(tuned[name].abs().max() > 0 for name in learned)
    # A third stage may go on, and may not leave the adapter out.
    capsys.readouterr()
    recipe["model"] |= {"init_from": recipe["output"], "adapter": None, "trainable": ["bind"]}
    recipe["output"] = "checkpoints/third"
    assert run("fit", recipe) == 1
    assert "checkpoints/stage2 was trained with an adapter" in capsys.readouterr().err
    assert not Path("checkpoints/third").exists()
    assert run("fit", recipe, "--output", "checkpoints/stage2") == 1
    assert "output checkpoints/stage2 is model.init_from too" in capsys.readouterr().err
