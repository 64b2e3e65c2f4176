"""Encoders: frozen models that turn media into unit embeddings, and what each of them promises.

There is no registry: a recipe names an encoder by its import path, so anyone's class will do if it keeps the
promises of `Encoder`. `bindllm.testing.check_encoder` tells whether it does.
"""

from __future__ import annotations

import hashlib
import importlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from bindllm.atomic import file_sha256
from bindllm.errors import EncoderError, InputError, did_you_mean
from bindllm.media import MODALITIES, Media

if TYPE_CHECKING:
    import torch

    from bindllm.encoders.aligned import Aligned
    from bindllm.encoders.audio_tower import AudioTower
    from bindllm.encoders.efficientnet import EfficientNetLite
    from bindllm.encoders.huggingface import HuggingFace
    from bindllm.encoders.imagebind import ImageBind
    from bindllm.encoders.pointbind import PointBind

__all__ = [
    "Aligned",
    "AudioTower",
    "EfficientNetLite",
    "Encoder",
    "HasExamples",
    "HasSpace",
    "HuggingFace",
    "ImageBind",
    "PointBind",
    "encoder_for",
    "fingerprint",
    "skipped_encoders",
]

_HOMES = {
    "Aligned": "bindllm.encoders.aligned",
    "EfficientNetLite": "bindllm.encoders.efficientnet",
    "HuggingFace": "bindllm.encoders.huggingface",
    "ImageBind": "bindllm.encoders.imagebind",
    "PointBind": "bindllm.encoders.pointbind",
    "AudioTower": "bindllm.encoders.audio_tower",
}


class Encoder(Protocol):
    """A frozen model from media to unit embeddings; any class with these members is one.

    ``prepare`` does what concerns one media alone (open, resize, scale) and may run in several threads or
    processes; ``embed`` runs the model on a batch. Encoders are never trained and never part of the model.

    Two more members are optional: `HasSpace` and `HasExamples`.

    The constructor is cheap, since a recipe is read without loading anything: weights load at the first `embed`.
    `Any` stands where classes may differ: a recipe's reader compares all other annotations word for word.
    """

    modalities: Sequence[str]
    """What it serves: names from `bindllm.media.MODALITIES`, or any other lower-case words."""

    @property
    def embedding_size(self) -> int:
        """E, the width of the embeddings."""
        ...

    @property
    def config(self) -> Mapping[str, Any]:
        """Keywords of the constructor, plain JSON: ``type(encoder)(**encoder.config)`` is the same encoder."""
        ...

    def fingerprint(self) -> str:
        """Return hex digits that change when an embedding would: weights, preprocessing, revision of the code.

        Stored embeddings are found by it, so it depends on no device, batch or path. The function `fingerprint`
        of this module makes one.
        """
        ...

    def to(self, device: Any) -> Any:
        """Move the model to a device (``torch.device`` or its name) and return the encoder itself."""
        ...

    def prepare(self, media: Media) -> torch.Tensor:
        """Return one media as a CPU tensor without batch dimension; the same bits every time.

        Raises:
            MediaError: the media cannot be read; the message names it.
        """
        ...

    def embed(self, modality: str, inputs: Any) -> torch.Tensor:
        """Return [B, E], float32, unit norm, without gradient, from prepared media of one modality.

        Args:
            modality: one of ``modalities``.
            inputs: a sequence of B prepared tensors, B at least 1; row i depends on ``inputs[i]`` alone.
        """
        ...


@runtime_checkable
class HasSpace(Protocol):
    """An encoder that names its joint space; see `bindllm.encoders.alignment`."""

    space: str
    """The same word for encoders that were trained together, so that their embeddings of one thing are alike."""


@runtime_checkable
class HasExamples(Protocol):
    """An encoder that brings media to be checked with; needed for modalities that we do not ship."""

    def examples(self) -> Sequence[Media]:
        """Return at least two different media of each modality that it serves, made up or files of its own."""
        ...


def encoder_for(modality: str, encoders: Sequence[Encoder]) -> Encoder:
    """Return the first encoder that serves a modality.

    Raises:
        InputError: none does; the message names the closest modality, and lists those that are served.
    """
    for encoder in encoders:
        if modality in encoder.modalities:
            return encoder
    served = sorted({name for encoder in encoders for name in encoder.modalities})
    # A word that is nobody's may be a misspelling of one that is served here or known elsewhere.
    hint = "" if modality in MODALITIES else f"{did_you_mean(modality, {*MODALITIES, *served})} "
    raise InputError(
        f"no encoder serves the modality {modality!r}; the encoders here serve: {', '.join(served) or 'nothing'}. "
        f"{hint}Name one that does under `encoders` of the recipe"
    )


def skipped_encoders(encoders: Sequence[Encoder]) -> list[str]:
    """Return one sentence for each encoder that serves a modality which an earlier one serves.

    `encoder_for` takes the first, so the later one is never asked for it.
    """
    first: dict[str, Encoder] = {}
    sentences = []
    for encoder in encoders:
        twice = [name for name in encoder.modalities if first.setdefault(name, encoder) is not encoder]
        if twice:
            ahead = dict.fromkeys(type(first[name]).__name__ for name in twice)
            sentences.append(
                f"{type(encoder).__name__} is not asked for {', '.join(twice)}: {' and '.join(ahead)} comes before it "
                "and serves it too. To choose, limit the modalities of the one, or change the order"
            )
    return sentences


def fingerprint(config: Mapping[str, Any], *parts: bytes | str | Path) -> str:
    """Return the sha256, in hex, of settings and parts: what an encoder's ``fingerprint`` can be made of.

    Args:
        config: the settings that change embeddings, as JSON can hold them; no paths and no device.
        parts: further bytes, words (such as the revision of the preprocessing), or files, which count with their
            content (a `Path`; a str is a word, never a file).

    Raises:
        EncoderError: a file cannot be read, or the settings are not JSON.

    Example:
        >>> fingerprint({"size": 224}, "tiny-net 1")[:8]
        '4d3345ee'
    """
    try:
        digest = hashlib.sha256(json.dumps(dict(config), sort_keys=True, allow_nan=False).encode())
    except (TypeError, ValueError) as error:
        raise EncoderError(f"the settings {dict(config)!r} are not plain JSON: {error}") from error
    for part in parts:
        # Hashing each part first keeps ("ab", "c") and ("a", "bc") apart.
        digest.update(_digest(part))
    return digest.hexdigest()


def _digest(part: bytes | str | Path) -> bytes:
    if isinstance(part, Path):
        try:
            return bytes.fromhex(file_sha256(part, prefix=b"file"))
        except OSError as error:
            raise EncoderError(f"{part}: cannot be read ({error.strerror})") from error
    return hashlib.sha256(b"word" + part.encode() if isinstance(part, str) else b"data" + part).digest()


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(
            f"module 'bindllm.encoders' has no attribute {name!r}; it has {', '.join(__all__)}"
        )
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
