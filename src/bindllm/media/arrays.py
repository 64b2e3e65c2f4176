"""Numbers in files: NPY and NPZ, whose headers are checked before anything is read, and tables of text.

Nothing is unpickled, and no more than `MAX_ARRAY_BYTES` is taken into memory, whatever a header claims.
"""

from __future__ import annotations

import codecs
import io
import math
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from typing import BinaryIO

import numpy as np

from bindllm.errors import MediaError, reading
from bindllm.media.limits import at_most, check_time

MAX_ARRAY_BYTES = 512 * 1024 * 1024
"""Largest array that is read, in memory."""

NPY, NPZ = b"\x93NUMPY", b"PK\x03\x04"
"""First bytes of the two kinds of files."""

# Version 3.0 only adds names outside of Latin-1 to records, which are refused anyway.
_HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
_MAX_MEMBERS = 1000
_MAX_LINE = 1 << 16
_BLOCK = 1 << 23


def holds_array(head: bytes) -> bool:
    """Return from the first bytes of a file whether it is an NPY or NPZ file."""
    return head.startswith((NPY, NPZ))


def read_array(stream: BinaryIO, *, keys: Sequence[str]) -> np.ndarray:
    """Return the array of an NPY file, or one array of an NPZ file.

    Args:
        stream: the file, at its start.
        keys: possible names of the array in an NPZ file that holds several.

    Raises:
        MediaError: damaged, not numbers, larger than `MAX_ARRAY_BYTES`, or an NPZ file without a clear choice.
    """
    is_archive = stream.read(len(NPZ)) == NPZ
    stream.seek(0)
    return _read_npz(stream, keys) if is_archive else _read_npy(stream)


def check_numbers(array: np.ndarray) -> None:
    """Refuse arrays of anything but real numbers.

    Raises:
        MediaError: objects, words, complex or boolean values, or records.
    """
    if array.dtype.kind not in "iuf":
        raise MediaError(f"an array of {array.dtype}; expected integers or floats")


def _read_npy(stream: BinaryIO) -> np.ndarray:
    try:
        version = np.lib.format.read_magic(stream)
        if version not in _HEADERS:
            raise MediaError(f"an NPY file of version {version}; expected 1.0 or 2.0. Save it again")
        shape, is_fortran, dtype = _HEADERS[version](stream)
    # A fault of CPython in threads, after which `bindllm.encoders.prepare` tries again.
    except (MediaError, SystemError):
        raise
    # The header is parsed as Python text, so errors in it raise many classes of exception.
    except Exception as error:
        raise MediaError(f"a damaged NPY file ({error}); replace the file") from error
    if dtype.subdtype is not None:
        raise MediaError(f"an array of {dtype}; expected integers or floats")
    # An array without rows has all that the check needs, before any data is read.
    check_numbers(np.empty(0, dtype))
    # In Python's integers, so that claimed sizes cannot overflow.
    size = math.prod(shape) * dtype.itemsize
    most = at_most("bytes", MAX_ARRAY_BYTES)
    if size > most or any(side < 0 for side in shape):
        raise MediaError(f"an array {list(shape)} of {size:,} bytes; at most {most:,} are read. Cut it first")
    data = stream.read(size)
    if len(data) < size:
        raise MediaError(
            f"a truncated NPY file: {len(data):,} of {size:,} bytes of its array; replace the file"
        )
    return np.frombuffer(data, dtype).reshape(shape, order="F" if is_fortran else "C")


def _read_npz(stream: BinaryIO, keys: Sequence[str]) -> np.ndarray:
    try:
        with zipfile.ZipFile(stream) as archive:
            member = _choose(archive, keys)
            # 1,024 bytes more, for the NPY header inside.
            if member.file_size > (most := at_most("bytes", MAX_ARRAY_BYTES)) + 1024:
                raise MediaError(
                    f"{member.filename} unpacks to {member.file_size:,} bytes; at most {most:,} are read"
                )
            if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise MediaError(f"{member.filename} is packed in a way that numpy never uses; save it again")
            # Without a size zipfile unpacks everything, whatever the header claims.
            with archive.open(member) as unpacked:
                data = unpacked.read(member.file_size + 1)
    except (MediaError, MemoryError):
        raise
    except (
        zipfile.BadZipFile,
        zlib.error,
        OSError,
        EOFError,
        ValueError,
        RuntimeError,
        LookupError,
    ) as error:
        raise MediaError(f"a damaged or encrypted NPZ file ({error}); replace the file") from error
    if not data.startswith(NPY):
        raise MediaError(f"{member.filename} is not an NPY file; expected an archive made by numpy.savez")
    with reading(member.filename):
        return _read_npy(io.BytesIO(data))


