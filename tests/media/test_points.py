"""Point clouds and meshes of every kind, good and bad."""

from __future__ import annotations

import io
import json
import struct
import tracemalloc

import numpy as np
import pytest
import trimesh
from plyfile import PlyData, PlyElement

import bindllm.media.points as points_module
from bindllm.errors import MediaError, MissingExtraError
from bindllm.media.meshes import MAX_VERTICES, SAMPLES
from bindllm.media.points import MAX_POINTS, open_points
from recordings import assert_refused

CORNERS = np.array([[0, 0, 0], [1, 0, 0], [0, 2, 0], [0, 0, 4]], np.float64)
TRIANGLE = np.array([[0, 0, 0], [1, 0, 0], [0, 1, 0]], np.float32)


def exported(shape, kind: str, **options) -> bytes:
    data = shape.export(file_type=kind, **options)
    return data.encode() if isinstance(data, str) else data


def ply(body: bytes, count: int, properties: str = "float x\nfloat y\nfloat z", kind: str = "ascii") -> bytes:
    lines = "".join(f"property {line}\n" for line in properties.splitlines())
    return f"ply\nformat {kind} 1.0\ncomment c\nelement vertex {count}\n{lines}end_header\n".encode() + body


def glb(body: bytes = TRIANGLE.tobytes(), **changes) -> bytes:
    """One triangle, with parts of its description changed."""
    tree = {
        "asset": {"version": "2.0"},
        "scene": 0,
        "scenes": [{"nodes": [0]}],
        "nodes": [{"mesh": 0}],
        "meshes": [{"primitives": [{"attributes": {"POSITION": 0}}]}],
        "accessors": [{"bufferView": 0, "componentType": 5126, "count": 3, "type": "VEC3"}],
        "bufferViews": [{"buffer": 0, "byteLength": 36}],
        "buffers": [{"byteLength": 36}],
        **changes,
    }
    text = json.dumps(tree).encode()
    text += b" " * (-len(text) % 4)
    chunks = struct.pack("<I4s", len(text), b"JSON") + text + struct.pack("<I4s", len(body), b"BIN\0") + body
    return b"glTF" + struct.pack("<II", 2, 12 + len(chunks)) + chunks


# --- clouds ---


@pytest.mark.parametrize(
    "data",
    [
        ply(b"0 0 0\n1 0 0\n0 2 0\n0 0 4\n", 4),
        ply(CORNERS.astype("<f4").tobytes(), 4, kind="binary_little_endian"),
        ply(CORNERS.astype(">f8").tobytes(), 4, "double x\ndouble y\ndouble z", kind="binary_big_endian"),
        exported(trimesh.PointCloud(CORNERS), "ply"),
        exported(trimesh.PointCloud(CORNERS), "glb"),
        b"0 0 0\n1 0 0\n0 2 0\n0 0 4\n",
        b"# c\n0,0,0,9\n1,0,0,9\n\n0,2,0,9\n0,0,4,9",
        b"4\r\n0 0 0 255 0 0\r\n1 0 0 255 0 0\r\n0 2 0 255 0 0\r\n0 0 4 255 0 0\r\n",
        b"X,Y,Z\n0,0,0\n1,0,0\n0,2,0\n0,0,4\n",
        b"//R G B X Y Z\n9 9 9 0 0 0\n9 9 9 1 0 0\n9 9 9 0 2 0\n9 9 9 0 0 4\n",
        b'"id","z [m]","y [m]","x [m]"\n1,0,0,0\n2,0,0,1\n3,0,2,0\n4,4,0,0\n',
        b"# x y z\n0 0 0\n1 0 0\n0 2 0\n0 0 4\n",
        b"//X Y Z\n0 0 0\n1 0 0\n0 2 0\n0 0 4\n",
        b"v 0 0 0\nv 1 0 0\nv 0 2 0\nv 0 0 4\n",
        b"\xef\xbb\xbf0 0 0\n1 0 0\n0 2 0\n0 0 4\n",
        b"\xef\xbb\xbfx,y,z\n0,0,0\n1,0,0\n0,2,0\n0,0,4\n",
        ply(b"0 0 0\n1 0 0\n0 2 0\n0 0 4\n", 4).replace(b"\n", b"\r\n"),
        ply(b"", 4, kind="binary_little_endian").replace(b"\n", b"\r\n") + CORNERS.astype("<f4").tobytes(),
        CORNERS,
        CORNERS.astype(np.float16),
        np.hstack([CORNERS, CORNERS]).astype(np.int32),
    ],
    ids=lambda value: repr(value[:12]) if isinstance(value, bytes) else str(value.dtype),
)
def test_clouds_keep_their_points_in_order(data):
    points = open_points(data)
    assert points.dtype == np.float32
    np.testing.assert_array_equal(points, CORNERS)


