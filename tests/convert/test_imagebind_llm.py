"""Published ImageBind-LLM weights, through the converter and the folder, give the published results."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from bindllm import BindLLM
from bindllm.convert.foreign import read_foreign
from bindllm.convert.imagebind_llm import (
    convert_imagebind_llm,
    halve_rotation,
    is_imagebind_llm,
    read_imagebind_llm,
)
from bindllm.errors import CheckpointError, DecoderError
from bindllm.model.adapter import AdapterConfig
from bindllm.model.bind_network import BindConfig
from bindllm.model.checkpoint import check_keys
from bindllm.model.decoder import DecoderConfig
from goldens import filled, golden, hollow
from imagebind_llm_tiny import ALLOW, GivenEncoder, published, row, write_base
from tiny import ColorEncoder, save_tiny_decoder, tiny_tokenizer


def convert(state, folder, base, **options):
    options = {"encoders": [GivenEncoder()], **options}
    return convert_imagebind_llm(state, folder, base=DecoderConfig(base, dtype="float32"), **options)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def load(tmp_path_factory, base):
    """Write a published file, convert it, and load the folder; once per phase."""
    models = {}

    def make(phase: str) -> BindLLM:
        if phase not in models:
            home = tmp_path_factory.mktemp(phase)
            torch.save({"model": published(phase), "config": {"dim": 64}}, home / "7B.pth")
            convert(read_foreign(home / "7B.pth"), home / "folder", base)
            models[phase] = BindLLM.from_pretrained(home / "folder", device="cpu", allow=ALLOW)
        return models[phase]

    return make


def inputs(model: BindLLM) -> dict[str, torch.Tensor]:
    ids = torch.from_numpy(golden("imagebind_llm_tiny")["ids"]).long()
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "media_index": torch.zeros_like(ids),
        "embeddings": model.encode([row("image", 0), row("image", 1)]).unsqueeze(1),
    }


PHASES = ["base", "pretrain", "finetune", "legacy", "finetune_last2"]


@pytest.mark.parametrize("phase", PHASES)
@torch.no_grad()
def test_logits_are_the_published_ones(load, phase):
    expected = golden("imagebind_llm_tiny")
    model = load(phase)
    batch = inputs(model)
    logits = model(**batch).logits
    error = (logits - torch.from_numpy(expected[f"{phase}/logits"])).abs().max().item()
    assert error < 3e-5
    labels = torch.from_numpy(expected["labels"]).long()
    output = model(**batch, labels=torch.where(labels == 0, -100, labels))
    loss = nn.functional.cross_entropy(output.logits, output.targets).item()
    assert abs(loss - float(expected[f"{phase}/loss"])) < 1e-5


@pytest.mark.parametrize("phase", PHASES)
@torch.no_grad()
def test_first_layer_and_last_norm_are_the_published_ones(load, phase):
    expected, model, found = golden("imagebind_llm_tiny"), load(phase), {}
    core = model.decoder.get_decoder()
    for name, module in (("layer0", core.layers[0]), ("norm", core.norm)):
        module.register_forward_hook(lambda _, args, output, name=name: found.update({name: output}))
    model(**inputs(model))
    for name, value in found.items():
        torch.testing.assert_close(value[0], torch.from_numpy(expected[f"{phase}/{name}"]), atol=3e-5, rtol=0)


@torch.no_grad()
def test_embeddings_are_mixed_and_bound_as_published(load):
    expected = {
        name: torch.from_numpy(value) for name, value in golden("imagebind_llm_tiny").items() if "/" in name
    }
    for phase in ("pretrain", "legacy"):
        model = load(phase)
        bind = model.bind(inputs(model)["embeddings"])
        torch.testing.assert_close(bind, expected[f"{phase}/bind"], atol=3e-5, rtol=0)
    model = load("pretrain")
    mixed = model.encode([[row("image", n), row("audio", n, 0.5)] for n in range(2)])
    torch.testing.assert_close(mixed, expected["mix/feature"], atol=1e-7, rtol=0)
    torch.testing.assert_close(model.bind(mixed.unsqueeze(1)), expected["mix/bind"], atol=3e-5, rtol=0)


@torch.no_grad()
def test_decoding_step_by_step_gives_the_published_logits(load):
    expected, model = golden("imagebind_llm_tiny"), load("finetune")
    batch = inputs(model)
    ids, bind = batch["input_ids"], model.bind(batch["embeddings"])
    with model.injection.holding(bind, batch["media_index"][:, :5]):
        step = model.decoder(ids[:, :5], use_cache=True)
        logits = [step.logits[:, -1]]
        for t in range(5, 12):
            step = model.decoder(ids[:, t : t + 1], past_key_values=step.past_key_values, use_cache=True)
            logits.append(step.logits[:, -1])
    error = (torch.stack(logits, 1) - torch.from_numpy(expected["finetune/step_logits"])).abs().max().item()
    assert error < 3e-5


def test_greedy_generation_says_the_published_tokens(load):
    expected, model = golden("imagebind_llm_tiny"), load("finetune")
    ids = torch.from_numpy(expected["finetune/greedy_prompt"]).long().unsqueeze(0)
    found = model.generate_from(
        ids,
        torch.ones_like(ids),
        torch.zeros_like(ids),
        model.encode([row("image", 0)]).unsqueeze(0),
        max_new_tokens=16,
        min_new_tokens=16,
        do_sample=False,
    )
    assert found[0].tolist() == expected["finetune/greedy"].tolist()


@pytest.mark.filterwarnings("ignore:.*lora_bias=True.*")
@torch.no_grad()
def test_a_converted_model_saved_again_is_the_same_and_plain_peft_reads_its_adapter(load, base, tmp_path):
    from peft import PeftModel

    model = load("finetune")
    model.save_pretrained(tmp_path / "again")
    again = BindLLM.from_pretrained(tmp_path / "again", device="cpu", allow=ALLOW)
    card = (tmp_path / "again" / "README.md").read_text()
    assert "## Origin" in card
    assert "GPL-3" in card
    assert "finetune phase" in card
    batch = inputs(model)
    assert torch.equal(again(**batch).logits, model(**batch).logits)
    plain = PeftModel.from_pretrained(
        LlamaForCausalLM.from_pretrained(base, dtype=torch.float32), str(tmp_path / "again" / "adapter")
    ).eval()
    assert torch.equal(plain(batch["input_ids"]).logits, model.decoder(batch["input_ids"]).logits)


@torch.no_grad()
def test_in_half_precision_the_answers_keep_their_direction(load, tmp_path):
    model = load("finetune")
    model.save_pretrained(tmp_path / "m")
    half = BindLLM.from_pretrained(tmp_path / "m", device="cpu", dtype="bfloat16", allow=ALLOW)
    logits = [each(**inputs(model)).logits.float().flatten(0, 1) for each in (model, half)]
    assert half.decoder.dtype == torch.bfloat16
    assert nn.functional.cosine_similarity(*logits).min() > 0.999


def test_every_tensor_is_in_the_report_and_the_manifest_says_what_it_is(load, tmp_path, base):
    state = published("legacy")
    state["llma.layers.1.attention_norm.weight"] = state.pop("llama.layers.1.attention_norm.weight")
    state["prefix_projector_norm.weight"] = torch.ones(3)
    convert(state, tmp_path / "m", base)
    report = (tmp_path / "m" / "conversion.tsv").read_text().splitlines()[1:]
    assert {line.split("\t")[0] for line in report} == set(state)
    dropped = [line.split("\t")[0] for line in report if line.split("\t")[1] == "dropped"]
    assert dropped == ["prefix_projector_norm.weight"]
    manifest = json.loads((tmp_path / "m" / "bindllm.json").read_text())
    bind = {"depth": 3, "expansion": 4, "norm": "layer", "bias": True, "fusion": "mean", "tokens": 1}
    assert {name: manifest["bind"][name] for name in bind} == bind
    assert manifest["inject"] == {"kind": "value", "queries": True, "layers": None}
    adapter = {
        "rank": 16,
        "alpha": None,
        "bias": True,
        "norm": True,
        "dora": False,
        "media_only": False,
        "rslora": False,
    }
    assert manifest["adapter"] == {**adapter, "layers": None, "targets": None}
    assert manifest["decoder"]["template"] == "alpaca"
    assert "non-commercial" in (tmp_path / "m" / "README.md").read_text()
    assert load("finetune_last2").inject_config.layers == 2
    assert load("pretrain").adapter is None


def test_a_training_checkpoint_gives_the_same_and_its_base_is_compared_whole(tmp_path, base):
    whole = filled("imagebind_llm_tiny_finetune") | {"image_bind.modality_trunks.text.w": torch.ones(2)}
    small = published("finetune")
    for name, state in (("whole", whole), ("small", small)):
        convert(state, tmp_path / name, base)
    for file in ("bind.safetensors", "adapter/adapter_model.safetensors"):
        assert (tmp_path / "whole" / file).read_bytes() == (tmp_path / "small" / file).read_bytes()
    whole["llama.layers.2.attention.wk.weight"] = whole["llama.layers.2.attention.wk.weight"].flip(0)
    with pytest.raises(CheckpointError, match=r"layers\.2\.self_attn\.k_proj\.weight differs"):
        convert(whole, tmp_path / "x", base)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_other_precisions_of_the_file_are_the_same_base(tmp_path, base, dtype):
    for phase in ("pretrain", "finetune"):
        state = {name: value.to(dtype) for name, value in published(phase).items()}
        done = convert(state, tmp_path / phase, base)
        assert done.report.unknown == []
        assert done.shape.phase == phase
        assert (tmp_path / phase / "bind.safetensors").is_file()


def test_a_wrong_base_is_refused_by_its_sizes(tmp_path):
    changes = {
        "width 64 in the adapter, 32": {"hidden_size": 32},
        "layers 4 in the adapter, 2": {"num_hidden_layers": 2},
        "heads 4 in the adapter, 8": {"num_attention_heads": 8},
        "key/value heads 4 in the adapter, 2": {"num_key_value_heads": 2},
        "inner width 192 in the adapter, 128": {"intermediate_size": 128},
    }
    for number, (words, change) in enumerate(changes.items()):
        other = write_base(tmp_path / str(number), **change)
        for accept in (False, True):
            with pytest.raises(CheckpointError, match=words):
                convert(published("finetune"), tmp_path / "m", other, accept_base=accept)
    other = write_base(tmp_path / "v", vocab_size=300)
    with pytest.raises(CheckpointError, match="vocabulary 96 in the adapter, 300"):
        convert(filled("imagebind_llm_tiny_pretrain"), tmp_path / "m", other)
    assert not (tmp_path / "m").exists()


def change_norms(base, folder, change):
    """Copy the base with other norms."""
    model = LlamaForCausalLM.from_pretrained(base)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                noise = 2 * torch.rand(parameter.shape, generator=generator) - 1
                parameter.copy_(change(parameter, noise))
    model.save_pretrained(folder)
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<|im_start|>"})
    tokenizer.save_pretrained(folder)
    return str(folder)


def test_a_wrong_base_is_refused_by_its_norms(tmp_path, base):
    # Norms of the made-up base are 1 + 0.1 u.
    unrelated = change_norms(base, tmp_path / "other", lambda norm, noise: 1 + 0.1 * noise)
    for phase in ("pretrain", "finetune"):
        with pytest.raises(CheckpointError, match="not the base model of this adapter.*--accept_base"):
            convert(published(phase), tmp_path / "m", unrelated)
        convert(published(phase), tmp_path / phase, unrelated, accept_base=True)
    # What tuning does: everything moves a little, and the file is accepted; a pretrained file was not tuned.
    tuned = change_norms(base, tmp_path / "tuned", lambda norm, noise: norm + 0.05 + 0.04 * noise)
    convert(published("finetune"), tmp_path / "t", tuned)
    with pytest.raises(CheckpointError, match=r"layernorm\.weight differs.*up to 0\.0"):
        convert(published("pretrain"), tmp_path / "m", tuned)
    constant = change_norms(base, tmp_path / "constant", lambda norm, noise: torch.ones_like(norm))
    with pytest.raises(CheckpointError, match="correlation of 0.00"):
        convert(published("finetune"), tmp_path / "m", constant)
    assert not (tmp_path / "m").exists()


def test_files_that_are_not_whole_or_not_known_are_refused(tmp_path, base):
    def refused(changes, words):
        state = {k: v for k, v in (published("finetune") | changes).items() if v is not None}
        with pytest.raises(CheckpointError, match=words):
            convert(state, tmp_path / "m", base)

    refused({"llama.layers.0.attention.lora_wz_l1.weight": torch.ones(2, 2)}, "1 unknown tensors: .*lora_wz")
    refused({"llama.layers.0.attention.wk.bias": torch.ones(64)}, r"unknown tensors: .*wk\.bias")
    refused({"image_bind_proj.weight": None}, "lacks image_bind_proj.weight")
    refused({"llama.layers.1.attention.gate": None}, "gates of some layers")
    refused({"llama.layers.1.attention.gate": torch.ones(1, 4, 1, 1).int()}, r"gates\.1 \(int32\)")
    refused({"prefix_query.weight": torch.ones(9, 64)}, "9 queries for 4 layers")
    refused({"image_bind_f2_2.weight": None}, r"missing bind\.blocks\.1\.down\.weight")
    refused(
        {"llama.layers.3.feed_forward.w2.bias": None},
        r"missing adapter.*layers\.3\.mlp\.down_proj\.lora_B\.bias",
    )
    refused({"image_bind_f1_2.weight": torch.ones(256, 32)}, r"blocks\.1\.gate\.weight has shape \[256, 32\]")
    broken = torch.full((64,), float("nan"))
    refused({"image_bind_proj.bias": broken}, r"not finite in bind\.projection\.bias")
    refused({"llma.norm.weight": torch.ones(64)}, "both become")
    refused(
        {"image_bind_proj.weight": torch.ones(64, 1024, dtype=torch.int8)}, r"projection\.weight \(int8\)"
    )
    assert not (tmp_path / "m").exists()


def test_shapes_that_cannot_be_are_refused_by_name(tmp_path, base):
    """Each of these says something about the model's shape, or has its rows reordered."""
    gates, query = [f"llama.layers.{n}.attention.gate" for n in range(4)], "llama.layers.0.attention."
    for changes, words in (
        (
            {"image_bind_proj.weight": torch.ones(64)},
            r"image_bind_proj\.weight has shape \[64\], expected a matrix",
        ),
        ({"image_bind_proj.weight": torch.ones(0, 1024)}, r"has shape \[0, 1024\]"),
        ({"prefix_query.weight": torch.tensor(1.0)}, r"prefix_query\.weight has shape \[\]"),
        ({"prefix_query.weight": torch.ones(0, 64)}, r"prefix_query\.weight has shape \[0, 64\]"),
        ({"image_bind_f1_1.weight": torch.tensor(1.0)}, r"f1_1\.weight has shape \[\]"),
        ({"image_bind_f1_1.weight": torch.ones(32, 64)}, r"blocks\.0\.gate\.weight has shape \[32, 64\]"),
        ({f"{query}lora_wq_l1.weight": torch.tensor(1.0)}, r"lora_wq_l1\.weight has shape \[\]"),
        (
            {f"{query}lora_wq_l2.weight": torch.ones(63, 16)},
            r"lora_wq_l2\.weight has shape \[63, 16\], impossible for this name",
        ),
        (
            {f"{query}lora_wv_l2.weight": torch.tensor(0.0)},
            r"v_proj\.lora_B\.weight has shape \[\], expected",
        ),
        ({f"{query}wq.bias": torch.tensor(0.0)}, r"wq\.bias has shape \[\], impossible for this name"),
        ({gates[1]: torch.ones(1, 8, 1, 1)}, "gates for 4 and 8 heads"),
        (dict.fromkeys(gates, torch.ones(0)), "gates for 0 heads"),
        (dict.fromkeys(gates, torch.ones(1, 3, 1, 1)), r"has shape \[64.*impossible for this name"),
    ):
        with pytest.raises(CheckpointError, match=words):
            convert(published("finetune") | changes, tmp_path / "m", base)
    assert not (tmp_path / "m").exists()


