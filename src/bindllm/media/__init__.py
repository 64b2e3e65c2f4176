"""Media: one image, audio, text, ... with a weight, and the functions that open files.

Every encoder reads a modality through the same function, so a file always gives the same numbers.
"""

from __future__ import annotations

import hashlib
import math
import re
import reprlib
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import BinaryIO, Literal, get_args

import numpy as np
from PIL import Image

from bindllm.errors import InputError, did_you_mean
from bindllm.media.images import MAX_PIXELS, is_inverted, open_image
from bindllm.media.source import (
    CHUNK,
    SUFFIXES,
    Source,
    Waveform,
    name_of,
    open_stream,
    plain_source,
    with_rate,
)

__all__ = [
    "MAX_PIXELS",
    "MODALITIES",
    "SUFFIXES",
    "Media",
    "Modality",
    "Source",
    "check_media",
    "is_modality",
    "open_image",
]

Modality = Literal["image", "video", "audio", "text", "point", "depth", "thermal", "imu"]
MODALITIES: tuple[str, ...] = get_args(Modality)
"""The modalities whose files can be opened here. An encoder may serve others, under any lower-case word."""

REVISION = "media 4"
"""Counted up when a file would give other pixels, samples or points: it is part of the fingerprint of encoders."""

_WORD = re.compile("[a-z][a-z0-9_]*")


def is_modality(name: object) -> bool:
    """Return whether this can be the name of a modality: a lower-case word, digits and _ after its first letter.

    Examples:
        >>> is_modality("radar"), is_modality("Radar")
        (True, False)
    """
    return isinstance(name, str) and _WORD.fullmatch(name) is not None


@dataclass(frozen=True, repr=False)
class Media:
    """One image, video, audio, text, point cloud, depth map, thermal image or IMU signal, or anything else.

    Nothing is opened here. A missing file is reported when an encoder prepares it, and an unknown modality when an
    encoder for it is needed.

    Args:
        modality: one of `MODALITIES`, or any lower-case word that an encoder serves, such as ``"radar"``.
        source: a path, a ``data:`` URI, an open file or its bytes, an array, a tensor or a Pillow image; for text, the
            text itself. Open files, URIs and tensors are turned into bytes and arrays at once (`plain_source`).
        weight: share of this media if several are fused into one group; finite and above 0.

    Raises:
        InputError: the modality is not a lower-case word, the source has the wrong type, or the weight is not finite
            and above 0.

    Examples:
        >>> Media.image("cat.jpg", weight=0.5)
        Media.image('cat.jpg', weight=0.5)
        >>> Media("radar", "sweep.npy")
        Media('radar', 'sweep.npy')
    """

    modality: str
    source: Source
    weight: float = 1.0

    def __post_init__(self) -> None:
        if not is_modality(self.modality):
            raise InputError(
                f"a modality is a lower-case word, not {self.modality!r}. "
                f"{did_you_mean(str(self.modality).lower(), MODALITIES)}"
            )
        # The way to set a field of a frozen dataclass.
        object.__setattr__(self, "source", plain_source(self.modality, self.source))
        # A str is always the text itself, never the path of a text file.
        expected = (str,) if self.modality == "text" else get_args(Source)
        if not isinstance(self.source, expected):
            names = " or ".join(kind.__name__ for kind in expected)
            raise InputError(
                f"the source of {self.modality} media must be {names}, not {type(self.source).__name__}"
            )
        if isinstance(self.source, np.ma.MaskedArray):
            raise InputError(f"{self.name} has a mask; fill it first, with 0 or NaN in a depth map")
        # bool is a subclass of int, but a truth value is not a weight.
        if isinstance(self.weight, bool) or not isinstance(self.weight, Real):
            raise InputError(f"the weight of {self.name} must be a number, not {self.weight!r}")
        if not (math.isfinite(self.weight) and self.weight > 0):
            raise InputError(f"the weight of {self.name} must be finite and above 0, not {self.weight}")

    @classmethod
    def image(cls, source: Source, weight: float = 1.0) -> Media:
        """Return an image: path, bytes of a file, array [H, W, 3] of uint8, tensor [3, H, W], or Pillow image."""
        return cls("image", source, weight)

    @classmethod
    def video(cls, source: Source, weight: float = 1.0) -> Media:
        """Return a video: path or bytes of a file, or an array of frames."""
        return cls("video", source, weight)

    @classmethod
    def audio(cls, source: Source, weight: float = 1.0, *, sampling_rate: int | None = None) -> Media:
        """Return audio: path or bytes of a file, or an array [N] or [C, N] of samples.

        Args:
            source: the audio; an array holds int16, or floats in -1..1.
            weight: as for `Media`.
            sampling_rate: samples a second of an array (default: 16,000).

        Raises:
            InputError: a rate that is not a whole number above 0, or a rate for a file.
        """
        return cls("audio", with_rate(plain_source("audio", source), sampling_rate), weight)

    @classmethod
    def text(cls, source: str, weight: float = 1.0) -> Media:
        """Return a text that an encoder embeds (the words of a prompt are not media)."""
        return cls("text", source, weight)

    @classmethod
    def point(cls, source: Source, weight: float = 1.0) -> Media:
        """Return a point cloud: path or bytes of a file, or an array of points."""
        return cls("point", source, weight)

    @classmethod
    def depth(cls, source: Source, weight: float = 1.0) -> Media:
        """Return a depth map: path or bytes of a file, or an array."""
        return cls("depth", source, weight)

    @classmethod
    def thermal(cls, source: Source, weight: float = 1.0) -> Media:
        """Return a thermal image: path or bytes of a file, or an array."""
        return cls("thermal", source, weight)

    @classmethod
    def imu(cls, source: Source, weight: float = 1.0) -> Media:
        """Return the signal of an inertial measurement unit: path or bytes of a file, or an array."""
        return cls("imu", source, weight)

    @property
    def name(self) -> str:
        """A short name for messages: the path, the first words of a text, or the size of an array."""
        if self.modality == "text":
            words = str(self.source)
            return repr(words if len(words) <= 40 else words[:37] + "...")
        return name_of(self.source)

    def content_hash(self, stream: BinaryIO | None = None) -> str:
        """Return the sha256 of modality and content, in hex; the weight and the path do not count.

        A file and its bytes have the same hash. An array counts with its shape and dtype.

        Args:
            stream: the file of this media, if the caller has opened it.

        Raises:
            MediaError: the file cannot be read.
        """
        # With the modality: one PNG as an image and as a depth map has two embeddings.
        digest = hashlib.sha256(f"{self.modality}\n".encode())
        for part in _content(stream or self.source, is_text=self.modality == "text"):
            digest.update(part)
        return digest.hexdigest()

    def __repr__(self) -> str:
        name = self.name if self.modality == "text" else repr(self.name)
        weight = "" if self.weight == 1 else f", weight={self.weight}"
        if self.modality in MODALITIES:
            return f"Media.{self.modality}({name}{weight})"
        return f"Media({self.modality!r}, {name}{weight})"