def test_ply_properties_in_any_order_with_others_between():
    record = np.dtype([("red", "u1"), ("z", "<f4"), ("x", "<f8"), ("y", "<i2")])
    rows = np.array([(255, 3.0, 1.0, 2), (0, 6.0, 4.0, 5)], record)
    data = ply(rows.tobytes(), 2, "uchar red\nfloat z\ndouble x\nshort y", kind="binary_little_endian")
    np.testing.assert_array_equal(open_points(data), [[1, 2, 3], [4, 5, 6]])


@pytest.mark.parametrize("text", [False, True])
@pytest.mark.parametrize("place", ["before", "after"])
@pytest.mark.parametrize("with_list", [False, True])
def test_ply_elements_next_to_the_vertices(text, place, with_list):
    """Scanners write cameras before and edges after the vertices; in ASCII their lines have other columns."""
    vertex = PlyElement.describe(np.rec.fromarrays(CORNERS.T, names="x,y,z"), "vertex")
    entry = ([1, 2, 3],) if with_list else (7,)
    kind = [("a", object)] if with_list else [("a", "u1")]
    other = PlyElement.describe(
        np.array([entry, entry], kind), "edge", val_types={"a": "i4"} if with_list else {}
    )
    stream = io.BytesIO()
    PlyData([other, vertex] if place == "before" else [vertex, other], text=text).write(stream)
    np.testing.assert_array_equal(open_points(stream.getvalue()), CORNERS)


@pytest.mark.parametrize("kind", ["ascii", "binary_little_endian"])
@pytest.mark.parametrize(
    "properties", ["float x\nfloat y\nfloat z", "list uchar int a\nfloat x\nfloat y\nfloat z"]
)
def test_a_huge_count_in_a_ply_header_allocates_nothing(kind, properties):
    data = ply(b"\0" * 20 if kind != "ascii" else b"1 2 3\n", 10**14, properties, kind)
    tracemalloc.start()
    try:
        with pytest.raises(MediaError, match="truncated PLY file: 1 of|100,000,000,000,000 records"):
            open_points(data)
        assert tracemalloc.get_traced_memory()[1] < 20e6
    finally:
        tracemalloc.stop()


def test_npy_and_npz(tmp_path):
    np.save(tmp_path / "a.npy", CORNERS)
    np.save(tmp_path / "f.npy", np.asfortranarray(CORNERS))
    np.savez(tmp_path / "b.npz", points=CORNERS, normals=-CORNERS)
    np.savez_compressed(tmp_path / "c.npz", whatever=CORNERS)
    for file in sorted(tmp_path.iterdir()):
        np.testing.assert_array_equal(open_points(file), CORNERS)
        np.testing.assert_array_equal(open_points(file.read_bytes()), CORNERS)
    np.savez(tmp_path / "d.npz", a=CORNERS, b=CORNERS)
    with pytest.raises(
        MediaError, match=r"d\.npz: the archive holds a, b; expected one array, or one called points"
    ):
        open_points(tmp_path / "d.npz")


@pytest.mark.parametrize("count", [1, 2, 3])
def test_few_points(count):
    np.testing.assert_array_equal(open_points(CORNERS[:count]), CORNERS[:count])


def test_coincident_points_stay():
    np.testing.assert_array_equal(open_points(np.ones((5, 3))), np.ones((5, 3)))


