"""Videos as ImageBind sees them: clips of two seconds, two frames of each, three square crops of both.

Facts: ImageBind, arXiv 2305.05665, section 4 and appendix B; the arithmetic is that of its released preprocessing.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from math import ceil

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from bindllm.encoders.imagebind.clips import CLIP_SECONDS, clip_starts
from bindllm.encoders.imagebind.network import normalize_pixels
from bindllm.errors import MediaError
from bindllm.media.source import Source, name_of
from bindllm.media.video import read_frames

SIDE = 224
CROPS = 3

MAX_ASPECT = 100
"""Longest frame that is scaled, as a multiple of its short side."""

_PUBLISHED_CLIPS = 5


def video_input(source: Source, *, coverage: str, max_clips: int) -> Tensor:
    """Return the clips of a video, each its first and last frame in three crops along the longer side.

    A clip in which no frame starts (fewer than one frame in two seconds) shows the last one before it; a video of
    one frame shows that frame twice.

    Args:
        source: path, bytes or array, as `read_frames` takes them.
        coverage: "published": five clips from start to end; "full": clips that cover all of it.
        max_clips: most clips under "full".

    Returns:
        [S * 3, 3, 2, 224, 224] float32, normalized RGB: S clips, the three crops of a clip next to each other.

    Raises:
        MediaError: the video cannot be read, or its frames are longer than `MAX_ASPECT` times their short side.
        InputError: unknown coverage.
        MissingExtraError: PyAV is not installed.

    Examples:
        >>> video_input(np.zeros((10, 60, 80, 3), np.uint8), coverage="published", max_clips=64).shape
        torch.Size([15, 3, 2, 224, 224])
    """
    name = name_of(source)
    clips: list[tuple[int, int]] = []

    # How to read this: `pick` runs after the first pass over the file, which counts frames without decoding. It fills
    # `clips`; the loop below then decodes only those frames, in order.
    def pick(count: int, rate: Fraction) -> Sequence[int]:
        starts = clip_starts(
            count / rate, published=_PUBLISHED_CLIPS, coverage=coverage, max_clips=max_clips, name=name
        )
        clips[:] = [_first_and_last(start, count, rate) for start in starts]
        return sorted({number for clip in clips for number in clip})

    views: Tensor | None = None
    for number, frame in read_frames(source, pick=pick):
        if views is None:
            views = torch.empty(len(clips), CROPS, 3, 2, SIDE, SIDE)
        crops = _crops(frame, name)
        for clip, frames in enumerate(clips):
            # A frame may belong to several clips, or be both the first and the last of one.
            for position, shown in enumerate(frames):
                if shown == number:
                    views[clip, :, :, position] = crops
    assert views is not None, "at least one frame is picked"
    return views.flatten(0, 1)


def _first_and_last(start: Fraction, count: int, rate: Fraction) -> tuple[int, int]:
    """Return the first and the last frame that start within a clip."""
    # ceil: the first frame that starts at or after the clip does.
    first = min(ceil(rate * start), count - 1)
    stop = min(ceil(rate * (start + CLIP_SECONDS)), count)
    return first, max(first, stop - 1)


def _crops(frame: np.ndarray, name: str) -> Tensor:
    """Return three squares of a frame, uint8 [H, W, 3]: [3 crops, 3, 224, 224] float32."""
    height, width = frame.shape[:2]
    short, long = min(height, width), max(height, width)
    if long > MAX_ASPECT * short:
        raise MediaError(
            f"{name}: frames of {width} x {height} pixels are longer than {MAX_ASPECT} times their short side; "
            "crop the video first"
        )
    # The short side becomes 224; the crops slide along the long side.
    along = SIDE * long // short
    size = (SIDE, along) if width >= height else (along, SIDE)
    pixels = torch.from_numpy(np.ascontiguousarray(frame.transpose(2, 0, 1))).float() / 255
    if size != (height, width):
        pixels = F.interpolate(pixels[None], size=size, mode="bilinear", align_corners=False)[0]
    offsets = (0, ceil((along - SIDE) / 2), along - SIDE)
    axis = 2 if width >= height else 1
    # Crops are views until they are stacked.
    squares = torch.stack([pixels.narrow(axis, offset, SIDE) for offset in offsets])
    return normalize_pixels(squares)
