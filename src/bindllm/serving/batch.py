"""The rows that a serving engine decodes together: one key/value cache, and the bind vectors of each row.

Letters: `R` rows, `T` tokens, `M` media groups, `N` bind tokens of a group, `C` context tokens, `D` decoder width, `H`
key/value heads, `d` head size, `V` vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
)

from bindllm.conversation import NO_MEDIA
from bindllm.errors import DecoderError
from bindllm.model.bindllm import BindLLM
from bindllm.model.decoder import projecting
from bindllm.model.injection.attend import GenerationState
from bindllm.serving.request import RowInput

SPARE_COLUMNS = 64
"""Columns for new tokens that a growing cache allocates at once; then its content is copied."""


class SlotLayer(CacheLayerMixin):
    """Keys and values of one layer, [R, H, columns, d], written in place."""

    is_sliding = False

    def __init__(self, slots: SlotCache) -> None:
        super().__init__()
        self.is_initialized, self._slots = True, slots

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing: `SlotCache.join` brings the first rows."""

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Write the new tokens of all rows, [R, H, T, d]; return keys and values of all tokens in use."""
        slots = self._slots
        rows, stop = len(slots.lengths), slots.end + key_states.shape[-2]
        self.keys[:rows, :, slots.end : stop] = key_states
        self.values[:rows, :, slots.end : stop] = value_states
        return self.keys[:rows, :, slots.start : stop], self.values[:rows, :, slots.start : stop]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return the columns that attention sees, and the first of them."""
        return self.get_seq_length() + query_length, 0

    def get_seq_length(self) -> int:
        """Return the columns in use."""
        return self._slots.width

    def get_max_length(self) -> int:
        """Return -1: this layer has no limit of its own."""
        return -1


class SlotCache(Cache):
    """A key/value cache whose rows come and go.

    All rows end in the same column, so a step writes one column. A row that is shorter than the others has padding on
    its left, which the attention mask hides, as in a batch of prompts of different lengths. Rows of the buffers after
    the last one in use, and columns on both sides of those in use, are spare.

    Attributes:
        start: first column in use.
        end: column of the next token.
    """

    def __init__(self, num_layers: int) -> None:
        super().__init__(layers=[SlotLayer(self) for _ in range(num_layers)])
        self.lengths: list[int] = []
        self.start = self.end = self._num_rows = self._num_columns = 0

    @property
    def width(self) -> int:
        """The columns in use: the tokens of the longest row."""
        return self.end - self.start

    def join(self, prompts: DynamicCache, lengths: Sequence[int], chosen: Sequence[int], most: int) -> None:
        """Add rows.

        Args:
            prompts: keys and values of prompts that are padded on the left.
            chosen: index of the prompt of each new row; several rows may have the same one.
            most: tokens that the longest row, old or new, will have at most.
        """
        # How to read this: rows are added below, and all of them end before column `end`, where the next step writes.
        first, width = len(self.lengths), max(lengths)
        rows = first + len(lengths)
        if rows > self._num_rows or width > self.end:
            self._move(rows, max(width, self.width), most)
        columns = slice(self.end - width, self.end)
        hidden = _mask(lengths, width, prompts.layers[0].keys.device)[:, None, :, None] == 0
        for own, other in zip(self.layers, prompts.layers, strict=True):
            if own.keys is None:
                own.keys, own.values = map(self._buffer, (other.keys, other.values))
            for buffer, new in ((own.keys, other.keys), (own.values, other.values)):
                # Zeros where nothing is written: attention gives hidden columns a weight of 0, but 0 times an
                # infinity, which an earlier row may have left there, would be NaN.
                buffer[first:rows].zero_()
                buffer[first:rows, :, columns] = new[chosen, :, -width:].masked_fill(hidden, 0)
        self.lengths += lengths
        self.start = self.end - max(self.lengths)

    def keep(self, rows: Sequence[int]) -> None:
        """Keep rows only, in this order; row ``n`` of them is at ``n`` or later before."""
        for layer in self.layers:
            for buffer in (layer.keys, layer.values):
                for row, old in enumerate(rows):
                    if row != old:
                        buffer[row, :, self.start : self.end] = buffer[old, :, self.start : self.end]
        self.lengths = [self.lengths[row] for row in rows]
        if rows:
            self.start = self.end - max(self.lengths)
        else:
            self.clear()

    def clear(self) -> None:
        """Drop all rows and their memory."""
        self.lengths, self.start, self.end, self._num_rows, self._num_columns = [], 0, 0, 0, 0
        for layer in self.layers:
            layer.keys = layer.values = None

    def reserve(self, most: int) -> None:
        """Make room for one more token in each row; ``most`` as for `join`."""
        if self.end == self._num_columns:
            self._move(len(self.lengths), self.width, most)

    def advance(self) -> None:
        """Count the token that a step has written into each row."""
        self.end += 1
        self.lengths = [length + 1 for length in self.lengths]

    def _move(self, rows: int, end: int, most: int) -> None:
        """Move the content to new buffers: so many rows, and its last column before column ``end``."""
        # Some spare columns, and never more than the longest answer can need.
        self._num_rows, self._num_columns = rows, min(max(most, end + 1), end + SPARE_COLUMNS)
        old, start = slice(self.start, self.end), end - self.width
        for layer in self.layers:
            if layer.keys is None:
                continue
            buffers = self._buffer(layer.keys), self._buffer(layer.values)
            for new, content in zip(buffers, (layer.keys, layer.values), strict=True):
                new[: len(self.lengths), :, start:end] = content[: len(self.lengths), :, old]
            # Layer by layer, so that only one of them is twice in memory.
            layer.keys, layer.values = buffers
        self.start, self.end = start, end

    def _buffer(self, like: Tensor) -> Tensor:
        return like.new_zeros(self._num_rows, like.shape[1], self._num_columns, like.shape[3])


