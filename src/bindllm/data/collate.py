"""From samples to the tensors of a batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from bindllm.conversation import NO_MEDIA
from bindllm.data.rows import IGNORE, Sample
from bindllm.errors import InputError
from bindllm.media import Media
from bindllm.model.context.records import CONTEXT_INPUTS
from bindllm.model.generation import by_row

Batch = dict[str, Tensor]
MediaGroup = tuple[Media, ...]
Lookup = Callable[[Sequence[MediaGroup]], Tensor]
"""Returns the fused embedding of each of N media groups: [N, E], unit norm."""
MODEL_INPUTS = (
    *("input_ids", "attention_mask", "media_index", "embeddings", "labels", "tokens"),
    *CONTEXT_INPUTS,
)
"""Entries of a training batch that `BindLLM.forward` takes; the others are for the objective."""


@runtime_checkable
class TokenLookup(Protocol):
    """A `Lookup` that may return tokens too, for a model with more than one bind token."""

    def __call__(self, groups: Sequence[MediaGroup]) -> Tensor:
        """Return the fused embedding of each of N media groups: [N, E], unit norm."""
        ...

    def tokens(self, groups: Sequence[MediaGroup]) -> Tensor | None:
        """Return the tokens of each of N media groups, [N, n, C], see `group_tokens`; None if none are asked for."""
        ...


def tokens_of(lookup: Lookup, groups: Sequence[MediaGroup]) -> Tensor | None:
    """Return the tokens of media groups, [N, n, C], or None if the lookup has none."""
    return lookup.tokens(groups) if isinstance(lookup, TokenLookup) else None


@runtime_checkable
class ContextLookup(Protocol):
    """A `Lookup` that may return retrieved records too, for a model with context."""

    def __call__(self, groups: Sequence[MediaGroup]) -> Tensor:
        """Return the fused embedding of each of N media groups: [N, E], unit norm."""
        ...

    def records(self, groups: Sequence[MediaGroup]) -> tuple[Tensor, Tensor, Tensor] | None:
        """Return embeddings [N, K, E], scores [N, K] and text ids [N, K, S] of the records of media groups, or None."""
        ...


def records_of(lookup: Lookup, groups: Sequence[MediaGroup]) -> tuple[Tensor, Tensor, Tensor] | None:
    """Return the records of media groups, or None if the lookup has none."""
    return lookup.records(groups) if isinstance(lookup, ContextLookup) else None


def collate(samples: Sequence[Sample], lookup: Lookup, *, pad_id: int) -> Batch:
    """Make a training batch, padded on the right: B rows, followed by the rejected answers of preference pairs.

    Args:
        samples: the rows, B of them; R of them have a rejected answer.
        lookup: source of the embeddings; called once for the whole batch. The answers of a pair share theirs.
        pad_id: token id of padding; masked, so any id does.

    Returns:
        Inputs of the model (`model_inputs`): ``input_ids``, ``attention_mask`` (1 on tokens), ``labels`` (-100 on
        padding) and ``media_index`` (-1 on padding), each int64 [B + R, T], and ``embeddings``, [B + R, M, E],
        zeros if a row has fewer than M groups. M is the largest number of groups, at least 1. If the lookup returns
        tokens, ``tokens``, [B + R, M, n, C]; zeros are no tokens. If it returns records, those of each group:
        ``context_embeddings``, [B + R, M, K, E], zeros are no records; ``context_scores``, [B + R, M, K]; and
        ``context_ids``, int64 [B + R, M, K, S].
        Inputs of the objective: ``numbers``, the index of each row in its split, int64 [B]; and if every row is
        judged, ``desirable``, bool [B]: whether its answer is a wanted one, like the chosen one of a pair.

    Raises:
        InputError: no rows, or rows without a supervised token, which would make the loss NaN; the message names
            them.
    """
    paired = [n for n, sample in enumerate(samples) if sample.rejected is not None]
    rows = [*samples, *(samples[n].rejected for n in paired)]
    answers = _answers(rows, pad_id=pad_id)
    media = {name: torch.cat([value, value[paired]]) for name, value in _media(samples, lookup).items()}
    batch = {
        **answers,
        **media,
        "numbers": torch.tensor([sample.number for sample in samples]),  # [B]
    }
    # An objective needs a judgment of every row, so a mixed batch has no such entry.
    if all(sample.rejected is not None or sample.desirable is not None for sample in samples):
        batch["desirable"] = torch.tensor([sample.desirable is not False for sample in samples])
    return batch


def answer_batch(samples: Sequence[Sample], lookup: Lookup, *, pad_id: int) -> Batch:
    """Make a batch as `collate` does, without rejected answers: only the inputs of the model."""
    answers = _answers(samples, pad_id=pad_id)
    return {**answers, **_media(samples, lookup)}


def model_inputs(batch: Batch) -> Batch:
    """Return the entries of a batch that `BindLLM.forward` takes."""
    return {name: batch[name] for name in MODEL_INPUTS if name in batch}


def prompt_batch(samples: Sequence[Sample], lookup: Lookup, *, pad_id: int) -> Batch:
    """Make a batch for generation: each row up to the header of its last answer, padded on the left.

    Args:
        lookup: source of the embeddings; called once for the whole batch.

    Returns:
        ``input_ids``, ``attention_mask``, ``media_index`` [B, T], ``embeddings`` [B, M, E] and perhaps ``tokens``, as
        in `collate`.
    """
    if not samples:
        raise InputError("a batch without rows")
    lengths = [sample.prompt_length for sample in samples]
    return {**_pad(samples, lengths, pad_id=pad_id, left=True), **_media(samples, lookup)}


def _answers(samples: Sequence[Sample], *, pad_id: int) -> dict[str, Tensor]:
    """Tokens, mask, media index and labels of whole rows."""
    if not samples:
        raise InputError("a batch without rows")
    # The mean over no tokens is NaN, which would reach the weights.
    if unsupervised := [sample.name for sample in samples if not sample.num_supervised]:
        raise InputError(
            f"{len(unsupervised)} rows of a batch have no token to learn from: {', '.join(unsupervised[:5])}"
        )
    lengths = [len(sample.input_ids) for sample in samples]
    return {
        **_pad(samples, lengths, pad_id=pad_id, left=False),
        "labels": _stack([sample.labels for sample in samples], IGNORE, left=False),
    }


def _pad(samples: Sequence[Sample], lengths: list[int], *, pad_id: int, left: bool) -> dict[str, Tensor]:
    """Tokens, mask and media index of the first ``lengths[b]`` tokens of each row."""
    ids = [sample.input_ids[:length] for sample, length in zip(samples, lengths, strict=True)]
    index = [sample.media_index[:length] for sample, length in zip(samples, lengths, strict=True)]
    return {
        "input_ids": _stack(ids, pad_id, left=left),
        "attention_mask": _stack([np.ones_like(row) for row in ids], 0, left=left),
        "media_index": _stack(index, NO_MEDIA, left=left),
    }


def _stack(rows: Sequence[np.ndarray], fill: int, *, left: bool) -> Tensor:
    width = max(len(row) for row in rows)
    batch = np.full((len(rows), width), fill, dtype=np.int64)  # [B, T]
    for b, row in enumerate(rows):
        batch[b, slice(width - len(row), None) if left else slice(len(row))] = row
    return torch.from_numpy(batch)


def _media(samples: Sequence[Sample], lookup: Lookup) -> dict[str, Tensor]:
    """Embeddings of the media groups of each row, [B, M, E], and their tokens, if the lookup returns any."""
    # One lookup for the whole batch. At least one group, as the model takes embeddings even without media.
    groups = [group for sample in samples for group in sample.media]
    found = {"embeddings": lookup(groups), "tokens": tokens_of(lookup, groups)}
    found |= dict(zip(CONTEXT_INPUTS, records_of(lookup, groups) or (None,) * 3, strict=True))
    counts = [len(sample.media) for sample in samples]
    return {name: by_row(values, counts) for name, values in found.items() if values is not None}
