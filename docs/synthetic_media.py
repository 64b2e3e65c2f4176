"""Synthetic media for the images of `docs/encoders.md`: a room in three modalities, a melody, a chair, a walk.

Random numbers come from seeded generators only, and no files are read.
"""

from __future__ import annotations

import wave
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

ARRIVES = 8.0
"""Seconds that the ball in the video needs from left to right."""

FRAME_RATE = 10
NOTES = (262, 330, 392, 523, 392, 330, 262, 196, 262)
"""Fundamental frequencies of the melody in hertz, one per second."""

_SOUND_RATE = 44_100
_EYE = np.array([0.0, 1.5, 0.0])
_LIGHT = np.array([-0.45, 0.8, -0.4])


class Ball(NamedTuple):
    """A ball of the room: center and radius in meters, color 0..1, temperature in degrees Celsius."""

    center: tuple[float, float, float]
    radius: float
    color: tuple[float, float, float]
    celsius: float


class View(NamedTuple):
    """The room as recorded by a camera, a depth sensor and a thermal camera.

    Attributes:
        image: uint8 [H, W, 3].
        meters: float32 [H, W], along the optical axis.
        celsius: float32 [H, W].
    """

    image: np.ndarray
    meters: np.ndarray
    celsius: np.ndarray


def look(width: int, height: int, *, seconds: float = 0.4 * ARRIVES) -> View:
    """Render the room at some time of the video by tracing one ray per pixel."""
    down, across = np.mgrid[0:height, 0:width]
    scale = 0.9 / height
    rays = np.stack(
        [(across - (width - 1) / 2) * scale, ((height - 1) / 2 - down) * scale - 0.18, np.ones(down.shape)],
        -1,
    )
    balls = _balls(seconds)
    nearest, hit = _trace(rays, balls)
    points = _EYE + rays * nearest[..., None]
    normals = np.zeros_like(points)
    normals[hit == -1] = (0, 1, 0)
    normals[hit == -2] = (0, 0, -1)
    tiles = ((np.floor(points[..., 0]) + np.floor(points[..., 2])) % 2)[..., None]
    colors = np.where(tiles > 0, (0.86, 0.82, 0.74), (0.62, 0.57, 0.5))
    colors[hit == -2] = (0.70, 0.78, 0.84)
    celsius = np.where(hit == -2, 17.5 + 0.6 * points[..., 1], 19.5)
    for number, ball in enumerate(balls):
        inside = hit == number
        normals[inside] = (points[inside] - ball.center) / ball.radius
        colors[inside] = ball.color
        # Surfaces appear cooler at grazing angles.
        facing = np.clip(-(normals[inside] * _unit(rays[inside])).sum(-1), 0, 1)
        celsius[inside] = 19.5 + (ball.celsius - 19.5) * (0.55 + 0.45 * facing)
    light = _unit(_LIGHT)
    bright = np.clip((normals * light).sum(-1), 0, 1) * ~_in_shadow(points, normals, balls, light)
    shaded = colors * (0.42 + 0.58 * bright[..., None])
    return View(
        (255 * shaded.clip(0, 1)).astype(np.uint8), nearest.astype(np.float32), celsius.astype(np.float32)
    )


def _balls(seconds: float) -> list[Ball]:
    """Return the balls; the yellow one rolls from left to right, the others do not move."""
    rolled = -2.6 + 5.2 * seconds / ARRIVES
    return [
        Ball((-1.15, 0.75, 4.6), 0.75, (0.83, 0.26, 0.22), 36.0),
        Ball((1.35, 0.55, 3.6), 0.55, (0.20, 0.42, 0.72), 8.0),
        Ball((rolled, 0.28, 2.6), 0.28, (0.96, 0.76, 0.20), 28.0),
    ]


def _unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


def _trace(rays: np.ndarray, balls: list[Ball]) -> tuple[np.ndarray, np.ndarray]:
    """Return the length of each ray and the object it hits: the index of a ball, -1 the floor, -2 the wall."""
    nearest, hit = np.full(rays.shape[:2], 7.0), np.full(rays.shape[:2], -2)
    with np.errstate(divide="ignore"):
        floor = np.where(rays[..., 1] < 0, -_EYE[1] / rays[..., 1], np.inf)
    hit[floor < nearest] = -1
    nearest = np.minimum(nearest, floor)
    for number, ball in enumerate(balls):
        distance = _distance(np.broadcast_to(_EYE, rays.shape), rays, ball)
        hit[distance < nearest] = number
        nearest = np.minimum(nearest, distance)
    return nearest, hit


def _distance(starts: np.ndarray, rays: np.ndarray, ball: Ball) -> np.ndarray:
    """Return the distance at which each ray enters a ball, in lengths of the ray; infinity if it misses."""
    offset = starts - np.array(ball.center)
    a, b = (rays * rays).sum(-1), (rays * offset).sum(-1)
    under = b * b - a * ((offset * offset).sum(-1) - ball.radius**2)
    distance = (-b - np.sqrt(np.maximum(under, 0))) / a
    return np.where((under > 0) & (distance > 1e-6), distance, np.inf)


