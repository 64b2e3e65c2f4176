"""Opening the signals of inertial measurement units: acceleration and rotation over time."""

from __future__ import annotations

import math
import re
import unicodedata
from typing import BinaryIO

import numpy as np
from PIL import Image

from bindllm.errors import MediaError, reading
from bindllm.media.arrays import cells_of, check_numbers, holds_array, is_number, read_array, read_rows
from bindllm.media.limits import at_most
from bindllm.media.source import Source, name_of, open_stream, read_head

MAX_READINGS = 4_000_000
"""Longest signal that is read: over five hours at 200 readings a second."""

AXES = ("acceleration x", "acceleration y", "acceleration z", "rotation x", "rotation y", "rotation z")
"""The six rows of a signal, in order."""

_HEAD = 4096
# Names of columns in common recorders, without separators and units. Longer names come first: "gyro_x" is not "g_y".
# The names with "rss" are those of EuRoC: w_RS_S_x.
_ACCELERATION = r"linearacceleration|accelerometer|acceleration|accel|accl|acc|arss|a"
_ROTATION = r"angularvelocity|rotationrate|gyroscope|rotation|angvel|omega|gyro|gyr|rot|wrss|g|w"
_AXIS = re.compile(rf"(?:({_ACCELERATION})|({_ROTATION}))([xyz])(.*)")
_TIME = re.compile(r"(?:t|time|timestamp|canonicaltimestamp|elapsed|seconds)(?:s|sec|seconds|ms|us|ns)?")
# Of the tables of Ego4D (https://ego4d-data.org/docs/data/imu): positions within one part of the recording.
_IGNORED = ("componentidx", "componenttimestampms")
# Without brackets inside: a long row of opening ones would be searched again from each of them.
_UNIT = re.compile(r"[\[(]([^\[\]()]*)[\])]")
# Factors to m/s^2 and rad/s by unit, as it is spelled without separators.
_ACCELERATION_UNITS = {
    **dict.fromkeys(("", "m/s2", "ms2", "m/s/s", "mps2", "m/sec2"), 1.0),
    **dict.fromkeys(("g", "gs"), 9.80665),
    **{"mg": 9.80665e-3, "cm/s2": 1e-2, "mm/s2": 1e-3},
}
_DEGREE = math.pi / 180
_ROTATION_UNITS = {
    **dict.fromkeys(("", "rad/s", "rads", "rads1", "radps", "rad/sec", "radians/s"), 1.0),
    **dict.fromkeys(("deg/s", "degs", "degs1", "degps", "dps", "deg/sec", "degrees/s", "\u00b0/s"), _DEGREE),
    **{"mrad/s": 1e-3, "mdps": 1e-3 * _DEGREE, "rpm": 6 * _DEGREE},
}


def open_imu(source: Source, *, steps: int) -> np.ndarray:
    """Open a signal and stretch or squeeze it to a number of steps.

    Files are tables of text or NPY files. Commas, semicolons, tabs or spaces separate the cells of a table. Its header,
    if it has one (also as a comment), names the columns in any order, as in ``time, acc_x, acc_y, acc_z, gyro_x,
    gyro_y, gyro_z``. Without one, six columns are acceleration x y z and rotation x y z, and seven begin with the time.
    With times, which must rise, the steps are even in time; otherwise the readings are taken as even. Steps lie between
    the first and the last reading, both included, and are interpolated linearly, without smoothing. A single reading is
    repeated.

    Values become meters per second squared and radians per second, on which ImageBind was trained, if the header names
    another unit: ``acc_x (g)``, ``gyro_x [deg/s]``, ``gyro_x_dps``. Values without a unit are taken to be in these.

    Args:
        source: path or bytes of a file, or an array [N, 6] or [6, N] (6 x 6 is refused: it could be either).
        steps: length of the result, at least 1.

    Returns:
        [6, steps], float32: acceleration x y z, then rotation x y z.

    Raises:
        MediaError: missing, empty, an unknown column or unit, an uneven row, a word, NaN or infinity (the line is
            named), or more than `MAX_READINGS`.
    """
    with reading(name_of(source)):
        times: np.ndarray | None = None
        if isinstance(source, Image.Image):
            raise MediaError("an image; expected a table or an array of six signals")
        if isinstance(source, np.ndarray):
            signal = _from_array(source)
        else:
            with open_stream(source) as stream:
                head = read_head(stream, _HEAD, "a table or an array of six signals")
                if holds_array(head):
                    signal = _from_array(read_array(stream, keys=("imu", "signal")))
                else:
                    signal, times = _from_table(stream)
        # Values beyond float32 become infinite, and are refused below.
        with np.errstate(over="ignore"):
            resampled = _resample(signal, times, steps).astype(np.float32)
        if not np.isfinite(resampled).all():
            raise MediaError("values beyond the range of 32-bit floats; check the units")
        return resampled


def _from_array(array: np.ndarray) -> np.ndarray:
    """Return [6, N], float64."""
    check_numbers(array)
    if array.ndim != 2 or 6 not in array.shape or 0 in array.shape:
        raise MediaError(f"an array {list(array.shape)}; expected [N, 6] or [6, N] with N at least 1")
    if array.shape == (6, 6):
        raise MediaError("an array [6, 6] could be read along either axis; give more readings")
    if max(array.shape) > (most := at_most("points", MAX_READINGS)):
        raise MediaError(f"{max(array.shape):,} readings; at most {most:,} are read. Cut it first")
    signal = (array if array.shape[0] == 6 else array.T).astype(np.float64)
    _check_finite(signal.T)
    return signal


def _check_finite(readings: np.ndarray) -> None:
    """Raise for the first reading, counted from 1, of an array [N, ...] that is NaN or infinite."""
    is_finite = np.isfinite(readings).all(axis=1)
    if not is_finite.all():
        raise MediaError(f"reading {is_finite.argmin() + 1} is NaN or infinite; fill the gap or cut it out")


