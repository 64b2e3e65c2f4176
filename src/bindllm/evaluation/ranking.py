"""Where the right answer stands among all: accuracy, recall and average precision, and what chance would give.

Scores that are equal are no ranking: such answers count as if drawn in random order. An encoder that gives everything
the same embedding so reaches exactly chance, instead of whatever the order of the files makes of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from bindllm.errors import MissingExtraError

DECIMALS = 6
"""Cosines are compared rounded to this: equal embeddings must stay equal whatever the order of summation was."""


class Ranks(NamedTuple):
    """Where the best right answer of each query stands, three times int64 [Q].

    Args:
        above: wrong answers with a higher score.
        tied: wrong answers with the same score.
        equals: right answers with that score, itself included.
    """

    above: Tensor
    tied: Tensor
    equals: Tensor


def cosines(queries: Tensor, candidates: Tensor) -> Tensor:
    """Return the rounded cosines of unit embeddings [Q, E] and [C, E]: float64, [Q, C]."""
    return (queries.double() @ candidates.double().T).round(decimals=DECIMALS)


def rank(scores: Tensor, right: Sequence[Sequence[int]]) -> Ranks:
    """Find the best right answer of each query.

    Args:
        scores: of each candidate, [Q, C].
        right: numbers of the right candidates of each query, at least one each.
    """
    counts = torch.tensor([len(numbers) for numbers in right])
    rows = torch.arange(len(right)).repeat_interleave(counts)
    columns = torch.tensor([number for numbers in right for number in numbers])
    values = scores[rows, columns]
    best = torch.full((len(right),), -torch.inf, dtype=scores.dtype).scatter_reduce(0, rows, values, "amax")
    equals = torch.zeros(len(right), dtype=torch.long).index_add(0, rows, (values == best[rows]).long())
    above = (scores > best[:, None]).sum(dim=1)
    return Ranks(above, (scores == best[:, None]).sum(dim=1) - equals, equals)


def join(parts: Sequence[Ranks]) -> Ranks:
    """Return the ranks of all parts of the queries."""
    return Ranks(*(torch.cat(columns) for columns in zip(*parts, strict=True)))


def hit_rate(ranks: Ranks, k: int) -> Tensor:
    """Return for each query the probability that a right answer is among the first k: float64, [Q].

    It is 0 or 1 where no score is tied; ties are taken to be in random order.

    Example:
        >>> hit_rate(rank(torch.tensor([[0.9, 0.5, 0.5]]), [[1]]), 2)
        tensor([0.5000], dtype=torch.float64)
    """
    places = (k - ranks.above).clamp(min=0)
    miss = torch.ones(len(places), dtype=torch.float64)
    # Drawing without replacement: every place is taken by a wrong one.
    for drawn in range(k):
        wrong = (ranks.tied - drawn).clamp(min=0).double()
        left = (ranks.tied + ranks.equals - drawn).clamp(min=1)
        miss = torch.where(drawn < places, miss * wrong / left, miss)
    return 1 - miss


def chance(num_right: Tensor, num_candidates: int, k: int) -> float:
    """Return the mean hit rate of a random order.

    Args:
        num_right: right answers of each query, int64 [Q].
        num_candidates: all answers.
        k: as for `hit_rate`.
    """
    everything_tied = Ranks(torch.zeros_like(num_right), num_candidates - num_right, num_right)
    return float(hit_rate(everything_tied, k).mean())


def average_precisions(scores: Tensor, targets: Tensor) -> Tensor:
    """Return the average precision of each class: float64, [C].

    Args:
        scores: cosine of each item with each class, -1..1, [N, C].
        targets: whether the class is right, bool [N, C]; each class is right for at least one item, since without one
            there is no such number.

    Raises:
        MissingExtraError: torchmetrics is not installed.
    """
    try:
        from torchmetrics.functional.classification import binary_average_precision
    except ImportError as error:
        raise MissingExtraError(
            "torchmetrics", extra="report", purpose="compute average precision"
        ) from error
    # Outside of 0..1 torchmetrics would take them for logits, and its sigmoid would make more of them equal.
    shares = ((scores.double() + 1) / 2).clamp(0, 1)
    # One by one: its mean over classes counts a class without a right item as 0.
    parts = zip(shares.unbind(dim=1), targets.long().unbind(dim=1), strict=True)
    return torch.stack([binary_average_precision(share, target).double() for share, target in parts])


def chance_of_precision(num_right: Tensor, num_items: int) -> Tensor:
    """Return the expected average precision of items in random order: float64, [C].

    Args:
        num_right: items for which the class is right, at least 1, [C].
        num_items: all items.

    Example:
        >>> chance_of_precision(torch.tensor([1]), 2)
        tensor([0.7500], dtype=torch.float64)
    """
    harmonic = float((1 / torch.arange(1, num_items + 1, dtype=torch.float64)).sum())
    others = (num_right.double() - 1) / max(num_items - 1, 1)
    return (harmonic + others * (num_items - harmonic)) / num_items
