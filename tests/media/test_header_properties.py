"""Every combination of the facts in a header (sizes, units, scales, orders, orientations) gives the same media."""

from __future__ import annotations

import io
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from bindllm.errors import MediaError
from bindllm.media import open_image
from bindllm.media.audio import cut_audio
from bindllm.media.maps import open_depth, open_thermal
from bindllm.media.motion import open_imu
from bindllm.media.points import open_points
from bindllm.media.video import read_frames
from recordings import numbered, video_file, wav

FEW, MANY = (settings(max_examples=count) for count in (12, 60))
RANDOM = np.random.default_rng(0)
# EXIF orientations, as what was done to the upright image before it was stored.
STORED = {
    1: lambda a: a,
    2: np.fliplr,
    3: lambda a: np.rot90(a, 2),
    4: np.flipud,
    5: lambda a: a.T,
    6: lambda a: np.rot90(a, 1),
    7: lambda a: np.rot90(a, 2).T,
    8: lambda a: np.rot90(a, -1),
}


def saved(values: np.ndarray, kind: str, orientation: int, **options) -> bytes:
    exif, stream = Image.Exif(), io.BytesIO()
    exif[0x0112] = orientation
    stored = np.ascontiguousarray(STORED[orientation](values))
    Image.fromarray(stored).save(stream, kind, exif=exif, **options)
    return stream.getvalue()


@MANY
@given(
    orientation=st.sampled_from(sorted(STORED)),
    kind=st.sampled_from(["PNG", "TIFF"]),
    wide=st.booleans(),
    inverted=st.booleans(),
)
def test_gray_is_upright_and_zero_is_black(orientation, kind, wide, inverted):
    upright = RANDOM.integers(1, 256, (5, 7)).astype(np.uint8)
    values = upright.astype(np.uint16) * 257 if wide else upright
    inverted = inverted and kind == "TIFF"
    # Pillow inverts 8-bit values while it writes them, 16-bit ones not.
    given_values = np.uint16(65535) - values if wide and inverted else values
    data = saved(
        given_values, kind, orientation, **({"tiffinfo": {262: 0, 274: orientation}} if inverted else {})
    )
    np.testing.assert_array_equal(np.asarray(open_image(data))[..., 0], upright)
    low, high = np.percentile(values, (1, 99)) if wide else (0, 255)
    brightness = (values.astype(np.float64).clip(low, high) - low) / (high - low)
    for source in (data, Image.open(io.BytesIO(data))):
        np.testing.assert_allclose(open_thermal(source), brightness, atol=1e-5)
    if wide and not inverted:
        np.testing.assert_array_equal(open_depth(data), values / np.float32(1000))
    else:
        with pytest.raises(MediaError, match="8 bits|0 is white"):
            open_depth(data)


@MANY
@given(
    rate=st.sampled_from([8_000, 16_000, 44_100, 96_000]),
    channels=st.integers(1, 3),
    dtype=st.sampled_from(["<u1", "<i2", "<i4", "<f4", "<f8"]),
    samples=st.integers(1, 3_000),
    unknown=st.sampled_from([None, (0, 0), (0xFFFFFFFF, 0xFFFFFFFF), (0x7FFFFFFF, 0x7FFFFF00)]),
    cut=st.booleans(),
)
def test_wav_is_its_samples(rate, channels, dtype, samples, unknown, cut):
    values = RANDOM.uniform(-0.9, 0.9, (channels, samples))
    kind, scale = np.dtype(dtype), {"u": 128, "i": 2 ** (8 * np.dtype(dtype).itemsize - 1), "f": 1}
    stored = values * scale[kind.kind] + (128 if kind.kind == "u" else 0)
    stored = (stored if kind.kind == "f" else np.rint(stored)).astype(kind)
    data = bytearray(wav(stored, rate, codec=3 if kind.kind == "f" else 1))
    if unknown:
        data[4:8], data[40:44] = (value.to_bytes(4, "little") for value in unknown)
    elif cut and samples > 1:
        # With a known length, a missing last sample is damage.
        del data[-kind.itemsize * channels :]
        with pytest.raises(MediaError, match="damaged or truncated"):
            cut_audio(bytes(data), rate=rate, cut=lambda length: [(0, length)])
        return
    [part] = cut_audio(bytes(data), rate=rate, cut=lambda length: [(0, length)])
    assert part.shape == values.shape
    np.testing.assert_allclose(part, values, atol=0.6 / 128 if dtype == "<u1" else 1e-4)