def check_media(row: Sequence[Media]) -> tuple[Media, ...]:
    """Return the media of one prompt as a tuple.

    Raises:
        InputError: not a list of `Media`: a path among the parts of a message would be read out as text.
    """
    if isinstance(row, Media):
        raise InputError(
            f"media takes lists: write [{row!r}], and one such list per prompt for several prompts"
        )
    if not isinstance(row, list | tuple):
        raise InputError(
            f"media takes lists of Media, not {reprlib.repr(row)}; write [Media.image('cat.png')]"
        )
    for item in row:
        if not isinstance(item, Media):
            raise InputError(f"media holds {item!r}, which is not a Media; write Media.image('cat.png')")
    return tuple(row)


def _content(source: Source | BinaryIO, *, is_text: bool) -> Iterator[bytes | memoryview]:
    """Yield the bytes that identify the content: a word for its kind first, so that kinds never collide."""
    if is_text:
        # A text may hold half of a surrogate pair.
        yield b"text\n" + str(source).encode("utf-8", "surrogatepass")
    elif isinstance(source, np.ndarray):
        # The same bytes with another shape or type are another array.
        rate = f" {source.rate}" if isinstance(source, Waveform) else ""
        yield f"array {source.dtype.str} {source.shape}{rate}\n".encode()
        yield np.ascontiguousarray(source).tobytes()
    elif isinstance(source, Image.Image):
        # Everything that changes the conversion to RGB: EXIF orientation (0x0112), transparency and palette.
        orientation, transparency = source.getexif().get(0x0112), source.info.get("transparency")
        yield f"image {source.mode} {source.size} {orientation} {transparency}\n".encode()
        yield bytes(source.getpalette() or ())
        # Also a TIFF whose 0 is white.
        yield source.tobytes() + b"inverted" * is_inverted(source)
    else:
        yield b"file\n"
        opened = open_stream(source) if isinstance(source, str | Path | bytes) else nullcontext(source)
        with opened as stream:
            # In pieces, because a video may be larger than memory.
            while chunk := stream.read(CHUNK):
                yield chunk
