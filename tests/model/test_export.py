"""A merged folder is a plain Hugging Face model whose logits are those of the checkpoint without media."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from bindllm import BindLLM
from bindllm.errors import CheckpointError, InputError
from bindllm.model.adapter import AdapterConfig
from bindllm.model.export import RECORD, export_decoder
from tiny import FAMILIES, IDS, save_tiny_decoder, tiny_model

NO_BIAS = {"rank": 4, "bias": False}
DORA = {**NO_BIAS, "alpha": 8.0, "dora": True, "rslora": True}


def checkpoint(place, family="llama", *, adapter=NO_BIAS, dtype="float32", system=None, **changes):
    """Write a decoder, and a checkpoint of it with an adapter that changes every answer; return the model."""
    folder = save_tiny_decoder(place / "decoder", family, **changes)
    adapter = None if adapter is None else AdapterConfig(**adapter)
    model = tiny_model(folder, dtype=dtype, system=system, adapter=adapter)
    for parameter in model.adapter.parameters().values() if model.adapter else ():
        parameter.data += 0.2 * torch.randn_like(parameter)
    model.save_pretrained(place / "checkpoint")
    return model


def len_of(adapter) -> int:
    """Return the number of layers that an adapter tunes."""
    layers = adapter.get("layers", 3)
    return len(layers) if isinstance(layers, list) else layers


def compare(model, folder, dtype=torch.float32):
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    expected = model.decoder(IDS).logits
    torch.testing.assert_close(plain(IDS).logits, expected, atol=1e-4, rtol=1e-3)
    return plain


@pytest.mark.parametrize(
    ("family", "adapter", "changes"),
    [
        *((family, {"rank": 4}, {}) for family in (*FAMILIES, "gemma3_text", "olmo2", "cohere2")),
        *((family, DORA, {}) for family in ("gemma2", "qwen2")),
        ("llama", {"rank": 4, "norm": False}, {"tie_word_embeddings": True}),
        ("llama", {"rank": 4}, {"attention_bias": True}),
        ("llama", {"rank": 4, "layers": 2}, {}),
        ("qwen2", {"rank": 4, "layers": [0]}, {}),
    ],
)
def test_the_logits_are_those_of_the_checkpoint(tmp_path, family, adapter, changes):
    model = checkpoint(tmp_path, family, adapter=adapter, **changes)
    done = export_decoder(tmp_path / "checkpoint", tmp_path / "plain")
    plain = compare(model, tmp_path / "plain")
    tuned = [name.rpartition(".")[0] for name in model.adapter.parameters()]
    assert done.num_merged == sum(name.endswith("lora_A") for name in tuned) == (7 * len_of(adapter))
    norms = sum(type(module).__name__.endswith("Norm") for module in plain.modules())
    if "layers" not in adapter:
        assert done.num_replaced == (norms if adapter.get("norm", True) else 0)
    tied = changes.get("tie_word_embeddings", False)
    assert plain.config.tie_word_embeddings is tied
    assert (plain.lm_head.weight is plain.model.embed_tokens.weight) is tied
    # The adapter did something.
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "decoder", dtype=torch.float32)
    assert (plain(IDS).logits - base(IDS).logits).abs().max() > 0.1


def test_the_folder_is_complete_and_says_what_it_is(tmp_path):
    model = checkpoint(tmp_path, system="Be brief.", dtype="bfloat16")
    export_decoder(tmp_path / "checkpoint", tmp_path / "plain")
    files = {file.name for file in (tmp_path / "plain").iterdir()}
    assert files >= {
        "model.safetensors",
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "README.md",
    }
    assert not any("adapter" in name or name == "bindllm.json" for name in files)
    own = AutoTokenizer.from_pretrained(tmp_path / "plain")
    messages = [{"role": "user", "content": "Hello"}]
    options = {"tokenize": False, "add_generation_prompt": True}
    rendered = own.apply_chat_template(messages, **options)
    assert rendered == model.tokenizer.apply_chat_template(messages, **options)
    assert "Be brief." in rendered
    record = json.loads((tmp_path / "plain" / RECORD).read_text())
    assert record["skipped"] == ["bind network", "injection"]
    assert "BindLLM.from_pretrained" in (tmp_path / "plain" / "README.md").read_text()
    # The decoder's files are float32, whatever it ran in.
    assert record["dtype"] == "float32"
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    assert plain.dtype == torch.float32


def test_another_precision_is_rounded_once(tmp_path):
    checkpoint(tmp_path)
    export_decoder(tmp_path / "checkpoint", tmp_path / "full")
    # An earlier export is replaced.
    export_decoder(tmp_path / "checkpoint", tmp_path / "plain")
    export_decoder(tmp_path / "checkpoint", tmp_path / "plain", dtype="bfloat16")
    full, half = (AutoModelForCausalLM.from_pretrained(tmp_path / n).state_dict() for n in ("full", "plain"))
    assert {tensor.dtype for tensor in half.values()} == {torch.bfloat16}
    for name, tensor in full.items():
        assert torch.equal(half[name], tensor.bfloat16()), name


def test_weights_outside_the_range_of_the_precision_are_named(tmp_path):
    model = checkpoint(tmp_path)
    norm = list(model.adapter.parameters().values())[-1]
    norm.data[0] = 1e6
    model.save_pretrained(tmp_path / "checkpoint")
    with pytest.raises(CheckpointError, match=r"infinite in float16: model\.norm\.weight"):
        export_decoder(tmp_path / "checkpoint", tmp_path / "plain", dtype="float16")
    assert not (tmp_path / "plain").exists()
    export_decoder(tmp_path / "checkpoint", tmp_path / "plain", dtype="bfloat16")


@pytest.mark.parametrize(
    ("family", "lacking"),
    [
        ("mistral", "q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj"),
        ("qwen2", "o_proj, gate_proj, up_proj, down_proj"),
        ("qwen3", "gate_proj, up_proj, down_proj"),
    ],
)
def test_biases_that_the_family_has_no_place_for_are_refused(tmp_path, family, lacking):
    checkpoint(tmp_path, family, adapter={"rank": 4, "bias": True})
    with pytest.raises(CheckpointError, match=rf"has none for {lacking}, nor .* model\.adapter\.bias: false"):
        export_decoder(tmp_path / "checkpoint", tmp_path / "plain")
    assert not (tmp_path / "plain").exists()


@pytest.mark.parametrize("targets", ["all-linear", ["qkv_proj", "down_proj"]])
def test_biases_of_other_projections_are_refused_by_name(tmp_path, targets):
    checkpoint(tmp_path, "phi3", adapter={"rank": 4, "bias": True, "targets": targets})
    with pytest.raises(CheckpointError, match=r"plain phi3 model has none for .*qkv_proj.*, nor a setting"):
        export_decoder(tmp_path / "checkpoint", tmp_path / "plain")


def test_an_adapter_for_media_only_is_not_merged_into_all_text(tmp_path):
    checkpoint(tmp_path, adapter={"rank": 4, "media_only": True})
    with pytest.raises(
        CheckpointError, match=r"only tokens that listen to media .* use the checkpoint as it is"
    ):
        export_decoder(tmp_path / "checkpoint", tmp_path / "plain")
    assert not (tmp_path / "plain").exists()


def test_without_an_adapter_there_is_nothing_to_merge(tmp_path):
    checkpoint(tmp_path, adapter=None)
    with pytest.raises(CheckpointError, match=r"has no adapter.*decoder is the plain folder already"):
        export_decoder(tmp_path / "checkpoint", tmp_path / "plain")


def test_folders_of_others_are_left_alone(tmp_path):
    checkpoint(tmp_path)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("mine")
    # The decoder as an earlier export: replaced, the checkpoint would no longer load.
    (tmp_path / "decoder" / RECORD).write_text("{}")
    for place in ("mine", "checkpoint", "decoder"):
        before = sorted((tmp_path / place).iterdir())
        with pytest.raises(InputError, match="not an earlier export|cannot be the output"):
            export_decoder(tmp_path / "checkpoint", tmp_path / place)
        assert sorted((tmp_path / place).iterdir()) == before


def test_an_export_that_fails_leaves_the_earlier_one(tmp_path, monkeypatch):
    model = checkpoint(tmp_path)
    export_decoder(tmp_path / "checkpoint", tmp_path / "plain")

    def full(*args, **kwargs):
        raise OSError("no space left on device")

    monkeypatch.setattr(type(model.tokenizer), "save_pretrained", full)
    with pytest.raises(OSError, match="no space"):
        export_decoder(tmp_path / "checkpoint", tmp_path / "plain", dtype="bfloat16")
    compare(model, tmp_path / "plain")
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint", "decoder", "plain"}


def test_what_cannot_be_merged_is_refused(tmp_path):
    model = checkpoint(tmp_path)
    with pytest.raises(InputError, match="unknown dtype 'bf16'"):
        export_decoder(tmp_path / "checkpoint", tmp_path / "plain", dtype="bf16")
    save_tiny_decoder(tmp_path / "other", seed=1)
    with pytest.raises(CheckpointError, match="is not the one that this checkpoint was trained with"):
        export_decoder(tmp_path / "checkpoint", tmp_path / "plain", decoder=str(tmp_path / "other"))
    next(iter(model.adapter.parameters().values())).data.fill_(float("nan"))
    model.save_pretrained(tmp_path / "checkpoint")
    with pytest.raises(CheckpointError, match=r"weights that are not finite .base_model"):
        export_decoder(tmp_path / "checkpoint", tmp_path / "plain")
    assert not (tmp_path / "plain").exists()


def test_an_export_is_no_decoder_for_the_checkpoint(tmp_path):
    checkpoint(tmp_path)
    export_decoder(tmp_path / "checkpoint", tmp_path / "plain")
    with pytest.raises(CheckpointError, match="is not the one"):
        BindLLM.from_pretrained(
            tmp_path / "checkpoint", decoder=str(tmp_path / "plain"), allow=["tiny.ColorEncoder"]
        )