class ReadPrompts(NamedTuple):
    """Prompts that were read and have no row yet.

    Args:
        logits: of the first tokens of their answers, [R, V].
        cache: their keys and values, padded on the left.
        most: tokens of each with its longest answer.
    """

    logits: Tensor
    cache: DynamicCache
    state: GenerationState
    lengths: list[int]
    most: list[int]


class Batch:
    """The running rows of a model.

    Args:
        chunk: tokens of prompts that the decoder reads at once.

    Raises:
        DecoderError: the decoder keeps something else than keys and values of all its tokens.
    """

    def __init__(self, model: BindLLM, *, chunk: int) -> None:
        layers = DynamicCache(config=model.decoder.config).layers
        # Both are masks over one cache of all tokens. Recurrent states, compressed or shared keys are not.
        if other := {type(x).__name__ for x in layers} - {
            DynamicLayer.__name__,
            DynamicSlidingWindowLayer.__name__,
        }:
            raise DecoderError(
                f"{type(model.decoder).__name__} keeps {', '.join(sorted(other))} in its cache; the serving engine "
                "serves decoders with keys and values only (full or sliding-window attention). "
                "Use BindLLM.generate, or another decoder"
            )
        self._model, self._chunk, self._slots = model, chunk, SlotCache(len(layers))
        self._state: GenerationState | None = None
        self._most: list[int] = []

    def __len__(self) -> int:
        return len(self._most)

    def needs(self, newcomers: Sequence[RowInput]) -> int:
        """Return an upper bound for the tokens that the cache will hold with these further rows."""
        # Every row takes as many columns as the longest one.
        most = [*self._most, *(row.most for row in newcomers)]
        return len(most) * max(most)

    def read(self, newcomers: Sequence[RowInput]) -> Iterator[ReadPrompts | None]:
        """Run the decoder on prompts, chunk by chunk; the rows of the batch are not touched, even if this fails.

        Yields:
            None after each chunk but the last one; then the prompts.
        """
        lengths = [len(row.ids) for row in newcomers]
        width, device = max(lengths), self._model.device
        # Padding on the left, as in `generate`: the next token follows the last column of every row.
        ids = torch.stack([pad(row.ids, (width - len(row.ids), 0)) for row in newcomers]).to(device)
        index = torch.stack(
            [pad(row.media_index, (width - len(row.ids), 0), value=NO_MEDIA) for row in newcomers]
        )
        bind = _stack([row.bind for row in newcomers])
        # Either all rows have context tokens, or the model reads none.
        context = [row.context for row in newcomers if row.context is not None]
        state = self._model.injection.state(bind, index.to(device), _stack(context) if context else None)
        prompts, mask = DynamicCache(), _mask(lengths, width, device)
        # Positions count tokens, not columns, so a prompt is read as it would be alone.
        positions = (mask.cumsum(1) - 1).clamp_(min=0)
        rows = torch.arange(len(newcomers), device=device)
        for start in range(0, width, step := max(1, self._chunk // len(newcomers))):
            stop = min(start + step, width)
            inputs = {"input_ids": ids[:, start:stop], "past_key_values": prompts, "use_cache": True}
            # Without padding no mask is needed, and attention is faster.
            if min(lengths) < width:
                inputs["attention_mask"] = mask[:, :stop]
            chosen = projecting(rows, torch.full_like(rows, stop - start - 1))
            with self._model.injection.applying(state), chosen:
                logits = self._model.decoder(**inputs, position_ids=positions[:, start:stop]).logits
            if stop < width:
                yield None
        # Three axes: a decoder without a projection of the usual shape has computed all positions.
        logits = logits[:, -1] if logits.ndim == 3 else logits
        most = [row.most for row in newcomers]
        yield ReadPrompts(logits.float(), prompts, state.after_prompt(), lengths, most)

    def join(self, prompts: ReadPrompts, chosen: Sequence[int]) -> None:
        """Add rows after the present ones.

        Args:
            chosen: index of the prompt of each new row; several rows may have the same one.
        """
        most = [*self._most, *(prompts.most[n] for n in chosen)]
        self._slots.join(prompts.cache, [prompts.lengths[n] for n in chosen], chosen, max(most))
        state = prompts.state.select(torch.tensor(chosen, device=self._model.device))
        self._state = state if self._state is None else self._state.join(state)
        self._most = most

    def step(self, tokens: Sequence[int]) -> Tensor:
        """Read one more token of each row, and return the logits of the next one, [R, V]."""
        slots, device = self._slots, self._model.device
        slots.reserve(max(self._most))
        inputs = {
            "input_ids": torch.tensor(tokens, device=device).unsqueeze(1),
            "position_ids": torch.tensor(slots.lengths, device=device).unsqueeze(1),
            "past_key_values": slots,
            "use_cache": True,
        }
        # Without padding no mask is needed, as in `read`.
        if min(slots.lengths) < slots.width:
            inputs["attention_mask"] = _mask(
                [length + 1 for length in slots.lengths], slots.width + 1, device
            )
        with self._model.injection.applying(self._state):
            logits = self._model.decoder(**inputs).logits
        slots.advance()
        return logits[:, -1].float()

    def remove(self, rows: Sequence[int]) -> list[int]:
        """Remove rows; return the former indices of the others, in their new order."""
        gone, count = set(rows), len(self) - len(set(rows))
        # The last rows take the places of the removed ones, so that few are copied.
        last = [row for row in range(count, len(self)) if row not in gone]
        order = [last.pop() if row in gone else row for row in range(count)]
        self._slots.keep(order)
        self._most = [self._most[row] for row in order]
        self._state = self._state.select(torch.tensor(order, device=self._model.device)) if order else None
        return order

    def clear(self) -> None:
        """Remove all rows, also after a failed step."""
        self._slots.clear()
        self._state, self._most = None, []


def _mask(lengths: Sequence[int], width: int, device: torch.device) -> Tensor:
    """Return 1 for tokens and 0 for padding on the left, [R, width]."""
    columns = torch.arange(width, device=device)
    return (columns >= width - torch.tensor(lengths, device=device).unsqueeze(1)).long()


def _stack(rows: Sequence[Tensor]) -> Tensor:
    """Stack rows [M, ...] of different sizes, with zeros, which no token refers to: [R, M, ...]."""
    most = [max(sizes) for sizes in zip(*(row.shape for row in rows), strict=True)]
    return torch.stack([pad(row, _missing(row.shape, most)) for row in rows])


def _missing(shape: Sequence[int], most: Sequence[int]) -> list[int]:
    """Return what `pad` takes to make a shape larger at the end of each axis; it starts with the last axis."""
    return [
        size
        for own, wanted in zip(reversed(shape), reversed(most), strict=True)
        for size in (0, wanted - own)
    ]
