"""NPY, NPZ and tables: what their headers may claim, and which line is at fault."""

from __future__ import annotations

import io
import struct
import tracemalloc
import zipfile

import numpy as np
import pytest

import bindllm.media.arrays as arrays_module
from bindllm.errors import MediaError, reading
from bindllm.media.arrays import NPY, read_array, read_rows


def npy(header: str, body: bytes = b"", version: bytes = b"\1\0") -> bytes:
    text = header.encode() + b"\n"
    return NPY + version + struct.pack("<H", len(text)) + text + body


def read(data: bytes) -> np.ndarray:
    with reading("a.npy"):
        return read_array(io.BytesIO(data), keys=("points",))


def rows(text: bytes, columns: int) -> np.ndarray:
    with reading("a.csv"):
        return np.concatenate(list(read_rows(io.BytesIO(text), first=1, columns=columns)))


def test_arrays_come_back_as_they_were_saved():
    for array in (np.arange(6.0).reshape(2, 3), np.asfortranarray(np.arange(6).reshape(3, 2)), np.float16(3)):
        stream = io.BytesIO()
        np.save(stream, array)
        np.testing.assert_array_equal(read(stream.getvalue()), array, strict=True)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (npy("{'descr': '<f8', 'fortran_order': False, 'shape': (2, 3)}", b"\0" * 40), "40 of 48 bytes"),
        (
            npy("{'descr': '<f8', 'fortran_order': False, 'shape': (99999999999,)}"),
            "at most 536,870,912 are read",
        ),
        (npy("{'descr': '<f8', 'fortran_order': False, 'shape': (-1, 3)}"), "an array .-1, 3."),
        (npy("{'descr': '|O', 'fortran_order': False, 'shape': (1,)}"), "an array of object"),
        (
            npy("{'descr': [('a', '<f4')], 'fortran_order': False, 'shape': (1,)}"),
            "expected integers or floats",
        ),
        (
            npy("{'descr': ('<f4', (3,)), 'fortran_order': False, 'shape': (1,)}", b"\0" * 12),
            "expected integers",
        ),
        (npy("{'descr': '<c16', 'fortran_order': False, 'shape': (1,)}"), "an array of complex128"),
        (npy("__import__('os').abort()"), "damaged NPY file"),
        (npy("{}"), "damaged NPY file"),
        (npy("{}", version=b"\7\0"), "version .7, 0."),
        (NPY, "damaged NPY file"),
    ],
)
def test_bad_npy_files(data, reason):
    with pytest.raises(MediaError, match=reason) as caught:
        read(data)
    assert str(caught.value).startswith("a.npy: ")


def test_a_zip_bomb_is_refused_by_its_header(monkeypatch):
    monkeypatch.setattr(arrays_module, "MAX_ARRAY_BYTES", 10**6)
    stream = io.BytesIO()
    np.savez_compressed(stream, points=np.zeros(50_000_000, np.uint8))
    data = stream.getvalue()
    tracemalloc.start()
    try:
        with pytest.raises(MediaError, match=r"points\.npy unpacks to 50,000,128 bytes"):
            read(data)
        # A header that lies does not help: the member is unpacked as far as it says, and no further.
        lying = data.replace(struct.pack("<I", 50_000_128), struct.pack("<I", 1000))
        assert lying != data
        with pytest.raises(MediaError, match="a.npy"):
            read(lying)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 3e6


def test_archives_without_an_array():
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("mimetype", "application/zip")
    with pytest.raises(MediaError, match="mimetype is not an NPY file"):
        read(stream.getvalue())
    with pytest.raises(MediaError, match="damaged or encrypted NPZ"):
        read(stream.getvalue()[:60])
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_LZMA) as archive:
        archive.writestr("points.npy", b"0" * 1000)
    with pytest.raises(MediaError, match=r"points\.npy is packed in a way that numpy never uses"):
        read(stream.getvalue())


@pytest.mark.parametrize(
    "text",
    [
        b"1 2 3\n4 5 6\n",
        b"1,2,3\r\n4,5,6",
        b" 1 ;2; 3\n\n# c\n4;5;6 # c\n",
        b"1\t2  3\n4 5\t6\n",
        b"1 2 3\n4, 5, 6",
    ],
)
def test_tables(text):
    np.testing.assert_array_equal(rows(text, 3), [[1, 2, 3], [4, 5, 6]])


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (b"1 2 3\n4 5\n", "line 2 has 2 cells; expected 3"),
        (b"1,2,3\n\n4,,6\n", "line 3, column 2 holds ''"),
        (b"1 2 3\n4 five 6\n", "line 2, column 2 holds 'five'"),
        (b"1 2 3\n4 \xff\0 6\n", "line 2, column 2"),
        (b"1 2 3 4\n", "line 1 has 4 cells; expected 3"),
    ],
)
def test_bad_tables_name_the_line(text, reason):
    with pytest.raises(MediaError, match=rf"a\.csv: {reason}"):
        rows(text, 3)


def test_lines_keep_their_numbers_over_blocks(monkeypatch):
    monkeypatch.setattr(arrays_module, "_BLOCK", 16)
    assert len(rows(b"1 2\n" * 100, 2)) == 100
    with pytest.raises(MediaError, match="line 51, column 2"):
        rows(b"1 2\n" * 50 + b"1 x\n" + b"1 2\n" * 50, 2)


def test_one_endless_line_does_not_fill_the_memory():
    text = b"1 " * 10_000_000
    tracemalloc.start()
    try:
        with pytest.raises(MediaError, match="line 1 has 32768 cells"):
            rows(text, 2)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 60e6
