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

The bind tensor travels as a keyword of the decoder's forward, so nothing outlives the call: several forwards
before one backward and activation checkpointing see the tensors of their own call.
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
from torch import Tensor, nn
from transformers import PreTrainedModel

from bindllm.errors import BindLLMError, DecoderError, InputError, check_choice
from bindllm.model.injection.attend import (
    PROJECTIONS,
    BindAttention,
    BindContext,
    GenerationState,
    find_attention,
    plain_projection,
)
from bindllm.model.injection.cross import HEADS, CrossReader
from bindllm.model.layers import check_layers, choose_layers, find_layers

KINDS = tuple(PROJECTIONS)
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


# The two channels that are not keywords: the state of a running `generate`, and the terms (of bind vectors, of context
# tokens) on their way from the entry of an attention to its output projection, or of a layer to its output; None until
# the query projection has run.
# Both are empty outside a call; context variables keep concurrent threads apart.
_GENERATION: ContextVar[GenerationState | None] = ContextVar("bindllm_generation", default=None)
_TERM: ContextVar[tuple[BindContext, Tensor | None, Tensor | None] | None] = ContextVar(
    "bindllm_term", default=None
)


class Injection(nn.Module):
    """Gates and queries, hooked onto the layers of a Hugging Face decoder.

    Construct it last: decoder, quantization, peft, then injection, so that the term passes through the adapter of
    the output projection like everything else in attention.

    Args:
        decoder: a causal language model whose layers are at ``get_decoder().layers``; kind ``value`` also needs
            ``self_attn.v_proj`` and ``self_attn.o_proj`` in each, kind ``attend`` all four projections.
        config: kind, queries, and how many layers are served.
        context_width: of the context tokens that the model reads through gates of their own, not with kind
            ``residual``; ``D``, or with kind ``cross`` more: the rest behind the first ``D`` is for keys only. None: no
            context.

    Raises:
        DecoderError: the decoder lacks one of these modules, or has fewer layers; the message names it.

    Attributes:
        gates: of the L served layers, zeros at the start, [L] for ``residual``, [L, R] for ``cross``, else [L, H].
        queries: [L, D], or None.
        reader: the attention of kind ``cross``, or None.
        context_gates: of context tokens, zeros at the start, [L, H] or [L, R], or None.
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
        core = decoder.get_decoder()
        hooks = decoder._forward_pre_hooks.values()
        if any(isinstance(hook, MethodType) and isinstance(hook.__self__, Injection) for hook in hooks):
            # The older injection would take the keywords, and the newer one would add nothing.
            raise DecoderError(
                "this decoder object carries an injection already; load the decoder again for another"
            )
        # How to read this: select the layers, create gates and queries for them, then hook. Hooks run in this order
        # in a forward: `_carry` once, then one pair per layer.
        name = type(decoder).__name__
        every = find_layers(core, name)
        layers = choose_layers(every, config.layers, name, "inject.layers")
        config_of_text = decoder.config.get_text_config()
        width, num_heads = config_of_text.hidden_size, config_of_text.num_attention_heads
        heads = {"residual": (), "cross": (HEADS,)}.get(self.kind, (num_heads,))
        shape = (len(layers), *heads)
        # Zero gates: the untrained model is exactly the plain decoder (tanh(0) = 0).
        self.gates = nn.Parameter(torch.zeros(shape))
        # Small and random, so that layers can specialize from the first step.
        has_queries = config.queries and self.kind != "cross"
        self.queries = nn.Parameter(0.02 * torch.randn(len(layers), width)) if has_queries else None
        self.reader = CrossReader(len(layers), width) if self.kind == "cross" else None
        self.context_gates = nn.Parameter(torch.zeros(shape)) if has_context else None
        self.context_reader = None
        if has_context and self.reader:
            self.context_reader = CrossReader(len(layers), width, context_width)
        if self.kind == "residual":
            for index, (_, layer) in enumerate(layers):
                layer.register_forward_pre_hook(partial(self._add_to_input, index), with_kwargs=True)
        elif self.kind == "cross":
            for index, (_, layer) in enumerate(layers):
                layer.register_forward_pre_hook(_keep_for_output, with_kwargs=True)
                layer.register_forward_hook(partial(self._add_to_output, index))
        else:
            # All layers are checked before the first hook, so that a refused decoder stays unchanged.
            attends = self.kind == "attend" or has_context
            options = {"num_heads": num_heads, "kind": "attend" if attends else self.kind}
            attentions = [find_attention(layer, n, name, **options) for n, layer in layers]
            for index, attention in enumerate(attentions):
                attention.register_forward_pre_hook(partial(self._enter_attention, index), with_kwargs=True)
                if attends:
                    own = BindAttention(attention, num_heads)
                    attention.q_proj.register_forward_hook(partial(self._attend, index, own))
                attention.o_proj.register_forward_pre_hook(self._add_to_heads)
        # Layers that are not served receive the keyword too, and must drop it.
        for number, layer in every:
            if number not in dict(layers):
                layer.register_forward_pre_hook(_leave_out, with_kwargs=True)
        # On the outer model: some families drop keywords on the way to their core already.
        decoder.register_forward_pre_hook(self._carry, with_kwargs=True)
        decoder.register_forward_hook(self._check_arrival, with_kwargs=True)

    def words(self, decoder: PreTrainedModel) -> Tensor:
        """Return the word embeddings of the decoder, [V, D], that make a bind or context token name its word."""
        # Kind cross adds a token to the stream that is compared with the output embeddings; the others read it like a
        # word of the input.
        is_output = self.kind == "cross"
        return (decoder.get_output_embeddings() if is_output else decoder.get_input_embeddings()).weight

    @torch.no_grad()
    def try_out(self, decoder: PreTrainedModel) -> None:
        """Run the decoder with this injection on a few tokens, before anything is trained.

        Raises:
            DecoderError: the injection does not work in this family of decoders.
        """
        # Seven tokens: a family with several residual streams would take a term for as many tokens as it has streams.
        index = torch.zeros(1, 7, dtype=torch.int64, device=decoder.device)
        # Two bind tokens: one would not need its queries and keys.
        sizes = (1, 1, 2) if self.kind in TOKEN_KINDS else (1, 1)
        width = decoder.config.get_text_config().hidden_size
        inputs = {"bind": torch.zeros(*sizes, width, device=decoder.device), "media_index": index}
        if self.context_gates is not None:
            inputs["context"] = torch.zeros(1, 1, 2, self.context_width, device=decoder.device)
        # On the meta device transformers cannot compute a mask; families without attention do not take a whole one.
        is_meta = decoder.device.type == "meta"
        masks = (torch.ones(1, 1, 7, 7, dtype=torch.bool, device="meta"), None) if is_meta else (None,)
        for mask in masks:
            try:
                decoder(input_ids=index, attention_mask=mask, use_cache=False, **inputs)
                return
            except (BindLLMError, torch.OutOfMemoryError):
                raise
            except Exception as error:
                # A forward that depends on values fails without weights; the loaded decoder is tried again.
                if not is_meta:
                    raise DecoderError(
                        f"{type(decoder).__name__} cannot run with an injection ({type(error).__name__}: {error}); use "
                        "a decoder of the LLaMA shape (Llama, Mistral, Qwen2, Qwen3, SmolLM2, ...)"
                    ) from error

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
        if bind is not None:
            self._check(bind, media_index, tokens)
            self._check_context(bind, retrieved)
            kwargs["bind"] = self.context_of(bind, media_index)
            if retrieved is not None:
                kwargs["bind"].retrieved = BindContext.of_retrieved(retrieved, media_index)
            return args, kwargs
        state = _GENERATION.get()
        if state is not None and state.injection is self:
            # Steps after the first bring only new tokens; the cache's length gives their positions.
            cache = kwargs.get("past_key_values")
            past = 0 if cache is None else int(cache.get_seq_length())
            kwargs["bind"] = state.context(tokens.shape[0], past, tokens.shape[1])
        return args, kwargs

    def _check_arrival(self, decoder: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        """Refuse a decoder that drops the keyword on the way: it would ignore all media without a word."""
        context = kwargs.get("bind")
        if context is None or (reached := context.arrivals.count) >= len(self.gates):
            return
        inside, served = bool(PROJECTIONS[self.kind]), len(self.gates)
        way = "its attention" if inside else "its layers"
        advice = "Try inject: {kind: residual}, or use" if inside else "Use"
        raise DecoderError(
            f"{type(decoder).__name__} does not pass keywords to {way}: the media reached {reached} of {served} "
            f"layers. {advice} a decoder of the LLaMA shape (Llama, Mistral, Qwen2, Qwen3, SmolLM2, ...)"
        )

    def _add_to_input(
        self, index: int, layer: nn.Module, args: tuple, kwargs: dict[str, Any]
    ) -> tuple[tuple, dict]:
        """Kind ``residual``: before a layer runs."""
        context = kwargs.pop("bind", None)
        if context is None:
            return args, kwargs
        hidden = args[0] if args else kwargs["hidden_states"]
        hidden = context.add(hidden, self._term(index, layer, context, hidden.dtype))
        return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})

    def context_of(
        self, bind: Tensor, media_index: Tensor, terms: dict[int, Any] | None = None
    ) -> BindContext:
        """Return what the layers get in one forward: `BindContext.of` for this kind."""
        return BindContext.of(bind, media_index, terms, attends_to_one=self.kind == "cross")

    def _add_to_output(self, index: int, layer: nn.Module, args: tuple, output: Any) -> Any:
        """Kind ``cross``: after a layer has run."""
        waiting = _TERM.get()
        if waiting is None:
            return None
        _TERM.set(None)
        context, hidden = waiting[0], output[0] if isinstance(output, tuple) else output
        term = self._read(index, hidden, context, self.reader, self.gates)
        if context.retrieved is not None:
            term = term + self._read(
                index, hidden, context.retrieved, self.context_reader, self.context_gates
            )
        hidden = context.add(hidden, term)
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    def _read(
        self, index: int, hidden: Tensor, context: BindContext, reader: CrossReader, gates: Tensor
    ) -> Tensor:
        """Return the term of kind ``cross`` of layer ``index`` for bind or context tokens, [B, T, D]."""
        found = None if context.terms is None else context.terms.get(index)
        if found is None:
            found = reader.keys_and_values(index, context.bind, hidden.dtype)
            # During a generation keys and values stay the same, so they are computed once.
            if context.terms is not None:
                context.terms[index] = found
        masked = None if context.masked is None else context.masked.squeeze(3)
        # Closed for tokens without a group.
        return reader(index, hidden, *found, gates[index], masked) * context.route.any(-1, keepdim=True)

    def _enter_attention(
        self, index: int, attention: nn.Module, args: tuple, kwargs: dict[str, Any]
    ) -> tuple:
        """Inside attention: take the keyword out before attention sees it, leave the term for the output projection."""
        context = kwargs.pop("bind", None)
        if context is None:
            _TERM.set(None)
        elif not context.has_tokens:
            hidden = args[0] if args else kwargs["hidden_states"]
            _TERM.set((context, self._term(index, attention, context, hidden.dtype), None))
        else:
            # The term needs the queries: the hook of `q_proj` computes it.
            _TERM.set((context, None, None))
        return args, kwargs

    def _attend(
        self, index: int, heads: BindAttention, projection: nn.Module, args: tuple, query: Tensor
    ) -> None:
        """Several bind tokens, or context tokens: after the query projection [B, T, H * d], compute the terms."""
        waiting = _TERM.get()
        if waiting is None:
            return
        context, term, further = waiting
        if term is None:
            term = self._attended(index, heads, context, self._vector(index, context), self.gates, query)
        if further is None and context.retrieved is not None:
            own = context.retrieved
            further = self._attended(index, heads, own, own.bind, self.context_gates, query)
        _TERM.set((context, term, further))

    def _attended(
        self,
        index: int,
        heads: BindAttention,
        context: BindContext,
        tokens: Tensor,
        gates: Tensor,
        query: Tensor,
    ) -> Tensor:
        """Return the gated term of layer ``index`` for tokens [B, M, N, D], of each text token: [B, T, H * d]."""
        found = None if context.terms is None else context.terms.get(index)
        if found is None:
            found = heads.keys_and_values(tokens.to(query.dtype))
            # During a generation keys and values stay the same, so they are computed once.
            if context.terms is not None:
                context.terms[index] = found
        # [B, T, H, 1]: closed for tokens without a group.
        gate = (torch.tanh(gates[index]) * context.route.any(-1, keepdim=True)).unsqueeze(-1)
        return (heads(query, *found, context.masked) * gate.to(query.dtype)).flatten(2)

    def _add_to_heads(self, projection: nn.Module, args: tuple) -> tuple | None:
        """Inside attention: before the output projection."""
        waiting = _TERM.get()
        # Without a term the query projection was not called; `_check_arrival` refuses such a decoder.
        if waiting is None or waiting[1] is None:
            return None
        context, term, further = waiting
        if (context.retrieved is None) != (further is None):
            return None
        _TERM.set(None)
        hidden = context.add(args[0], term)
        return (hidden if further is None else hidden + further.to(hidden.dtype), *args[1:])

    def _vector(self, index: int, context: BindContext) -> Tensor:
        """Return ``bind + query[l]``, see the formulas in the module docstring."""
        return context.bind if self.queries is None else context.bind + self.queries[index]

    def _term(self, index: int, module: nn.Module, context: BindContext, dtype: torch.dtype) -> Tensor:
        """Return the gated term of layer ``index`` for each media group: [B, M, D] or [B, M, H * d]."""
        if context.terms is not None and index in context.terms:
            return context.terms[index]
        vector = self._vector(index, context)
        if self.kind == "residual":
            term = (self.gates[index] * vector).to(dtype)
        else:
            gate = torch.tanh(self.gates[index]).to(dtype)
            # [B, M, Hkv * d] -> [B, M, Hkv, 1, d].
            value = plain_projection(module.v_proj)(vector.to(dtype)).unflatten(
                -1, (-1, 1, module.o_proj.in_features // gate.numel())
            )
            # [Hkv, 1, d] times [Hkv, group, 1]: each key/value head serves the heads of its group.
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


def _keep_for_output(layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """Kind ``cross``: the hook on the output of this call of the layer gets no keywords."""
    context = kwargs.pop("bind", None)
    _TERM.set(None if context is None else (context, None, None))
    return args, kwargs


def _leave_out(layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """A layer that is not served: attention must not see the keyword."""
    kwargs.pop("bind", None)
    return args, kwargs
