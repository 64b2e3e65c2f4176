"""How well two sides of a joint space find each other: recall at k in both directions, beside chance."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bindllm.cache.recall import chance, cosines, find_positions, hit_rate, join_positions, mean_ranks

RECALL_AT = (1, 5, 10)

_SCORES_AT_ONCE = 1 << 22


def retrieval_metrics(queries: Tensor, gallery: Tensor, right: Sequence[Sequence[int]]) -> dict[str, Any]:
    """Return recall@1/5/10 and what chance gives, the median rank, and how many there are of each.

    Args:
        queries: unit embeddings [Q, E], Q at least 1.
        gallery: unit embeddings [G, E] to choose from.
        right: for each query the numbers of its right answers, at least one.

    Returns:
        keys ``recall@k``, ``chance@k`` (0 to 1), ``median_rank`` (from 1; half ranks are ties), ``queries``,
        ``gallery``. Ties count as drawn in random order, so embeddings that are all alike get chance.
    """
    step = max(1, _SCORES_AT_ONCE // len(gallery))
    parts = [slice(start, start + step) for start in range(0, len(queries), step)]
    places = join_positions(
        [find_positions(cosines(queries[part], gallery).cpu(), right[part]) for part in parts]
    )
    counts = torch.tensor([len(numbers) for numbers in right])
    measured: dict[str, Any] = {"queries": len(queries), "gallery": len(gallery)}
    for k in RECALL_AT:
        measured[f"recall@{k}"] = round(float(hit_rate(places, k).mean()), 4)
        measured[f"chance@{k}"] = round(chance(counts, len(gallery), k), 4)
    measured["median_rank"] = round(float(mean_ranks(places).median()), 1)
    return measured


def mean_recall(metrics: dict[str, Any]) -> float:
    """Return the mean of recall@1/5/10 over all directions of what an alignment has measured.

    Example:
        >>> mean_recall({"loss": 2.0, "text_to_image": {"recall@1": 0.25, "recall@5": 0.5, "recall@10": 0.75}})
        0.5
    """
    ways = [value for value in metrics.values() if isinstance(value, dict)]
    recalls = [way[f"recall@{k}"] for way in ways for k in RECALL_AT]
    return sum(recalls) / len(recalls)