def test_encoders_of_another_width_are_refused(tmp_path, base):
    with pytest.raises(CheckpointError, match="embeddings of size 1024, the encoders give 16"):
        convert(published("pretrain"), tmp_path / "m", base, encoders=[ColorEncoder()])


def test_a_base_that_is_no_llama_is_refused(tmp_path, base):
    other = str(save_tiny_decoder(tmp_path / "qwen", "qwen2"))
    with pytest.raises(CheckpointError, match="of type 'qwen2'"):
        convert(published("pretrain"), tmp_path / "m", other)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DecoderError, match=r"no usable causal language model here .*config\.json"):
        convert(published("pretrain"), tmp_path / "m", str(tmp_path / "empty"))
    copy = shutil.copytree(base, tmp_path / "copy")
    config = (copy / "config.json").read_text()
    (copy / "config.json").write_text(config.replace('"silu"', '"sulu"'))
    with pytest.raises(DecoderError, match="no usable causal language model.*sulu"):
        convert(published("pretrain"), tmp_path / "m", str(copy))
    # Sizes that a config leaves out are the defaults of the type.
    (copy / "config.json").write_text(
        config.replace('"num_key_value_heads": 4', '"num_key_value_heads": null')
    )
    convert(published("pretrain"), tmp_path / "converted", str(copy))
    (copy / "config.json").write_text(config)
    (copy / "tokenizer.json").write_text("{}")
    with pytest.raises(DecoderError, match="no usable tokenizer here"):
        convert(published("pretrain"), tmp_path / "m", str(copy))
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize(
    ("table", "phase", "legacy", "trained"),
    [
        ("pretrain", "pretrain", False, 608_322_560),
        ("finetune", "finetune", False, 608_322_560 + 41_340_928),
        ("legacy_pretrain", "pretrain", True, 608_445_440),
        ("legacy_finetune", "finetune", True, 608_445_440 + 41_340_928),
    ],
)
def test_the_published_7b_files_are_accounted_for_and_fill_a_7b_model(table, phase, legacy, trained):
    state = hollow(f"imagebind_llm_7b_{table}")
    assert is_imagebind_llm(state)
    adapted = read_imagebind_llm(state)
    assert (adapted.shape.phase, adapted.shape.legacy) == (phase, legacy)
    assert (adapted.shape.width, adapted.shape.num_layers, adapted.shape.num_heads) == (4096, 32, 32)
    assert len(adapted.report.mapped) + len(adapted.report.dropped) == len(state)
    # The zero biases of keys and values are ours.
    added = 2 * 32 * 4096 if phase == "finetune" else 0
    assert sum(tensor.numel() for tensor in adapted.tensors.values()) == trained + added
    assert len(adapted.base) == 65
    # Names and shapes of a whole 7B model, without its memory.
    with torch.device("meta"):
        model = BindLLM(
            LlamaForCausalLM(LlamaConfig(intermediate_size=11008)),
            tiny_tokenizer(),
            DecoderConfig("7b"),
            encoders=[GivenEncoder()],
            bind=BindConfig(norm="layer" if legacy else "rms", bias=legacy),
            adapter=AdapterConfig() if phase == "finetune" else None,
        )
    check_keys(model.trainable_state(), adapted.tensors, source=table)
    base = {f"llama.{name}": tensor for name, tensor in hollow("llama_7b_base").items()}
    plain = {
        name.replace(".base_layer.", ".").replace(".original_module.", "."): value.shape
        for name, value in model.decoder.state_dict().items()
        if "default" not in name
    }
    assert {name: x.shape for name, x in read_imagebind_llm({**base, **state}).base.items()} == plain


def test_rotation_of_halves_is_the_rotation_of_pairs():
    """A projection whose rows are reordered turns each head as before, seen from the other convention."""
    heads, size = 2, 6
    x = torch.randn(heads * size)
    angles = torch.tensor([0.3, 1.1, 2.0])
    pairs = torch.view_as_complex(x.view(heads, size // 2, 2)) * torch.polar(torch.ones(3), angles)
    first, second = halve_rotation(x, num_heads=heads).view(heads, 2, size // 2).unbind(1)
    halves = torch.cat(
        [first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin()], dim=1
    )
    expected = halve_rotation(torch.view_as_real(pairs).flatten(), num_heads=heads)
    torch.testing.assert_close(halves.flatten(), expected)
