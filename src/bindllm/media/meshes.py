"""Reading meshes and spreading points over their surface; nothing outside the file is read."""

from __future__ import annotations

import io
import json
import os
import re
import struct
from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO

import numpy as np

from bindllm.errors import MediaError, needs_extra
from bindllm.media.limits import at_most, warn

SAMPLES = 16_384
"""Points that are taken from the surface of a mesh: twice as many as Point-Bind works on."""

MAX_MESH_BYTES = 128 * 1024 * 1024
"""Largest mesh file that is read; in memory it takes ten to twenty times as much."""

MAX_VERTICES = 10_000_000
"""Most vertices of a mesh; repeated parts count each time."""

_MAX_NODES = 10_000
# Extensions of glTF that change the shape, and those (of the required ones) that only change how it looks.
_SHAPE_EXTENSIONS = ("KHR_draco_mesh_compression", "EXT_meshopt_compression", "EXT_mesh_gpu_instancing")
_APPEARANCE = re.compile(
    r"KHR_mesh_quantization|(KHR|EXT|MSFT)_(materials|texture|lights|animation|packing|xmp)_?\w*"
)
# Values of glTF 2.0: modes of primitives and types of numbers.
_POINTS, _LINES, _TRIANGLES, _STRIP, _FAN = 0, (1, 2, 3), 4, 5, 6
_SURFACES = (_TRIANGLES, _STRIP, _FAN)
_FLOAT, _INTEGERS = 5126, {5120: "<i1", 5121: "<u1", 5122: "<i2", 5123: "<u2"}
_OBJ_OTHERS = re.compile(rb"^[ \t]*(l|p|curv2?|surf)[ \t]", re.MULTILINE)
# A face that counts its vertices back from its own line, or from 0, which is not valid.
_OBJ_RELATIVE = re.compile(rb"^[ \t]*f[ \t][^\n]*?(?<=[ \t])(-|0[\s/])", re.MULTILINE)
_OBJ_VERTEX = re.compile(rb"(?<=[ \t])(-?\d+)[^\s]*")
_OPTIONS: dict[str, dict[str, Any]] = {
    "glb": {"skip_materials": True},
    "obj": {"skip_materials": True, "split_object": False, "group_material": False},
    "ply": {"skip_materials": True},
}
# Fractional steps of the plane-filling sequence of Roberts (2018), from the real root of x^3 = x + 1.
_STEPS = np.array([0.7548776662466927, 0.5698402909980532])


def sample_mesh(stream: BinaryIO, *, kind: str, name: str) -> np.ndarray:
    """Return `SAMPLES` points on the surface of a mesh, the same ones every time, or its vertices if it has no area.

    Args:
        kind: obj, off, stl, glb or ply.
        name: name of the file, for warnings of parts that are not used.

    Returns:
        [N, 3], float64, in the units of the file; vertices may be NaN or infinite, points on a surface are not.

    Raises:
        MediaError: damaged, of a kind whose shape the reader would change, above `MAX_MESH_BYTES` or `MAX_VERTICES`, or
            without a vertex.
        MissingExtraError: trimesh is not installed.
    """
    with needs_extra("trimesh", extra="point", purpose="read meshes"):
        import trimesh

    stream.seek(0, os.SEEK_END)
    size = stream.tell()
    stream.seek(0)
    if size > (most := at_most("bytes", MAX_MESH_BYTES)):
        raise MediaError(
            f"a mesh of {size:,} bytes; at most {most:,} are read. Simplify it, or save its points as NPY"
        )
    data = stream.read()
    if kind == "glb":
        data = _plain_glb(data, name)
    if kind == "obj":
        # A backslash at its end continues a line.
        data = re.sub(rb"\\\r?\n", b" ", data)
        if _OBJ_RELATIVE.search(data):
            data = _absolute_obj(data)
        if found := _OBJ_OTHERS.search(data):
            kept = found[1].decode()
            warn(name, f"lines, points and free-form surfaces of this OBJ file are not used ({kept})")
    try:
        # ``resolver=None`` reads no other file, ``process=False`` keeps the vertices as stored.
        scene = trimesh.load_scene(
            io.BytesIO(data), file_type=kind, resolver=None, process=False, **_OPTIONS.get(kind, {})
        )
        vertices, faces = _gather(scene)
    except MediaError:
        raise
    # Damaged files make it raise nearly every class of exception, and ask for any amount of memory.
    except Exception as error:
        problem = str(error)[:200] or type(error).__name__
        raise MediaError(f"a damaged {kind.upper()} file ({problem}); replace the file") from error
    if not len(vertices):
        raise MediaError(f"no vertices in this {kind.upper()} file")
    return _spread(vertices, faces)


