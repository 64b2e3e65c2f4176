"""Attention of a decoder's heads over bind tokens, with the decoder's own projections: injection kind ``attend``.

Also `BindContext`, the bind vectors and routes of one forward, `RUNNING`, through which the hooks of all layers find
them, and `GenerationState`, which makes them for each step of a generation.

Letters: `B` batch, `T` tokens, `M` media groups, `N` bind tokens of a group, `D` decoder width, `H` query heads, `Hkv`
key/value heads, `d` head size.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from functools import wraps
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.utils.checkpoint import checkpoint

from bindllm.errors import InputError
from bindllm.model.injection.projections import Heads

if TYPE_CHECKING:
    from bindllm.model.injection import Injection

RUNNING: ContextVar[BindContext | None] = ContextVar("bindllm_running", default=None)
"""The bind vectors of the forward that runs in this thread; None outside of a forward, and in one without media."""


@dataclass
class BindContext:
    """Bind vectors and routes of one forward, the same for every layer.

    Attributes:
        bind: bind vectors, [B, M, D], or bind tokens, [B, M, N, D].
        route: 1 if token ``t`` listens to group ``m``, else 0, [B, T, M].
        masked: the bind tokens that a token does not attend to, of `mask_tokens`, or None.
        terms: gated terms, or keys and values, already computed, by layer; kept over the steps of a generation. In
            training those of kind ``cross``, else None.
        arrivals: number of terms that were added in this forward.
        retrieved: the same for context tokens, which are always read by attention; None without any.
        words: word embeddings of the tokens, [B, T, D], of unit scale; None if no context token has the word before it.
    """

    bind: Tensor
    route: Tensor
    masked: Tensor | None = None
    terms: dict[int, Any] | None = None
    arrivals: int = 0
    retrieved: BindContext | None = None
    words: Tensor | None = None

    @classmethod
    def of(
        cls,
        bind: Tensor,
        media_index: Tensor,
        terms: dict[int, Any] | None = None,
        *,
        attends_to_one: bool = False,
    ) -> Self:
        """Return the context of bind vectors or tokens and a media index [B, T].

        Args:
            bind: [B, M, D] or [B, M, N, D].
            attends_to_one: whether one bind token is read by attention too.
        """
        route = route_tokens(media_index, bind.shape[1])
        if attends_to_one:
            bind = bind if bind.dim() == 4 else bind.unsqueeze(2)
        elif bind.dim() == 3 or bind.shape[2] == 1:
            # Attention over one key has weight 1, so one bind token needs no queries and no keys.
            return cls(bind if bind.dim() == 3 else bind.squeeze(2), route, None, terms)
        return cls(bind, route, mask_tokens(bind, route), terms)

    @classmethod
    def of_retrieved(cls, context: Tensor, media_index: Tensor, terms: dict[int, Any] | None = None) -> Self:
        """Return the context of context tokens [B, M, C, D]; a group with zeros only has none."""
        route = route_tokens(media_index, context.shape[1]) & context.flatten(2).any(-1).unsqueeze(1)
        return cls(context, route, mask_tokens(context, route, first_is_token=False), terms)

    @property
    def has_tokens(self) -> bool:
        """Whether a group has several bind tokens, so that terms are computed by attention."""
        return self.bind.dim() == 4

    def add(self, hidden: Tensor, term: Tensor) -> Tensor:
        """Return hidden states [B, T, C] with a term added: of each token [B, T, C], or of its group, [B, M, C].

        A family with S residual streams, [S, B, T, C] (Gemma 3n) or [B, T, S, C] (DeepSeek V4), gets it in each.
        """
        self.arrivals += 1
        if not self.has_tokens:
            if self.route.dtype != hidden.dtype:
                # Once per forward; every layer after the first finds it converted.
                self.route = self.route.to(hidden.dtype)
            # Not baddbmm: autocast would return the whole residual stream in low precision.
            term = torch.bmm(self.route, term)
        if hidden.dim() == 4 and hidden.shape[1:3] != term.shape[:2]:
            term = term.unsqueeze(2)
        return hidden + term.to(hidden.dtype)


@dataclass
class GenerationState:
    """Bind vectors and media index of a running generation, repeated to its real batch size (beams, samples).

    Attributes:
        injection: the injection of the decoder that generates.
        bind: bind vectors of the prompts, as for `BindContext`.
        media_index: the media index of the prompts, padded on the left, [B, T].
        retrieved: context tokens, [B, M, C, D], or None.
        terms: the terms of `BindContext`, kept over the steps.
        retrieved_terms: the same for context tokens.
    """

    injection: Injection
    bind: Tensor
    media_index: Tensor
    retrieved: Tensor | None = None
    terms: dict[int, Any] = field(default_factory=dict)
    retrieved_terms: dict[int, Any] = field(default_factory=dict)

    def context(self, batch: int, past: int | None, length: int) -> BindContext:
        """Return the context of tokens ``past .. past + length``; generated ones keep the last prompt token's group.

        Args:
            past: tokens before it; None: unknown, so these are the prompts, or the last of all tokens.
        """
        # Beams and several returned sequences repeat each prompt; cached terms have the old batch size.
        if batch != self.bind.shape[0]:
            repeats, rest = divmod(batch, self.bind.shape[0])
            if rest or not repeats:
                raise InputError(f"generation runs {batch} rows for {self.bind.shape[0]} prompts")
            self.bind = self.bind.repeat_interleave(repeats, dim=0)
            self.media_index = self.media_index.repeat_interleave(repeats, dim=0)
            if self.retrieved is not None:
                self.retrieved = self.retrieved.repeat_interleave(repeats, dim=0)
            self.terms.clear()
            self.retrieved_terms.clear()
        last = self.media_index.shape[1] - 1
        past = max(last + 1 - length, 0) if past is None else past
        # Positions after the prompt read the route of its last token.
        columns = torch.arange(past, past + length, device=self.media_index.device).clamp_(max=last)
        found = self.injection.context_of(self.bind, self.media_index[:, columns], self.terms)
        if self.retrieved is not None:
            own = (self.media_index[:, columns], self.retrieved_terms)
            found.retrieved = BindContext.of_retrieved(self.retrieved, *own)
        return found

    # How to read this: a server's rows come and go between two steps. Prompts of several media groups are read first;
    # their answers need one group each, so `after_prompt` leaves states of one shape, which `join` puts together.

    def after_prompt(self) -> GenerationState:
        """Return the state for the tokens after the prompts: of each row the group that its last token listens to."""
        groups, num_groups = self.media_index[:, -1], self.bind.shape[1]
        rows, chosen = torch.arange(len(groups), device=groups.device), groups.clamp(min=0)

        def pick(values: Tensor) -> Tensor:
            return values[rows, chosen].unsqueeze(1)

        def pick_term(term: Any) -> Any:
            if isinstance(term, Tensor):
                return pick(term)
            # Keys [B, Hkv, d, M * N] and values [B, Hkv, M * N, d].
            keys, values = (
                x.unflatten(axis, (num_groups, -1)) for x, axis in zip(term, (-1, 2), strict=True)
            )
            return keys[rows, :, :, chosen], values[rows, :, chosen]

        return GenerationState(
            self.injection,
            pick(self.bind),
            groups.clamp(max=0).unsqueeze(1),
            None if self.retrieved is None else pick(self.retrieved),
            {layer: pick_term(term) for layer, term in self.terms.items()},
            {layer: pick_term(term) for layer, term in self.retrieved_terms.items()},
        )

    def select(self, rows: Tensor) -> GenerationState:
        """Return the state of some rows, given by their indices, in this order."""
        return self._each(lambda parts: parts[0][rows])

    def join(self, other: GenerationState) -> GenerationState:
        """Return the state of these rows, then those of another state of `after_prompt`."""
        return self._widened(other)._each(torch.cat, other._widened(self))

    def _widened(self, other: GenerationState) -> GenerationState:
        """Return the state with as many bind and context tokens of a group as another has, if that has more."""
        state = self
        # Zeros are no tokens; keys and values are computed again.
        if self.bind.dim() == 4 and (missing := other.bind.shape[2] - self.bind.shape[2]) > 0:
            state = replace(state, bind=pad(self.bind, (0, 0, 0, missing)), terms={})
        if self.retrieved is not None and (missing := other.retrieved.shape[2] - self.retrieved.shape[2]) > 0:
            state = replace(state, retrieved=pad(self.retrieved, (0, 0, 0, missing)), retrieved_terms={})
        return state

    def _each(self, make: Callable[[list[Tensor]], Tensor], *others: GenerationState) -> GenerationState:
        """Return a state in which each tensor is made of the same tensor of this state and others."""
        states = (self, *others)

        def make_terms(tables: list[dict[int, Any]]) -> dict[int, Any]:
            # A term that one of them lacks is computed again in the next step.
            layers = set.intersection(*map(set, tables))
            return {layer: make_term([table[layer] for table in tables]) for layer in layers}

        def make_term(terms: list[Any]) -> Any:
            if isinstance(terms[0], Tensor):
                return make(terms)
            return tuple(make(list(parts)) for parts in zip(*terms, strict=True))

        return replace(
            self,
            bind=make([state.bind for state in states]),
            media_index=make([state.media_index for state in states]),
            retrieved=None if self.retrieved is None else make([state.retrieved for state in states]),
            terms=make_terms([state.terms for state in states]),
            retrieved_terms=make_terms([state.retrieved_terms for state in states]),
        )


class BindAttention:
    """The attention of one layer over bind tokens.

    For head ``h`` of token ``t``, in a softmax of its own over the ``N`` bind tokens of the token's group:
    ``sum_n softmax_n(scaling * q[t,h] . k_proj(x[n])[h]) * v_proj(x[n])[h]``. The query is the output of ``q_proj``,
    adapter included, before the rotary embedding: bind tokens have no position in the text. Keys and values come from
    the plain projections, without the adapter. A family's norms of queries and keys (Qwen3, Gemma 3, OLMo 2) apply.
    """

    def __init__(self, heads: Heads) -> None:
        self._heads = heads

    def keys_and_values(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return scaled keys [B, Hkv, k, M * N] and values [B, Hkv, M * N, d] of bind tokens [B, M, N, D]."""
        x = x.flatten(1, 2)
        return self._heads.keys(x).permute(0, 2, 3, 1), self._heads.values(x).transpose(1, 2)

    def __call__(self, features: Tensor, keys: Tensor, values: Tensor, masked: Tensor | None) -> Tensor:
        """Return the attended values of each head, [B, T, H, d].

        Args:
            features: output of the query projection, [B, T, C].
        """
        query = self._heads.queries(features, keys.shape[2])
        # The heads of a group share their keys, so they become rows of one product: [B, Hkv, T * G, k].
        length, num_groups = query.shape[1], keys.shape[1]
        query = query.unflatten(2, (num_groups, -1)).transpose(1, 2).flatten(2, 3)
        scores = (query @ keys).unflatten(2, (length, -1))
        if masked is not None:
            scores = scores.masked_fill(masked, -torch.inf)
        # In float32, as transformers does in its own attention.
        shares = scores.softmax(-1, dtype=torch.float32).to(values.dtype).flatten(2, 3)
        return (shares @ values).unflatten(2, (length, -1)).transpose(1, 2).flatten(2, 3)


