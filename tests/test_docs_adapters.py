"""docs/adapters.md: its table is that of the code, its recipe keys are read, its commands understood."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

import yaml
from jsonargparse import ArgumentParser

from bindllm.cli.arguments import read_command
from bindllm.cli.generate import generate
from bindllm.model.adapter import AdapterConfig
from bindllm.model.decoder import DecoderConfig

PAGE = (Path(__file__).parents[1] / "docs/adapters.md").read_text(encoding="utf-8")


def test_the_table_has_every_key_with_its_default():
    rows = re.findall(r"^\| `(\w+)` \| `?(\w+)`? \|", PAGE, flags=re.MULTILINE)
    names = {True: "true", False: "false", None: "null"}
    defaults = {field.name: names.get(field.default, str(field.default)) for field in fields(AdapterConfig)}
    # Without a value of its own, alpha is the rank.
    assert dict(rows) == {**defaults, "alpha": "rank"}


def test_its_recipe_keys_are_read():
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--decoder", type=DecoderConfig | None)
    parser.add_argument("--adapter", type=AdapterConfig | None)
    blocks = re.findall(r"```yaml\n(.*?)```", PAGE, flags=re.DOTALL)
    assert len(blocks) == 4
    for block in blocks:
        model = yaml.safe_load(block)["model"]
        parser.parse_object({name: model[name] for name in ("decoder", "adapter") if name in model})


def test_its_commands_are_understood():
    assert read_command("generate", generate, ["folder", "--quantize", "none"])["model"].quantize == "none"
    assert "bindllm generate folder --quantize none" in PAGE
