"""Every decoder family of the installed transformers, built tiny, with each kind of injection: `make test-families`.

A family is right for a kind if the probe accepts it and cached generation gives the logits of a full forward. The
table goes into `docs/decoders.md`.
"""

from __future__ import annotations

import copy
import json
import logging
import os
import re
import sys
import warnings
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import transformers
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from bindllm.errors import DecoderError
from bindllm.model.decoder import choose_positions, model_class
from bindllm.model.injection import KINDS, TOKEN_KINDS, InjectConfig, Injection
from bindllm.model.injection.probe import probe

PAGE = Path(__file__).parents[1] / "docs" / "decoders.md"
MARKS = ("<!-- families -->", "<!-- end of families -->")
MOST_PARAMETERS = 10_000_000
WRAPPERS = ("mistral3", "qwen2_5_vl", "qwen3_vl", "smolvlm", "llava", "internvl", "paligemma")
"""Models that read images and hold a language model; only transformers' class for images and text loads them."""

# How to read this: settings of any family, if it has them; then those of single families.
SIZES = {
    **{
        name: 32
        for name in ("hidden_size", "d_model", "moe_intermediate_size", "shared_expert_intermediate_size")
    },
    **{
        name: 64
        for name in ("intermediate_size", "decoder_ffn_dim", "encoder_ffn_dim", "ffn_dim", "mamba_d_ssm")
    },
    **{
        name: 4
        for name in ("num_hidden_layers", "num_attention_heads", "decoder_layers", "decoder_attention_heads")
    },
    **{
        name: 4
        for name in ("encoder_attention_heads", "num_experts", "num_local_experts", "n_routed_experts")
    },
    **{name: 2 for name in ("num_key_value_heads", "num_experts_per_tok", "linear_num_key_heads")},
    **{name: 8 for name in ("head_dim", "v_head_dim", "qk_nope_head_dim", "qk_rope_head_dim", "state_size")},
    **{
        name: 8 for name in ("linear_key_head_dim", "linear_value_head_dim", "mamba_d_state", "mamba_n_heads")
    },
    **{name: 1 for name in ("encoder_layers", "n_group", "topk_group", "mamba_n_groups")},
    **{name: 0 for name in ("mtp_num_layers", "num_nextn_predict_layers", "pad_token_id")},
    **{"kv_lora_rank": 16, "q_lora_rank": 16, "mamba_d_head": 8, "linear_num_value_heads": 4},
    **{"vocab_size": 259, "max_position_embeddings": 512, "bos_token_id": 1, "eos_token_id": 2},
    **{"tie_word_embeddings": False, "initializer_range": 0.2, "is_decoder": True},
}
_LATENT = {"num_key_value_heads": 4}
_MIXED = {"layer_types": ["linear_attention", "full_attention"] * 2}
_LARGE = {"vocab_size_per_layer_input": 259, "hidden_size_per_layer_input": 8}
_INDEXED = (
    "indexer_n_heads",
    "indexer_kv_heads",
    "indexer_head_dim",
    "indexer_budget",
    "indexer_compress_ratio",
)
_ROTARY = {"rope_type": "default", "rope_theta": 1e4}
_TOWER = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "depth": 1,
}
_TOWER |= {"num_heads": 2, "out_hidden_size": 32, "image_size": 28, "patch_size": 14}
OWN: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("axk1", "axk2", "deepseek_v2", "deepseek_v3", "deepseek_v32", "glm4_moe_lite"), _LATENT),
    **dict.fromkeys(("glm_moe_dsa", "youtu"), _LATENT),
    "bailing_hybrid": {**_LATENT, **_MIXED},
    "bamba": {"attn_layer_indices": [1, 3]},
    "codegen": {"rotary_dim": 4},
    "cohere_compass_text": {
        "rope_parameters": dict.fromkeys(("sliding_attention", "full_attention"), _ROTARY)
    },
    "dots1": {"n_shared_experts": 1},
    "gemma3n_text": {
        **_LARGE,
        **{"num_kv_shared_layers": 2, "layer_types": ["sliding_attention", "full_attention"] * 2},
        **{"laurel_rank": 8, "altup_num_inputs": 2},
    },
    "gemma4": {"text_config": _LARGE},
    "gemma4_text": _LARGE,
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "gptj": {"rotary_dim": 4},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * 2},
    "jamba": {"attn_layer_offset": 1, "attn_layer_period": 2},
    "kimi_linear": {**_LATENT, **_MIXED, "linear_head_dim": 8, "linear_num_heads": 4},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "longcat_flash": {**_LATENT, "num_layers": 2, "zero_expert_num": 2},
    "mamba2": {"num_heads": 8, "n_groups": 1},
    "minicpm3": {**_LATENT, "dim_model_base": 8, "head_dim": None},
    "qwen4_exp_text": {
        **_MIXED,
        **dict(zip(_INDEXED, (2, 1, 8, 16, 4), strict=True)),
        "hc_count": 2,
        "hc_lowrank": 8,
    },
    "reformer": {"axial_pos_embds_dim": [16, 16], "axial_pos_shape": [16, 32]},
    "roc_bert": {"shape_vocab_size": 16, "pronunciation_vocab_size": 16},
    "xlnet": {"d_head": 8},
    "xmod": {"languages": ["en_XX"], "default_language": "en_XX"},
    "zaya": {"num_experts_per_tok": 1},
}


