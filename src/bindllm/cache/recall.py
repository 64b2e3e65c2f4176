"""Recall at k with ties and several right answers, mean ranks, and the recall of a random order.

Equal scores do not rank: such answers count as if they were in random order. An encoder that gives every input the same
embedding therefore reaches exactly chance, whatever the order of the files.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

DECIMALS = 6
"""Cosines are rounded to this many decimals before they are compared, so that equal embeddings stay equal whatever the
order of summation."""


class Positions(NamedTuple):
    """The position of the best right answer of each query, three times int64 [Q].

    Args:
        above: Wrong answers with a higher score.
        tied: Wrong answers with the same score.
        equals: Right answers with that score, including itself.
    """

    above: Tensor
    tied: Tensor
    equals: Tensor


def cosines(queries: Tensor, candidates: Tensor) -> Tensor:
    """Return the rounded cosines of unit embeddings [Q, E] and [C, E]: float64, [Q, C]."""
    return (queries.double() @ candidates.double().T).round(decimals=DECIMALS)


def find_positions(scores: Tensor, right: Sequence[Sequence[int]]) -> Positions:
    """Find the best right answer of each query. If its score is NaN, all other answers are above it.

    Args:
        scores: Of each candidate, [Q, C].
        right: Indices of the right candidates of each query, at least one each.
    """
    # A flat list of pairs, because queries have different numbers of right answers.
    counts = torch.tensor([len(indices) for indices in right])
    rows = torch.arange(len(right)).repeat_interleave(counts)
    columns = torch.tensor([index for indices in right for index in indices])
    values = scores[rows, columns]
    best = torch.full((len(right),), -torch.inf, dtype=scores.dtype).scatter_reduce(0, rows, values, "amax")
    equals = torch.zeros(len(right), dtype=torch.long).index_add(0, rows, (values == best[rows]).long())
    # Not `scores > best`: with NaN on either side that would be False.
    above = (~(scores <= best[:, None])).sum(dim=1)
    return Positions(above, (scores == best[:, None]).sum(dim=1) - equals, equals)


def join_positions(parts: Sequence[Positions]) -> Positions:
    """Return the positions of all parts of the queries."""
    return Positions(*(torch.cat(columns) for columns in zip(*parts, strict=True)))


def hit_rate(positions: Positions, k: int) -> Tensor:
    """Return for each query the probability that a right answer is among the first k: float64, [Q].

    It is 0 or 1 without ties; tied answers count as being in random order.

    Examples:
        >>> hit_rate(find_positions(torch.tensor([[0.9, 0.5, 0.5]]), [[1]]), 2)
        tensor([0.5000], dtype=torch.float64)
    """
    # Positions among the first k that the tied answers share.
    free = (k - positions.above).clamp(min=0)
    miss = torch.ones(len(free), dtype=torch.float64)
    # Drawing without replacement: the probability that every free position goes to a wrong answer.
    for drawn in range(k):
        wrong = (positions.tied - drawn).clamp(min=0).double()
        left = (positions.tied + positions.equals - drawn).clamp(min=1)
        miss = torch.where(drawn < free, miss * wrong / left, miss)
    return 1 - miss


def mean_ranks(positions: Positions) -> Tensor:
    """Return the rank, from 1, of the best right answer of each query, a mean over the orders of ties: float64, [Q].

    Other right answers do not count against the best.

    Examples:
        >>> mean_ranks(find_positions(torch.tensor([[0.9, 0.5, 0.5]]), [[1]]))
        tensor([2.5000], dtype=torch.float64)
    """
    # The first of r right answers among r + w tied ones has the mean rank (r + w + 1) / (r + 1).
    return positions.above + (positions.tied + positions.equals + 1).double() / (positions.equals + 1)


def chance(num_right: Tensor, num_candidates: int, k: int) -> float:
    """Return the mean hit rate of a random order.

    Args:
        num_right: Number of right answers of each query, int64 [Q].
        num_candidates: Number of all answers.
        k: As for `hit_rate`.

    Examples:
        >>> round(chance(torch.tensor([1]), 50, 5), 6)
        0.1
    """
    # Equal scores count as a random order, so chance is the hit rate of a complete tie.
    everything_tied = Positions(torch.zeros_like(num_right), num_candidates - num_right, num_right)
    return float(hit_rate(everything_tied, k).mean())
