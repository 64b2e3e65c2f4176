"""Tokens that all prompts of a batch start with, such as the same shots: computed once.

Their keys and values are placed in the columns that they have in the left-padded batch, so positions, masks and media
index are those of a batch in which every row is computed. Nothing is kept after the call.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from bindllm.conversation import NO_MEDIA
from bindllm.model.decoder import projecting

MIN_SAVED = 64
"""Tokens of a batch that must be saved, since a further call of the decoder takes time too."""

# Options for which Hugging Face makes a key/value cache of its own, or that may hide other options.
_OTHER_CACHE = ("cache_implementation", "cache_config", "prompt_lookup_num_tokens", "generation_config")


class Prompts(NamedTuple):
    """A left-padded batch of prompts.

    Args:
        ids: [B, T].
        mask: [B, T].
        index: media index, [B, T].
        media: embeddings, tokens and records of the media groups by name, each [B, M, ...]; empty without media.
    """

    ids: Tensor
    mask: Tensor
    index: Tensor
    media: dict[str, Tensor]

    @property
    def padding(self) -> Tensor:
        """Columns of padding of each row, [B, 1]."""
        return self.mask.shape[1] - self.mask.sum(1, keepdim=True)


def generate_ids(
    decoder: PreTrainedModel,
    prompts: Prompts,
    options: dict[str, Any],
    bind: Callable[..., dict[str, Any]],
    hold: Callable[..., AbstractContextManager],
) -> Tensor:
    """Generate the ids of answers, [N, A]; tokens that all rows start with, such as the same shots, are computed once.

    Args:
        decoder: with its injection.
        prompts: the batch.
        options: of Hugging Face ``generate``.
        bind: returns the keywords of the decoder's forward for a media index and the media by name.
        hold: gives these keywords to all calls of the decoder in a block, see `Injection.holding`.
    """
    if found := _read_beginning(decoder, prompts, options, bind):
        options["past_key_values"], prompts = found
    # `generate` rejects unknown keywords, so the bind vectors reach the layers through a context variable.
    with hold(**bind(prompts.index, **prompts.media)) if prompts.media else nullcontext():
        ids = decoder.generate(prompts.ids, attention_mask=prompts.mask, **options)
    return ids[:, prompts.ids.shape[1] :]


def _read_beginning(
    decoder: PreTrainedModel,
    prompts: Prompts,
    options: Mapping[str, Any],
    bind: Callable[..., dict[str, Any]],
) -> tuple[DynamicCache, Prompts] | None:
    """Compute the tokens that all rows of a batch start with; arguments as for `generate_ids`.

    Returns:
        the keys and values of the first columns, in each row that ``generate`` runs, and the prompts with the media of
        the other columns. None if this saves too little, or does not work with the decoder or the options.
    """
    repeats = max(options.get("num_beams") or 1, options.get("num_return_sequences") or 1)
    copies = len(prompts.ids) * repeats - 1
    length = _count_shared(prompts) if copies else 0
    if copies * length < MIN_SAVED or not _can_reuse(decoder, options):
        return None
    # How to read this: the longest row is read as far as all rows agree, its keys and values are placed in the columns
    # of these tokens in each row, and the groups that no later token listens to are dropped.
    padding = prompts.padding
    row = int(padding.argmin())
    # Shorter rows have more padding: they compute the end of the common tokens again.
    width = int(padding.min()) + length
    read = _read(decoder, prompts, row, slice(width - length, width), bind)
    # [B, W]: the token of each column; any for padding, which is masked.
    tokens = (torch.arange(width, device=padding.device) - padding).clamp(min=0).repeat_interleave(repeats, 0)
    placed = DynamicCache(config=decoder.config)
    for number, layer in enumerate(read.layers):
        # [1, Hkv, P, d] -> [B, Hkv, W, d].
        placed.update(*(x[0][:, tokens].transpose(0, 1) for x in (layer.keys, layer.values)), number)
    dropped = 0
    for values in prompts.media.values():
        later = prompts.index[:, width:]
        dropped = int(later.where(later != NO_MEDIA, values.shape[1] - 1).min())
    index = (prompts.index - dropped).clamp(min=NO_MEDIA)
    media = {name: values[:, dropped:] for name, values in prompts.media.items()}
    return placed, prompts._replace(index=index, media=media)


def _count_shared(prompts: Prompts) -> int:
    """Return how many tokens with equal media all rows start with; each row keeps at least one token after them."""
    shortest = int(prompts.mask.sum(1).min())
    columns = prompts.padding + torch.arange(shortest - 1, device=prompts.ids.device)
    ids, index = prompts.ids.gather(1, columns), prompts.index.gather(1, columns)
    same = ((ids == ids[:1]) & (index == index[:1])).all(0)
    for values in prompts.media.values():
        equal = (values == values[:1]).flatten(2).all(2).all(0)  # [M]
        same &= equal[index[0].clamp(min=0)] | (index[0] == NO_MEDIA)
    return int(same.cumprod(0).sum())


def _read(
    decoder: PreTrainedModel,
    prompts: Prompts,
    row: int,
    columns: slice,
    bind: Callable[..., dict[str, Any]],
) -> DynamicCache:
    """Return the keys and values of some columns of a row, with the media that these listen to."""
    ids, index = prompts.ids[row : row + 1, columns], prompts.index[row : row + 1, columns]
    groups = max(1, int(index.max()) + 1)
    media = {name: values[row : row + 1, :groups] for name, values in prompts.media.items()}
    read = DynamicCache(config=decoder.config)
    # Else a window would drop keys that rows with more padding still need.
    read.activate_past_recording()
    first = ids.new_zeros(1)
    # Only keys and values are read, so the vocabulary projection runs at one position.
    with projecting(first, first):
        decoder(input_ids=ids, past_key_values=read, use_cache=True, **bind(index, **media))
    return read


def _can_reuse(decoder: PreTrainedModel, options: Mapping[str, Any]) -> bool:
    """Return whether keys and values of the first tokens do not depend on those that follow."""
    if options.get("use_cache") is False or any(options.get(name) for name in _OTHER_CACHE):
        return False
    # Processes that share a sharded decoder must run it equally often.
    if vars(decoder).get("_is_fsdp_managed_module") or not decoder._supports_default_dynamic_cache():
        return False
    config = decoder.config.get_text_config()
    # These rotary embeddings depend on the length of the whole input.
    rotary = str(config.to_dict().get("rope_parameters"))
    if "'dynamic'" in rotary or "'longrope'" in rotary:
        return False
    # Other layers keep a state instead of keys and values.
    layers = DynamicCache(config=decoder.config).layers
    return all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers)
