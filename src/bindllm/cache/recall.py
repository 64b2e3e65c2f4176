"""How often the right answer is among the first: recall with ties and several right answers, and what chance gives.

Scores that are equal are no ranking: such answers count as if drawn in random order. An encoder that gives everything
the same embedding so reaches exactly chance, instead of whatever the order of the files makes of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

DECIMALS = 6
"""Cosines are compared rounded to this: equal embeddings must stay equal whatever the order of summation was."""


class Places(NamedTuple):
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


def find_places(scores: Tensor, right: Sequence[Sequence[int]]) -> Places:
    """Find the best right answer of each query. A score that is NaN is no score: all answers are above it.

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
    above = (~(scores <= best[:, None])).sum(dim=1)
    return Places(above, (scores == best[:, None]).sum(dim=1) - equals, equals)


def join_places(parts: Sequence[Places]) -> Places:
    """Return the places of all parts of the queries."""
    return Places(*(torch.cat(columns) for columns in zip(*parts, strict=True)))


def hit_rate(places: Places, k: int) -> Tensor:
    """Return for each query the probability that a right answer is among the first k: float64, [Q].

    It is 0 or 1 where no score is tied; ties are taken to be in random order.

    Example:
        >>> hit_rate(find_places(torch.tensor([[0.9, 0.5, 0.5]]), [[1]]), 2)
        tensor([0.5000], dtype=torch.float64)
    """
    free = (k - places.above).clamp(min=0)
    miss = torch.ones(len(free), dtype=torch.float64)
    # Drawing without replacement: every place is taken by a wrong one.
    for drawn in range(k):
        wrong = (places.tied - drawn).clamp(min=0).double()
        left = (places.tied + places.equals - drawn).clamp(min=1)
        miss = torch.where(drawn < free, miss * wrong / left, miss)
    return 1 - miss


def mean_ranks(places: Places) -> Tensor:
    """Return the rank, from 1, of the best right answer of each query, a mean over the orders of ties: float64, [Q].

    Other right answers do not count against the best.

    Example:
        >>> mean_ranks(find_places(torch.tensor([[0.9, 0.5, 0.5]]), [[1]]))
        tensor([2.5000], dtype=torch.float64)
    """
    return places.above + (places.tied + places.equals + 1).double() / (places.equals + 1)


def chance(num_right: Tensor, num_candidates: int, k: int) -> float:
    """Return the mean hit rate of a random order.

    Args:
        num_right: right answers of each query, int64 [Q].
        num_candidates: all answers.
        k: as for `hit_rate`.

    Example:
        >>> round(chance(torch.tensor([1]), 50, 5), 6)
        0.1
    """
    everything_tied = Places(torch.zeros_like(num_right), num_candidates - num_right, num_right)
    return float(hit_rate(everything_tied, k).mean())