def _from_table(stream: BinaryIO) -> tuple[np.ndarray, np.ndarray | None]:
    """Return [6, N] and the times [N], if there are any."""
    cells, number = _first_cells(stream)
    if all(map(is_number, cells)):
        if len(cells) not in (6, 7):
            raise MediaError(
                f"line {number} has {len(cells)} columns and no header; expected 6 "
                f"({', '.join(AXES)}), or 7 with the time first"
            )
        # The signals are the last six columns; a seventh before them is the time.
        order, time = list(range(len(cells) - 6, len(cells))), 0 if len(cells) == 7 else None
        factors = [1.0] * 6
        # The first line is already a row.
        stream.seek(0)
        number = 1
    else:
        order, factors, time = _read_header(cells)
        number += 1
    blocks, count = [], 0
    for block in read_rows(stream, first=number, columns=len(cells)):
        count += len(block)
        # While reading, so that an endless file does not fill the memory.
        if count > (most := at_most("points", MAX_READINGS)):
            raise MediaError(f"more than {most:,} readings; cut it first")
        blocks.append(block)
    if not blocks:
        raise MediaError("a header and no readings; expected at least one row of numbers")
    table = np.concatenate(blocks)
    _check_finite(table)
    times = None if time is None else table[:, time]
    if times is not None and (backwards := np.flatnonzero(np.diff(times) <= 0)).size:
        at = int(backwards[0]) + 1
        raise MediaError(
            f"the time of reading {at + 1} is {times[at]:g}, after {times[at - 1]:g}; times must rise"
        )
    return table[:, order].T * np.array(factors)[:, None], times


def _first_cells(stream: BinaryIO) -> tuple[list[str], int]:
    """Return the cells of the header or the first row, and the number of its line; the stream is left after it."""
    for number, line in enumerate(iter(lambda: stream.readline(_HEAD), b""), start=1):
        # A header may be a comment, as in EuRoC; other comments do not name axes.
        words = _words(line.lstrip(b"# \t"))
        if cells_of(line) or sum(bool(_AXIS.fullmatch(_plain(word))) for word in words) > 2:
            return words, number
    raise MediaError("no readings; expected a table or an array of six signals")


def _words(line: bytes) -> list[str]:
    cells = cells_of(line)
    # Names may contain spaces if tabs separate them.
    if b"\t" in line and not (b"," in line or b";" in line or all(map(is_number, cells))):
        cells = line.split(b"\t")
    return [cell.decode("utf-8-sig", "replace").strip("\"' \r\n") for cell in cells]


def _plain(word: str) -> str:
    """Return the name of a column without separators and unit: "Acc X [m/s^2]" is "accx"."""
    return re.sub(r"[^a-z0-9]", "", _UNIT.sub("", word.lower()))


def _read_header(words: list[str]) -> tuple[list[int], list[float], int | None]:
    """Return the columns of the six signals, in the order of `AXES`, the factors of their units, and the time."""
    # How to read this: each word is a signal with its unit, the time, or odd; odd and missing ones are named together.
    columns: dict[int, int] = {}
    factors: dict[int, float] = {}
    has_unit: dict[int, bool] = {}
    time: int | None = None
    odd = []
    for column, word in enumerate(words):
        # NFKC makes digits of superscripts, as in m/s\u00b2.
        word = unicodedata.normalize("NFKC", word)
        plain, bracketed = _plain(word), _UNIT.search(word.lower())
        if found := _AXIS.fullmatch(plain):
            # Acceleration takes the rows 0 to 2, rotation 3 to 5.
            axis = "xyz".index(found[3]) + (3 if found[2] else 0)
            unit = found[4] + re.sub(r"[^a-z0-9/\u00b0]", "", bracketed[1] if bracketed else "")
            factor = (_ROTATION_UNITS if found[2] else _ACCELERATION_UNITS).get(unit)
            if axis in columns or factor is None:
                odd.append(word)
            columns[axis], factors[axis], has_unit[axis] = column, factor or 1.0, unit != ""
        elif plain in _IGNORED:
            continue
        elif _TIME.fullmatch(plain) and time is None:
            time = column
        else:
            odd.append(word)
    missing = [axis for row, axis in enumerate(AXES) if row not in columns]
    # A unit of only one axis leaves the others open.
    odd += [
        words[columns[row]]
        for row in columns
        if not has_unit[row] and has_unit.get((row + 1) % 3 + row // 3 * 3)
    ]
    if odd or missing:
        shown = ", ".join(repr(word[:40]) for word in words[:30])
        names = ", ".join(repr(word[:40]) for word in odd[:10])
        problem = f"unknown, repeated or without a unit: {names}" if odd else ""
        lacking = f"missing: {', '.join(missing)}" if missing else ""
        raise MediaError(
            f"the columns are {shown} ({'; '.join(filter(None, (problem, lacking)))}). Expected acc_x, acc_y, "
            "acc_z, gyro_x, gyro_y, gyro_z and, if there is one, time; units in brackets such as (g), [m/s2], [deg/s]. "
            "Rename or remove the others"
        )
    return [columns[axis] for axis in range(6)], [factors[axis] for axis in range(6)], time


def _resample(signal: np.ndarray, times: np.ndarray | None, steps: int) -> np.ndarray:
    count = signal.shape[1]
    if times is None and count == steps:
        return signal
    # From 0, since times in nanoseconds since 1970 are too large for exact fractions of a step.
    at = np.arange(count, dtype=np.float64) if times is None else times - times[0]
    wanted = np.linspace(0.0, at[-1], steps)
    return np.stack([np.interp(wanted, at, row) for row in signal])
