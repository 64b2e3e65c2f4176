"""Signals of motion sensors: tables with and without header and time, arrays, and resampling."""

from __future__ import annotations

import io
import re

import numpy as np
import pytest
from PIL import Image

import bindllm.media.motion as motion_module
from bindllm.errors import MediaError
from bindllm.media.motion import open_imu
from recordings import assert_refused

SIGNAL = np.random.default_rng(0).normal(size=(9, 6)).astype(np.float32)
HEADER = "acc_x,acc_y,acc_z,gyro_x,gyro_y,gyro_z"


def table(header: str | None, *columns: np.ndarray, mark: str = ",") -> bytes:
    rows = [] if header is None else [header]
    rows += [mark.join(repr(float(value)) for value in row) for row in np.column_stack(columns)]
    return "\n".join(rows).encode()


def npy(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


TIMES = np.arange(9) * 0.5


@pytest.mark.parametrize(
    "source",
    [
        SIGNAL,
        SIGNAL.T,
        npy(SIGNAL),
        npy(SIGNAL.T.astype(np.float64)),
        table(None, SIGNAL),
        table(None, TIMES, SIGNAL),
        table(None, SIGNAL, mark="  "),
        table(HEADER, SIGNAL),
        b"\xef\xbb\xbf# a remark\n\n" + table(HEADER, SIGNAL).replace(b"\n", b"\r\n"),
        table(HEADER.replace(",", "\t"), SIGNAL, mark="\t"),
        table(
            "Time (s)\tAcc X [m/s2]\tAcc Y [m/s2]\tAcc Z [m/s2]\tGyro X\tGyro Y\tGyro Z",
            TIMES,
            SIGNAL,
            mark="\t",
        ),
        table("time;ax;ay;az;gx;gy;gz", TIMES, SIGNAL, mark=";"),
        table('"Accelerometer.X","Accelerometer.Y","Accelerometer.Z",wx,wy,wz', SIGNAL),
        table(
            "canonical_timestamp_ms,gyro_x,gyro_y,gyro_z,accl_x,accl_y,accl_z",
            TIMES + 1.7e12,
            SIGNAL[:, 3:],
            SIGNAL[:, :3],
        ),
    ],
)
def test_every_form_gives_the_same_signal(source):
    signal = open_imu(source, steps=9)
    assert signal.dtype == np.float32
    np.testing.assert_allclose(signal, SIGNAL.T, atol=1e-6)


G, DEGREE = 9.80665, np.pi / 180


@pytest.mark.parametrize(
    ("header", "factors"),
    [
        (
            "acc_x (g),acc_y (g),acc_z (g),gyro_x [deg/s],gyro_y [deg/s],gyro_z [deg/s]",
            [G] * 3 + [DEGREE] * 3,
        ),
        ("ax[mg],ay[g],az[m/s^2],gx[dps],gy[\u00b0/s],gz[rad/s]", [G / 1000, G, 1, DEGREE, DEGREE, 1]),
        ("acc_x_g,acc_y_g,acc_z_g,gyro_x_dps,gyro_y_dps,gyro_z_dps", [G] * 3 + [DEGREE] * 3),
        (
            "Acc X [m/s\u00b2],Acc Y [m\u00b7s\u207b\u00b2],Acc Z (mm/s^2),wx (mrad/s),wy (rpm),wz (rad s-1)",
            [1, 1, 1e-3, 1e-3, np.pi / 30, 1],
        ),
    ],
)
def test_units_of_the_header_are_converted(header, factors):
    signal = open_imu(table(header, SIGNAL), steps=9)
    np.testing.assert_allclose(signal, SIGNAL.T * np.array(factors)[:, None], rtol=1e-5)


@pytest.mark.parametrize("odd", ["acc_x [raw]", "acc_x [deg/s]", "acc_x (lsb)", "acc_x_g (g)", "acc_x_raw"])
def test_an_unknown_unit_is_refused(odd):
    with pytest.raises(
        MediaError, match=f"unknown, repeated or without a unit: '{re.escape(odd)}'.*units in brackets"
    ):
        open_imu(table(HEADER.replace("acc_x", odd), SIGNAL), steps=9)


def test_a_unit_of_one_axis_leaves_the_others_open():
    with pytest.raises(MediaError, match="without a unit: 'acc_z'"):
        open_imu(table("acc_x (g),acc_y (g),acc_z,gx,gy,gz", SIGNAL), steps=9)


def test_a_header_may_be_a_comment():
    """As in EuRoC, whose rotation comes first. Other comments are ignored."""
    names = [f"w_RS_S_{axis} [rad s^-1]" for axis in "xyz"] + [f"a_RS_S_{axis} [m s^-2]" for axis in "xyz"]
    data = table(f"#timestamp [ns],{','.join(names)}", TIMES, SIGNAL[:, 3:], SIGNAL[:, :3])
    np.testing.assert_allclose(open_imu(data, steps=9), SIGNAL.T, rtol=1e-5)
    spaced = table("# walk of a dog\n# gx gy gz ax ay az", SIGNAL[:, 3:], SIGNAL[:, :3], mark=" ")
    np.testing.assert_allclose(open_imu(spaced, steps=9), SIGNAL.T, rtol=1e-5)


def test_tables_of_ego4d():
    header = "component_idx,component_timestamp_ms,canonical_timestamp_ms"
    header += ",gyro_x,gyro_y,gyro_z,accl_x,accl_y,accl_z"
    parts, local = np.array([0] * 5 + [1] * 4), np.array([0, 5, 10, 15, 20, 0, 5, 10, 15])
    data = table(header, parts, local, np.arange(9) * 5.0, SIGNAL[:, 3:], SIGNAL[:, :3])
    np.testing.assert_allclose(open_imu(data, steps=9), SIGNAL.T, rtol=1e-5)


def test_a_path_as_well_as_bytes(tmp_path):
    path = tmp_path / "walk.csv"
    path.write_bytes(table(HEADER, SIGNAL))
    np.testing.assert_array_equal(open_imu(str(path), steps=5), open_imu(path.read_bytes(), steps=5))


def test_steps_are_even_and_keep_both_ends():
    ramp = np.arange(6) + np.arange(5)[:, None] * 10.0
    np.testing.assert_allclose(open_imu(ramp, steps=9)[0], np.arange(9) * 5)
    np.testing.assert_allclose(open_imu(ramp, steps=3)[5], [5, 25, 45])
    np.testing.assert_allclose(open_imu(ramp, steps=1)[0], [0])


def test_uneven_times_are_made_even():
    times = np.array([100.0, 101, 102, 106])
    values = np.tile(times[:, None], (1, 6))
    np.testing.assert_allclose(open_imu(table(None, times, values), steps=7)[3], np.arange(100, 107))


def test_times_in_nanoseconds_since_1970():
    rows = [f"{1_700_000_000_000_000_000 + 5_000_000 * n}," + ",".join([str(n)] * 6) for n in range(5)]
    np.testing.assert_allclose(open_imu("\n".join(rows).encode(), steps=9)[0], np.arange(9) / 2, atol=1e-3)


def test_one_reading_is_held():
    np.testing.assert_array_equal(open_imu(b"1 2 3 4 5 6", steps=3), np.tile(np.arange(1.0, 7)[:, None], 3))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "No such file"),
        (b"", "the file is empty"),
        (b"\n\n", "no readings"),
        (HEADER.encode(), "a header and no readings"),
        (b"1 2 3\n", "line 1 has 3 columns and no header; expected 6 .acceleration x"),
        (
            table(HEADER + ",temperature", SIGNAL, TIMES),
            "unknown, repeated or without a unit: 'temperature'.*remove the others",
        ),
        (
            table("acc_x,acc_y,acc_z,mag_x,mag_y,mag_z", SIGNAL),
            "the columns are 'acc_x'.*missing: rotation x",
        ),
        (
            table("acc_x,acc_x,acc_z,gx,gy,gz", SIGNAL),
            "unknown, repeated or without a unit: 'acc_x'; missing: acceleration y",
        ),
        (table(f"t,time,{HEADER}", TIMES, TIMES, SIGNAL), "unknown, repeated or without a unit: 'time'"),
        (b"\0\1\2\3", "the columns are"),
        (table(HEADER, SIGNAL) + b"\n1,2,3\n", "line 11 has 3 cells; expected 6"),
        (table(HEADER, SIGNAL) + b"\n1,2,3,4,high,6\n", "line 11, column 5 holds 'high'"),
        (table(HEADER, SIGNAL) + b"\n1,2,3,4,,6\n", "line 11, column 5 holds ''"),
        (table(HEADER, SIGNAL) + b"\n1,2,3,4,nan,6\n", "reading 10 is NaN or infinite; fill the gap"),
        (table(None, TIMES[::-1], SIGNAL), "the time of reading 2 is 3.5, after 4; times must rise"),
        (table(None, TIMES * 0, SIGNAL), "times must rise"),
        (b"1e300 0 0 0 0 0\n", "beyond the range of 32-bit floats"),
        (npy(np.zeros((5, 7))), "an array .5, 7.; expected .N, 6."),
        (npy(np.zeros((6, 6))), "could be read along either axis"),
        (npy(np.zeros((0, 6))), "an array .0, 6."),
        (npy(np.where(np.arange(60).reshape(10, 6) == 21, np.inf, 0)), "reading 4 is NaN or infinite"),
        (npy(np.zeros((5, 6), bool)), "an array of bool"),
    ],
)
def test_bad_files_are_named_with_the_reason(content, reason, tmp_path):
    assert_refused(lambda file: open_imu(file, steps=4), content, tmp_path / "bad.csv", reason)


def test_an_image_is_not_a_signal():
    with pytest.raises(MediaError, match="an image; expected a table"):
        open_imu(Image.new("L", (6, 9)), steps=4)


def test_signals_above_the_limit_are_refused(monkeypatch):
    monkeypatch.setattr(motion_module, "MAX_READINGS", 8)
    for source in (SIGNAL, table(HEADER, SIGNAL)):
        with pytest.raises(MediaError, match="cut it first|Cut it first"):
            open_imu(source, steps=4)
