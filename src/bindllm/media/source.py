"""The content of media: its types, its name in messages, its file endings, and how its bytes are opened."""

from __future__ import annotations

import io
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, Self
from urllib.parse import unquote, urlsplit

import numpy as np
from PIL import Image

from bindllm.errors import MediaError, reading

Source = str | Path | bytes | np.ndarray | Image.Image

CHUNK = 1 << 20
"""Bytes that are read at once."""

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
            return str(source)


def local_path(address: str) -> str:
    """Return the path that a ``file:`` URL names; any other text is a path already.

    Raises:
        MediaError: a web address, or a file: URL of another machine.

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
    url = urlsplit(address)
    if url.netloc not in ("", "localhost"):
        raise MediaError("a file: URL of another machine")
    # It spells special characters as %20 and so on.
    return unquote(url.path)


@contextmanager
def open_stream(source: str | Path | bytes) -> Iterator[BinaryIO]:
    """Open a file or bytes for reading; an error of the system becomes a MediaError that names the file."""
    if isinstance(source, bytes):
        yield io.BytesIO(source)
        return
    with reading(name_of(source)):
        try:
            # A pipe or a device, such as /dev/zero, would block or never end.
            kind = Path(source).stat().st_mode
            if not stat.S_ISREG(kind):
                found = "a folder" if stat.S_ISDIR(kind) else "a pipe, a socket or a device"
                raise MediaError(f"this is {found}; expected a regular file")
            stream = Path(source).open("rb")  # noqa: SIM115 (closed by the last block)
        except OSError as error:
            raise MediaError(f"cannot be opened ({error.strerror}); check the path") from error
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
