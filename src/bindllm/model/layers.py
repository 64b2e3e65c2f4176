"""Which layers of a decoder a part serves: all, the last few, or some by their index."""

from __future__ import annotations

from torch import nn

from bindllm.errors import DecoderError, InputError

Layers = int | list[int] | None
"""A number of layers, counted from the last; a list of indices from 0; or None for all."""


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


def find_layers(core: nn.Module, name: str) -> list[tuple[int, nn.Module]]:
    """Return the layers of a decoder with their indices.

    Args:
        core: ``get_decoder()`` of a causal language model.
        name: of the decoder, for the message.

    Raises:
        DecoderError: it has no list of layers.
    """
    children = dict(core.named_children())
    if not isinstance(children.get("layers"), nn.ModuleList):
        raise DecoderError(
            f"{name} has no `layers` list in its decoder, so nothing can be injected; it has: {', '.join(children)}. "
            "Decoders of the LLaMA shape (Llama, Mistral, Qwen2, Qwen3, SmolLM2, ...) have it."
        )
    return list(enumerate(children["layers"]))


def choose_layers(
    every: list[tuple[int, nn.Module]], layers: Layers, name: str, setting: str
) -> list[tuple[int, nn.Module]]:
    """Return the layers that a setting names.

    Raises:
        DecoderError: the decoder has fewer.
    """
    if layers is None:
        return every
    numbers = sorted(layers) if isinstance(layers, list) else range(len(every) - layers, len(every))
    if numbers[0] < 0 or numbers[-1] >= len(every):
        raise DecoderError(
            f"{setting} is {layers}, but {name} has {len(every)} layers: is it the right decoder?"
        )
    return [every[number] for number in numbers]
