"""Encoders: frozen models that turn media into unit embeddings, and the contract of each.

A recipe names an encoder by its import path instead of a registered name, so any class works that keeps the contract
of `Encoder`. `bindllm.testing.check_encoder` checks it.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import json
import threading
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from types import FunctionType
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, runtime_checkable

from bindllm.atomic import file_sha256
from bindllm.errors import EncoderError, InputError, did_you_mean
from bindllm.media import MODALITIES, REVISION, Media, is_modality

if TYPE_CHECKING:
    import torch

    from bindllm.encoders.aligned import Aligned
    from bindllm.encoders.audio_tower import AudioTower
    from bindllm.encoders.efficientnet import EfficientNetLite
    from bindllm.encoders.huggingface import HuggingFace
    from bindllm.encoders.imagebind import ImageBind
    from bindllm.encoders.padded import Padded
    from bindllm.encoders.pointbind import PointBind
    from bindllm.encoders.sentence_transformers import SentenceTransformers
    from bindllm.encoders.trainable import Tuned

__all__ = [
    "Aligned",
    "AudioTower",
    "EfficientNetLite",
    "Embedded",
    "Encoder",
    "HasBlocks",
    "HasExamples",
    "HasSpace",
    "HasTokens",
    "HuggingFace",
    "ImageBind",
    "Padded",
    "PointBind",
    "SentenceTransformers",
    "Tuned",
    "encoder_for",
    "fingerprint",
    "skipped_encoders",
]

# Imported at first use: `import bindllm.encoders` must not import torch.
_HOMES = {
    "Aligned": "bindllm.encoders.aligned",
    "EfficientNetLite": "bindllm.encoders.efficientnet",
    "HuggingFace": "bindllm.encoders.huggingface",
    "ImageBind": "bindllm.encoders.imagebind",
    "Padded": "bindllm.encoders.padded",
    "PointBind": "bindllm.encoders.pointbind",
    "SentenceTransformers": "bindllm.encoders.sentence_transformers",
    "AudioTower": "bindllm.encoders.audio_tower",
    "Tuned": "bindllm.encoders.trainable",
}


_TRIES = 5


# How to read this: the seven members below are the whole contract, without a base class to inherit from.
class Encoder(Protocol):
    """A frozen model from media to unit embeddings; any class with these members is one.

    ``prepare`` processes a single media (open, resize, scale) and may run in several threads or
    processes; ``embed`` runs the model on a batch. Only blocks of a `Tuned` encoder are ever trained.

    Further members are optional: `HasSpace`, `HasExamples`, `HasTokens` and `HasBlocks`.

    The constructor is cheap, since a recipe is read without loading anything: weights load at the first `embed`.
    `Any` marks annotations that may differ between classes: jsonargparse compares all others word for word.
    """

    modalities: Sequence[str]
    """Served modalities: names from `bindllm.media.MODALITIES`, or any other lower-case words."""

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
        """Return [B, E], float32, unit norm, from prepared media of one modality; without gradient if frozen.

        Args:
            modality: one of ``modalities``.
            inputs: a sequence of B prepared tensors, B at least 1; row i depends only on ``inputs[i]``.
        """
        ...


class Embedded(NamedTuple):
    """Embeddings with the tokens that they were pooled from.

    Attributes:
        embeddings: [B, E], float32, unit norm.
        tokens: for each of the B media its tokens on their grid, [*grid, C], in any floating dtype. The grid has one to
            three axes, such as positions of a text, rows and columns of an image, or clips, rows and columns of a
            video. Class tokens and padding are not on it. Media of a batch may differ in their grids.
    """

    embeddings: torch.Tensor
    tokens: list[torch.Tensor]


@runtime_checkable
class HasTokens(Protocol):
    """An encoder that also returns the tokens of its network, for models with more than one bind token."""

    token_sizes: Mapping[str, int]
    """C, the width of a token, for each modality that has tokens; known without loading the weights."""

    def embed(self, modality: str, inputs: Any, *, tokens: bool = False) -> Any:
        """Return embeddings as `Encoder.embed` does, or with ``tokens`` an `Embedded` that holds the same ones."""
        ...


@runtime_checkable
class HasSpace(Protocol):
    """An encoder that names its joint space; see `bindllm.encoders`."""

    space: str
    """The same word for encoders that were trained together, so that their embeddings of one thing are alike."""


@runtime_checkable
class HasBlocks(Protocol):
    """An encoder whose blocks can be trained, by `Tuned`: its parameters are frozen by their ``requires_grad`` only."""

    def blocks(self, modality: str) -> Sequence[Any]:
        """Return the blocks of its network for a modality, each a ``torch.nn.Module``, in the order in which they run.

        Loads the weights; the blocks are those that `embed` runs, also if submodules of them are replaced.
        """
        ...


@runtime_checkable
class HasExamples(Protocol):
    """An encoder that brings media for its own check; needed for modalities without synthetic media here."""

    def examples(self) -> Sequence[Media]:
        """Return at least two different media of each modality that it serves, synthetic or files of its own."""
        ...


def encoder_for(modality: str, encoders: Sequence[Encoder]) -> Encoder:
    """Return the first encoder that serves a modality.

    Raises:
        InputError: no encoder does. The message lists the served modalities and the closest name.
    """
    for encoder in encoders:
        if modality in encoder.modalities:
            return encoder
    # No encoder serves it, so the message lists the modalities that would work.
    served = sorted({name for encoder in encoders for name in encoder.modalities})
    # An unknown word may be a misspelling of a modality that is served here or known elsewhere.
    hint = "" if modality in MODALITIES else f"{did_you_mean(modality, {*MODALITIES, *served})} "
    raise InputError(
        f"no encoder serves the modality {modality!r}; the encoders here serve: {', '.join(served) or 'nothing'}. "
        f"{hint}Name one that does under `encoders` of the recipe"
    )


def prepare(media: Media, encoders: Sequence[Encoder]) -> Any:
    """Return a media as its encoder prepares it; may run in several threads.

    Raises:
        InputError: no encoder serves its modality.
        MediaError: it cannot be read.
    """
    encoder = encoder_for(media.modality, encoders)
    for _ in range(_TRIES - 1):
        try:
            return encoder.prepare(media)
        # numpy parses the header of an NPY file as Python text. Before 3.11.8 that can fail when another thread does
        # the same (https://github.com/python/cpython/issues/106905), and a good file would end the run.
        except SystemError as error:
            if "recursion depth mismatch" not in str(error):
                raise
    return encoder.prepare(media)


def skipped_encoders(encoders: Sequence[Encoder]) -> list[str]:
    """Return one sentence for each encoder that serves a modality which an earlier one serves.

    `encoder_for` takes the first, so the later one is never asked for it.
    """
    first: dict[str, Encoder] = {}
    sentences = []
    for encoder in encoders:
        # `setdefault` keeps the first encoder of each modality, as `encoder_for` does.
        twice = [name for name in encoder.modalities if first.setdefault(name, encoder) is not encoder]
        if twice:
            earlier = dict.fromkeys(type(first[name]).__name__ for name in twice)
            sentences.append(
                f"{type(encoder).__name__} is not asked for {', '.join(twice)}: {' and '.join(earlier)} comes before "
                "it and serves it too. To choose, limit the modalities of the one, or change the order"
            )
    return sentences


def space_of(encoder: Encoder) -> str | None:
    """Return the name of an encoder's joint space, or None when it does not name one."""
    return encoder.space if isinstance(encoder, HasSpace) else None