class NotBuiltError(Exception):
    """A family that cannot be built tiny here."""


def config_of(family: str) -> transformers.PretrainedConfig:
    """Return a tiny config of a family."""
    default, own = CONFIG_MAPPING[family](), copy.deepcopy(OWN.get(family, {}))

    def sizes(part: Any, wanted: dict[str, Any]) -> dict[str, Any]:
        known = set(part.to_dict()) | set(type(part).attribute_map)
        return {name: value for name, value in wanted.items() if name in known}

    text = default.get_text_config()
    if text is default:
        return AutoConfig.for_model(family, **{**sizes(default, SIZES), **own})
    entries = {
        "text_config": {**sizes(text, SIZES), **own.pop("text_config", {}), "model_type": text.model_type}
    }
    for name in ("vision_config", "audio_config"):
        if (part := vars(default).get(name)) is not None and family in WRAPPERS:
            entries[name] = {**sizes(part, _TOWER), "model_type": part.model_type}
    return AutoConfig.for_model(family, **entries, **own)


def build(family: str) -> PreTrainedModel:
    """Return a random decoder of a family, and raise `NotBuiltError` if that does not work."""
    try:
        config = config_of(family)
        with torch.device("meta"):
            size = sum(p.numel() for p in model_class(config).from_config(config).parameters())
        if size > MOST_PARAMETERS:
            raise NotBuiltError(f"{size / 1e6:.0f} million parameters")
        torch.manual_seed(0)
        decoder = model_class(config).from_config(config, dtype=torch.float32).eval().requires_grad_(False)
        decoder(input_ids=torch.arange(3, 10).unsqueeze(0), use_cache=False)
        return decoder
    except Exception as error:
        raise NotBuiltError(f"{type(error).__name__}: {error}") from error


@torch.no_grad()
def difference(decoder: PreTrainedModel, kind: str) -> str:
    """Return why a kind of injection is not right for a decoder; empty: it is."""
    try:
        injection = Injection(decoder, InjectConfig(kind=kind))
        decoder.get_output_embeddings().register_forward_pre_hook(choose_positions)
        probe(decoder, injection)
    except DecoderError as error:
        return f"refused: {error}"
    torch.manual_seed(1)
    torch.nn.init.normal_(injection.gates, std=0.03 if kind == "cross" else 1.0)
    ids, index = torch.randint(3, 250, (2, 9)), torch.tensor([[-1, -1, 0, 0, 1, 1, 1, 1, 1], [-1, *[0] * 8]])
    tokens = (3,) if kind in TOKEN_KINDS else ()
    bind = torch.randn(2, 2, *tokens, decoder.config.get_text_config().hidden_size)
    full = decoder(input_ids=ids, bind=bind, media_index=index, use_cache=False).logits
    part = {"input_ids": ids[1:, :6], "bind": bind[1:], "media_index": index[1:, :6]}
    if not close(full[1:, :6], decoder(**part, use_cache=False).logits):
        return "a row depends on the rest of its batch, or on the tokens after it"
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    options |= {"output_logits": True, "return_dict_in_generate": True}
    with injection.holding(bind, index[:, :6]):
        output = decoder.generate(ids[:, :6], attention_mask=torch.ones_like(ids[:, :6]), **options)
    index = torch.cat([index[:, :6], index[:, 5:6].expand(2, 4)], 1)
    full = decoder(input_ids=output.sequences, bind=bind, media_index=index, use_cache=False).logits
    return "" if close(torch.stack(output.logits, 1), full[:, 5:-1]) else "generation is not the full forward"


