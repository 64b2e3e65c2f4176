"""Sampling answers to prompts, and the training batch that is made of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bindllm.conversation import NO_MEDIA
from bindllm.data.collate import Batch, model_inputs
from bindllm.data.rows import IGNORE
from bindllm.model.bindllm import BindLLM, BindOutput


@dataclass(frozen=True)
class Answers:
    """The answers of a model to B prompts, G each: R = B * G answers, grouped by prompt.

    Attributes:
        batch: prompts with their answers, padded on the right, as from `bindllm.data.collate.answer_batch`; the labels
            are the sampled tokens, including the end token.
        texts: the answers without control tokens.
        cut: whether the answer reached the maximum length without an end token, bool, [R].
    """

    batch: Batch
    texts: list[str]
    cut: Tensor


def draw_answers(
    model: BindLLM, prompts: Batch, *, group_size: int, temperature: float, max_new_tokens: int
) -> Answers:
    """Sample answers, all in one batch with a key/value cache, with torch's global random numbers.

    Args:
        model: in any mode; it generates in eval mode, without gradients.
        prompts: a batch of `bindllm.data.collate.prompt_batch`, B rows.
        group_size: answers to each prompt, G.
        temperature: divisor of the logits; 1 samples from the model's own distribution.
        max_new_tokens: longest answer, including its end token.
    """
    ids = _generate(
        model,
        prompts,
        do_sample=True,
        temperature=temperature,
        num_return_sequences=group_size,
        max_new_tokens=max_new_tokens,
    )
    ended = torch.isin(ids, torch.tensor(model.settings.eos_token_id, device=ids.device))
    # The first end token belongs to the answer; padding follows it.
    in_answer = ended.cumsum(1) - ended.long() == 0
    batch = _join(prompts, ids, in_answer, group_size)
    return Answers(batch, model.decode(ids), ~ended.any(1))


def greedy_answers(model: BindLLM, prompts: Batch, *, max_new_tokens: int) -> list[str]:
    """Return the greedy answer to each prompt; arguments as for `draw_answers`."""
    return model.decode(_generate(model, prompts, max_new_tokens=max_new_tokens))


def token_log_probs(model: Callable[..., BindOutput], batch: Batch, *, temperature: float = 1.0) -> Tensor:
    """Return the log-probability of each supervised token of a batch, row after row.

    Args:
        model: a `BindLLM` in any mode; the result has a gradient if gradients are enabled.
        batch: inputs of the model; the N supervised tokens are its labels after the first of each row.
        temperature: the sampling temperature.

    Returns:
        Log-probabilities in nats, [N], float32 (float64 if the logits are).
    """
    output = model(**model_inputs(batch))
    logits = output.logits.to(torch.promote_types(output.logits.dtype, torch.float32))
    return -nn.functional.cross_entropy(logits / temperature, output.targets, reduction="none")


def _generate(model: BindLLM, prompts: Batch, **options: Any) -> Tensor:
    mode = model.training
    # Activation checkpointing, which train mode enables, would disable the key/value cache.
    model.eval()
    try:
        return model.generate_from(**prompts, **options)
    finally:
        model.train(mode)


def _join(prompts: Batch, ids: Tensor, in_answer: Tensor, group_size: int) -> Batch:
    """Append answers [R, A] to their prompts, and move all padding to the right."""
    given = {name: value.repeat_interleave(group_size, dim=0) for name, value in prompts.items()}
    mask, index = given["attention_mask"], given["media_index"]
    blank = torch.full_like(ids, IGNORE)
    columns = {
        "input_ids": torch.cat([given["input_ids"], ids], dim=1),
        "attention_mask": torch.cat([mask, in_answer.long()], dim=1),
        # An answer attends to the media of the end of its prompt, as in generation.
        "media_index": torch.cat([index, torch.where(in_answer, index[:, -1:], NO_MEDIA)], dim=1),
        "labels": torch.cat([torch.full_like(mask, IGNORE), torch.where(in_answer, ids, blank)], dim=1),
    }
    width = columns["input_ids"].shape[1]
    padding = mask.shape[1] - mask.sum(1, keepdim=True)
    order = (torch.arange(width, device=ids.device) + padding) % width
    longest = int(columns["attention_mask"].sum(1).max())
    moved = {name: value.gather(1, order)[:, :longest] for name, value in columns.items()}
    return {**moved, "embeddings": given["embeddings"]}
