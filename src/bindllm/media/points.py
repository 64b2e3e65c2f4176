"""Opening point clouds and meshes: every format becomes points in space."""

from __future__ import annotations

import io
import itertools
import os
import re
from collections.abc import Iterator
from pathlib import PurePath
from typing import Any, BinaryIO

import numpy as np
from PIL import Image

from bindllm.errors import MediaError, needs_extra, reading
from bindllm.media.arrays import cells_of, check_numbers, holds_array, is_number, read_array, read_rows
from bindllm.media.limits import at_most, check_time, warn
from bindllm.media.meshes import sample_mesh
from bindllm.media.source import Source, name_of, open_stream, read_head

MAX_POINTS = 1_000_000
"""Most points that are returned; above it, every second, fourth, eighth, ... is taken."""

_KEYS = ("points", "xyz", "vertices", "pc")
_MOST_COLUMNS = 64
_HEAD = 1 << 16
_BLOCK = 1 << 18
_ELEMENT = re.compile(rb"^([ \t]*element[ \t]+\S+[ \t]+)(\S+)", re.MULTILINE)
_COUNT = re.compile(rb"\s*\d+\s*")
# Without brackets inside: a long row of opening ones would be searched again from each of them.
_BRACKETS = re.compile(rb"[\[(][^\[\]()]*[\])]")
_OFF = re.compile(rb"\s*C?OFF\b")
_OBJ = re.compile(rb"^(?:v|vn|vt|f)[ \t]+[-+.\d]", re.MULTILINE)
_SUFFIXES = {".obj": "obj", ".off": "off", ".stl": "stl", ".glb": "glb", ".ply": "ply"}
_EXPECTED = "PLY, OBJ, OFF, STL, GLB, NPY, NPZ, or lines of x y z"


def open_points(source: Source) -> np.ndarray:
    """Open a point cloud, or a mesh as points on its surface.

    Files are recognized by their content; the suffix of a path decides only if the content is unclear. A mesh (OBJ,
    OFF, STL, GLB, PLY with faces) becomes `bindllm.media.meshes.SAMPLES` points, spread evenly over its surface, the
    same ones every time; a mesh without area gives its vertices. Lines, single points and skeletons of a mesh file are
    not used, with a warning. A header of a table may name the columns x, y and z in any order. Above `MAX_POINTS`
    points, every second, fourth, ... in the order of the file is taken. Points that are NaN, infinite or beyond the
    range of 32-bit floats are skipped, and a warning counts them. Other columns than x y z (colors, normals) are not
    read.

    Coordinates stay as they are, with one exception: a cloud so far from the origin that 32-bit floats would round its
    shape away (surveyed coordinates, for example) is moved to its center.

    Args:
        source: path or bytes of a file (PLY, OBJ, OFF, STL, GLB, NPY, NPZ with the array ``points``, or a table of
            text as in XYZ, PTS and CSV), or an array [N, 3 or more].

    Returns:
        [N, 3], float32, finite, N from 1 to `MAX_POINTS`.

    Raises:
        MediaError: missing, damaged, unknown, too large, or without a point; it names the file.
        MissingExtraError: a mesh without the extra ``point``.
    """
    name = name_of(source)
    with reading(name):
        if isinstance(source, Image.Image):
            raise MediaError("an image; expected a point cloud")
        if isinstance(source, np.ndarray):
            return _finish(_from_array(source), name)
        with open_stream(source) as stream:
            head = read_head(stream, _HEAD, _EXPECTED)
            if holds_array(head):
                return _finish(_from_array(read_array(stream, keys=_KEYS)), name)
            suffix = "" if isinstance(source, bytes) else PurePath(source).suffix.lower()
            kind = _kind(head, stream, suffix)
            sieve = _Sieve()
            # A PLY file with faces gives None: it is read as a mesh below.
            if kind == "ply" and (blocks := _read_ply(stream)) is not None:
                for block in blocks:
                    sieve.add(block)
            elif kind == "table":
                _read_table(stream, sieve)
            elif kind is not None:
                sieve.add(sample_mesh(stream, kind=kind, name=name))
            else:
                raise MediaError(f"not a point cloud (it starts with {head[:12]!r}); expected {_EXPECTED}")
        return _finish(sieve.points(), name)


class _Sieve:
    """Keeps every n-th point of a stream, n a power of two, so that at most `MAX_POINTS` are held."""

    def __init__(self) -> None:
        self._blocks: list[np.ndarray] = []
        self._step, self._seen, self._kept = 1, 0, 0

    def add(self, block: np.ndarray) -> None:
        # From the first point of the block whose position in the whole stream is a multiple of the step.
        taken = block[-self._seen % self._step :: self._step, :3].astype(np.float64)
        self._seen += len(block)
        self._kept += len(taken)
        self._blocks.append(taken)
        while self._kept > MAX_POINTS:
            # As if the doubled step had been used from the start.
            self._blocks = [self.points()[::2]]
            self._kept = len(self._blocks[0])
            self._step *= 2

    def points(self) -> np.ndarray:
        return np.concatenate(self._blocks) if self._blocks else np.empty((0, 3))


