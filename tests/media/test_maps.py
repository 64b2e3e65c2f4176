"""Depth maps and thermal images: units, what was not measured, and files that are neither."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from bindllm.errors import MediaError
from bindllm.media.maps import open_depth, open_thermal
from recordings import assert_refused, png

MILLIMETRES = np.array([[0, 1000, 2500], [65535, 1, 800]], np.uint16)
METRES = np.array([[0, 1, 2.5], [65.535, 0.001, 0.8]], np.float32)


def saved(image: Image.Image | np.ndarray, kind: str, **options) -> bytes:
    stream = io.BytesIO()
    (Image.fromarray(image) if isinstance(image, np.ndarray) else image).save(stream, kind, **options)
    return stream.getvalue()


def npy(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


def npz(**arrays: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.savez(stream, **arrays)
    return stream.getvalue()


# --- depth ---


@pytest.mark.parametrize(
    "source",
    [
        saved(MILLIMETRES, "PNG"),
        saved(MILLIMETRES, "TIFF"),
        saved(MILLIMETRES.astype(np.int32), "TIFF"),
        saved(METRES, "TIFF"),
        npy(METRES),
        npy(METRES.astype(np.float64)[:, :, None]),
        npy(MILLIMETRES),
        npz(depth=METRES, other=MILLIMETRES),
        npz(anything=METRES),
        MILLIMETRES,
        MILLIMETRES.astype(np.int64),
        METRES,
        Image.fromarray(MILLIMETRES),
        Image.frombytes("I;16B", (3, 2), MILLIMETRES.astype(">u2").tobytes()),
    ],
)
def test_integers_are_millimeters_and_floats_are_meters(source):
    depth = open_depth(source)
    assert depth.dtype == np.float32
    np.testing.assert_allclose(depth, METRES, rtol=1e-6)


def test_what_was_not_measured_is_zero():
    depth = open_depth(np.array([[np.nan, np.inf, -np.inf], [-1, 0, 2]]))
    np.testing.assert_array_equal(depth, [[0, 0, 0], [0, 0, 2]])
    np.testing.assert_array_equal(open_depth(np.array([[-5, 3000]], np.int16)), [[0, 3]])
    for nothing in (np.zeros((2, 2)), np.full((2, 2), np.nan), np.zeros((2, 2), np.uint16)):
        with pytest.raises(MediaError, match="no pixel of this depth map was measured"):
            open_depth(nothing)


def test_transparent_depth_is_not_measured():
    depth = open_depth(png((2, 1), 16, 0, b"\0\xff\xff\x03\xe8", level=b"\xff\xff"))
    np.testing.assert_array_equal(depth, [[0, 1]])


@pytest.mark.parametrize("mode", ["L", "RGB", "P", "1", "LA"])
def test_images_of_eight_bits_are_refused_with_advice(mode, tmp_path):
    path = tmp_path / "depth.png"
    Image.new(mode, (4, 4)).save(path)
    with pytest.raises(
        MediaError, match=r"depth\.png: 8 bits or color cannot hold depth; .* Save the depth values"
    ):
        open_depth(path)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "No such file"),
        (b"", "the file is empty"),
        (b"\x76\x2f\x31\x01\2\0\0\0", "OpenEXR is not read here; save it as NPY"),
        (b"words", "not an image"),
        (saved(np.full((64, 64), 7, np.uint16), "PNG")[:70], "damaged or truncated"),
        (npy(np.zeros((2, 3, 4))), "an array .2, 3, 4.; expected .H, W."),
        (npy(np.zeros((0, 4))), "an array .0, 4."),
        (npy(np.zeros((2, 2), bool)), "an array of bool"),
        (npz(a=METRES, b=METRES), "expected one array, or one called depth"),
    ],
)
def test_bad_depth_files_are_named_with_the_reason(content, reason, tmp_path):
    assert_refused(open_depth, content, tmp_path / "bad.png", reason)


@pytest.mark.parametrize(
    ("unit", "given"), [("floats are meters", METRES * 1000), ("integers", MILLIMETRES // 1000)]
)
def test_an_implausible_depth_asks_for_the_unit_once(unit, given, caplog, monkeypatch):
    monkeypatch.setattr("bindllm.media.limits._logged", set())
    open_depth(METRES)
    assert not caplog.messages
    open_depth(given)
    open_depth(given)
    [message] = caplog.messages
    assert unit in message
    assert "Which unit" in message


def test_arrays_above_the_limit_are_refused(monkeypatch):
    monkeypatch.setattr("bindllm.media.images.MAX_PIXELS", 5)
    for open_map in (open_depth, open_thermal):
        with pytest.raises(MediaError, match="3 x 2 pixels; at most 5"):
            open_map(METRES)


# --- thermal ---


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "BMP", "GIF"])
def test_eight_bits_are_their_value(kind):
    gray = np.array([[0, 51], [204, 255]], np.uint8)
    for source in (
        saved(gray, kind),
        gray,
        gray[:, :, None],
        np.stack([gray] * 3, -1),
        Image.fromarray(gray),
    ):
        np.testing.assert_allclose(open_thermal(source), [[0, 0.2], [0.8, 1]], atol=1e-6)


def test_colors_are_their_luminance():
    source = saved(Image.new("RGB", (2, 2), (255, 0, 0)), "PNG")
    np.testing.assert_allclose(open_thermal(source), np.full((2, 2), 0.299), atol=2e-3)


def test_sixteen_bits_and_temperatures_are_scaled_by_their_percentiles():
    ramp = np.arange(10_001).reshape(1, -1)
    expected = np.clip((ramp - 100) / 9800, 0, 1)
    sources = [
        saved((ramp + 5000).astype(np.uint16), "PNG"),
        (ramp + 5000).astype(np.uint16),
        ramp.astype(np.int32) - 7000,
        ramp / 100 - 20,
        npy((ramp / 100 + 273.15).astype(np.float32)),
        ramp * 1e300,
        saved((ramp / 100 - 20).astype(np.float32), "TIFF"),
    ]
    for source in sources:
        thermal = open_thermal(source)
        assert thermal.dtype == np.float32
        np.testing.assert_allclose(thermal, expected, atol=1e-5)


def test_one_hot_pixel_does_not_darken_the_rest():
    values = np.tile(np.arange(100, dtype=np.uint16), (100, 1))
    values[0, 0] = 65535
    assert open_thermal(values)[50, 50] == pytest.approx(0.5, abs=0.02)


def test_floats_within_zero_and_one_stay():
    values = np.array([[0.25, 0.5], [0.75, np.nan]])
    np.testing.assert_array_equal(open_thermal(values), [[0.25, 0.5], [0.75, 0]])


def test_even_and_empty_images():
    np.testing.assert_array_equal(open_thermal(np.full((2, 2), 300.0)), np.zeros((2, 2)))
    np.testing.assert_array_equal(open_thermal(np.array([[300.0, np.inf], [300, 400]]))[0, 1], 0)
    with pytest.raises(MediaError, match="no value of this thermal image is finite"):
        open_thermal(np.full((2, 2), np.nan))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "No such file"),
        (b"", "the file is empty"),
        (b"words", "not an image"),
        (png((2, 1), 16, 4, bytes(9)), "16 bits in color or with transparency; save it as 16-bit gray"),
        (png((2, 1), 16, 2, bytes(13)), "16 bits in color or with transparency; save it as 16-bit gray"),
        (png((2, 1), 16, 0, bytes(5), b"\0\1"), "16 bits in color or with transparency"),
        (b"\x76\x2f\x31\x01\2\0\0\0", "OpenEXR"),
        (npy(np.zeros((2, 3, 4, 5))), "an array .2, 3, 4, 5."),
        (npy(np.array([["a"]])), "expected integers or floats"),
    ],
)
def test_bad_thermal_files_are_named_with_the_reason(content, reason, tmp_path):
    assert_refused(open_thermal, content, tmp_path / "bad.png", reason)
