"""The projections of families with different attentions, against the attention itself."""

import pytest
import torch

from bindllm.model.injection import InjectConfig, Injection
from families import misplaced
from tiny import tiny_decoder

LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "num_key_value_heads": 4}
LATENT |= {"qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}
SHAPES = {
    "gpt2": {},
    "phi": {},
    "phi3": {},
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32},
    "gpt_neox": {},
    "bloom": {},
    "gpt_bigcode": {},
    "deepseek_v3": {**LATENT, "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2},
}

# Its sliding layers have sinks, so a single token does not give its value.
SINKS = {"head_dim": 12, "v_head_dim": 8, "num_experts_per_tok": 2, "n_group": 1, "n_routed_experts": 4}


@pytest.mark.parametrize("family", SHAPES)
def test_values_are_those_of_the_attention(family):
    decoder = tiny_decoder(family, **SHAPES[family])
    assert not misplaced(decoder)


@pytest.mark.parametrize("family", ["qwen3", "phi3", "gpt_neox", "deepseek_v3", "mimo_v2_flash"])
@torch.no_grad()
def test_queries_and_keys_give_the_scores_of_the_attention(family):
    """At the first position, where the rotary embedding does nothing, or only changes the order of the features."""
    from transformers import AttentionInterface

    calls = []

    def note(module, query, key, value, mask, *, scaling, **options):
        groups = query.shape[1] // key.shape[1]
        calls.append((query * key.repeat_interleave(groups, 1)).sum(-1) * scaling)
        return value.repeat_interleave(query.shape[1] // value.shape[1], 1).transpose(1, 2), None

    AttentionInterface.register("noted", note)
    decoder = tiny_decoder(
        family, **{"mimo_v2_flash": SINKS, **SHAPES}.get(family, {}), attn_implementation="noted"
    )
    read, made = [], []
    layers = Injection(decoder, InjectConfig(kind="value"))._heads
    for heads in layers:
        heads.source.register_forward_pre_hook(lambda _, args: read.append(args[0]))
        heads.query.register_forward_hook(lambda _, args, output: made.append(output))
    decoder(input_ids=torch.tensor([[7]]), use_cache=False)
    for heads, x, features, scores in zip(layers, read, made, calls, strict=True):
        key = heads.keys(x)
        query = heads.queries(features, key.shape[-1])
        found = (query * key.repeat_interleave(query.shape[2] // key.shape[2], 2)).sum(-1)
        torch.testing.assert_close(found.transpose(1, 2), scores)