def alignment_warnings(encoders: Sequence[Encoder]) -> list[str]:
    """Return one sentence for each space that was never trained together with that of the first encoder.

    Encoders of one ``space`` belong together; an encoder without one forms a group of its own. Every group after
    the first gets a warning, compared with the first, which most recipes train on.

    Examples:
        >>> class Ears:
        ...     modalities = ("audio",)
        >>> class Eyes:
        ...     modalities, space = ("image",), "clip"
        >>> print(alignment_warnings([Eyes(), Ears()])[0])
        Ears (audio; no space named) was never trained together with Eyes (image; space 'clip'): what a model learns \
from one means nothing to it from the other. Train on each of these modalities, or take encoders of one space; if \
they do share one, give both the same attribute `space`.
    """
    # One group for each space; encoders without a space are never merged.
    groups: list[list[Encoder]] = []
    for encoder in encoders:
        space = space_of(encoder)
        same = [group for group in groups if space is not None and space_of(group[0]) == space]
        if same:
            same[0].append(encoder)
        else:
            groups.append([encoder])
    return [
        f"{_names(group)} {'was' if len(group) == 1 else 'were'} never trained together with {_names(groups[0])}: "
        "what a model learns from one means nothing to it from the other. Train on each of these modalities, or take "
        "encoders of one space; if they do share one, give both the same attribute `space`."
        for group in groups[1:]
    ]


def _names(group: Sequence[Encoder]) -> str:
    space = space_of(group[0])
    named = "no space named" if space is None else f"space {space!r}"
    return " and ".join(
        f"{type(encoder).__name__} ({', '.join(encoder.modalities)}; {named})" for encoder in group
    )


def members_of(protocol: type, *, methods: bool = False) -> list[str]:
    """Return the names that a class needs to keep a protocol such as `Encoder`: all of them, or only its methods."""
    # Attributes without a value are annotations, properties and methods are values.
    names = [*protocol.__annotations__, *(name for name in vars(protocol) if not name.startswith("_"))]
    return [name for name in names if not methods or isinstance(vars(protocol).get(name), FunctionType)]


