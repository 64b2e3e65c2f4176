"""A decoder folder that brings Python code: the code never runs, even if somebody answers yes."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bindllm.cli import main
from bindllm.encoders import HuggingFace
from bindllm.errors import BindLLMError
from bindllm.model.decoder import (
    DecoderConfig,
    fingerprint_decoder,
    load_decoder,
    load_tokenizer,
    read_config,
    without_weights,
)
from bindllm.training.memory import RunPlan
from cache_parts import save_tiny_model
from tiny import ColorEncoder, save_tiny_decoder
from tiny_run import run, tiny_parts, tiny_recipe

SAYS = "names Python code of the folder, and bindllm never runs code of a folder"


def add_code(folder: Path, file: str, *, model_type: str | None = None) -> Path:
    """Let a file of a decoder folder name code, which leaves a file when it is imported; return that file."""
    marker = folder / "imported"
    lines = ["from transformers import LlamaConfig as Config, LlamaForCausalLM as Model"]
    lines += ["from transformers import PreTrainedTokenizerFast as Words"]
    lines += ["from pathlib import Path", f"Path({str(marker)!r}).touch()"]
    (folder / "own_code.py").write_text("\n".join(lines))
    names = {"AutoConfig": "own_code.Config", "AutoModelForCausalLM": "own_code.Model"}
    if file == "tokenizer_config.json":
        names = {"AutoTokenizer": ["own_code.Words", "own_code.Words"]}
    content = json.loads((folder / file).read_text()) | {"auto_map": names}
    if model_type:
        content["model_type"] = model_type
    if file == "tokenizer_config.json":
        content["tokenizer_class"] = "OwnWords"
    (folder / file).write_text(json.dumps(content))
    return marker


@pytest.fixture(autouse=True)
def _somebody_says_yes(monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: "y")


@pytest.fixture
def decoder(tmp_path) -> Path:
    return save_tiny_decoder(tmp_path / "decoder")


def load_all(folder: Path):
    config = DecoderConfig(str(folder), dtype="float32")
    yield lambda: read_config(folder)
    yield lambda: without_weights(folder)
    yield lambda: load_decoder(config, device="cpu")
    yield lambda: RunPlan(config, [ColorEncoder()], rows=1, tokens=8, supervised=8).estimate


def test_a_type_that_transformers_does_not_know_is_refused(decoder):
    marker = add_code(decoder, "config.json", model_type="own")
    for load in load_all(decoder):
        with pytest.raises(BindLLMError, match=f"auto_map in config.json {SAYS}"):
            load()
    with pytest.raises(BindLLMError, match=SAYS):
        HuggingFace(str(decoder)).modalities  # noqa: B018
    assert not marker.exists()


def test_a_type_that_transformers_knows_is_its_own(decoder):
    marker = add_code(decoder, "config.json")
    for load in load_all(decoder):
        load()
    assert type(load_decoder(DecoderConfig(str(decoder)), device="cpu")).__module__.startswith(
        "transformers."
    )
    assert not marker.exists()


def test_a_tokenizer_of_the_folder_is_not_imported(decoder):
    marker = add_code(decoder, "tokenizer_config.json")
    with contextlib.suppress(BindLLMError):
        load_tokenizer(DecoderConfig(str(decoder)))
    assert not marker.exists()


def test_check_names_the_code_of_a_recipes_decoder(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tiny_parts(tmp_path))
    marker = add_code(tmp_path / "decoder", "config.json", model_type="own")
    assert run("check", tiny_recipe(tmp_path)) == 1
    assert SAYS in capsys.readouterr().out
    assert not marker.exists()


@pytest.mark.parametrize("line", [["check", "--folder", "model"], ["generate", "model", "What?"]])
def test_a_pipe_of_yes_runs_nothing(tmp_path, decoder, line):
    save_tiny_model(tmp_path / "model", decoder)
    marker = add_code(decoder, "config.json", model_type="own")
    manifest = tmp_path / "model/bindllm.json"
    # The fingerprint is no protection: whoever writes the folder writes it too.
    content = json.loads(manifest.read_text())
    content["decoder"]["fingerprint"] = fingerprint_decoder(decoder)
    manifest.write_text(json.dumps(content))
    done = subprocess.run(
        [sys.executable, "-m", "bindllm.cli", *line, "--allow", "cache_parts.Multimodal"],
        input="y\n" * 20,
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.returncode == 1, done.stderr
    assert SAYS in done.stdout + done.stderr
    assert "[y/N]" not in done.stdout + done.stderr
    assert not marker.exists()


def test_export_and_convert_read_the_same_way():
    """No load of transformers leaves the question open."""
    source = Path(main.__code__.co_filename).parent
    loads = ("AutoConfig.", "AutoTokenizer.", "AutoModelForCausalLM.", "AutoModel.", "AutoProcessor.")
    for file in source.rglob("*.py"):
        text = file.read_text()
        for at in (at for name in loads for at in range(len(text)) if text.startswith(f"{name}from_", at)):
            if "save_pretrained" not in text[at : at + 60]:
                assert "trust_remote_code=False" in text[at : at + 220], f"{file}: {text[at : at + 60]}"