def _from_array(array: np.ndarray) -> np.ndarray:
    check_numbers(array)
    # Three points of many columns are a cloud that is turned.
    is_turned = array.ndim == 2 and array.shape[0] == 3 and array.shape[1] > 6
    if array.ndim != 2 or is_turned or not 3 <= array.shape[1] <= _MOST_COLUMNS:
        hint = "; transpose it" if is_turned else ""
        raise MediaError(f"an array {list(array.shape)}; expected [N, 3] or more columns after x y z{hint}")
    sieve = _Sieve()
    # In blocks, so that the copy in double precision stays small.
    for start in range(0, len(array), MAX_POINTS):
        sieve.add(array[start : start + MAX_POINTS])
    return sieve.points()


def _kind(head: bytes, stream: BinaryIO, suffix: str) -> str | None:
    """Return the format of a file by its content; if that is unclear, by its suffix."""
    if head.startswith((b"ply\n", b"ply\r")):
        return "ply"
    if head.startswith(b"glTF"):
        return "glb"
    stream.seek(0, os.SEEK_END)
    size = stream.tell()
    stream.seek(0)
    # A binary STL has no signature, but its length follows from its count of triangles.
    if size >= 84 and size == 84 + 50 * int.from_bytes(head[80:84], "little"):
        return "stl"
    if head.lstrip().startswith(b"solid") and b"facet" in head:
        return "stl"
    if _OFF.match(head):
        return "off"
    # Text never contains a zero byte.
    if b"\0" not in head:
        if _OBJ.search(head):
            return "obj"
        if (
            _columns(head)
            or _COUNT.fullmatch(head.partition(b"\n")[0])
            or _named_axes(head.partition(b"\n")[0])
        ):
            return "table"
    return _SUFFIXES.get(suffix)


def _read_ply(stream: BinaryIO) -> Iterator[np.ndarray] | None:
    """Return the vertices [n, 3] of a PLY file block by block; None if it has faces, so that it is a mesh."""
    header = b"".join(itertools.takewhile(lambda line: line.strip() != b"end_header", _header_lines(stream)))
    lines, start = header.count(b"\n") + 1, stream.tell()
    # Windows ends lines with "\r\n".
    ply, counts = _parse_ply_header(header.replace(b"\r\n", b"\n") + b"end_header\n")
    if any(
        element.name in ("face", "tristrips") and count for element, count in zip(ply, counts, strict=True)
    ):
        stream.seek(0)
        return None
    at = next((n for n, element in enumerate(ply) if element.name == "vertex"), None)
    names = [] if at is None else [entry.name for entry in ply.elements[at].properties]
    if at is None or not {"x", "y", "z"} <= set(names):
        raise MediaError("a PLY file without vertices that have x, y and z")
    # Lists make the records differ in size, so the positions of the vertices are unknown.
    if any(
        hasattr(entry, "list_dtype") for element in ply.elements[: at + 1] for entry in element.properties
    ):
        return _ply_with_lists(stream, sum(counts))
    count, before = counts[at], list(zip(ply.elements[:at], counts[:at], strict=True))
    # A text record is one line; records of other elements before the vertices are lines to skip.
    if ply.text:
        skipped = sum(count for _, count in before)
        for _ in range(skipped):
            if not stream.readline():
                raise MediaError("a truncated PLY file: it ends before its vertices; replace the file")
        rows = read_rows(stream, first=lines + skipped + 1, columns=len(names), most=count)
        return _all_of(count, (block[:, [names.index(axis) for axis in "xyz"]] for block in rows))
    # Binary records before the vertices are skipped by their size.
    offset = start + sum(element.dtype(ply.byte_order).itemsize * count for element, count in before)
    stream.seek(offset)
    return _all_of(count, _records(stream, np.dtype(ply.elements[at].dtype(ply.byte_order)), count))


