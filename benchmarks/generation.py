"""Tokens per second of `generate` with media, against Hugging Face `generate` on the bare decoder."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.measure import Metric, paired
from benchmarks.parts import bare_decoder, bound_model
from bindllm import Conversation, Media, Message
from bindllm.model.bindllm import BindLLM
from bindllm.model.generation import render_prompts

NEW_TOKENS = 32


def options_of(model: BindLLM) -> dict[str, Any]:
    """Return the options of a greedy generation of exactly `NEW_TOKENS` tokens."""
    return {
        "max_new_tokens": NEW_TOKENS,
        "min_new_tokens": NEW_TOKENS,
        "do_sample": False,
        "pad_token_id": model.tokenizer.pad_token_id,
    }


def prompt_batch(model: BindLLM, rows: int) -> dict[str, Tensor]:
    """Return the inputs of `BindLLM.generate_from`: the same question in each row, about an image of its own."""
    prompt = Conversation((Message("user", [Media.image(b""), "Describe this image in one sentence."]),))
    names = ("input_ids", "attention_mask", "media_index")
    rendered = render_prompts([prompt] * rows, model.tokenizer)
    embeddings = torch.nn.functional.normalize(torch.randn(rows, 1, 1280), dim=-1)
    return {
        name: x.to(model.device)
        for name, x in zip((*names, "embeddings"), (*rendered, embeddings), strict=True)
    }


def metrics() -> list[Metric]:
    """Measure batch sizes 1 and 32, with precomputed embeddings because encoding is measured separately."""
    bare, model = bare_decoder(), bound_model().eval()
    options = options_of(model)
    found, speed = [], {}
    for rows, repeats in ((1, 5), (32, 3)):
        batch = prompt_batch(model, rows)
        text = {name: batch[name] for name in ("input_ids", "attention_mask")}

        def ours(batch=batch) -> None:
            model.generate_from(**batch, **options)

        def theirs(text=text) -> None:
            bare.generate(**text, **options)

        ratio, a, b = paired(theirs, ours, repeats=repeats)
        speed[rows] = rows * NEW_TOKENS / b
        found.append(
            Metric(
                f"generate_b{rows}_over_hf",
                ratio,
                "ratio of tokens/s",
                1.0,
                f"{speed[rows]:.1f} tokens/s over {rows * NEW_TOKENS / a:.1f}; at least 0.95",
            )
        )
    weights = sum(p.numel() * p.element_size() for p in bare.parameters())
    found.append(
        Metric(
            "generate_b32_over_b1",
            speed[32] / speed[1],
            "ratio of tokens/s",
            32.0,
            f"at least 6; a step reads {weights / 1e6:.0f} MB of weights whatever the batch, so 32 is the ceiling",
        )
    )
    return found
