"""Injection: bind vectors are added to the tokens of every decoder layer through gates that start at zero.

Letters: `B` batch, `T` tokens, `M` media groups, `N` bind tokens of a group, `D` decoder width, `H` heads, `L` layers.

Four kinds:

- ``residual``, the formula of ImageBind-LLM section 3.2 (arXiv 2309.03905): at the input of layer ``l``,
  ``h[b,t] += gate[l] * (bind[b,m(t)] + query[l])``.
- ``value``, the form of its released weights: inside attention, after the heads are mixed and before the output
  projection, ``out[b,t,h] += tanh(gate[l,h]) * v_proj(bind[b,m(t)] + query[l])[h]``. Attention over one key has
  weight 1, so no softmax is needed; with grouped key/value heads each value serves its group of heads. The value
  projection is the decoder's own, without its adapter. The published formula has no bias there, since LLaMA has
  none; if a decoder has one (Qwen2), it belongs to the projection.
- ``attend``, the same for several bind tokens: each head attends to those of its token's group in a softmax of their
  own (`bindllm.model.injection.attend`),
  ``out[b,t,h] += tanh(gate[l,h]) * attention(bind[b,m(t),:] + query[l])[h]``. With one bind token it is kind ``value``.
- ``cross``, gated cross-attention at the output of a layer, with queries and keys of its own, that adds the bind tokens
  themselves to the residual stream (`bindllm.model.injection.cross`), for one or several bind tokens.

The bind tensor is a keyword of the decoder's forward, and nothing outlives the call: several forwards before one
backward and activation checkpointing see the tensors of their own call. Inside, hooks find it in a context variable, so
a family does not need to pass keywords on to its layers.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from types import MethodType
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from bindllm.errors import DecoderError, InputError, check_choice
from bindllm.model.injection.attend import RUNNING, BindAttention, BindContext, GenerationState
from bindllm.model.injection.cross import HEADS, CrossReader
from bindllm.model.injection.projections import Heads, find_heads
from bindllm.model.layers import USUAL, check_layers, choose_layers, find_layers

KINDS = ("residual", "value", "attend", "cross")
HEAD_KINDS = ("value", "attend")
"""Kinds that add to the heads of an attention."""

TOKEN_KINDS = ("attend", "cross")
"""Kinds that read several bind tokens of a media group."""


@dataclass
class InjectConfig:
    """How bind vectors reach the decoder's tokens."""

    kind: Literal["residual", "value", "attend", "cross"] = "value"
    """`value` adds inside attention, one gate per head; `attend` does so for several bind tokens (`bind.tokens`);
    `cross` adds the bind tokens themselves to the layer's output, chosen by an attention of its own; `residual` adds to
    the layer's input, one gate a layer."""

    queries: bool = True
    """Whether each layer adds its own learned query to the bind vector; kind `cross` has none."""

    layers: int | list[int] | None = None
    """Layers that receive the bind vectors: a number of layers, counted from the last, or a list of indices from 0,
    such as every second layer. By default all. The backward pass ends at the first of them, so later layers train
    faster."""

    def __post_init__(self) -> None:
        check_layers(self.layers, "inject.layers")
        check_choice("injection kind", self.kind, KINDS)


def _check_reads_context(config: InjectConfig) -> None:
    if config.kind == "residual":
        raise InputError(
            "inject.kind residual adds one vector for each media group, and context tokens are read by attention: "
            "set inject.kind: attend, cross or value, or leave out context"
        )


def check_kind(config: InjectConfig, num_tokens: int | str) -> None:
    """Raise an `InputError` if this kind of injection takes one bind token only."""
    if config.kind not in TOKEN_KINDS:
        raise InputError(
            f"bind.tokens is {num_tokens}, and injection kind {config.kind!r} adds one vector for each media group: "
            "set inject.kind: attend or cross, or bind.tokens: 1"
        )


# The state of a running `generate`; and the terms (of bind vectors, of context tokens) that a query projection leaves
# for the output projection of its attention, with the forward that they belong to. Context variables keep concurrent
# threads apart.
_GENERATION: ContextVar[GenerationState | None] = ContextVar("bindllm_generation", default=None)
_TERMS: ContextVar[tuple[BindContext, Tensor | None, Tensor | None] | None] = ContextVar(
    "bindllm_terms", default=None
)


