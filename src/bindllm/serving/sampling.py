"""Choosing the next token of each row: greedy, or at random with a generator of the row's own."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from bindllm.errors import InputError
from bindllm.model.generation.constraint import Constraint

CANDIDATES = 256
"""Most likely tokens that are sorted first; nearly always the tokens of ``top_p`` are among them."""


@dataclass(frozen=True)
class Sampling:
    """How a row draws its tokens.

    Args:
        temperature: divides the logits; 0 takes the most likely token.
        top_p: the smallest set of tokens with this much probability is drawn from.
        generator: on the CPU, so that a seed gives the same answer on every device.
        presence_penalty: subtracted from the logits of tokens that the answer has already.
        frequency_penalty: the same, times the number of times that the answer has the token.
        logit_bias: added to the logits of tokens.
        constraint: tokens that may follow; None: all.
        counts: the tokens of the answer, if a penalty needs them.
    """

    temperature: float
    top_p: float
    generator: torch.Generator
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    constraint: Constraint | None = None
    counts: Counter[int] = field(default_factory=Counter)

    @classmethod
    def of(cls, temperature: float, top_p: float, seed: int | None, **further: Any) -> Sampling:
        """Return the sampling of an answer; without a seed, answers differ from call to call."""
        generator = torch.Generator()
        if seed is None:
            generator.seed()
        else:
            generator.manual_seed(seed)
        return cls(temperature, top_p, generator, **further)

    @property
    def error(self) -> str:
        """Why no token can follow; empty if one can."""
        if self.constraint is None or not self.constraint.error:
            return ""
        return f"the answer cannot follow its schema any further: {self.constraint.error}"

    @property
    def is_complete(self) -> bool:
        """Whether the constraint lets no token follow but the end."""
        return self.constraint is not None and self.constraint.is_complete

    def take(self, token: int) -> None:
        """Add a token to the answer."""
        if self.presence_penalty or self.frequency_penalty:
            self.counts[token] += 1
        if self.constraint is not None:
            self.constraint.take(token)

    def changes(self) -> dict[int, float]:
        """Return the numbers that are added to the logits of tokens, by OpenAI's formula."""
        found = dict(self.logit_bias)
        for token, count in self.counts.items():
            penalty = self.presence_penalty + count * self.frequency_penalty
            found[token] = found.get(token, 0.0) - penalty
        return found


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
    values = logits.amax(-1).tolist()
    logits = _changed(logits, rows)
    tokens = logits.argmax(-1).tolist()
    chosen = [n for n, row in enumerate(rows) if row.temperature > 0 and math.isfinite(values[n])]
    if chosen:
        drawn = _draw(logits[chosen], [rows[n] for n in chosen])
        for n, token in zip(chosen, drawn, strict=True):
            tokens[n] = token
    return tokens, values


def _changed(logits: Tensor, rows: Sequence[Sampling]) -> Tensor:
    """Return the logits with bias and penalties, and minus infinity for tokens that must not follow."""
    # One value for each row and token: no two are added in an order that the other rows could change.
    changes = [(n, token, value) for n, row in enumerate(rows) for token, value in row.changes().items()]
    limited = [n for n, row in enumerate(rows) if row.constraint is not None]
    if not changes and not limited:
        return logits
    logits = logits.clone()
    if changes:
        where, tokens, values = (torch.tensor(x, device=logits.device) for x in zip(*changes, strict=True))
        logits[where, tokens] += values
    for n in limited:
        allowed = rows[n].constraint.allowed(logits.shape[1])
        logits[n].masked_fill_(~allowed.to(logits.device), -math.inf)
    return logits


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
    # A number that rounds up to the sum means the last token with a share, not one after it.
    return torch.minimum(found, torch.searchsorted(sums, sums[:, -1:].contiguous())).squeeze(1).tolist()


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
