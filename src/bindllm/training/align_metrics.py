"""Retrieval across two sides of a joint space: recall at k beside chance, with ties and several right answers."""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch import Tensor

RECALL_AT = (1, 5, 10)

_CHUNK = 1024


def best_ranks(queries: Tensor, gallery: Tensor, belongs: list[list[int]]) -> Tensor:
    """Return for each query the rank, from 1, of the best of its right answers: int64 [Q].

    A wrong answer with the same similarity ranks before a right one, so that embeddings which are all alike get
    nothing for it; other right answers do not count against the best.

    Args:
        queries: unit embeddings [Q, E].
        gallery: unit embeddings [G, E] to choose from.
        belongs: for each query the numbers of its right answers, at least one.

    Example:
        >>> best_ranks(torch.eye(2), torch.eye(2), [[0], [0]])
        tensor([1, 2])
    """
    ranks = []
    for start in range(0, len(queries), _CHUNK):
        chunk = belongs[start : start + _CHUNK]
        scores = queries[start : start + _CHUNK] @ gallery.T
        right = torch.zeros_like(scores, dtype=torch.bool)
        rows = [row for row, answers in enumerate(chunk) for _ in answers]
        right[rows, [answer for answers in chunk for answer in answers]] = True
        best = scores.masked_fill(~right, float("-inf")).max(dim=1, keepdim=True).values
        ranks.append(1 + ((scores >= best) & ~right).sum(dim=1))
    return torch.cat(ranks)


def chance(right: int, gallery: int, k: int) -> float:
    """Return the probability that k of ``gallery`` things, drawn blindly, hold one of the ``right`` ones.

    Example:
        >>> round(chance(1, 100, 10), 6), chance(2, 4, 1), chance(2, 4, 3)
        (0.1, 0.5, 1.0)
    """
    if gallery - right < k:
        return 1.0
    return 1 - prod((gallery - right - n) / (gallery - n) for n in range(k))


def retrieval_metrics(queries: Tensor, gallery: Tensor, belongs: list[list[int]]) -> dict[str, Any]:
    """Return recall@1/5/10 and what chance gives, the median rank, and how many there are of each.

    Args:
        queries: unit embeddings [Q, E], Q at least 1.
        gallery: unit embeddings [G, E].
        belongs: for each query the numbers of its right answers.

    Returns:
        keys ``recall@k``, ``chance@k`` (0 to 1), ``median_rank``, ``queries``, ``gallery``.
    """
    ranks = best_ranks(queries, gallery, belongs)
    measured: dict[str, Any] = {"queries": len(queries), "gallery": len(gallery)}
    for k in RECALL_AT:
        by_chance = [chance(len(answers), len(gallery), k) for answers in belongs]
        measured[f"recall@{k}"] = round(float((ranks <= k).double().mean()), 4)
        measured[f"chance@{k}"] = round(sum(by_chance) / len(by_chance), 4)
    measured["median_rank"] = int(ranks.median())
    return measured