def _absolute_obj(data: bytes) -> bytes:
    """Return an OBJ file whose faces count vertices from 1; the reader would count back from the end of the file.

    Raises:
        MediaError: a face refers to a vertex that does not exist.
    """
    count, lines = 0, []

    def absolute(match: re.Match[bytes]) -> bytes:
        at = int(match[1])
        if not 1 <= (at := at + (count + 1) * (at < 0)) <= count:
            raise MediaError(
                "a damaged OBJ file: a face refers to a vertex that does not exist; replace the file"
            )
        return b"%d" % at

    for line in data.splitlines():
        word = line.split(maxsplit=1)[:1]
        count += word == [b"v"]
        # Without the texture and the normal of each corner, which are not read.
        lines.append(_OBJ_VERTEX.sub(absolute, line) if word == [b"f"] else line)
    return b"\n".join(lines)


def _plain_glb(data: bytes, name: str) -> bytes:
    """Return a GLB file as the reader takes it; refuse, convert or report everything that the reader would ignore.

    Raises:
        MediaError: damaged, parts that change the shape and cannot be read, or counts far beyond the size of the file.
    """
    # GLB: 12 bytes of header, then length and type of the first chunk (4 bytes each), and its JSON.
    length = int.from_bytes(data[12:16], "little")
    try:
        tree = json.loads(data[20 : 20 + length])
        count = sum(int(accessor.get("count", 0)) for accessor in tree.get("accessors", ()))
        nodes = len(tree.get("nodes", ()))
        problem = _glb_problem(tree)
        skipped = _skipped_of_glb(tree)
        quantized = [at for at in _positions(tree) if tree["accessors"][at].get("normalized")]
        if quantized and not problem:
            # Header and type of the second chunk lie between both contents.
            data = _dequantized(tree, data[28 + length :], quantized)
    except (ValueError, TypeError, AttributeError, LookupError, RecursionError) as error:
        raise MediaError(f"a damaged GLB file ({error}); replace the file") from error
    if problem:
        raise MediaError(f"a GLB file with {problem}; save it as plain triangles")
    if count > 6 * (most := at_most("points", MAX_VERTICES)) or nodes > _MAX_NODES:
        raise MediaError(
            f"a GLB file of {count:,} values and {nodes:,} nodes; at most {6 * most:,} and "
            f"{_MAX_NODES:,} are read. Simplify it first"
        )
    if skipped:
        warn(name, f"{' and '.join(skipped)} of this GLB file are not used")
    return data