def close(found: Tensor, expected: Tensor) -> bool:
    found, expected = found.float().nan_to_num(neginf=0), expected.float().nan_to_num(neginf=0)
    return bool((found - expected).abs().max() <= 1e-3 * expected.abs().max())


@torch.no_grad()
def misplaced(decoder: PreTrainedModel) -> str:
    """Return a part of a layer's attention that differs from its projections as bindllm reads them; empty: none.

    At the first position the rotary embedding does nothing, and attention to a single token gives its value. So the
    output projection of a text of one token reads that value.
    """
    injection, seen = Injection(decoder, InjectConfig(kind="value")), {}
    for heads in injection._heads:
        heads.source.register_forward_pre_hook(lambda m, args: seen.update({m: args[0]}))
        heads.output.register_forward_pre_hook(lambda m, args: seen.update({m: args[0]}))
    decoder(input_ids=torch.tensor([[7]]), use_cache=False)
    for heads in injection._heads:
        value = heads.values(seen[heads.source])
        groups = heads.num_heads // value.shape[-2]
        if not close(value.repeat_interleave(groups, -2).flatten(-2), seen[heads.output]):
            return "its value"
    return ""


def outcomes(family: str) -> tuple[str, dict[str, str]]:
    """Return a family with the outcome of each kind; only `build` if it cannot be built."""
    logging.disable()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    found = {}
    try:
        decoder = build(family)
        for kind in KINDS:
            try:
                found[kind] = difference(copy.deepcopy(decoder), kind)
            except Exception as error:
                found[kind] = f"{type(error).__name__}: {error}"
        if not found["value"]:
            found["projections"] = misplaced(decoder)
    except NotBuiltError as error:
        found["build"] = str(error)
    except Exception as error:
        found["projections"] = f"{type(error).__name__}: {error}"
    return family, {kind: re.sub(r"\s+", " ", text)[:300] for kind, text in found.items()}


def table(found: dict[str, dict[str, str]]) -> str:
    """Return the page's table of the families that were built, by the kinds that are right."""
    built = {family: kinds for family, kinds in found.items() if "build" not in kinds}
    right = {kind: sum(kinds.get(kind) == "" for kinds in built.values()) for kind in KINDS}
    groups: dict[tuple[str, ...], list[str]] = {}
    for family, kinds in sorted(built.items()):
        groups.setdefault(tuple(kind for kind in KINDS if kinds.get(kind) == ""), []).append(family)
    counts = ", ".join(f"`{kind}` {count}" for kind, count in right.items())
    lines = [
        f"transformers {transformers.__version__}, {len(built)} families that can be built tiny. Right: {counts}.",
        "",
        "| kinds | families |",
        "|---|---|",
    ]
    for kinds, families in sorted(groups.items(), key=lambda group: -len(group[1])):
        lines.append(f"| {', '.join(f'`{kind}`' for kind in kinds) or 'none'} | {', '.join(families)} |")
    left = ", ".join(sorted(set(found) - set(built)))
    wrong = [
        f"{family} with `{kind}` ({kinds[kind]})"
        for family, kinds in sorted(built.items())
        for kind in KINDS
        if kinds.get(kind) and not kinds[kind].startswith("refused")
    ]
    notes = [
        f"All other kinds are refused, except {', '.join(wrong)}."
        if wrong
        else "All other kinds are refused.",
        f"Not built here, so not known: {left}.",
    ]
    return "\n".join([*lines, "", *notes])


def write(text: str) -> None:
    """Put the table between the marks of the page."""
    page = PAGE.read_text()
    start, end = (page.index(mark) for mark in MARKS)
    PAGE.write_text(page[: start + len(MARKS[0])] + f"\n\n{text}\n\n" + page[end:])


if __name__ == "__main__":
    every, found = [*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *WRAPPERS], {}
    for number, name in enumerate(sys.argv[1:] or every, 1):
        _, found[name] = outcomes(name)
        print(number, name, json.dumps(found[name]), flush=True)
    if not sys.argv[1:]:
        write(table(found))
