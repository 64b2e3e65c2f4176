"""Tokens that all prompts of a batch start with, such as the same shots: computed once for all rows with equal media.

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
    """Generate the ids of answers, [N, A]; equal beginnings of all rows, such as the same shots, are computed once.

    Args:
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
    length, owners = _find_shared(prompts, repeats)
    copies = len(owners) * repeats - len(set(owners))
    if copies * length < MIN_SAVED or not _can_reuse(decoder, options):
        return None
    # How to read this: the first row with each media is read as far as all rows agree, its keys and values are placed
    # in the columns of these tokens in each row with its media, and groups that no later token listens to are dropped.
    padding, firsts = prompts.padding, sorted(set(owners))
    # Shorter rows have more padding: they compute the end of the common tokens again.
    width = int(padding.min()) + length
    read = _read(decoder, prompts, firsts, length, bind)
    # [B, W]: the token of each column; any for padding, which is masked. [B, 1]: the row that was read.
    tokens = (torch.arange(width, device=padding.device) - padding).clamp(min=0).repeat_interleave(repeats, 0)
    rows = torch.tensor([firsts.index(n) for n in owners], device=padding.device)
    rows = rows.repeat_interleave(repeats)[:, None]
    placed = DynamicCache(config=decoder.config)
    for number, layer in enumerate(read.layers):
        # [U, Hkv, P, d] -> [B, W, Hkv, d] -> [B, Hkv, W, d].
        placed.update(*(x[rows, :, tokens].transpose(1, 2) for x in (layer.keys, layer.values)), number)
    dropped = 0
    for values in prompts.media.values():
        later = prompts.index[:, width:]
        dropped = int(later.where(later != NO_MEDIA, values.shape[1] - 1).min())
    index = (prompts.index - dropped).clamp(min=NO_MEDIA)
    media = {name: values[:, dropped:] for name, values in prompts.media.items()}
    return placed, prompts._replace(index=index, media=media)


def _find_shared(prompts: Prompts, repeats: int) -> tuple[int, list[int]]:
    """Find the beginning that saves the most tokens if it is computed once for all rows with equal media.

    Returns:
        its number of tokens, and for each row the first one with the same media. Each row keeps a token after it.
    """
    shortest = int(prompts.mask.sum(1).min())
    columns = prompts.padding + torch.arange(shortest - 1, device=prompts.ids.device)
    ids, index = prompts.ids.gather(1, columns), prompts.index.gather(1, columns)
    longest = int(((ids == ids[:1]) & (index == index[:1])).all(0).cumprod(0).sum())
    # Before each token that is the first to listen to further media: such as those of the question, after the shots.
    heard = index[0, :longest].cummax(0).values.tolist()
    ends = [n for n in range(1, longest) if heard[n] > heard[n - 1]] + [longest] * bool(longest)
    found = [(end, _first_rows(prompts, heard[end - 1] + 1)) for end in ends]
    return max(found, key=lambda one: one[0] * (len(one[1]) * repeats - len(set(one[1]))), default=(0, [0]))


def _first_rows(prompts: Prompts, groups: int) -> list[int]:
    """Return for each row the first one whose first media groups are equal."""
    parts = [values[:, :groups].flatten(1).cpu().contiguous() for values in prompts.media.values()]
    # By their bytes, as NumPy lacks bfloat16.
    keys = [
        b"".join(x[n].view(torch.uint8).numpy().tobytes() for x in parts) for n in range(len(prompts.ids))
    ]
    first: dict[bytes, int] = {}
    return [first.setdefault(key, n) for n, key in enumerate(keys)]


def _read(
    decoder: PreTrainedModel,
    prompts: Prompts,
    rows: list[int],
    length: int,
    bind: Callable[..., dict[str, Any]],
) -> DynamicCache:
    """Return the keys and values of the first tokens of some rows, with the media that these listen to."""
    columns = prompts.padding[rows] + torch.arange(length, device=prompts.ids.device)
    ids, index = (x[rows].gather(1, columns) for x in (prompts.ids, prompts.index))
    groups = max(1, int(index.max()) + 1)
    media = {name: values[rows, :groups] for name, values in prompts.media.items()}
    read = DynamicCache(config=decoder.config)
    # Else a window would drop keys that rows with more padding still need.
    read.activate_past_recording()
    # Only keys and values are read, so the vocabulary projection runs at one position.
    first = ids.new_zeros(1)
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
