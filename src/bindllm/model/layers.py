"""Which layers of a decoder a part serves: all, the last few, or some by their index."""

from __future__ import annotations

import os
import shutil

from torch import nn
from transformers import PreTrainedModel

from bindllm.errors import DecoderError, InputError, listed

Layers = int | list[int] | None
"""A number of layers, counted from the last; a list of indices from 0; or None for all."""


USUAL = "a decoder of the LLaMA shape (Llama, Mistral, Qwen2, Qwen3, SmolLM2, ...)"

# Names of the list of layers: of most families; GPT-2, BLOOM, Falcon; MPT, DBRX; BERT.
_LISTS = ("layers", "h", "blocks", "layer")
_FEED_FORWARD = ("mlp", "feed_forward", "ffn")
_COMPILERS = ("g++", "clang++", "cl")


def check_layers(layers: Layers, setting: str) -> None:
    """Raise an `InputError` that names the setting if a choice of layers cannot be one, whatever the decoder."""
    is_list = isinstance(layers, list)
    numbers = layers if is_list else [1 if layers is None else layers]
    least = 0 if is_list else 1
    if (
        not numbers
        or len(set(numbers)) < len(numbers)
        or any(type(n) is not int or n < least for n in numbers)
    ):
        raise InputError(
            f"{setting} is {layers}, expected a whole number of at least 1, a list of different layer indices from 0, "
            "or null for all layers"
        )


def find_layers(decoder: PreTrainedModel) -> list[tuple[int, nn.Module]]:
    """Return the layers of a decoder with their indices.

    Raises:
        DecoderError: it has no list of layers.
    """
    core = decoder.get_decoder()
    # transformers takes the vocabulary projection of ModernBERT for the decoder.
    for path, module in (*core.named_modules(), *decoder.named_modules()):
        if isinstance(module, nn.ModuleList) and path.rpartition(".")[2] in _LISTS:
            return list(enumerate(module))
    raise DecoderError(
        f"{type(decoder).__name__} has no list of layers ({', '.join(_LISTS)}) in its decoder, so nothing can be "
        f"injected; it has: {', '.join(dict(core.named_children()))}. Use {USUAL}"
    )


def compile_layers(decoder: PreTrainedModel) -> None:
    """Compile the feed-forward part and the norms of each layer, in place, by torch.compile.

    The attention and the layer itself are not compiled: hooks of the injection would break their graphs.

    Raises:
        DecoderError: there is no C++ compiler on a CPU.
    """
    if decoder.device.type == "cpu" and not any(
        map(shutil.which, (*filter(None, [os.environ.get("CXX")]), *_COMPILERS))
    ):
        raise DecoderError(
            f"decoder.compile needs a C++ compiler on a CPU, and none was found ({', '.join(_COMPILERS)}, or the "
            "variable CXX): install one, or remove decoder.compile"
        )
    for _, layer in find_layers(decoder):
        for name, part in layer.named_children():
            if name in _FEED_FORWARD or "norm" in name:
                # Batches differ in length: one graph serves all.
                part.compile(dynamic=True)


def choose_layers(
    every: list[tuple[int, nn.Module]], layers: Layers, name: str, setting: str
) -> list[tuple[int, nn.Module]]:
    """Return the layers that a setting names.

    Raises:
        DecoderError: the decoder has fewer.
    """
    if layers is None:
        return every
    # Kinds that add to heads have no use for a layer without attention.
    known = dict(every)
    numbers = sorted(layers) if isinstance(layers, list) else list(known)[-layers:]
    if len(numbers) < (layers if isinstance(layers, int) else 0) or not set(numbers) <= set(known):
        listing = "" if [*known] == [*range(len(known))] else f" with attention: {listed([*map(str, known)])}"
        raise DecoderError(
            f"{setting} is {layers}, but {name} has {len(known)} layers{listing}: is it the right decoder?"
        )
    return [(number, known[number]) for number in numbers]