def test_points_that_are_not_finite_are_counted_and_skipped(caplog, tmp_path):
    path = tmp_path / "scan.xyz"
    path.write_text("0 0 0\nnan 1 2\n1 inf 3\n1e300 0 0\n4 5 6\n")
    np.testing.assert_array_equal(open_points(path), [[0, 0, 0], [4, 5, 6]])
    assert f"{path}: 3 of 5 points are NaN or infinite, and were skipped" in caplog.text
    with pytest.raises(MediaError, match="all 2 points are NaN"):
        open_points(np.full((2, 3), np.nan))


def test_surveyed_coordinates_keep_their_shape():
    far = np.array([4_500_000.0, 300_000.0, 120.0])
    points = open_points(CORNERS + far)
    np.testing.assert_allclose(points - points[0], CORNERS, atol=1e-6)
    np.testing.assert_array_equal(open_points(CORNERS + 100), CORNERS + 100)
    np.testing.assert_array_equal(open_points(far[None]), far[None].astype(np.float32))


# --- many points ---


def test_of_many_points_every_other_one_is_taken_whatever_the_format(monkeypatch, tmp_path):
    monkeypatch.setattr(points_module, "MAX_POINTS", 100)
    cloud = np.random.default_rng(0).normal(size=(333, 3)).astype(np.float32)
    np.save(tmp_path / "a.npy", cloud)
    body = "".join(" ".join(map(repr, map(float, row))) + "\n" for row in cloud).encode()
    binary = ply(cloud.tobytes(), 333, kind="binary_little_endian")
    for source in (cloud, tmp_path / "a.npy", body, ply(body, 333), binary):
        np.testing.assert_array_equal(open_points(source), cloud[::4])


