"""What ImageBind's vision, depth and thermal trunks see of a picture or a map: its middle square, 224 pixels wide."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from bindllm.errors import InputError
from bindllm.media import Source, open_image
from bindllm.media.maps import open_depth, open_thermal

SIDE = 224

NEAREST, FARTHEST = 0.01, 50.0
"""Metres to which depth is clamped before it becomes disparity."""

LARGEST_DISPARITY = 75.0
DISPARITY_MEAN, DISPARITY_DEVIATION = 0.0418, 0.0295
"""Disparity is cut at the largest and divided by it; then mean and deviation standardise it."""

# The longest that a picture is made before its middle is cut out; of longer ones only the middle is resized.
_LONGEST = 16 * SIDE
_LEAST_MEASURED = 0.5


def image_input(source: Source) -> Tensor:
    """Return a picture as ImageBind was tested on it (https://arxiv.org/abs/2305.05665, section 4).

    The short side becomes 224 pixels (bicubic, antialiased, on 8-bit pixels), then the middle is cut out. Two things
    differ from the published code: EXIF orientation is applied, and transparent parts become white.

    Args:
        source: path or bytes of a file, an array of uint8, or a Pillow picture, as `bindllm.media.open_image` takes.

    Returns:
        [3, 224, 224], uint8.

    Raises:
        MediaError: the picture cannot be read.
    """
    # A JPEG decoded at reduced size would not give the published pixels.
    square = _middle_square(open_image(source, size=None), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(square)).permute(2, 0, 1).contiguous()


def depth_input(source: Source, *, baseline: float, focal: float) -> Tensor:
    """Return a depth map as standardised disparity.

    ImageBind was trained on the disparity of Omnivore (https://arxiv.org/abs/2305.05665, section 4;
    https://arxiv.org/abs/2201.08377, section 4), and no loader was published. Authors of both gave the first steps in
    github.com/facebookresearch/omnivore/issues/12: depth clamped to `NEAREST`..`FARTHEST` metres, and disparity =
    baseline * focal / depth in pixels, with a baseline of 0.075 m for Kinect and 0.095 m for RealSense and Xtion
    cameras. The scale is that of Omnivore's own depth input: cut at `LARGEST_DISPARITY`, divided by it, minus
    `DISPARITY_MEAN`, over `DISPARITY_DEVIATION`. Users of ImageBind report the same mean and deviation
    (github.com/facebookresearch/ImageBind/issues/107) and standardised disparity of true metres
    (the same, issues/134). Pixels where nothing was measured have disparity 0, as if infinitely far.

    The short side becomes 224 pixels (bilinear, antialiased, over measured pixels only; a pixel of which less than
    half was measured counts as not measured), then the middle is cut out.

    Args:
        source: what `bindllm.media.maps.open_depth` takes.
        baseline: distance between the eyes of the depth camera, metres.
        focal: focal length of the depth camera, pixels of the map as stored.

    Returns:
        [1, 224, 224], float32.

    Raises:
        InputError: ``baseline`` or ``focal`` is not finite and above 0.
        MediaError: the map cannot be read.
    """
    for key, value in (("baseline", baseline), ("focal", focal)):
        if not (np.isfinite(value) and value > 0):
            raise InputError(f"{key} of the depth camera must be finite and above 0, not {value}")
    metres = open_depth(source)
    is_measured = metres > 0
    disparity = np.where(is_measured, baseline * focal / metres.clip(NEAREST, FARTHEST), 0)
    disparity = disparity.clip(0, LARGEST_DISPARITY).astype(np.float32) / LARGEST_DISPARITY
    share = _middle_map(is_measured.astype(np.float32), Image.Resampling.BILINEAR)
    mean = _middle_map(disparity, Image.Resampling.BILINEAR) / np.maximum(share, np.float32(1e-6))
    seen = np.where(share >= _LEAST_MEASURED, mean, np.float32(0))
    return torch.from_numpy((seen - np.float32(DISPARITY_MEAN)) / np.float32(DISPARITY_DEVIATION))[None]


def thermal_input(source: Source) -> Tensor:
    """Return a thermal image as brightness, not standardised.

    No loader was published. One channel in 0..1 without standardising comes nearest to the paper's figure on LLVIP
    (github.com/facebookresearch/ImageBind/pull/73: 62.4 of 63.4, against 55.2 with it). The short side becomes 224
    pixels (bicubic, antialiased, cut to 0..1 again), then the middle is cut out.

    Args:
        source: what `bindllm.media.maps.open_thermal` takes.

    Returns:
        [1, 224, 224], float32, 0..1.

    Raises:
        MediaError: the image cannot be read.
    """
    brightness = _middle_map(open_thermal(source), Image.Resampling.BICUBIC)
    return torch.from_numpy(brightness.clip(0, 1))[None]


def _middle_map(values: np.ndarray, filter: Image.Resampling) -> np.ndarray:
    """Return the middle square [224, 224] of a map [H, W], float32."""
    return np.array(_middle_square(Image.fromarray(values), filter))


def _middle_square(image: Image.Image, filter: Image.Resampling) -> Image.Image:
    """Shrink or enlarge the short side to 224, the long one in proportion, rounded down, and cut out the middle."""
    short = min(image.size)
    width, height = (SIDE if side == short else SIDE * side // short for side in image.size)
    # Python rounds halves to even, as the published code does.
    left, top = round((width - SIDE) / 2), round((height - SIDE) / 2)
    if max(width, height) > _LONGEST:
        across, down = image.width / width, image.height / height
        box = (left * across, top * down, (left + SIDE) * across, (top + SIDE) * down)
        return image.resize((SIDE, SIDE), filter, box=box)
    if (width, height) != image.size:
        image = image.resize((width, height), filter)
    return image.crop((left, top, left + SIDE, top + SIDE))
