"""A decoder folder that brings Python code: the code never runs, even if somebody answers yes."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path

import pytest
import torch

from bindllm.cli import main
from bindllm.encoders import HuggingFace
from bindllm.encoders.hub import load_model, load_processor
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
    # The search for the entry must neither wait nor fail.
    os.mkfifo(decoder / "pipe.json")
    (decoder / "notes.json").write_bytes(b"\xff")
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


def test_code_of_a_part_of_a_model_is_not_run(tmp_path):
    """Transformers builds a backbone without `trust_remote_code`, and would ask."""
    decoder = save_tiny_decoder(tmp_path / "decoder")
    marker = add_code(decoder, "config.json")
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 16}
    part = {
        "model_type": "bert",
        "auto_map": {"AutoBackbone": "own_code.Model"},
        "name_or_path": str(decoder),
    }
    config = {"model_type": "dpt", "is_hybrid": True, "backbone_config": part | sizes, **sizes}
    (decoder / "config.json").write_text(json.dumps(config))
    with pytest.raises(BindLLMError, match="no usable model here"):
        load_model(decoder, dtype=torch.float32, without_pooler=True)
    assert not marker.exists()


def test_code_of_a_part_of_a_tokenizer_is_not_run(tmp_path):
    """RAG loads two tokenizers from subfolders without `trust_remote_code`, and would ask."""
    decoder = save_tiny_decoder(tmp_path / "decoder")
    parts = [decoder / "question_encoder_tokenizer", decoder / "generator_tokenizer"]
    for part in parts:
        save_tiny_decoder(part)
    markers = [add_code(part, "tokenizer_config.json") for part in parts]
    file = decoder / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"tokenizer_class": "RagTokenizer"}))
    part = json.loads((decoder / "config.json").read_text())
    config = {"model_type": "rag", "question_encoder": part, "generator": part}
    (decoder / "config.json").write_text(json.dumps(config))
    with pytest.raises(BindLLMError, match=SAYS):
        load_tokenizer(DecoderConfig(str(decoder)))
    with pytest.raises(BindLLMError, match=SAYS):
        load_processor(decoder, "text")
    assert not any(marker.exists() for marker in markers)


def test_an_export_names_no_code_of_the_folder(decoder, tmp_path):
    add_code(decoder, "config.json")
    names = {"auto_map": {"AutoTokenizer": ["own_code.Words", "own_code.Words"]}}
    file = decoder / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | names))
    config = DecoderConfig(str(decoder), dtype="float32")
    load_decoder(config, device="cpu").save_pretrained(tmp_path / "out")
    load_tokenizer(config).save_pretrained(tmp_path / "out")
    assert not [file for file in (tmp_path / "out").glob("*.json") if "auto_map" in file.read_text()]


@pytest.mark.parametrize("kernel", ["somebody/kernel", {"": "kernels-community/flash-attn2"}])
def test_attention_is_built_in(decoder, kernel):
    file = decoder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"attn_implementation": kernel}))
    loaded = load_decoder(DecoderConfig(str(decoder), dtype="float32"), device="cpu")
    assert loaded.config._attn_implementation in ("sdpa", "eager")


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("adapter_config.json", {"peft_type": "LORA"}),
        ("model.safetensors.index.json", {"weight_map": {"a": "weights.bin"}}),
        ("model.safetensors.index.json", {"weight_map": {"a": "../other/model.safetensors"}}),
        ("config.json", {"transformers_weights": "adapter_model.bin"}),
    ],
)
def test_weights_are_in_the_files_that_identify_a_folder(decoder, file, content):
    path = decoder / file
    path.write_text(json.dumps(content | (json.loads(path.read_text()) if path.exists() else {})))
    with pytest.raises(BindLLMError, match=r"holds adapter_config\.json|names weights in"):
        load_decoder(DecoderConfig(str(decoder)), device="cpu")
    with pytest.raises(BindLLMError, match=r"holds adapter_config\.json|names weights in"):
        load_model(decoder, dtype=torch.float32, without_pooler=True)


def test_check_names_the_code_of_a_recipes_decoder(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tiny_parts(tmp_path))
    marker = add_code(tmp_path / "decoder", "config.json", model_type="own")
    assert run("check", tiny_recipe(tmp_path)) == 1
    assert SAYS in capsys.readouterr().out
    assert not marker.exists()


@pytest.mark.parametrize("line", [["check", "--folder", "model"], ["generate", "model", "What?"]])
def test_no_command_asks_or_runs_anything(tmp_path, decoder, line, monkeypatch, capsys):
    asked = []
    monkeypatch.setattr("builtins.input", lambda *words: asked.append(words) or "y")
    monkeypatch.chdir(tmp_path)
    save_tiny_model(tmp_path / "model", decoder)
    marker = add_code(decoder, "config.json", model_type="own")
    manifest = tmp_path / "model/bindllm.json"
    # The fingerprint is no protection: whoever writes the folder writes it too.
    content = json.loads(manifest.read_text())
    content["decoder"]["fingerprint"] = fingerprint_decoder(decoder)
    manifest.write_text(json.dumps(content))
    assert main([*line, "--allow", "cache_parts.Multimodal"]) == 1
    assert SAYS in "".join(capsys.readouterr())
    assert not asked
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
