"""Towers: what an aligned encoder stands on, either a frozen encoder or a network that was trained for it.

A trainable tower is a `torch.nn.Module` with the members of `TrainableTower`; any class will do, by its import path.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from bindllm.encoders import Encoder
from bindllm.errors import BindLLMError, EncoderError
from bindllm.imports import name_module, replace_allow

_KINDS = {
    "a frozen encoder": (
        "modalities",
        "embedding_size",
        "config",
        "fingerprint",
        "to",
        "prepare",
        "embed",
    ),
    "a trainable tower": (
        "modality",
        "embedding_size",
        "revision",
        "config",
        "prepare",
        "augment",
        "forward",
    ),
}
_METHODS = ({"fingerprint", "to", "prepare", "embed"}, {"prepare", "augment", "forward"})


class TrainableTower(Protocol):
    """A network from prepared media of one modality to vectors; also a `torch.nn.Module`.

    In evaluation mode nothing is drawn by chance, and a row depends on its own input alone. The constructor is cheap
    and draws the initial weights; trained ones come from the aligned encoder's folder.
    """

    modality: str
    """What it takes: a name from `bindllm.media.MODALITIES`, or any other lower-case word."""

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


@runtime_checkable
class CanMix(Protocol):
    """A tower that can lay two media over each other, such as two sounds of one picture."""

    def mix(self, first: Tensor, second: Tensor, generator: torch.Generator) -> Tensor:
        """Return a prepared media in which both are heard."""
        ...


def is_trainable(tower: Any) -> bool:
    """Tell a tower that is to be trained from a frozen encoder.

    Raises:
        EncoderError: it is neither; lists what it lacks.

    Example:
        >>> is_trainable("a tower")
        Traceback (most recent call last):
        ...
        bindllm.errors.EncoderError: str is no tower. As a frozen encoder it lacks modalities, embedding_size, ...
    """
    kind = type(tower)
    lacks = {what: [name for name in names if name not in dir(tower)] for what, names in _KINDS.items()}
    if not lacks["a frozen encoder"]:
        return False
    if not lacks["a trainable tower"] and isinstance(tower, torch.nn.Module):
        return True
    if not lacks["a trainable tower"]:
        raise EncoderError(f"{kind.__name__} is no tower: a trainable one is a torch.nn.Module too")
    told = "; ".join(f"as {what} it lacks {', '.join(names)}" for what, names in lacks.items())
    raise EncoderError(f"{kind.__name__} is no tower. {told[0].upper()}{told[1:]}")


def build_tower(class_path: str, init_args: Mapping[str, Any], *, allow: Sequence[str]) -> Encoder | Any:
    """Build the tower that an aligned encoder's folder names.

    Args:
        class_path: import path of the class.
        init_args: arguments of its constructor.
        allow: import paths outside ``bindllm.`` that may be imported. It replaces any ``allow`` in ``init_args``.

    Raises:
        EncoderError: the class is not allowed, does not exist, is no tower, or cannot be built.
    """
    if not class_path.startswith("bindllm.") and class_path not in allow:
        raise EncoderError(
            f"the aligned encoder stands on the class {class_path!r}, which is not part of bindllm and would run code "
            f"from there. If you trust it, give the encoder the argument allow=[{class_path!r}], or the command line "
            f"--allow {class_path}"
        )
    module, _, name = class_path.rpartition(".")
    if class_path in allow:
        name_module(class_path)
    try:
        kind = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise EncoderError(f"the tower {class_path} cannot be imported: {error}") from error
    # Looked at before anything is called: a folder from a stranger may name any class and any arguments.
    if not isinstance(kind, type) or not any(methods <= set(dir(kind)) for methods in _METHODS):
        raise EncoderError(
            f"{class_path} is not the class of a tower; expected an encoder or a trainable tower"
        )
    try:
        return kind(**replace_allow(kind, init_args, allow))
    except BindLLMError:
        raise
    # This may be a stranger's code: whatever it raises means that there is no such tower.
    except Exception as error:
        raise EncoderError(
            f"the tower {class_path} cannot be built with {dict(init_args)}: {type(error).__name__}: {error}"
        ) from error