class Injection(nn.Module):
    """Gates and queries, hooked onto the layers of a Hugging Face decoder.

    Construct it last: decoder, quantization, peft, then injection, so that the term passes through the adapter of
    the output projection like everything else in attention.

    Args:
        decoder: a causal language model whose layers are at ``get_decoder().layers``; kind ``value`` also needs
            ``self_attn.v_proj`` and ``self_attn.o_proj`` in each, kind ``attend`` all four projections.
        config: kind, queries, and how many layers are served.
        context_width: width of the context tokens, which have gates of their own; None: no context. It is ``D``. With
            kind ``cross`` it may be larger, and entries after the first ``D`` are for keys only. Kind ``residual`` has
            no context.

    Raises:
        DecoderError: the decoder lacks one of these modules, or has fewer layers; the message names it.

    Attributes:
        gates: gates of the L served layers, zero at the start, [L] for ``residual``, [L, R] for ``cross``, else [L, H].
        queries: [L, D], or None.
        reader: the attention of kind ``cross``, or None.
        context_gates: gates of context tokens, zero at the start, [L, H] or [L, R], or None.
        context_reader: the attention of kind ``cross`` over context tokens, or None.

    Example:
        decoder(ids, bind=bind, media_index=index)      # bind [B, M, D] or, for ``attend``, [B, M, N, D]
                                                        # index [B, T], -1: nothing is added
    """

    def __init__(
        self, decoder: PreTrainedModel, config: InjectConfig, *, context_width: int | None = None
    ) -> None:
        super().__init__()
        self.context_width, has_context = context_width, context_width is not None
        if has_context:
            _check_reads_context(config)
        self.kind = config.kind
        hooks = decoder._forward_pre_hooks.values()
        if any(isinstance(hook, MethodType) and isinstance(hook.__self__, Injection) for hook in hooks):
            # The older injection would take the keywords, and the newer one would add nothing.
            raise DecoderError(
                "this decoder object carries an injection already; load the decoder again for another"
            )
        # How to read this: select the layers, create gates and queries for them, then hook.
        layers, heads = served_layers(decoder, config)
        width = decoder.config.get_text_config().hidden_size
        own = {"residual": (), "cross": (HEADS,)}.get(
            self.kind, (max((h.num_heads for h in heads), default=0),)
        )
        shape = (len(layers), *own)
        # Zero gates: the untrained model is exactly the plain decoder (tanh(0) = 0).
        self.gates = nn.Parameter(torch.zeros(shape))
        # Small and random, so that layers can specialize from the first step.
        has_queries = config.queries and self.kind != "cross"
        self.queries = nn.Parameter(0.02 * torch.randn(len(layers), width)) if has_queries else None
        self.reader = CrossReader(len(layers), width) if self.kind == "cross" else None
        self.context_gates = nn.Parameter(torch.zeros(shape)) if has_context else None
        self.context_reader = None
        if has_context and self.reader:
            # Records may be wrong, media are not.
            self.context_reader = CrossReader(len(layers), width, context_width, has_sink=True)
        for index, layer in enumerate(layers):
            if self.kind == "residual":
                layer.register_forward_pre_hook(partial(self._add_to_input, index), with_kwargs=True)
            elif self.kind == "cross":
                layer.register_forward_hook(partial(self._add_to_output, index))
        self._heads = heads
        for index, own in enumerate(heads):
            if self.kind == "attend" or has_context:
                own.query.register_forward_hook(partial(self._attend, index))
            own.output.register_forward_pre_hook(partial(self._add_to_heads, index))
        # On the outer model, which gets the keywords, and around all of its layers.
        decoder.register_forward_pre_hook(self._carry, with_kwargs=True)
        decoder.register_forward_hook(self._check_arrival)
        decoder.register_forward_hook(_end, always_call=True)

    def words(self, decoder: PreTrainedModel) -> Tensor:
        """Return the word embeddings of the decoder, [V, D], that make a bind or context token name its word."""
        # Kind cross adds a token to the stream that is compared with the output embeddings; the others read it like a
        # word of the input.
        is_output = self.kind == "cross"
        return (decoder.get_output_embeddings() if is_output else decoder.get_input_embeddings()).weight

    @contextmanager
    def holding(self, bind: Tensor, media_index: Tensor, context: Tensor | None = None) -> Iterator[None]:
        """Give every decoder call of this block, in this thread, the same bind vectors; for generation only.

        Hugging Face ``generate`` refuses unknown keywords, and no gradient is needed there.

        Args:
            bind: [B, M, D], or [B, M, N, D] for kinds ``attend`` and ``cross``.
            media_index: [B, T] of the left-padded prompts; generated tokens use its last column.
            context: context tokens, [B, M, C, context_width], or None.
        """
        with self.applying(self.state(bind, media_index, context)):
            yield

    def state(self, bind: Tensor, media_index: Tensor, context: Tensor | None = None) -> GenerationState:
        """Return the state of a generation for `applying`; arguments as for `holding`."""
        # With gradients, checkpointing would recompute layers after the block has ended, without the vectors.
        if torch.is_grad_enabled():
            raise InputError(
                "holding() is for generation: use it under torch.no_grad(), else pass bind= to the decoder"
            )
        self._check(bind, media_index)
        self._check_context(bind, context)
        return GenerationState(self, bind, media_index, context)

    @contextmanager
    def applying(self, state: GenerationState) -> Iterator[None]:
        """Do as `holding`, with a state whose terms outlive the block: rows may come and go between two blocks."""
        token = _GENERATION.set(state)
        try:
            yield
        finally:
            _GENERATION.reset(token)

    def _carry(self, decoder: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        """Check the keywords once, before the layers, and turn the media index into a route."""
        bind, media_index = kwargs.pop("bind", None), kwargs.pop("media_index", None)
        retrieved = kwargs.pop("context", None)
        if (bind is None) != (media_index is None):
            raise InputError("bind and media_index go together: pass both to the decoder, or neither")
        # Ids or embeddings: only their first two sizes are needed.
        tokens = args[0] if args else kwargs.get("input_ids")
        tokens = kwargs.get("inputs_embeds") if tokens is None else tokens
        running = None
        if bind is not None:
            self._check(bind, media_index, tokens)
            self._check_context(bind, retrieved)
            running = self.context_of(bind, media_index)
            if retrieved is not None:
                running.retrieved = BindContext.of_retrieved(retrieved, media_index)
        elif (state := _GENERATION.get()) is not None and state.injection is self:
            running = state.context(tokens.shape[0], _count_past(kwargs), tokens.shape[1])
        if running is not None and self.reader is not None:
            self._prepare(running, self.reader, decoder.dtype)
            if running.retrieved is not None:
                self._prepare(running.retrieved, self.context_reader, decoder.dtype)
                if self.context_reader.reads_words:
                    # Of the same table as those of the records. Without token ids, those of the input.
                    words = F.embedding(tokens, self.words(decoder)) if tokens.dim() == 2 else tokens
                    running.retrieved.words = F.rms_norm(words, words.shape[-1:], eps=1e-6).to(decoder.dtype)
        RUNNING.set(running)
        return args, kwargs

    def _check_arrival(self, decoder: nn.Module, args: tuple, output: Any) -> None:
        """Refuse a decoder that runs a served layer in another way: it would ignore media without a word."""
        running = RUNNING.get()
        if running is None or running.arrivals >= len(self.gates):
            return
        inside = self.kind in HEAD_KINDS
        raise DecoderError(
            f"{type(decoder).__name__} does not run {'its projections' if inside else 'its layers'} as modules: the "
            f"media reached {running.arrivals} of {len(self.gates)} layers. "
            f"{'Try inject: {kind: residual}, or use' if inside else 'Use'} {USUAL}"
        )

    def _add_to_input(
        self, index: int, layer: nn.Module, args: tuple, kwargs: dict[str, Any]
    ) -> tuple[tuple, dict] | None:
        """Kind ``residual``: before a layer runs."""
        running = RUNNING.get()
        if running is None:
            return None
        hidden = args[0] if args else kwargs["hidden_states"]
        hidden = running.add(hidden, self._term(index, running, hidden.dtype))
        return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})

    def context_of(
        self, bind: Tensor, media_index: Tensor, terms: dict[int, Any] | None = None
    ) -> BindContext:
        """Return what the layers get in one forward: `BindContext.of` for this kind."""
        return BindContext.of(bind, media_index, terms, attends_to_one=self.kind == "cross")

    def _add_to_output(self, index: int, layer: nn.Module, args: tuple, output: Any) -> Any:
        """Kind ``cross``: after a layer has run."""
        context = RUNNING.get()
        if context is None:
            return None
        hidden = output[0] if isinstance(output, tuple) else output
        term = self._read(index, hidden, context, self.reader, self.gates)
        if context.retrieved is not None:
            term = term + self._read(
                index, hidden, context.retrieved, self.context_reader, self.context_gates
            )
        hidden = context.add(hidden, term)
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    def _prepare(self, context: BindContext, reader: CrossReader, dtype: torch.dtype) -> None:
        """Compute keys and values of kind ``cross`` before the layers run: checkpointing would repeat it in one layer.

        During a generation they stay the same, so they are computed once.
        """
        if not context.terms:
            # The table of a generation is filled, and not replaced: its next step reads it.
            context.terms = {} if context.terms is None else context.terms
            context.terms.update(enumerate(reader.keys_and_values(context.bind, dtype)))

    def _read(
        self, index: int, hidden: Tensor, context: BindContext, reader: CrossReader, gates: Tensor
    ) -> Tensor:
        """Return the term of kind ``cross`` of layer ``index`` for bind or context tokens, [B, T, D]."""
        masked = None if context.masked is None else context.masked.squeeze(3)
        # Closed for tokens without a group.
        term = reader(index, hidden, *context.terms[index], gates[index], masked, context.words)
        return term * context.route.any(-1, keepdim=True)

    def _attend(self, index: int, projection: nn.Module, args: tuple, features: Tensor) -> None:
        """Several bind tokens, or context tokens: after the query projection [B, T, C], compute the terms."""
        context = RUNNING.get()
        if context is None:
            return
        term = further = None
        if context.has_tokens:
            term = self._attended(index, context, self._vector(index, context), self.gates, features)
        if (own := context.retrieved) is not None:
            further = self._attended(index, own, own.bind, self.context_gates, features)
        _TERMS.set((context, term, further))

    def _attended(
        self, index: int, context: BindContext, tokens: Tensor, gates: Tensor, features: Tensor
    ) -> Tensor:
        """Return the gated term of layer ``index`` for tokens [B, M, N, D], of each text token: [B, T, H * d]."""
        attention = BindAttention(self._heads[index])
        found = None if context.terms is None else context.terms.get(index)
        if found is None:
            found = attention.keys_and_values(tokens.to(features.dtype))
            # During a generation keys and values stay the same, so they are computed once.
            if context.terms is not None:
                context.terms[index] = found
        attended = attention(features, *found, context.masked)
        # [B, T, H, 1]: closed for tokens without a group.
        gate = torch.tanh(gates[index, : attended.shape[2]]) * context.route.any(-1, keepdim=True)
        return (attended * gate.unsqueeze(-1).to(attended.dtype)).flatten(2)

    def _add_to_heads(self, index: int, projection: nn.Module, args: tuple) -> tuple | None:
        """Inside attention: before the output projection."""
        context, waiting = RUNNING.get(), _TERMS.get()
        if context is None:
            return None
        _TERMS.set(None)
        # Of another forward, which has failed: these terms are not for this one.
        _, term, further = waiting if waiting is not None and waiting[0] is context else (None, None, None)
        if term is None and not context.has_tokens:
            term = self._term(index, context, args[0].dtype)
        # Without its terms the query projection was not called; `_check_arrival` refuses such a decoder.
        if term is None or (context.retrieved is None) != (further is None):
            return None
        hidden = context.add(args[0], term)
        return (hidden if further is None else hidden + further.to(hidden.dtype), *args[1:])

    def _vector(self, index: int, context: BindContext) -> Tensor:
        """Return ``bind + query[l]``, see the formulas in the module docstring."""
        return context.bind if self.queries is None else context.bind + self.queries[index]

    def _term(self, index: int, context: BindContext, dtype: torch.dtype) -> Tensor:
        """Return the gated term of layer ``index`` for each media group: [B, M, D] or [B, M, H * d]."""
        if context.terms is not None and index in context.terms:
            return context.terms[index]
        vector = self._vector(index, context)
        if self.kind == "residual":
            term = (self.gates[index] * vector).to(dtype)
        else:
            heads = self._heads[index]
            # [B, M, Hkv, 1, d] times [Hkv, group, 1]: each key/value head serves the heads of its group.
            value = heads.values(vector.to(dtype)).unsqueeze(-2)
            gate = torch.tanh(self.gates[index, : heads.num_heads]).to(dtype)
            term = (value * gate.view(value.shape[-3], -1, 1)).flatten(-3)
        # During a generation the term is the same at every step, so it is computed once.
        if context.terms is not None:
            context.terms[index] = term
        return term

    def _check(self, bind: Tensor, media_index: Tensor, tokens: Tensor | None = None) -> None:
        """Refuse shapes that would broadcast into a wrong answer."""
        takes_tokens = self.kind in TOKEN_KINDS
        if bind.dim() == 4 and not takes_tokens:
            raise InputError(
                f"bind {list(bind.shape)} has {bind.shape[2]} bind tokens per media group, and injection kind "
                f"{self.kind!r} adds one vector [B, M, D]: use inject: {{kind: attend}} or cross"
            )
        if bind.dim() not in (3, 4) or media_index.dim() != 2 or bind.shape[0] != media_index.shape[0]:
            raise InputError(
                f"bind {list(bind.shape)} and media_index {list(media_index.shape)}: expected "
                f"{'[B, M, D] or [B, M, N, D]' if takes_tokens else '[B, M, D]'} and [B, T]"
            )
        # An index out of range would silently add nothing. On the meta device an index has no value.
        has_values = media_index.numel() and not media_index.is_meta
        if has_values and not -1 <= int(media_index.min()) <= int(media_index.max()) < bind.shape[1]:
            raise InputError(
                f"media_index reaches from {int(media_index.min())} to {int(media_index.max())}, but bind has "
                f"{bind.shape[1]} media groups: expected -1 (nothing) up to {bind.shape[1] - 1}"
            )
        if tokens is not None and tokens.shape[:2] != media_index.shape:
            raise InputError(
                f"media_index {list(media_index.shape)} for tokens {list(tokens.shape[:2])}: they must agree"
            )

    def _check_context(self, bind: Tensor, context: Tensor | None) -> None:
        """Refuse context tokens for a model without gates for them, or of other shapes than the bind vectors."""
        if context is None:
            return
        if self.context_gates is None:
            raise InputError(
                "this model reads no context: build it with context, or leave out context tokens"
            )
        expected = (*bind.shape[:2], self.context_width)
        if context.dim() != 4 or (*context.shape[:2], context.shape[3]) != expected:
            raise InputError(
                f"context tokens {list(context.shape)} for bind {list(bind.shape)}: expected "
                f"{[*bind.shape[:2], 'C', self.context_width]}"
            )