def _records(stream: BinaryIO, record: np.dtype, count: int) -> Iterator[np.ndarray]:
    """Yield x, y and z of binary records, at most `count`."""
    while count and len(data := stream.read(min(_BLOCK, count) * record.itemsize)) >= record.itemsize:
        # A record that the end of the file cuts is left to `_all_of`, which counts the vertices.
        block = np.frombuffer(data, record, len(data) // record.itemsize)
        yield np.stack([block[axis] for axis in "xyz"], axis=1)
        count -= len(block)


def _header_lines(stream: BinaryIO) -> Iterator[bytes]:
    while stream.tell() < _HEAD and (line := stream.readline(_HEAD)):
        yield line
    raise MediaError(f"a damaged PLY header (no end_header in {_HEAD:,} bytes); replace the file")


def _parse_ply_header(header: bytes) -> tuple[Any, list[int]]:
    """Return the elements as `plyfile` describes them, without data, and how many records each has."""
    with needs_extra("plyfile", extra="point", purpose="read PLY files"):
        from plyfile import PlyData
    counts = [count for _, count in _ELEMENT.findall(header)]
    # int() also accepts signs and underscores; 15 digits are enough for any file.
    if odd := [count for count in counts if not (count.isdigit() and len(count) < 16)]:
        raise MediaError(f"a damaged PLY header (a count of {odd[0][:40]!r}); replace the file")
    try:
        # It allocates as many records as the header claims, so it sees a header that claims none.
        ply = PlyData.read(io.BytesIO(_ELEMENT.sub(rb"\g<1>0", header)))
    # Damaged headers make it raise several classes of exception.
    except Exception as error:
        raise MediaError(f"a damaged PLY header ({error}); replace the file") from error
    if len(ply.elements) != len(counts):
        raise MediaError("a damaged PLY header; replace the file")
    return ply, [int(count) for count in counts]


def _ply_with_lists(stream: BinaryIO, records: int) -> Iterator[np.ndarray]:
    """Yield the vertices of a file whose records differ in size, which only a slow loop can read."""
    from plyfile import PlyData

    if records > (most := at_most("points", MAX_POINTS)):
        raise MediaError(
            f"a PLY file of {records:,} records with lists before or in its vertices; at most {most:,} are read. "
            "Save it again with the vertices first, of plain numbers"
        )
    stream.seek(0)
    try:
        vertex = PlyData.read(io.BytesIO(stream.read()), mmap=False)["vertex"]
        yield np.stack([vertex[axis] for axis in "xyz"], axis=1).astype(np.float64)
    except Exception as error:
        raise MediaError(f"a damaged or truncated PLY file ({error}); replace the file") from error


def _all_of(count: int, blocks: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
    """Pass blocks on, and refuse a file that ends early."""
    found = 0
    for block in blocks:
        found += len(block)
        yield block
    if found < count:
        raise MediaError(f"a truncated PLY file: {found:,} of {count:,} vertices; replace the file")


def _columns(text: bytes) -> int:
    """Return the number of columns of the first line that is not a comment; 0 if it is not a row of numbers."""
    for line in text.splitlines():
        if (cells := cells_of(line)) and not line.lstrip().startswith(b"//"):
            return len(cells) if all(map(is_number, cells)) and 3 <= len(cells) <= _MOST_COLUMNS else 0
    return 0


def _named_axes(line: bytes) -> list[int]:
    """Return the columns that a header, also as a comment, names x, y and z; none if it is another line.

    Examples:
        >>> _named_axes(b"//R G B X Y Z"), _named_axes(b'"id","x [m]","y [m]","z [m]"'), _named_axes(b"1 2 3")
        ([3, 4, 5], [1, 2, 3], [])
    """
    words = [cell.strip(b" \"'").lower() for cell in cells_of(_BRACKETS.sub(b"", line.lstrip(b"/# \t")))]
    return [words.index(axis) for axis in (b"x", b"y", b"z")] if {b"x", b"y", b"z"} <= set(words) else []


def _read_table(stream: BinaryIO, sieve: _Sieve) -> None:
    """Read lines of x y z, which a count of points or the names of the columns may precede."""
    # How to read this: skip everything before the first row of numbers, then read all rows as it is formed.
    skipped, start, axes, count, found = 0, 0, [0, 1, 2], 0.0, 0
    while line := stream.readline(_HEAD):
        check_time()
        named = _named_axes(line)
        axes = named or axes
        if line.strip() and _COUNT.fullmatch(line):
            # A float, since an integer of thousands of digits cannot be read.
            count = float(line)
        elif not (named or line.lstrip().startswith(b"//")) and cells_of(line):
            break
        skipped, start = skipped + 1, stream.tell()
    columns = len(cells_of(line))
    stream.seek(start)
    if not max(axes) < columns <= _MOST_COLUMNS:
        raise MediaError(f"line {skipped + 1} has {columns} cells; expected lines of x y z")
    for block in read_rows(stream, first=skipped + 1, columns=columns):
        sieve.add(block[:, axes])
        found += len(block)
    if found < count:
        raise MediaError(f"a truncated table: {found:,} of {count:,.0f} points; replace the file")


def _finish(points: np.ndarray, name: str) -> np.ndarray:
    """Drop points that are not finite, and return float32."""
    if not len(points):
        raise MediaError("no points in it; expected at least one")
    is_good = (np.abs(points) <= np.finfo(np.float32).max).all(axis=1)  # also false for NaN
    if not is_good.all():
        bad = int((~is_good).sum())
        if bad == len(points):
            raise MediaError(f"all {bad:,} points are NaN or infinite")
        warn(name, f"{bad} of {len(points)} points are NaN or infinite, and were skipped")
        points = points[is_good]
    low, high = points.min(axis=0), points.max(axis=0)
    extent = float((high - low).max())
    # 32-bit floats hold seven digits; a shape needs the last four.
    if 0 < extent < 1e-3 * float(np.maximum(np.abs(low), np.abs(high)).max()):
        points = points - (low + high) / 2
    return points.astype(np.float32)