@FEW
@given(
    aspect=st.fractions(Fraction(1, 4), Fraction(4), max_denominator=16),
    rotation=st.sampled_from([0, 90, 180, -90]),
    container=st.sampled_from(
        [("mp4", "libx264"), ("matroska", "libx264"), ("avi", "mpeg4"), ("mov", "mpeg4")]
    ),
)
def test_frames_have_square_pixels_and_are_upright(aspect, rotation, container):
    # AVI has no field for a rotation.
    rotation = 0 if container[0] == "avi" else rotation
    data = video_file(*container, [numbered(5)] * 2, aspect=aspect, rotation=rotation)
    [(_, frame)] = read_frames(data, pick=lambda *_: [1])
    width, height = (round(96 * aspect), 64) if aspect >= 1 else (96, round(64 / aspect))
    assert frame.shape[:2] == ((width, height) if rotation in (90, -90) else (height, width))


UNITS = {
    "a": {" [m/s^2]": 1, "_ms2": 1, " (g)": 9.80665, "[mg]": 9.80665e-3, " (mm/s\u00b2)": 1e-3},
    "g": {" [rad/s]": 1, " (deg/s)": np.pi / 180, "_dps": np.pi / 180, "[\u00b0/s]": np.pi / 180},
}
NAMES = {"a": ["a", "acc_", "Acc ", "accl_", "Accelerometer."], "g": ["g", "gyro_", "Gyr ", "rotationRate"]}


@MANY
@given(
    data=st.data(),
    mark=st.sampled_from([",", ";", "\t"]),
    prefix=st.sampled_from(["", "#", "# "]),
    has_time=st.booleans(),
    has_units=st.tuples(st.booleans(), st.booleans()),
)
def test_signals_in_any_order_and_unit(data, mark, prefix, has_time, has_units):
    columns = data.draw(st.permutations(range(6 + has_time)))
    signal = RANDOM.normal(size=(6, 4))
    cells, rows = [], []
    for column in columns:
        if column == 6:
            cells.append("time (ms)")
            rows.append(np.arange(4) * 5.0)
            continue
        kind = "ag"[column // 3]
        # All axes of a sensor name their unit, or none does.
        units = UNITS[kind] if has_units[column // 3] else {"": 1}
        unit = data.draw(st.sampled_from(sorted(units)))
        cells.append(data.draw(st.sampled_from(NAMES[kind])) + "xyz"[column % 3] + unit)
        rows.append(signal[column] / units[unit])
    lines = [
        prefix + mark.join(cells),
        *(mark.join(repr(float(cell)) for cell in row) for row in np.transpose(rows)),
    ]
    np.testing.assert_allclose(open_imu("\n".join(lines).encode(), steps=4), signal, rtol=1e-5)


@MANY
@given(
    columns=st.permutations(["x", "y", "z", "r", "intensity"]),
    mark=st.sampled_from([",", " ", ";"]),
    prefix=st.sampled_from(["", "//", "# "]),
    unit=st.sampled_from(["", " [m]"]),
    is_large=st.booleans(),
)
def test_points_by_the_names_of_their_columns(columns, mark, prefix, unit, is_large):
    points = RANDOM.normal(size=(20, 3)).astype(np.float32)
    values = {"x": points[:, 0], "y": points[:, 1], "z": points[:, 2], "r": np.full(20, 200.0)}
    table = np.stack([values.get(name, np.arange(20.0)) for name in columns], axis=1)
    header = prefix + mark.join(name.upper() * is_large or name + unit for name in columns)
    lines = [header, *(mark.join(repr(float(cell)) for cell in row) for row in table)]
    np.testing.assert_allclose(open_points("\n".join(lines).encode()), points, rtol=1e-6)


@MANY
@given(
    dtype=st.sampled_from(["<u2", ">u2", "<i4", ">i8", "<f4", ">f4", "<f8", "<f2"]),
    is_fortran=st.booleans(),
    version=st.sampled_from([(1, 0), (2, 0)]),
    packed=st.booleans(),
)
def test_arrays_of_any_layout(dtype, is_fortran, version, packed):
    meters = RANDOM.integers(1, 9, (4, 6))
    stored = (meters * (1000 if np.dtype(dtype).kind in "iu" else 1)).astype(dtype)
    stored, stream = np.asarray(stored, order="F" if is_fortran else "C"), io.BytesIO()
    if packed:
        np.savez_compressed(stream, depth=stored, other=stored[:1])
    else:
        np.lib.format.write_array(stream, stored, version=version)
    np.testing.assert_array_equal(open_depth(stream.getvalue()), meters.astype(np.float32))