def test_ten_million_points_are_read_in_bounded_memory(tmp_path):
    count = 10_000_000
    path = tmp_path / "large.ply"
    rows = np.arange(3_000_000, dtype=np.float32).reshape(-1, 3)
    with path.open("wb") as stream:
        stream.write(ply(b"", count, kind="binary_little_endian"))
        for _ in range(count // len(rows)):
            rows.tofile(stream)
    tracemalloc.start()
    try:
        points = open_points(path)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(points) == count // 16 < MAX_POINTS
    np.testing.assert_array_equal(points[1], rows[16])
    assert peak < 150e6


# --- meshes ---


@pytest.mark.parametrize("kind", ["ply", "obj", "off", "stl", "stl_ascii", "glb"])
def test_meshes_are_sampled_evenly_on_their_surface(kind):
    box = trimesh.creation.box((1, 2, 4))
    data = exported(box, kind)
    points = open_points(data)
    assert points.shape == (SAMPLES, 3)
    half = np.array([0.5, 1, 2])
    on_side = np.isclose(np.abs(points), half, atol=1e-6)
    assert on_side.any(axis=1).all()
    assert (np.abs(points) <= half + 1e-6).all()
    # Two sides each of 2 x 4, 1 x 4 and 1 x 2.
    np.testing.assert_allclose(on_side.mean(axis=0), np.array([16, 8, 4]) / 28, atol=2e-3)
    cells = np.floor((points[on_side[:, 0]][:, 1:] + [1, 2]) * 2).astype(int)
    _, counts = np.unique(cells, axis=0, return_counts=True)
    assert len(counts) == 32
    assert counts.std() < 0.1 * counts.mean()
    np.testing.assert_array_equal(open_points(data), points)


def test_parts_of_a_scene_stand_where_they_belong():
    scene = trimesh.Scene()
    scene.add_geometry(
        trimesh.creation.box((1, 1, 1)), transform=trimesh.transformations.translation_matrix((9, 0, 0))
    )
    scene.add_geometry(trimesh.creation.box((1, 1, 1)), transform=trimesh.transformations.scale_matrix(2))
    points = open_points(exported(scene, "glb"))
    is_moved = points[:, 0] > 5
    np.testing.assert_allclose(points[is_moved].mean(axis=0), (9, 0, 0), atol=0.02)
    np.testing.assert_allclose(np.abs(points[~is_moved]).max(axis=0), (1, 1, 1), atol=1e-6)
    assert is_moved.mean() == pytest.approx(0.2, abs=0.01)  # by area: 6 of 30


@pytest.mark.parametrize(
    "data",
    [
        b"v 0 0 0\nv 1 0 0\nv 2 0 0\nf 1 2 3\n",
        b"OFF\n3 0 0\n0 0 0\n1 0 0\n2 0 0\n",
        ply(b"0 0 0\n1 0 0\n2 0 0\n3 0 1 2\n", 3).replace(
            b"end", b"element face 1\nproperty list uchar int vertex_indices\nend"
        ),
    ],
)
def test_a_mesh_without_area_gives_its_vertices(data):
    np.testing.assert_array_equal(open_points(data), [[0, 0, 0], [1, 0, 0], [2, 0, 0]])


def test_huge_and_tiny_coordinates_have_a_surface_too():
    for scale in (1e-30, 1e30):
        text = f"v 0 0 0\nv {scale} 0 0\nv 0 {scale} 0\nf 1 2 3\n".encode()
        points = open_points(text) / scale
        assert points.shape == (SAMPLES, 3)
        np.testing.assert_allclose(points.mean(axis=0), (1 / 3, 1 / 3, 0), atol=1e-3)


def test_a_face_with_a_broken_corner_is_left_out():
    points = open_points(b"v 0 0 0\nv 1 0 0\nv 0 1 0\nv nan 0 0\nf 1 2 3\nf 1 2 4\n")
    assert points.shape == (SAMPLES, 3)
    assert points.max() <= 1


def test_faces_of_obj_count_back_from_their_own_line():
    """The reader itself would count back from the end of the file, so both faces would be the last one."""
    part = "v 0 0 {z}\nv 1 0 {z}\nv 0 1 {z}\nvt 0 0\n"
    relative = [part.format(z=0), "f -3/-1 -2/-1 \\\n -1/-1\n", part.format(z=5), "f -3//1 5//1 -1//1\n"]
    plain = [part.format(z=0), part.format(z=5), "f 1 2 3\nf 4 5 6\n"]
    points = open_points("".join(relative).encode())
    np.testing.assert_array_equal(points, open_points("".join(plain).encode()))
    assert set(points[:, 2]) == {0, 5}
    # The only such count is on a continued line.
    continued = [part.format(z=0), "f 1 2 \\\n -1\n", part.format(z=5)]
    assert set(open_points("".join(continued).encode())[:, 2]) == {0}


def test_glb_is_read_from_its_own_bytes_alone(tmp_path):
    assert open_points(glb()).max() <= 1
    secret = tmp_path / "secret.bin"
    secret.write_bytes(TRIANGLE.tobytes())
    for address in (secret.as_uri(), str(secret), "http://localhost:1/a.bin"):
        with pytest.raises(MediaError, match="damaged GLB"):
            open_points(glb(body=b"", buffers=[{"byteLength": 36, "uri": address}]))


def test_a_glb_file_that_would_unpack_to_far_more_is_refused():
    bomb = [{"componentType": 5126, "count": 10**10, "type": "VEC3"}]
    with pytest.raises(MediaError, match="10,000,000,000 values"):
        open_points(glb(accessors=bomb))
    with pytest.raises(MediaError, match="20,000 nodes"):
        open_points(glb(nodes=[{"mesh": 0}] * 20_000))
    with pytest.raises(MediaError, match=f"more than {MAX_VERTICES:,} vertices"):
        body = np.zeros((300_000, 3), np.float32).tobytes()
        size = {"byteLength": len(body)}
        accessors = [{"bufferView": 0, "componentType": 5126, "count": 300_000, "type": "VEC3"}]
        nodes = {"nodes": [{"mesh": 0}] * 40, "scenes": [{"nodes": list(range(40))}]}
        open_points(
            glb(body, accessors=accessors, buffers=[size], bufferViews=[{"buffer": 0, **size}], **nodes)
        )


@pytest.mark.parametrize("kind", ["i1", "u1", "i2", "u2"])
@pytest.mark.parametrize("stride", [None, 16])
def test_normalized_positions_are_scaled_before_they_are_placed(kind, stride):
    # Two parts, one moved by 3: as plain integers, the first would dwarf the distance.
    top = np.iinfo(kind).max
    corners = (TRIANGLE * top).astype(f"<{kind}")
    step = stride or corners.dtype.itemsize * 3
    body = b"".join(row.tobytes().ljust(step, b"\7") for row in corners)
    component = {"i1": 5120, "u1": 5121, "i2": 5122, "u2": 5123}[kind]
    view = {"buffer": 0, "byteLength": len(body), **({"byteStride": stride} if stride else {})}
    accessor = {"bufferView": 0, "componentType": component, "count": 3, "type": "VEC3", "normalized": True}
    points = open_points(
        glb(
            body + bytes(-len(body) % 4),
            accessors=[accessor],
            bufferViews=[view],
            buffers=[{"byteLength": len(body)}],
            scenes=[{"nodes": [0, 1]}],
            nodes=[{"mesh": 0}, {"mesh": 0, "translation": [3, 0, 0]}],
            extensionsRequired=["KHR_mesh_quantization"],
        )
    )
    np.testing.assert_allclose([points.min(axis=0), points.max(axis=0)], [[0, 0, 0], [4, 1, 0]], atol=0.02)


PLAIN = {"bufferView": 0, "componentType": 5126, "count": 3, "type": "VEC3"}
POSITION = {"attributes": {"POSITION": 0}}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"extensionsRequired": ["KHR_draco_mesh_compression"]}, "KHR_draco_mesh_compression"),
        ({"extensionsUsed": ["EXT_mesh_gpu_instancing"]}, "EXT_mesh_gpu_instancing"),
        ({"extensionsRequired": ["KHR_node_visibility"]}, "required extension KHR_node_visibility"),
        ({"accessors": [{**PLAIN, "sparse": {"count": 1}}]}, "sparse accessors"),
        ({"meshes": [{"primitives": [{**POSITION, "mode": 6}]}]}, "triangle fans"),
        ({"meshes": [{"primitives": [POSITION], "weights": [0, 0.5]}]}, "morph targets"),
        ({"nodes": [{"mesh": 0, "weights": [1]}]}, "morph targets"),
    ],
)
def test_features_of_glb_that_change_the_shape_are_refused(changes, reason):
    with pytest.raises(MediaError, match=rf"a GLB file with .*{reason}.*; save it as plain triangles"):
        open_points(glb(**changes))


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (glb(meshes=[{"primitives": [POSITION, {**POSITION, "mode": 3}]}]), "lines of this GLB"),
        (glb(meshes=[{"primitives": [POSITION, {**POSITION, "mode": 0}]}]), "single points of this GLB"),
        (glb(skins=[{"joints": [0]}]), "skeletons of this GLB"),
        (b"v 0 0 0\nv 1 0 0\nv 0 1 0\nf 1 2 3\nl 1 2\n", "lines, points and free-form surfaces"),
        (glb(), ""),
        (glb(extensionsRequired=["KHR_materials_unlit", "KHR_texture_transform"]), ""),
        (glb(meshes=[{"primitives": [POSITION], "weights": [0, 0]}]), ""),
    ],
)
def test_parts_that_are_not_used_are_reported(source, words, caplog):
    assert open_points(source).shape == (SAMPLES, 3)
    assert words in caplog.text
    assert bool(words) == bool(caplog.messages)


