"""Answers that a model draws to prompts, and the batch that they are learnt from."""

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

_PLAIN = {
    "top_k": 0,
    "top_p": 1.0,
    "min_p": None,
    "typical_p": 1.0,
    "repetition_penalty": 1.0,
    "num_beams": 1,
}
"""Options under which tokens are drawn from the whole distribution, whatever the decoder's folder recommends."""


@dataclass(frozen=True)
class Answers:
    """What a model has said to B prompts, G times to each: R = B * G answers, those to one prompt side by side.

    Attributes:
        batch: prompts with their answers, padded on the right, as `bindllm.data.collate.answer_batch` makes them; the
            labels are the drawn tokens, the end token included.
        texts: the answers without control tokens.
        cut: whether the answer reached the longest length without an end, bool, [R].
    """

    batch: Batch
    texts: list[str]
    cut: Tensor


def draw_answers(
    model: BindLLM, prompts: Batch, *, group_size: int, temperature: float, max_new_tokens: int
) -> Answers:
    """Draw answers from a model, all in one batch with a key/value cache; torch's random numbers are used.

    Args:
        model: in any mode; it answers in eval mode, without gradients.
        prompts: as `bindllm.data.collate.prompt_batch` makes them, B of them.
        group_size: answers to each prompt, G.
        temperature: divides the logits; 1 draws from the model itself.
        max_new_tokens: longest answer, its end token included.
    """
    ids = _generate(
        model,
        prompts,
        do_sample=True,
        temperature=temperature,
        num_return_sequences=group_size,
        max_new_tokens=max_new_tokens,
        **_PLAIN,
    )
    ended = torch.isin(ids, _end_tokens(model).to(ids.device))
    # The first end token belongs to the answer; what follows it is padding.
    said = ended.cumsum(1) - ended.long() == 0
    batch = _join(prompts, ids, said, group_size)
    return Answers(batch, _texts(model, ids), ~ended.any(1))


def greedy_answers(model: BindLLM, prompts: Batch, *, max_new_tokens: int) -> list[str]:
    """Return the likeliest answer to each prompt, token by token; arguments as for `draw_answers`."""
    ids = _generate(model, prompts, do_sample=False, num_beams=1, max_new_tokens=max_new_tokens)
    return _texts(model, ids)


def token_log_probs(model: Callable[..., BindOutput], batch: Batch, *, temperature: float = 1.0) -> Tensor:
    """Return the log-probability of each learnt token of a batch, row after row.

    Args:
        model: a `BindLLM` in any mode; the result has a gradient where gradients are on.
        batch: with what the model takes; the N learnt tokens are its labels after each row's first.
        temperature: that the tokens were drawn with.

    Returns:
        In nats, [N], float32 (float64 from logits of that kind).
    """
    output = model(**model_inputs(batch))
    logits = output.logits.to(torch.promote_types(output.logits.dtype, torch.float32))
    return -nn.functional.cross_entropy(logits / temperature, output.targets, reduction="none")


def _generate(model: BindLLM, prompts: Batch, **options: Any) -> Tensor:
    mode = model.training
    # Activation checkpointing, which train mode switches on, would do without the key/value cache.
    model.eval()
    try:
        return model.generate_from(**prompts, **options)
    finally:
        model.train(mode)


def _texts(model: BindLLM, ids: Tensor) -> list[str]:
    return [text.strip() for text in model.tokenizer.batch_decode(ids, skip_special_tokens=True)]


def _end_tokens(model: BindLLM) -> Tensor:
    """Ids that end a generation."""
    ends = model.decoder.generation_config.eos_token_id
    return torch.tensor([] if ends is None else ends, dtype=torch.long).reshape(-1)


def _join(prompts: Batch, ids: Tensor, said: Tensor, group_size: int) -> Batch:
    """Put answers [R, A] behind their prompts, and all padding to the right.

    Args:
        prompts: padded on the left, B of them.
        ids: tokens of the answers.
        said: 1 on tokens that belong to an answer.
        group_size: answers to each prompt.
    """
    given = {name: value.repeat_interleave(group_size, dim=0) for name, value in prompts.items()}
    mask, index = given["attention_mask"], given["media_index"]
    blank = torch.full_like(ids, IGNORE)
    columns = {
        "input_ids": torch.cat([given["input_ids"], ids], dim=1),
        "attention_mask": torch.cat([mask, said.long()], dim=1),
        # An answer hears what the end of its prompt hears, as in a generation.
        "media_index": torch.cat([index, torch.where(said, index[:, -1:], NO_MEDIA)], dim=1),
        "labels": torch.cat([torch.full_like(mask, IGNORE), torch.where(said, ids, blank)], dim=1),
    }
    width = columns["input_ids"].shape[1]
    padding = mask.shape[1] - mask.sum(1, keepdim=True)
    order = (torch.arange(width, device=ids.device) + padding) % width
    longest = int(columns["attention_mask"].sum(1).max())
    moved = {name: value.gather(1, order)[:, :longest] for name, value in columns.items()}
    return {**moved, "embeddings": given["embeddings"]}
