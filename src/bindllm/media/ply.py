"""Reading the vertices of PLY files, ASCII and binary, block by block (http://paulbourke.net/dataformats/ply)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import BinaryIO

import numpy as np

from bindllm.errors import MediaError
from bindllm.media.arrays import read_rows

_BLOCK = 1 << 18
_MOST_LINES, _MAX_LINE = 1000, 4096
_FORMATS = {"ascii": "", "binary_little_endian": "<", "binary_big_endian": ">"}
_TYPES = {
    **{name: "i1" for name in ("char", "int8")},
    **{name: "u1" for name in ("uchar", "uint8")},
    **{name: "i2" for name in ("short", "int16")},
    **{name: "u2" for name in ("ushort", "uint16")},
    **{name: "i4" for name in ("int", "int32")},
    **{name: "u4" for name in ("uint", "uint32")},
    **{name: "f4" for name in ("float", "float32")},
    **{name: "f8" for name in ("double", "float64")},
}


@dataclass
class _Element:
    """One kind of record: its name, how many there are, and the properties with their types ("" for a list)."""

    name: str
    count: int
    properties: dict[str, str] = field(default_factory=dict)


def read_ply_points(stream: BinaryIO, *, name: str) -> Iterator[np.ndarray] | None:
    """Return the vertices [n, 3] block by block, float64; None where there are faces, so that it is a mesh.

    Args:
        stream: the file, at its start; at its start again where there are faces.
        name: what the file is called in error messages.

    Raises:
        MediaError: damaged, truncated, or a vertex without x, y and z; also while the blocks are read.
    """
    byte_order, elements, lines = _read_header(stream, name)
    if any(element.name in ("face", "tristrips") and element.count for element in elements):
        stream.seek(0)
        return None
    vertex = next((element for element in elements if element.name == "vertex"), None)
    if vertex is None or not {"x", "y", "z"} <= set(vertex.properties):
        raise MediaError(f"{name}: a PLY file without vertices that have x, y and z")
    if vertex is not elements[0] or "" in vertex.properties.values():
        raise MediaError(
            f"{name}: a PLY file with lists in, or something before, its vertices; expected the vertices first, of "
            "plain numbers. Save it again with another program"
        )
    if byte_order:
        return _binary(stream, vertex, byte_order, name)
    return _ascii(stream, vertex, lines, name)


def _read_header(stream: BinaryIO, name: str) -> tuple[str, list[_Element], int]:
    """Return the byte order ("" for ASCII), the elements, and how many lines the header has."""
    byte_order: str | None = None
    elements: list[_Element] = []
    for number in range(1, _MOST_LINES):
        words = stream.readline(_MAX_LINE).decode("ascii", "replace").split()
        match words:
            case ["format", kind, *_] if kind in _FORMATS:
                byte_order = _FORMATS[kind]
            case ["element", element, count] if count.isdecimal() and len(count) < 16:
                elements.append(_Element(element, int(count)))
            case ["property", "list", *_, key] if elements:
                elements[-1].properties[key] = ""
            case ["property", kind, key] if (
                elements and kind in _TYPES and key not in elements[-1].properties
            ):
                elements[-1].properties[key] = _TYPES[kind]
            case ["end_header"] if byte_order is not None:
                return byte_order, elements, number
            case ["ply"] | ["comment" | "obj_info", *_]:
                pass
            case _:
                shown = " ".join(words)[:60]
                raise MediaError(f"{name}: a damaged PLY header (line {number}: {shown!r}); replace the file")
    raise MediaError(f"{name}: a PLY header of more than {_MOST_LINES} lines; replace the file")


def _binary(stream: BinaryIO, vertex: _Element, byte_order: str, name: str) -> Iterator[np.ndarray]:
    record = np.dtype([(key, byte_order + kind) for key, kind in vertex.properties.items()])
    for start in range(0, vertex.count, _BLOCK):
        count = min(_BLOCK, vertex.count - start)
        data = stream.read(count * record.itemsize)
        if len(data) < count * record.itemsize:
            raise _truncated(start + len(data) // record.itemsize, vertex, name)
        block = np.frombuffer(data, record)
        yield np.stack([block[axis].astype(np.float64) for axis in "xyz"], axis=1)


def _ascii(stream: BinaryIO, vertex: _Element, lines: int, name: str) -> Iterator[np.ndarray]:
    keys = list(vertex.properties)
    axes, left = [keys.index(axis) for axis in "xyz"], vertex.count
    for block in read_rows(stream, name=name, first=lines + 1, columns=len(keys)):
        yield block[:left, axes]
        left -= len(block)
        if left <= 0:
            return
    if left:
        raise _truncated(vertex.count - left, vertex, name)


def _truncated(found: int, vertex: _Element, name: str) -> MediaError:
    return MediaError(
        f"{name}: a truncated PLY file: {found:,} of {vertex.count:,} vertices; replace the file"
    )