def checkpointed(forward: Callable) -> Callable:
    """Return the forward of a layer with activation checkpointing."""

    def run(running: BindContext | None, *args: Any, **kwargs: Any) -> Any:
        # Run again in the backward pass, in another thread and after the end of the forward: with its own bind vectors.
        token = RUNNING.set(running)
        try:
            return forward(*args, **kwargs)
        finally:
            RUNNING.reset(token)

    @wraps(forward)
    def call(*args: Any, **kwargs: Any) -> Any:
        options = {"use_reentrant": False, "preserve_rng_state": False}
        return checkpoint(run, RUNNING.get(), *args, **options, **kwargs)

    return call


def route_tokens(media_index: Tensor, num_groups: int) -> Tensor:
    """Return the one-hot route [B, T, M] of a media index [B, T]; index -1 gives a row of zeros."""
    groups = torch.arange(num_groups, device=media_index.device)
    # Index -1 equals no group, so its row is all zeros and nothing is added.
    return media_index.unsqueeze(-1) == groups


def mask_tokens(bind: Tensor, route: Tensor, *, first_is_token: bool = True) -> Tensor | None:
    """Return True for each bind token that a token does not attend to, [B, 1, T, 1, M * N]; None if nothing is masked.

    Args:
        bind: bind tokens, [B, M, N, D]; a row of zeros is not a token.
        route: one-hot group of each token, or zeros, [B, T, M].
        first_is_token: row 0 of a group is a token even if it is zero; else, no route leads to a group without tokens.
    """
    present = bind.any(-1)
    # So a token with a group has at least one key.
    if first_is_token:
        present[..., 0] = True
    seen = (route.unsqueeze(-1) & present.unsqueeze(1)).flatten(2)
    # A token without a group sees everything, and its result is dropped: a softmax over nothing would be NaN.
    masked = ~seen & route.any(-1, keepdim=True)
    # With one group in every row nothing is: a layer then saves two passes over its scores.
    return masked[:, None, :, None] if masked.is_meta or masked.any() else None