def test_nodes_in_a_circle_come_to_an_end():
    assert open_points(glb(nodes=[{"mesh": 0, "children": [1]}, {"children": [0]}])).shape == (SAMPLES, 3)


def test_without_trimesh_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "trimesh", None)
    with pytest.raises(MissingExtraError, match=r"bindllm\[point\]"):
        open_points(b"v 0 0 0\nv 1 0 0\nv 0 1 0\nf 1 2 3\n")
    np.testing.assert_array_equal(open_points(b"1 2 3\n"), [[1, 2, 3]])


# --- files that are not clouds ---


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "No such file"),
        (b"", "the file is empty"),
        (b"just some words\n", "not a point cloud"),
        (b"\x89PNG\r\n\x1a\n", "not a point cloud"),
        (b"# .PCD v.7 - Point Cloud Data file format\nVERSION .7\n", "not a point cloud"),
        (b"1 2\n3 4\n", "not a point cloud"),
        (b"0 0 0\n1 2\n", "line 2 has 2 cells; expected 3"),
        (b"0 0 0\n\n1 2 x\n", "line 3, column 3 holds 'x'"),
        (b"2\ncomment\nC 0 0 0\n", "line 2 has 1 cells"),
        (b"5\n0 0 0\n1 2 3\n", "a truncated table: 2 of 5 points"),
        (b"9" * 5000 + b"\n0 0 0\n", "a truncated table: 1 of"),
        (b"v 0 0 0\nv 1 0 0\nv 0 1 0\nf 0 1 2\n", "a face refers to a vertex that does not exist"),
        (b"v 0 0 0\nv 1 0 0\nv 0 1 0\nf -4 -2 -1\n", "a face refers to a vertex that does not exist"),
        (ply(b"1 2 3\n", 5), "truncated PLY file: 1 of 5 vertices"),
        (ply(b"\0" * 20, 5, kind="binary_little_endian"), "truncated PLY file: 1 of 5 vertices"),
        (ply(b"1 2\n", 1, "float x\nfloat y"), "without vertices that have x, y and z"),
        (ply(b"", 1, "list uchar int a\nfloat x\nfloat y\nfloat z"), "damaged or truncated PLY file"),
        (ply(b"", 1).replace(b"vertex 1", b"vertex many"), "damaged PLY header .a count of b'many'"),
        (ply(b"", 1).replace(b"end_header", b"nothing"), "damaged PLY header .no end_header"),
        (ply(b"", 1).replace(b"float x", b"quaternion x"), "damaged PLY header"),
        (ply(b"", 0), "no points in it"),
        (b"OFF\n", "damaged OFF file"),
        (b"glTF\2\0\0\0", "damaged GLB file"),
        (b"solid a\nfacet normal x\n", "STL file"),
        (b"v 0 0 0\nf 1 2 3\n", "OBJ file|a face names a vertex"),
        (b"\x93NUMPY\1\0\2\0{}", "damaged NPY file"),
        (b"PK\3\4" + b"\0" * 40, "damaged or encrypted NPZ"),
    ],
)
def test_bad_files_are_named_with_the_reason(content, reason, tmp_path):
    assert_refused(open_points, content, tmp_path / "bad.dat", reason)


def test_the_ending_decides_where_the_content_does_not(tmp_path):
    path = tmp_path / "a.obj"
    path.write_bytes(b"# a long remark\n" * 9000 + b"v 1 2 3\n")
    np.testing.assert_array_equal(open_points(path), [[1, 2, 3]])


@pytest.mark.parametrize(
    ("array", "reason"),
    [
        (np.zeros((0, 3)), "no points in it"),
        (np.zeros((3, 7)), r"an array \[3, 7\].*transpose it"),
        (np.zeros((3, 100)), r"an array \[3, 100\].*transpose it"),
        (np.zeros(3), "expected .N, 3."),
        (np.zeros((4, 3), complex), "an array of complex128; expected integers or floats"),
        (np.array([["a", "b", "c"]]), "expected integers or floats"),
        (np.array([[None, 1, 2]]), "an array of object"),
    ],
)
def test_arrays_that_are_not_clouds(array, reason):
    with pytest.raises(MediaError, match=reason):
        open_points(array)


def test_arrays_of_objects_are_never_unpickled():
    stream = io.BytesIO()
    np.save(stream, np.array([print], dtype=object), allow_pickle=True)
    with pytest.raises(MediaError, match="an array of object"):
        open_points(stream.getvalue())
