"""The tiny ImageBind-LLM of the published results: base, adapter files, and an encoder of given embeddings."""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from bindllm import Media
from goldens import fill, fill_input, filled
from tiny import tiny_tokenizer

ALLOW = ["imagebind_llm_tiny.GivenEncoder"]
HEADS, LAYERS = 4, 4
BASE_NAMES = {
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}


class GivenEncoder:
    """Gives the embeddings that the published results were made from: media are the number of a row."""

    modalities = ("image", "audio")
    embedding_size = 1024
    config: dict = {}  # noqa: RUF012

    def fingerprint(self) -> str:
        return hashlib.sha256(b"given").hexdigest()

    def to(self, device):
        return self

    def prepare(self, media: Media) -> torch.Tensor:
        return fill_input(f"emb_{media.modality}", (2, 1024), -3, 3)[int(media.source[0])]

    def embed(self, modality: str, inputs) -> torch.Tensor:
        return nn.functional.normalize(torch.stack(list(inputs)), dim=-1)


def row(modality: str, number: int, weight: float = 1.0) -> Media:
    return Media(modality, np.array([number]), weight)


def write_base(folder, **changes):
    """Write the tiny LLaMA as a Hugging Face folder, row by row as the published facts say."""
    state = filled("imagebind_llm_tiny_pretrain")
    tensors = {
        "model.embed_tokens.weight": state["llama.tok_embeddings.weight"],
        "model.norm.weight": state["llama.norm.weight"],
        "lm_head.weight": state["llama.output.weight"],
    }
    for layer in range(LAYERS):
        for theirs, ours in BASE_NAMES.items():
            value = state[f"llama.layers.{layer}.{theirs}.weight"]
            if theirs in ("attention.wq", "attention.wk"):
                size = len(value) // HEADS
                order = [h * size + i for h in range(HEADS) for i in [*range(0, size, 2), *range(1, size, 2)]]
                value = value[order]
            tensors[f"model.layers.{layer}.{ours}.weight"] = value
    config = LlamaConfig(
        **{
            "vocab_size": 96,
            "hidden_size": 64,
            "intermediate_size": 192,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": HEADS,
            "rms_norm_eps": 1e-6,
            "tie_word_embeddings": False,
            "bos_token_id": 1,
            "eos_token_id": 2,
            **changes,
        }
    )
    model = LlamaForCausalLM(config)
    if not changes:
        model.load_state_dict(tensors)
    model.save_pretrained(folder)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    tokenizer.add_special_tokens({"bos_token": "<|im_start|>"})
    tokenizer.save_pretrained(folder)
    return str(folder)


def adapter_of(table: str) -> dict[str, torch.Tensor]:
    """What a published adapter file holds of a whole model."""
    parts = ("bias", "gate", "lora", "norm")
    return {
        name: value
        for name, value in filled(table).items()
        if not name.startswith("llama.") or any(part in name for part in parts)
    }


def published(phase: str) -> dict[str, torch.Tensor]:
    if phase == "finetune_last2":
        return adapter_of("imagebind_llm_tiny_finetune") | {
            "prefix_query.weight": fill("prefix_query.weight", (2, 64))
        }
    if phase == "base":
        state = adapter_of("imagebind_llm_tiny_pretrain")
        return {name: value * (0 if "gate" in name else 1) for name, value in state.items()}
    return adapter_of(f"imagebind_llm_tiny_{phase}")