def member_problems(encoder: Any) -> list[str]:
    """Return the faults of the members of an encoder, one phrase for each; nothing is called or loaded.

    Examples:
        >>> class Ears:
        ...     modalities = ("audio",)
        >>> member_problems(Ears())
        ['it lacks embedding_size, config, fingerprint, to, prepare, embed']
    """
    if isinstance(encoder, type):
        return [f"it is a class; give an instance, as in check_encoder({encoder.__name__}())"]
    if missing := [name for name in members_of(Encoder) if name not in dir(encoder)]:
        return [f"it lacks {', '.join(missing)}"]
    methods = members_of(Encoder, methods=True)
    problems = [f"{name} must be a method" for name in methods if not callable(getattr(encoder, name))]
    names, size, config = encoder.modalities, encoder.embedding_size, encoder.config
    # A text is a sequence too, and "image" is in "images".
    if not isinstance(names, tuple | list) or not names:
        problems.append(f"modalities must be a tuple of names such as ('image',), not {names!r}")
    elif wrong := [name for name in names if not is_modality(name)]:
        problems.append(f"modalities are lower-case words, not {wrong}")
    if isinstance(encoder, HasSpace) and not isinstance(encoder.space, str):
        problems.append(f"space must be a word, not {encoder.space!r}")
    if type(size) is not int or size < 1:
        problems.append(f"embedding_size must be an int above 0, not {size!r}")
    # A checkpoint holds class and config only: with another config it could not be written, or not be loaded.
    if not _survives_json(config):
        problems.append(
            f"config must be a dict that JSON gives back unchanged (no tuples, paths or objects): {config!r}"
        )
    elif not problems:
        try:
            inspect.signature(type(encoder)).bind(**config)
        except TypeError as error:
            problems.append(f"config must be keywords of the constructor, not {config!r}: {error}")
    return problems


def check_members(encoder: Any) -> None:
    """Raise an `EncoderError` if the members of an encoder are wrong, see `member_problems`."""
    if problems := member_problems(encoder):
        raise EncoderError(
            f"{type(encoder).__name__} breaks the contract of an encoder: {'; '.join(problems)}. "
            "`bindllm check --encoder` checks all of it"
        )


def _survives_json(config: Any) -> bool:
    try:
        return isinstance(config, Mapping) and json.loads(json.dumps(dict(config), allow_nan=False)) == config
    except (TypeError, ValueError):
        return False


class once(cached_property):
    """A property that is computed at its first use: threads that share an encoder must not load its weights twice."""

    # One lock for all, since an encoder with a lock of its own could not be pickled.
    lock = threading.RLock()

    def __get__(self, instance: Any, owner: type | None = None) -> Any:
        """Compute the value, or return the one that another thread has computed meanwhile."""
        with self.lock:
            return super().__get__(instance, owner)


def fingerprint(config: Mapping[str, Any], *parts: bytes | str | Path) -> str:
    """Return the sha256 of settings and parts, in hex, as a building block of an encoder's ``fingerprint``.

    It covers the revision of `bindllm.media` too, since other pixels of a file give another embedding.

    Args:
        config: the settings that change embeddings, as JSON can hold them; no paths and no device.
        parts: further bytes, words (such as the revision of the preprocessing), or files, which count with their
            content (a `Path`; a str is a word, never a file).

    Raises:
        EncoderError: a file cannot be read, or the settings are not JSON.

    Examples:
        >>> fingerprint({"size": 224}, "tiny-net 1")[:8]
        'ebbb0aae'
    """
    try:
        # Sorted keys: equal settings must give equal bytes.
        digest = hashlib.sha256(json.dumps(dict(config), sort_keys=True, allow_nan=False).encode())
    except (TypeError, ValueError) as error:
        raise EncoderError(f"the settings {dict(config)!r} are not plain JSON: {error}") from error
    for part in (REVISION, *parts):
        # Hashing each part first keeps ("ab", "c") and ("a", "bc") apart.
        digest.update(_digest(part))
    return digest.hexdigest()


def shape_problems(expected: Mapping[str, Sequence[int]], found: Mapping[str, Sequence[int]]) -> list[str]:
    """Return one phrase for each tensor that is missing, unexpected or of another shape."""
    missing = [f"missing {name}" for name in expected if name not in found]
    unexpected = [f"unexpected {name}" for name in found if name not in expected]
    misshaped = [
        f"{name} has shape {list(found[name])}, expected {list(shape)}"
        for name, shape in expected.items()
        if name in found and tuple(found[name]) != tuple(shape)
    ]
    return missing + unexpected + misshaped


def _digest(part: bytes | str | Path) -> bytes:
    # The prefixes keep a file, a word and bytes with the same content apart.
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
