"""Made-up weights, inputs and media for the parity tests, and the numbers that the published models give for them.

The weights of a tensor follow from its published name alone (a counter-based generator, integer arithmetic up to
the last step), so any platform makes the same bytes and no released weight is needed. `tests/golden` holds the
published models' results on them, and the names and shapes of every tensor of their checkpoints.
"""

from __future__ import annotations

import re
import zlib
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

FOLDER = Path(__file__).parent / "golden"

_KEPT = ("log_logit_scale", "logit_scale", "num_batches_tracked", "text.mask")
_WIDE = re.compile(
    r"(^|.*\.)(pos_embed|cls_token|cls_pos|bias_k|bias_v|gate|prefix_query\.weight)|.*prefix_query\.weight"
)
_BLOCK = 1 << 22


def bits(name: str, count: int, *, seed: int = 0, start: int = 0) -> np.ndarray:
    """Return ``count`` integers in [0, 2**24), int64, of the stream that belongs to a name and a seed."""
    first = np.array([(zlib.crc32(name.encode()) << 32) | (seed & 0xFFFFFFFF)], dtype=np.uint64)
    steps = np.arange(start + 1, start + count + 1, dtype=np.uint64)
    mixed = _splitmix(steps * np.uint64(0x9E3779B97F4A7C15) + _splitmix(first))
    return (mixed >> np.uint64(40)).astype(np.int64)


def _splitmix(values: np.ndarray) -> np.ndarray:
    """The finaliser of the splitmix64 generator (Steele, Lea and Flood, 2014), modulo 2**64."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def _uniform(name: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    """float32 in [-1, 1)."""
    values = np.empty(int(np.prod(shape, dtype=np.int64)), np.float32)
    for start in range(0, values.size, _BLOCK):
        part = bits(name, min(_BLOCK, values.size - start), seed=seed, start=start)
        values[start : start + part.size] = (part - (1 << 23)).astype(np.float32) * np.float32(2.0**-23)
    return values.reshape(shape)


def fill(name: str, shape: tuple[int, ...], *, seed: int = 0) -> Tensor | None:
    """Return the weights of a published tensor name; None: it keeps the constant it is constructed with."""
    if name.endswith(_KEPT):
        return None
    scale, shift = np.float32(0.1), np.float32(0.0)
    if name.endswith("running_var"):
        scale, shift = np.float32(0.5), np.float32(1.0)
    elif _WIDE.fullmatch(name):
        scale = np.float32(0.5)
    elif len(shape) >= 2:
        scale = np.float32(np.sqrt(3.0 / float(np.prod(shape[1:], dtype=np.int64))))
    elif name.endswith("weight"):
        shift = np.float32(1.0)
    elif not shape:
        return None
    scaled = scale * _uniform(name, shape, seed)
    return torch.from_numpy(np.asarray(shift + scaled if shift else scaled))


@cache
def keys(table: str) -> dict[str, tuple[int, ...]]:
    """Return name and shape of every tensor of a published checkpoint, in its order."""
    rows = (FOLDER / f"{table}.tsv").read_text().splitlines()[1:]
    cells = (row.split("\t") for row in rows)
    return {name: () if shape == "scalar" else tuple(map(int, shape.split("x"))) for name, shape, *_ in cells}


def hollow(table: str) -> dict[str, Tensor]:
    """Return the tensors of a published checkpoint without memory: only names and shapes."""
    return {name: torch.empty(shape, device="meta") for name, shape in keys(table).items()}


def filled(table: str) -> dict[str, Tensor]:
    """Return made-up weights for a published checkpoint, without the tensors that keep their constants."""
    made = ((name, fill(name, shape)) for name, shape in keys(table).items())
    return {name: tensor for name, tensor in made if tensor is not None}


@cache
def golden(name: str) -> dict[str, np.ndarray]:
    """Return the published results of one file, by name."""
    with np.load(FOLDER / f"{name}.npz") as arrays:
        return dict(arrays)


def fill_input(name: str, shape: tuple[int, ...], low: float, high: float, *, seed: int = 0) -> Tensor:
    """Return float32 in [low, high)."""
    count = int(np.prod(shape, dtype=np.int64))
    unit = bits("input:" + name, count, seed=seed).astype(np.float32) * np.float32(2.0**-24)
    return torch.from_numpy((np.float32(low) + np.float32(high - low) * unit).reshape(shape))


def fill_ids(name: str, shape: tuple[int, ...], low: int, high: int, *, seed: int = 0) -> np.ndarray:
    """Return int64 in [low, high)."""
    count = int(np.prod(shape, dtype=np.int64))
    return (low + bits("ids:" + name, count, seed=seed) % (high - low)).reshape(shape)


def make_image(name: str, height: int, width: int) -> np.ndarray:
    """Return an image of two ramps, a texture and noise: uint8 [H, W, 3]."""
    y, x = np.mgrid[0:height, 0:width].astype(np.int64)
    ramps = [255 * x // (width - 1), 255 * y // (height - 1), (x * y // 37 + 3 * x) % 256]
    noise = fill_ids("image:" + name, (height, width, 3), -24, 25)
    return np.clip(np.stack(ramps, -1) + noise, 0, 255).astype(np.uint8)


def make_wave(name: str, rate: int, samples: int, channels: int) -> np.ndarray:
    """Return per channel a rising triangle wave with noise and an offset: int16 [C, N]."""
    step = np.arange(samples, dtype=np.int64)
    waves = []
    for channel in range(channels):
        low, high = 200 + 150 * channel, 3000 + 700 * channel
        increments = (low * samples + (high - low) * step) // samples * (1 << 32) // rate
        phase = (np.cumsum(increments) % (1 << 32)) >> 16
        triangle = np.abs(phase - 32768) * 2 - 32768
        noise = fill_ids(f"wave:{name}:{channel}", (samples,), -900, 901)
        waves.append(triangle * 3 // 8 + noise + 700 + 250 * channel)
    return np.clip(np.stack(waves), -32768, 32767).astype(np.int16)


def make_frames(name: str, count: int, height: int, width: int) -> np.ndarray:
    """Return a video of drifting ramps with noise, no two frames alike: uint8 [N, H, W, 3]."""
    t, y, x = np.mgrid[0:count, 0:height, 0:width].astype(np.int64)
    ramps = [
        (255 * x // (width - 1) + 11 * t) % 256,
        255 * y // (height - 1),
        (5 * t + x * y // 29) % 256,
    ]
    video = np.stack(ramps, -1)
    return np.clip(video + fill_ids("frames:" + name, video.shape, -16, 17), 0, 255).astype(np.uint8)
