"""Tools that need no model: crop an image, measure audio, point clouds and depth maps, calculate with two numbers."""

from __future__ import annotations

import math
import operator
from typing import Annotated, Any, Literal

import numpy as np

from bindllm.errors import InputError
from bindllm.media import Media, open_image
from bindllm.media.audio import cut_audio
from bindllm.media.maps import open_depth
from bindllm.media.points import open_points
from bindllm.reasoning.tools import Tool, tool

_RATE, _FRAME = 16_000, 1024
_MOST_SECONDS = 60
_LOWEST, _HIGHEST = 50, 1000
# A frame has a pitch if a shift by one period changes little of it.
_PERIODIC = 0.8
_OPERATIONS = {
    **{"add": operator.add, "subtract": operator.sub, "multiply": operator.mul, "divide": operator.truediv},
    **{"larger": operator.gt, "equal": operator.eq},
}


@tool
def crop(
    image: Annotated[Media, "image"], left: float, top: float, right: float, bottom: float
) -> Annotated[Media, "image"]:
    """Cut a part out of an image.

    Args:
        image: the image
        left: left edge, in percent of the width, 0 to 100
        top: top edge, in percent of the height, 0 to 100
        right: right edge, in percent of the width
        bottom: bottom edge, in percent of the height
    """
    if not (0 <= left < right <= 100 and 0 <= top < bottom <= 100):
        raise InputError("expected 0 <= left < right <= 100 and 0 <= top < bottom <= 100")
    opened = open_image(image.source, size=None)
    width, height = opened.width / 100, opened.height / 100
    edges = (
        math.floor(left * width), math.floor(top * height),
        math.ceil(right * width), math.ceil(bottom * height),
    )  # fmt: skip
    return Media.image(opened.crop(edges))


@tool
def measure_audio(audio: Annotated[Media, "audio"]) -> dict[str, Any]:
    """Measure the duration of audio in seconds, its loudness in dB (0 is full scale), and its pitch in Hz.

    Args:
        audio: the audio; loudness and pitch are those of its first minute
    """
    lengths: list[int] = []

    def first_minute(length: int) -> list[tuple[int, int]]:
        lengths.append(length)
        return [(0, _MOST_SECONDS * _RATE)]

    (samples,) = cut_audio(audio.source, rate=_RATE, cut=first_minute)
    mono = samples.mean(0)
    power = float(np.square(mono, dtype=np.float64).mean())
    return {
        "seconds": round(lengths[0] / _RATE, 3),
        # Silence has no level in dB, and null says so.
        "loudness_db": round(10 * math.log10(power), 1) if power > 0 else None,
        "pitch_hz": _pitch(mono),
    }


def _pitch(samples: np.ndarray) -> float | None:
    """Return the median fundamental frequency of the frames that have one, by autocorrelation; None: no frame has."""
    count = len(samples) // _FRAME
    frames = samples[: count * _FRAME].reshape(count, _FRAME).astype(np.float64)
    frames = frames - frames.mean(1, keepdims=True) if count else frames
    spectra = np.abs(np.fft.rfft(frames, 2 * _FRAME)) ** 2
    shifts = np.fft.irfft(spectra)[:, : _RATE // _LOWEST + 2]
    found = []
    for row in shifts:
        if row[0] <= 0:
            continue
        # A shifted frame overlaps itself less, so its product is scaled up.
        row = row / row[0] * _FRAME / (_FRAME - np.arange(len(row)))
        peaks = [
            n
            for n in range(_RATE // _HIGHEST, len(row) - 1)
            if row[n] > _PERIODIC and row[n - 1] < row[n] >= row[n + 1]
        ]
        if peaks:
            # Multiples of the period are peaks too: the first one that is about as high is the period.
            highest = max(row[n] for n in peaks)
            n = next(n for n in peaks if row[n] > 0.9 * highest)
            before, here, after = row[n - 1 : n + 2]
            # The vertex of the parabola through the three values.
            found.append(_RATE / (n + 0.5 * (before - after) / (before - 2 * here + after)))
    return round(float(np.median(found)), 1) if found else None


@tool
def measure_points(points: Annotated[Media, "point"]) -> dict[str, Any]:
    """Measure a point cloud: its extent along x, y and z, and the volume of its bounding box, in its own unit.

    Args:
        points: the point cloud
    """
    cloud = open_points(points.source).astype(np.float64)
    extent = np.ptp(cloud, axis=0)
    sizes = dict(zip("xyz", (float(f"{value:.6g}") for value in extent), strict=True))
    return {"points": len(cloud), "extent": sizes, "box_volume": float(f"{extent.prod():.6g}")}


@tool
def depth_at(depth: Annotated[Media, "depth"], x: float, y: float) -> float:
    """Return the distance in meters at a point of a depth map.

    Args:
        depth: the depth map
        x: position from the left, in percent of the width, 0 to 100
        y: position from the top, in percent of the height, 0 to 100
    """
    if not (0 <= x <= 100 and 0 <= y <= 100):
        raise InputError(f"x is {x:g} and y is {y:g}, expected 0 to 100")
    meters = open_depth(depth.source)
    height, width = meters.shape
    value = float(meters[min(int(y / 100 * height), height - 1), min(int(x / 100 * width), width - 1)])
    if not value:
        raise InputError("nothing was measured at this point; take another one")
    return round(value, 3)


@tool
def calculate(
    operation: Literal["add", "subtract", "multiply", "divide", "larger", "equal"], a: float, b: float
) -> float | bool:
    """Calculate with two numbers, or compare them.

    Args:
        operation: subtract is a - b, divide is a / b, larger is whether a > b
        a: the first number
        b: the second number
    """
    if operation == "divide" and b == 0:
        raise InputError("b is 0")
    value = _OPERATIONS[operation](a, b)
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value


MEDIA_TOOLS: tuple[Tool, ...] = (crop, measure_audio, measure_points, depth_at, calculate)
"""All tools of this module."""
