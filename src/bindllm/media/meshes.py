"""Reading meshes and spreading points over their surface; nothing outside the file is read."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterator
from typing import Any, BinaryIO

import numpy as np

from bindllm.errors import MediaError, MissingExtraError

SAMPLES = 16_384
"""Points that are taken from the surface of a mesh: twice as many as Point-Bind works on."""

MAX_MESH_BYTES = 128 * 1024 * 1024
"""Largest mesh file that is read; in memory it takes ten to twenty times as much."""

MAX_VERTICES = 10_000_000
"""Most vertices of a mesh; repeated parts count each time."""

_MAX_NODES = 10_000
_COMPRESSED = ("KHR_draco_mesh_compression", "EXT_meshopt_compression")
_OPTIONS: dict[str, dict[str, Any]] = {
    "glb": {"skip_materials": True},
    "obj": {"skip_materials": True, "split_object": False, "group_material": False},
    "ply": {"skip_materials": True},
}
# Fractional steps of the plane-filling sequence of Roberts (2018), from the real root of x^3 = x + 1.
_STEPS = np.array([0.7548776662466927, 0.5698402909980532])


def sample_mesh(stream: BinaryIO, *, kind: str) -> np.ndarray:
    """Return `SAMPLES` points on the surface of a mesh, the same ones every time, or its vertices if it has no area.

    Args:
        stream: the file, at its start.
        kind: obj, off, stl, glb or ply.

    Returns:
        [N, 3], float64, in the units of the file; vertices may be NaN or infinite, points on a surface are not.

    Raises:
        MediaError: damaged, compressed, above `MAX_MESH_BYTES` or `MAX_VERTICES`, or without a vertex.
        MissingExtraError: trimesh is not installed.
    """
    try:
        import trimesh
    except ImportError as error:
        raise MissingExtraError("trimesh", extra="point", purpose="read meshes") from error

    stream.seek(0, os.SEEK_END)
    size = stream.tell()
    stream.seek(0)
    if size > MAX_MESH_BYTES:
        raise MediaError(
            f"a mesh of {size:,} bytes; at most {MAX_MESH_BYTES:,} are read. Simplify it, or save its points "
            "as NPY"
        )
    data = stream.read()
    if kind == "glb":
        _check_glb(data)
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


def _check_glb(data: bytes) -> None:
    """Refuse compressed meshes, which the reader would skip, and counts far beyond the size of the file."""
    # GLB: 12 bytes of header, then length and type of the first chunk (4 bytes each), and its JSON.
    length = int.from_bytes(data[12:16], "little")
    try:
        tree = json.loads(data[20 : 20 + length])
        extensions = {key for part in ("extensionsRequired", "extensionsUsed") for key in tree.get(part, ())}
        count = sum(int(accessor.get("count", 0)) for accessor in tree.get("accessors", ()))
        nodes = len(tree.get("nodes", ()))
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise MediaError(f"a damaged GLB file ({error}); replace the file") from error
    if found := [key for key in _COMPRESSED if key in extensions]:
        raise MediaError(f"a GLB file compressed with {found[0]}; save it without compression")
    if count > 6 * MAX_VERTICES or nodes > _MAX_NODES:
        raise MediaError(
            f"a GLB file of {count:,} values and {nodes:,} nodes; at most {6 * MAX_VERTICES:,} and "
            f"{_MAX_NODES:,} are read. Simplify it first"
        )


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
        if count > MAX_VERTICES or sum(map(len, faces)) > 2 * MAX_VERTICES:
            raise MediaError(f"a mesh of more than {MAX_VERTICES:,} vertices; simplify it first")
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