def _primitives(tree: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for mesh in tree.get("meshes", ()):
        yield from mesh.get("primitives", ())


def _positions(tree: dict[str, Any]) -> set[int]:
    """Return the accessors that hold positions."""
    return {part["attributes"]["POSITION"] for part in _primitives(tree)}


def _glb_problem(tree: dict[str, Any]) -> str:
    """Return the first feature that changes the shape and that the reader would ignore; "" if it has none."""
    for key in tree.get("extensionsUsed", ()):
        if key in _SHAPE_EXTENSIONS:
            return key
    # By the specification, a reader must refuse required extensions that it does not implement.
    for key in tree.get("extensionsRequired", ()):
        if key in _SHAPE_EXTENSIONS or not _APPEARANCE.fullmatch(key):
            return f"the required extension {key}"
    used = {part["indices"] for part in _primitives(tree) if "indices" in part} | _positions(tree)
    if any("sparse" in tree["accessors"][at] for at in used):
        return "sparse accessors"
    if any(part.get("mode", _TRIANGLES) == _FAN for part in _primitives(tree)):
        return "triangle fans"
    if any(any(part.get("weights", ())) for key in ("meshes", "nodes") for part in tree.get(key, ())):
        return "morph targets that are in use"
    return ""


def _skipped_of_glb(tree: dict[str, Any]) -> list[str]:
    """Return the features that do not count for points on a surface, as words for a warning."""
    modes = {part.get("mode", _TRIANGLES) for part in _primitives(tree)}
    skipped = ["lines"] if modes & set(_LINES) else []
    skipped += ["single points"] if _POINTS in modes and modes & set(_SURFACES) else []
    return skipped + (["skeletons"] if tree.get("skins") else [])


def _dequantized(tree: dict[str, Any], binary: bytes, quantized: Sequence[int]) -> bytes:
    """Return a GLB file in which normalized integer positions (KHR_mesh_quantization) are floats in -1..1."""
    for at in quantized:
        accessor = tree["accessors"][at]
        view, kind = tree["bufferViews"][accessor["bufferView"]], _INTEGERS[accessor["componentType"]]
        stored = np.ndarray(
            (accessor["count"], 3),
            kind,
            binary,
            offset=view.get("byteOffset", 0) + accessor.get("byteOffset", 0),
            strides=(view.get("byteStride", 3 * np.dtype(kind).itemsize), np.dtype(kind).itemsize),
        )
        # The most negative integer, which has no positive partner, also means -1.
        floats = np.maximum(stored / np.iinfo(kind).max, -1).astype("<f4").tobytes()
        binary += bytes(-len(binary) % 4)
        tree["bufferViews"].append({"buffer": 0, "byteOffset": len(binary), "byteLength": len(floats)})
        binary += floats
        accessor.update(bufferView=len(tree["bufferViews"]) - 1, byteOffset=0, componentType=_FLOAT)
    tree["buffers"][0]["byteLength"] = len(binary)
    text = json.dumps(tree).encode()
    text += b" " * (-len(text) % 4)
    chunks = b"".join(
        len(part).to_bytes(4, "little") + kind + part for part, kind in ((text, b"JSON"), (binary, b"BIN\0"))
    )
    return b"glTF" + struct.pack("<II", 2, 12 + len(chunks)) + chunks


def _gather(scene: Any) -> tuple[np.ndarray, np.ndarray]:
    """Return the vertices [V, 3] and triangles [F, 3] of everything that a scene shows, at its position."""
    vertices, faces, count = [], [], 0
    for part, triangles in _parts(scene):
        if len(triangles) and not (triangles.min() >= 0 and triangles.max() < len(part)):
            raise MediaError(
                "a damaged mesh: a face refers to a vertex that does not exist; replace the file"
            )
        vertices.append(part)
        # Each part counts its own vertices from 0.
        faces.append(triangles + count)
        count += len(part)
        if count > (most := at_most("points", MAX_VERTICES)) or sum(map(len, faces)) > 2 * most:
            raise MediaError(f"a mesh of more than {most:,} vertices; simplify it first")
    if not vertices:
        return np.empty((0, 3)), np.empty((0, 3), np.int64)
    return np.concatenate(vertices), np.concatenate(faces)


def _parts(scene: Any) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    import trimesh

    for node in scene.graph.nodes_geometry:
        matrix, key = scene.graph[node]
        geometry = scene.geometry[key]
        if isinstance(geometry, trimesh.Trimesh | trimesh.PointCloud):
            vertices = np.asarray(geometry.vertices, np.float64).reshape(-1, 3)
            # Damaged matrices overflow; vertices that are not finite are dropped later.
            with np.errstate(all="ignore"):
                placed = vertices @ matrix[:3, :3].T + matrix[:3, 3]
            is_mesh = isinstance(geometry, trimesh.Trimesh)
            yield placed, np.asarray(geometry.faces if is_mesh else [], np.int64).reshape(-1, 3)


def _spread(vertices: np.ndarray, faces: np.ndarray) -> np.ndarray:
    """Return points evenly spread over the triangles, or the vertices if those have no area."""
    # Without triangles that touch a vertex which is not finite.
    faces = faces[np.isfinite(vertices).all(axis=1)[faces].all(axis=1)]
    corners = vertices[faces]
    scale = np.abs(corners).max(initial=0.0)
    if scale == 0:
        return vertices
    # Within -1..1, so that no product overflows; around the center, so that none is rounded away.
    corners = corners / scale
    middle = (corners.min(axis=(0, 1)) + corners.max(axis=(0, 1))) / 2
    corners = corners - middle
    sides = corners[:, 1:] - corners[:, :1]
    # Twice the area of each triangle: only the ratios matter.
    area = np.linalg.norm(np.cross(sides[:, 0], sides[:, 1]), axis=1)
    total = np.cumsum(area)
    if not total[-1] > 0:
        return vertices
    # Even steps on the running sum of areas: large triangles get more points, and nothing is random.
    picks = (np.arange(SAMPLES) + 0.5) / SAMPLES * total[-1]
    chosen = np.minimum(np.searchsorted(total, picks), len(area) - 1)
    shares = np.arange(1, SAMPLES + 1)[:, None] * _STEPS % 1.0
    # The square of both shares is folded onto the triangle below its diagonal.
    is_above = shares.sum(axis=1) > 1
    shares[is_above] = 1 - shares[is_above]
    points = corners[chosen, 0] + (sides[chosen] * shares[:, :, None]).sum(axis=1)
    return (points + middle) * scale