def served_layers(decoder: PreTrainedModel, config: InjectConfig) -> tuple[list[nn.Module], list[Heads]]:
    """Return the served layers, and for kinds that add to heads the projections of each."""
    name = type(decoder).__name__
    every = find_layers(decoder)
    if config.kind not in HEAD_KINDS:
        return [layer for _, layer in choose_layers(every, config.layers, name, "inject.layers")], []
    found = [(number, find_heads(layer, decoder.config.get_text_config())) for number, layer in every]
    # Hybrid decoders: layers without attention have no heads to add to.
    found = [(number, heads) for number, heads in found if heads is not None]
    if not found:
        raise DecoderError(
            f"{name}: injection kind {config.kind!r} needs an attention with query, key, value and output projections, "
            "and no layer has one that bindllm knows. Use inject: {kind: residual} or cross"
        )
    layers = choose_layers(found, config.layers, name, "inject.layers")
    return [layer for number, layer in every if number in dict(layers)], [heads for _, heads in layers]


def _count_past(kwargs: dict[str, Any]) -> int | None:
    """Return how many tokens the cache of a forward holds, or None if it holds a recurrent state only."""
    # Mamba and RWKV have keywords of their own.
    caches = [
        kwargs[name] for name in ("past_key_values", "cache_params", "state") if kwargs.get(name) is not None
    ]
    try:
        return int(caches[0].get_seq_length()) if caches else 0
    except (AttributeError, ValueError):
        return None


def _end(decoder: nn.Module, args: tuple, output: Any) -> None:
    """After the decoder has run, or failed: nothing outlives the call."""
    RUNNING.set(None)
    _TERMS.set(None)