def _choose(archive: zipfile.ZipFile, keys: Sequence[str]) -> zipfile.ZipInfo:
    # Not all of them, because a small archive can claim millions.
    members = {info.filename.removesuffix(".npy"): info for info in archive.infolist()[:_MAX_MEMBERS]}
    if len(members) == 1:
        return next(iter(members.values()))
    for key in keys:
        if key in members:
            return members[key]
    found = ", ".join(list(members)[:20]) or "nothing"
    raise MediaError(f"the archive holds {found}; expected one array, or one called {' or '.join(keys)}")


def read_rows(stream: BinaryIO, *, first: int, columns: int, most: int | None = None) -> Iterator[np.ndarray]:
    """Yield the rows of a table of text in blocks [n, columns], float64, n at least 1.

    Cells are separated by commas, else by semicolons, else by white space. Empty lines and text after ``#`` are
    ignored. Words such as ``nan`` and ``inf`` are numbers here: the caller decides about their meaning.

    Args:
        stream: the file, at the line to begin with.
        first: number of the line to begin with, 1 for the first of the file.
        columns: how many cells every row has.
        most: lines that are read; by default all of them.

    Raises:
        MediaError: a row has more or fewer cells, or a cell is not a number; it names the line and the cell.
    """
    while (most is None or most > 0) and (lines := _some_lines(stream, most)):
        check_time()
        # The fast reader takes only rows of one form; the slow one names the faulty line.
        block = _quickly(lines, columns)
        if block is None:
            block = _carefully(lines, columns, first)
        if len(block):
            yield block
        # The first line of the next block, for messages.
        first += len(lines)
        most = None if most is None else most - len(lines)


def _some_lines(stream: BinaryIO, most: int | None) -> list[bytes]:
    """Return the next lines, about `_BLOCK` bytes of them; a longer line than `_MAX_LINE` comes in pieces."""
    lines, size = [], 0
    while size < _BLOCK and len(lines) != most and (line := stream.readline(_MAX_LINE)):
        lines.append(line)
        size += len(line)
    return lines


def _quickly(lines: list[bytes], columns: int) -> np.ndarray | None:
    """Read lines that all have the same form; None if one differs."""
    filled = [line for line in lines if line.lstrip()[:1] not in (b"", b"#")]
    # np.loadtxt warns of input without rows.
    if not filled:
        return np.empty((0, columns))
    delimiter = _delimiter(filled[0].strip())
    try:
        block = np.loadtxt(filled, delimiter=delimiter and delimiter.decode(), ndmin=2)
    except ValueError:
        return None
    return block if block.shape[1] == columns else None


def _carefully(lines: list[bytes], columns: int, first: int) -> np.ndarray:
    """Read lines one by one, and name the one that cannot be read."""
    block = []
    for number, line in enumerate(lines, start=first):
        cells = cells_of(line)
        if cells and len(cells) != columns:
            raise MediaError(f"line {number} has {len(cells)} cells; expected {columns} as above it")
        for column, cell in enumerate(cells, start=1):
            if not is_number(cell):
                text = cell[:40].decode("utf-8", "replace")
                raise MediaError(f"line {number}, column {column} holds {text!r}; expected a number")
        if cells:
            block.append([float(cell) for cell in cells])
    return np.array(block).reshape(-1, columns)


def cells_of(line: bytes) -> list[bytes]:
    """Return the cells of one line of a table; none if it is empty or a comment.

    Examples:
        >>> cells_of(b"1, 2,3 # note"), cells_of(b"1  2 3"), cells_of(b"1,,3")
        ([b'1', b'2', b'3'], [b'1', b'2', b'3'], [b'1', b'', b'3'])
    """
    text = line.removeprefix(codecs.BOM_UTF8).partition(b"#")[0].strip()
    if not text:
        return []
    return [cell.strip() for cell in text.split(_delimiter(text))]


def _delimiter(line: bytes) -> bytes | None:
    """Return the separator of the cells of a line; None: any white space."""
    return next((mark for mark in (b",", b";") if mark in line), None)


def is_number(cell: bytes | str) -> bool:
    """Return whether a cell is a number, ``nan`` and ``inf`` included."""
    try:
        float(cell)
    except ValueError:
        return False
    return True
