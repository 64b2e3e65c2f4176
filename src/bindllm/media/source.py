"""What the content of media can be, what it is called in messages, and how its bytes are reached."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image

from bindllm.errors import MediaError

Source = str | Path | bytes | np.ndarray | Image.Image

CHUNK = 1 << 20
"""Bytes that are read at once."""


def name_of(source: Source) -> str:
    """Return the path, or a few words about bytes, an array or a Pillow picture."""
    match source:
        case bytes():
            return f"<{len(source)} bytes>"
        case np.ndarray():
            return f"<array {list(source.shape)} {source.dtype}>"
        case Image.Image():
            return f"<picture {source.width}x{source.height} {source.mode}>"
        case _:
            return str(source)


@contextmanager
def open_stream(source: str | Path | bytes) -> Iterator[BinaryIO]:
    """Open a file or bytes for reading; what the system refuses becomes a MediaError that names the file."""
    if isinstance(source, bytes):
        yield io.BytesIO(source)
        return
    path = Path(source)
    if path.is_dir():
        raise MediaError(f"{path}: this is a folder; expected a file")
    try:
        stream = path.open("rb")
    except OSError as error:
        raise MediaError(f"{path}: cannot be opened ({error.strerror}); check the path") from error
    except ValueError as error:
        # A zero byte, which no path has.
        raise MediaError(f"{str(path)!r}: cannot be opened ({error}); check the path") from error
    with stream:
        yield stream