def _in_shadow(points: np.ndarray, normals: np.ndarray, balls: list[Ball], light: np.ndarray) -> np.ndarray:
    rays = np.broadcast_to(light, points.shape)
    return np.any([np.isfinite(_distance(points + 1e-3 * normals, rays, ball)) for ball in balls], axis=0)


def write_photograph(file: Path) -> Path:
    """Write a JPEG like phones do: stored sideways, with the EXIF orientation that makes it upright."""
    large = look(1280, 800).image.astype(np.float32)
    smooth = large.reshape(400, 2, 640, 2, 3).mean((1, 3)).round().astype(np.uint8)
    image = Image.fromarray(smooth).transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(file, quality=92, exif=exif)
    return file


def write_depth(file: Path) -> Path:
    """Write a 16-bit PNG in millimeters, without values for the shiny blue ball and its shadow."""
    view, (_, blue, _) = look(640, 480), _balls(0.4 * ARRIVES)
    millimeters = (view.meters * 1000).round()
    is_blue = (view.celsius < 15) & (view.meters < 4)
    rows, columns = np.nonzero(is_blue)
    shadow = np.zeros_like(is_blue)
    shadow[rows, np.minimum(columns + 26, 639)] = True
    is_behind = view.meters > blue.center[2] + 0.3
    Image.fromarray(np.where(is_blue | (shadow & is_behind), 0, millimeters).astype(np.uint16)).save(file)
    return file


def write_heat(file: Path) -> Path:
    """Write temperatures in the format of a thermal camera: 16 bits, hundredths of a kelvin, one hot pixel."""
    kelvin = look(320, 256).celsius + 273.15
    noise = np.random.default_rng(0).normal(0, 0.05, kelvin.shape)
    counts = ((kelvin + noise) * 100).round()
    counts[20, 30] = 65_000
    Image.fromarray(counts.astype(np.uint16)).save(file)
    return file


def write_video(file: Path) -> Path:
    """Write the video of the rolling ball, `ARRIVES` seconds long."""
    import av

    with av.open(str(file), "w") as output:
        stream = output.add_stream("mpeg4", rate=FRAME_RATE)
        stream.width, stream.height, stream.pix_fmt, stream.bit_rate = 384, 216, "yuv420p", 4_000_000
        for number in range(round(ARRIVES * FRAME_RATE)):
            image = look(384, 216, seconds=number / FRAME_RATE).image
            output.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        output.mux(stream.encode(None))
    return file


def write_melody(file: Path) -> Path:
    """Write a WAV file of `NOTES`, stereo, each note with overtones; higher overtones fade faster."""
    at = np.arange(_SOUND_RATE) / _SOUND_RATE
    notes = []
    for hertz in NOTES:
        overtones = [
            np.sin(2 * np.pi * hertz * number * at) * np.exp(-(1.2 + 0.5 * number) * at) / number
            for number in range(1, 9)
        ]
        notes.append(np.sum(overtones, axis=0) * np.minimum(at / 0.01, 1) * np.minimum((1 - at) / 0.02, 1))
    melody = np.concatenate(notes) * 0.4 + np.random.default_rng(1).normal(0, 1e-3, len(notes) * _SOUND_RATE)
    both = (np.stack([melody, 0.8 * melody], axis=1).clip(-1, 1) * 32767).astype("<i2")
    with wave.open(str(file), "wb") as output:
        output.setparams((2, 2, _SOUND_RATE, len(both), "NONE", ""))
        output.writeframes(both.tobytes())
    return file


def write_chair(file: Path) -> Path:
    """Write a chair of boxes as a mesh, in centimeters and far from the origin, like CAD programs do."""
    import trimesh

    legs = [(-20, 21, -20), (20, 21, -20), (-20, 21, 20), (20, 21, 20)]
    parts = [((44, 4, 44), (0, 44, 0)), ((44, 8, 4), (0, 88, -20)), ((44, 8, 4), (0, 66, -20))]
    parts += [((4, 42, 4), leg) for leg in legs] + [((4, 50, 4), (side, 69, -20)) for side in (-20, 20)]
    boxes = []
    for size, position in parts:
        box = trimesh.creation.box(extents=size)
        box.apply_translation(np.add(position, (310, 0, 150)))
        boxes.append(box)
    trimesh.util.concatenate(boxes).export(file)
    return file


def write_walk(file: Path) -> Path:
    """Write six seconds of a walk as CSV: about 50 readings per second at uneven times, with a gap."""
    generator = np.random.default_rng(2)
    times = np.cumsum(generator.uniform(0.014, 0.026, 310))
    times = times[(times < 6) & ~((times > 2.6) & (times < 2.9))]
    step = 2 * np.pi * 1.8 * times
    rows = [
        1.2 * np.sin(step), 0.6 * np.sin(step / 2), 9.81 + 2.5 * np.abs(np.sin(step)) ** 3 - 0.9,
        0.5 * np.cos(step), 0.9 * np.sin(step / 2 + 0.5), 0.25 * np.cos(step / 2),
    ]  # fmt: skip
    table = np.column_stack([times, *rows])
    table[:, 1:] += generator.normal(0, 0.06, (len(times), 6))
    names = "time,acc_x,acc_y,acc_z,gyro_x,gyro_y,gyro_z"
    np.savetxt(file, table, delimiter=",", fmt="%.4f", header=names, comments="")
    return file
