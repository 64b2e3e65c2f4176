"""Towers: the base of an aligned encoder, either a frozen encoder or a network that was trained for it.

A trainable tower is a `torch.nn.Module` with the members of `TrainableTower`; any class will do, by its import path.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from bindllm.encoders import Encoder, members_of
from bindllm.errors import EncoderError
from bindllm.imports import build_named


class TrainableTower(Protocol):
    """A network from prepared media of one modality to vectors; also a `torch.nn.Module`.

    In evaluation mode it is deterministic, and a row depends only on its own input. The constructor is cheap
    and draws the initial weights; trained ones come from the aligned encoder's folder.
    """

    modality: str
    """Its input: a name from `bindllm.media.MODALITIES`, or any other lower-case word."""

    embedding_size: int
    """W, the width of its vectors."""

    revision: str
    """A word such as "my-tower 1": raise the number when `prepare` or `forward` give other numbers."""

    config: Mapping[str, Any]
    """Keywords of the constructor, plain JSON."""

    def prepare(self, media: Any) -> Tensor:
        """Return one media as a CPU tensor; `MediaError` when it cannot be read."""
        ...

    def augment(self, inputs: Tensor, generator: torch.Generator) -> Tensor:
        """Return a changed copy of a prepared media, for one training step; all chance comes from ``generator``."""
        ...

    def forward(self, inputs: Sequence[Tensor]) -> Tensor:
        """Return [B, W] for B prepared (or augmented) media, which may differ in shape."""
        ...


# By role, for a message that lists the missing members. A tower with the members of an encoder is one.
_KINDS = {"a frozen encoder": Encoder, "a trainable tower": TrainableTower}


@runtime_checkable
class CanMix(Protocol):
    """A tower that can mix two media, such as two recordings that belong to one image."""

    def mix(self, first: Tensor, second: Tensor, generator: torch.Generator) -> Tensor:
        """Return a prepared media that contains both."""
        ...


def is_trainable(tower: Any) -> bool:
    """Return whether a tower is trainable; a frozen encoder is not.

    Raises:
        EncoderError: the tower is neither; lists the missing members.

    Examples:
        >>> is_trainable("a tower")
        Traceback (most recent call last):
        ...
        bindllm.errors.EncoderError: str is not a tower. As a frozen encoder it lacks modalities, embedding_size, ...
    """
    kind = type(tower)
    lacks = {
        role: [name for name in members_of(protocol) if name not in dir(tower)]
        for role, protocol in _KINDS.items()
    }
    # An encoder first: it may be a torch.nn.Module too, and must still stay frozen.
    if not lacks["a frozen encoder"]:
        return False
    if not lacks["a trainable tower"] and isinstance(tower, torch.nn.Module):
        return True
    if not lacks["a trainable tower"]:
        raise EncoderError(f"{kind.__name__} is not a tower: a trainable one is a torch.nn.Module too")
    reasons = "; ".join(f"as {role} it lacks {', '.join(names)}" for role, names in lacks.items())
    raise EncoderError(f"{kind.__name__} is not a tower. {reasons[0].upper()}{reasons[1:]}")


def build_tower(class_path: str, init_args: Mapping[str, Any], *, allow: Sequence[str]) -> Encoder | Any:
    """Build the tower that an aligned encoder's folder names.

    Args:
        class_path: import path of the class.
        init_args: arguments of its constructor.
        allow: import paths outside ``bindllm.`` that may be imported. It replaces any ``allow`` in ``init_args``.

    Raises:
        EncoderError: the class is not allowed, does not exist, is not a tower, or cannot be built.
    """
    return build_named(class_path, init_args, allow=allow, problem=_not_a_tower, failure=EncoderError)


def _not_a_tower(kind: Any) -> str:
    """Return why something is not the class of a tower: an untrusted folder may name any class and any arguments."""
    # Only methods are on the class: attributes may be set in the constructor.
    methods = [set(members_of(protocol, methods=True)) for protocol in _KINDS.values()]
    fits = isinstance(kind, type) and any(names <= set(dir(kind)) for names in methods)
    return "" if fits else "not the class of a tower, which is an encoder or a trainable tower"
