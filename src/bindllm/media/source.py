"""The content of media: the forms it may have, its name in messages, its file endings, and how its bytes are opened."""

from __future__ import annotations

import base64
import binascii
import io
import stat
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Self
from urllib.parse import unquote, unquote_to_bytes, urlsplit

import numpy as np
from PIL import Image

from bindllm.errors import InputError, MediaError, reading

Source = str | Path | bytes | np.ndarray | Image.Image

_LONGEST_PATH = 4096

CHUNK = 1 << 20
"""Bytes that are read at once."""

ARRAY_RATE = 16_000
"""Sample rate of audio that is given as an array without a rate of its own."""

SUFFIXES: dict[str, frozenset[str]] = {
    "image": frozenset((".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".svg", ".svgz")),
    "video": frozenset((".mp4", ".webm", ".mkv", ".avi", ".mov", ".m4v", ".mpg", ".mpeg")),
    "audio": frozenset((".wav", ".mp3", ".flac", ".ogg", ".oga", ".opus", ".m4a", ".aac")),
    "point": frozenset((".ply", ".obj", ".off", ".stl", ".glb", ".xyz", ".pts")),
}
"""File endings by modality, in lower case. Other files (npy, npz, csv, txt) may hold any modality."""


class NamedBytes(bytes):
    """The bytes of a file that has no path, with the name that messages give it, such as a part of a request.

    Examples:
        >>> name_of(NamedBytes(b"RIFF", "messages[0].content[1]")), name_of(b"RIFF")
        ('messages[0].content[1]', '<4 bytes>')
    """

    name: str

    def __new__(cls, content: bytes, name: str) -> Self:
        """Return the same bytes with a name."""
        named = super().__new__(cls, content)
        named.name = name
        return named


class Waveform(np.ndarray):
    """Samples [N] or [C, N] with their rate.

    Examples:
        >>> Waveform(np.zeros(441), 44_100).rate
        44100
    """

    rate: int = ARRAY_RATE

    def __new__(cls, samples: np.ndarray, rate: int) -> Self:
        """Return a view of the samples with a rate, in samples a second."""
        view = np.asarray(samples).view(cls)
        view.rate = rate
        return view

    def __array_finalize__(self, other: Any) -> None:
        """Keep the rate in slices and other views."""
        self.rate = getattr(other, "rate", ARRAY_RATE)

    def __reduce__(self) -> tuple[Any, ...]:
        """Keep the rate in copies, such as those for another process."""
        return Waveform, (np.asarray(self), self.rate)


def plain_source(modality: str, source: Any) -> Any:
    """Return a source in one of the forms of `Source`, if it can be turned into one.

    An open file gives its bytes, from its start; a ``data:`` URI its content; a tensor an array; and
    ``{"array": ..., "sampling_rate": ...}`` a `Waveform`. The pixels of a tensor are [..., C, H, W], uint8 or floats
    from 0 to 1.

    Raises:
        InputError: a file that was opened as text, or pixels out of their range.
        MediaError: a ``data:`` URI without content.
    """
    match source:
        case str() if modality != "text" and source[:5].lower() == "data:" and "," in source:
            return read_data_uri(source)
        case bytearray() | memoryview():
            return bytes(source)
        case io.IOBase():
            # A buffer that was just written stands at its end.
            if source.seekable():
                source.seek(0)
            if isinstance(content := source.read(), str):
                raise InputError(f"a file with {modality} media was opened as text; open it with mode 'rb'")
            return content
        case Mapping() if modality == "audio" and source.get("array") is not None:
            samples = plain_source(modality, source["array"])
            return with_rate(np.asanyarray(samples), source.get("sampling_rate"))
    # Looked up, so that media do not import torch: without it there are no tensors.
    torch = sys.modules.get("torch")
    return _from_tensor(modality, source) if torch and isinstance(source, torch.Tensor) else source


def with_rate(source: Any, rate: int | None) -> Any:
    """Return samples with their rate, in samples a second; None: `ARRAY_RATE`.

    Raises:
        InputError: the rate is not a whole number above 0, or the source is not an array: a file has a rate of its own.
    """
    if rate is None:
        return source
    if isinstance(rate, bool) or not isinstance(rate, int | np.integer) or rate < 1:
        raise InputError(f"sampling_rate is {rate!r}; expected samples a second, such as 44100")
    # `Media` refuses a list by its type.
    if not isinstance(source, np.ndarray | str | Path | bytes):
        return source
    if not isinstance(source, np.ndarray):
        raise InputError(f"sampling_rate belongs to an array; {name_of(source)} has a rate of its own")
    if isinstance(source, Waveform) and source.rate != rate:
        raise InputError(
            f"sampling_rate is {rate}, and the samples have the rate {source.rate} already; give one"
        )
    return source if rate == ARRAY_RATE else Waveform(source, int(rate))


def _from_tensor(modality: str, tensor: Any) -> np.ndarray:
    tensor = tensor.detach().cpu()
    array = (tensor.float() if tensor.is_floating_point() else tensor).numpy()
    if modality in ("depth", "thermal") and array.ndim == 3 and len(array) == 1:
        return array[0]
    if modality not in ("image", "video") or array.ndim < 3:
        return array
    if array.dtype.kind == "f":
        # Written so that NaN fails too. A normalized tensor would give other colors without a word.
        if not (array.size and array.min() >= 0 and array.max() <= 1):
            raise InputError(
                f"a tensor with {modality} media holds values outside of 0..1; undo its normalization"
            )
        array = (array * 255).round().astype(np.uint8)
    if array.shape[-3] in (1, 3, 4):
        array = np.moveaxis(array, -3, -1)
    return array[..., 0] if array.shape[-1] == 1 else array


def name_of(source: Source) -> str:
    """Return the path, or a few words about bytes, an array or a Pillow image."""
    match source:
        case NamedBytes():
            return source.name
        case bytes():
            return f"<{len(source)} bytes>"
        case np.ndarray():
            return f"<array {list(source.shape)} {source.dtype}>"
        case Image.Image():
            return f"<image {source.width}x{source.height} {source.mode}>"
        case _:
            # No path is as long as base64 that was taken for one.
            return text if len(text := str(source)) <= _LONGEST_PATH else f"{text[:60]}..."


def local_path(address: str) -> str:
    """Return the path that a ``file:`` URL names; any other text is a path already.

    Raises:
        MediaError: a web address, or a file: URL of another machine or with a fault.

    Examples:
        >>> local_path("file:///data/a%20cat.png"), local_path("a:cat.png")
        ('/data/a cat.png', 'a:cat.png')
    """
    # Schemes have at most five characters (https); a later colon belongs to the path.
    scheme = address[: address.find(":")].lower() if ":" in address[:6] else ""
    if scheme in ("http", "https"):
        raise MediaError("a web address; download it first and give its path: runs are offline")
    if scheme != "file":
        return address
    try:
        url = urlsplit(address)
    except ValueError as error:
        raise MediaError(f"a file: URL that cannot be read ({error}); give the path") from error
    if url.netloc not in ("", "localhost"):
        raise MediaError("a file: URL of another machine")
    # It spells special characters as %20 and so on.
    return unquote(url.path)


def from_base64(text: str) -> bytes | None:
    """Return the bytes that a text holds in base64, or None if it is not base64."""
    try:
        # Writers wrap base64 in lines; empty content is not media.
        return base64.b64decode("".join(text.split()), validate=True) or None
    except (binascii.Error, ValueError):
        return None


def read_data_uri(uri: str) -> bytes:
    """Return the content of a ``data:`` URI.

    Raises:
        MediaError: it has no content, or the content is not base64.

    Examples:
        >>> read_data_uri("data:text/plain;base64,aGk="), read_data_uri("data:,a%20cat")
        (b'hi', b'a cat')
    """
    # Not `urllib`, which opens the URLs of every other scheme too.
    head, comma, data = uri.partition(",")
    is_base64 = head.lower().endswith(";base64")
    # Few writers escape the characters + / = of base64.
    text = unquote_to_bytes(data).decode("latin-1") if "%" in data and is_base64 else data
    # Half of a surrogate pair has no bytes in UTF-8.
    content = from_base64(text) if is_base64 else unquote_to_bytes(data.encode(errors="surrogatepass"))
    if not comma or not content:
        fault = "has no comma before its data" if not comma else "has no data, or data that are not base64"
        raise MediaError(f"a data: URI {fault}; expected data:image/png;base64,iVBORw0...")
    return content


@contextmanager
def open_stream(source: str | Path | bytes) -> Iterator[BinaryIO]:
    """Open a file or bytes for reading; an error of the system becomes a MediaError that names the file."""
    if isinstance(source, bytes):
        yield io.BytesIO(source)
        return
    with reading(name_of(source)):
        if not str(source):
            raise MediaError("an empty path; give the path of a file")
        if len(str(source)) > _LONGEST_PATH:
            raise MediaError(
                "no path; write data:image/png;base64, before base64, with the type of the media"
            )
        try:
            # A pipe or a device, such as /dev/zero, would block or never end.
            kind = Path(source).stat().st_mode
            if not stat.S_ISREG(kind):
                found = "a folder" if stat.S_ISDIR(kind) else "a pipe, a socket or a device"
                raise MediaError(f"this is {found}; expected a regular file")
            stream = Path(source).open("rb")  # noqa: SIM115 (closed by the last block)
        except OSError as error:
            # Addresses are never opened here: a row that is held to its folder could name one.
            advice = "download it first and give its path" if "://" in str(source) else "check the path"
            raise MediaError(f"cannot be opened ({error.strerror}); {advice}") from error
        except ValueError as error:
            # A zero byte, which no path has.
            raise MediaError(f"cannot be opened ({error}); check the path") from error
    with stream:
        yield stream


def read_head(stream: BinaryIO, size: int, expected: str) -> bytes:
    """Return the first bytes of a file, which tell its format; the stream stays at its start.

    Raises:
        MediaError: the file is empty; ``expected`` ends the message.
    """
    head = stream.read(size)
    stream.seek(0)
    if not head:
        raise MediaError(f"the file is empty; expected {expected}")
    return head
