"""Choosing the next token of each row: greedy, or at random with a generator of the row's own."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bindllm.errors import InputError

CANDIDATES = 256
"""Most likely tokens that are sorted first; nearly always the tokens of ``top_p`` are among them."""


@dataclass(frozen=True)
class Sampling:
    """How a row draws its tokens.

    Args:
        temperature: divides the logits; 0 takes the most likely token.
        top_p: the smallest set of tokens with this much probability is drawn from.
        generator: on the CPU, so that a seed gives the same answer on every device.

    Raises:
        InputError: a number is out of its range.
    """

    temperature: float
    top_p: float
    generator: torch.Generator

    @classmethod
    def of(cls, temperature: float, top_p: float, seed: int | None) -> Sampling:
        """Return the sampling of a request; without a seed, answers differ from call to call."""
        generator = torch.Generator()
        if seed is None:
            generator.seed()
        else:
            generator.manual_seed(seed)
        return cls(temperature, top_p, generator)


def check_sampling(temperature: float, top_p: float, seed: int | None) -> None:
    """Raise an `InputError` if a number is out of its range."""
    if not (math.isfinite(temperature) and temperature >= 0):
        raise InputError(f"temperature is {temperature}, expected at least 0; 0 is greedy")
    if not 0 < top_p <= 1:
        raise InputError(f"top_p is {top_p}, expected more than 0 and at most 1")
    if seed is not None and not -(2**63) <= seed < 2**64:
        raise InputError(f"seed is {seed}, expected a whole number of 64 bits")


def choose_tokens(logits: Tensor, rows: Sequence[Sampling]) -> tuple[list[int], list[float]]:
    """Return the next token of each row, and its largest logit; one that is not finite makes the row useless.

    Args:
        logits: [R, V], float32.
        rows: R of them. Each that samples draws one number, whatever the other rows do.
    """
    # A row that is not finite anywhere has such a maximum.
    values, tokens = (x.tolist() for x in logits.max(-1))
    chosen = [n for n, row in enumerate(rows) if row.temperature > 0 and math.isfinite(values[n])]
    if chosen:
        drawn = _draw(logits[chosen], [rows[n] for n in chosen])
        for n, token in zip(chosen, drawn, strict=True):
            tokens[n] = token
    return tokens, values


def _draw(logits: Tensor, rows: Sequence[Sampling]) -> list[int]:
    def column(values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float64, device=logits.device).unsqueeze(1)

    # The largest logit becomes 0 first, so that no temperature, however low, overflows.
    scaled = (logits - logits.amax(-1, keepdim=True)).double() / column([row.temperature for row in rows])
    shares, top_p = scaled.softmax(-1), [row.top_p for row in rows]
    if min(top_p) < 1:
        shares = torch.where(shares >= _threshold(shares, column(top_p)), shares, 0)
    # The token whose part of the line from 0 to the sum a random number falls into.
    sums = shares.cumsum(-1)
    numbers = [torch.rand((), generator=row.generator, dtype=torch.float64).item() for row in rows]
    found = torch.searchsorted(sums, column(numbers) * sums[:, -1:], right=True)
    return found.clamp_(max=sums.shape[1] - 1).squeeze(1).tolist()


def _threshold(shares: Tensor, top_p: Tensor) -> Tensor:
    """Return the share of the last token that belongs to the set of ``top_p``, [R, 1]; 0 for a ``top_p`` of 1.

    Tokens of equal share belong together: the order of equal values in a sort may depend on the other rows.
    """
    ordered = shares.topk(min(CANDIDATES, shares.shape[1])).values
    if bool(((ordered.sum(-1, keepdim=True) < top_p) & (top_p < 1)).any()):
        ordered = shares.sort(descending=True).values
    # A token belongs to the set if those before it do not reach `top_p` yet.
    count = (ordered.cumsum(-1) - ordered < top_p).sum(-1, keepdim=True)
    return torch.where(top_p < 1, ordered.gather(1, (count - 1).clamp_(min=0)), 0)
