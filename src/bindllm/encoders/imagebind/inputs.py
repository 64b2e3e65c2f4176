"""Inputs of ImageBind's vision, depth, thermal and IMU trunks.

Of an image or a map the trunk gets the middle square, 224 pixels wide; of a motion signal it gets 2000 steps.
"""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from bindllm.encoders.imagebind.network import SIGNAL
from bindllm.media import Source, open_image
from bindllm.media.maps import open_depth, open_thermal
from bindllm.media.motion import open_imu

SIDE = 224

NEAREST, FARTHEST = 0.01, 50.0
"""Meters to which depth is clamped before it becomes disparity."""

LARGEST_DISPARITY = 75.0
DISPARITY_MEAN, DISPARITY_DEVIATION = 0.0418, 0.0295
"""Disparity is cut at the largest and divided by it; then mean and deviation standardize it."""

# The longest that an image is made before its middle is cut out; of longer ones only the middle is resized.
_LONGEST = 16 * SIDE
_LEAST_MEASURED = 0.5


def image_input(source: Source) -> Tensor:
    """Return an image as ImageBind was tested on it (https://arxiv.org/abs/2305.05665, section 4).

    The short side becomes 224 pixels (bicubic, antialiased, on 8-bit pixels), then the middle is cut out. Two things
    differ from the published code: EXIF orientation is applied, and transparent parts become white.

    Args:
        source: path or bytes of a file, an array of uint8, or a Pillow image, as `bindllm.media.open_image` takes.

    Returns:
        [3, 224, 224], uint8.

    Raises:
        MediaError: the image cannot be read.
    """
    # A JPEG decoded at reduced size would not give the published pixels.
    square = _middle_square(open_image(source, size=None), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(square)).permute(2, 0, 1).contiguous()


def depth_input(source: Source, *, baseline: float, focal: float) -> Tensor:
    """Return a depth map as standardized disparity.

    ImageBind was trained on the disparity of Omnivore (https://arxiv.org/abs/2305.05665, section 4;
    https://arxiv.org/abs/2201.08377, section 4), and no loader was published. Authors of both gave the first steps in
    github.com/facebookresearch/omnivore/issues/12: depth clamped to `NEAREST`..`FARTHEST` meters, and disparity =
    baseline * focal / depth in pixels, with a baseline of 0.075 m for Kinect and 0.095 m for RealSense and Xtion
    cameras. The scale is that of Omnivore's own depth input: cut at `LARGEST_DISPARITY`, divided by it, minus
    `DISPARITY_MEAN`, over `DISPARITY_DEVIATION`. Users of ImageBind report the same mean and deviation
    (github.com/facebookresearch/ImageBind/issues/107) and standardized disparity of true meters
    (the same, issues/134). Pixels without a measurement have disparity 0, as if infinitely far.

    The short side becomes 224 pixels (bilinear, antialiased, over measured pixels only; an output pixel of less than
    half measured input counts as not measured), then the middle is cut out.

    Args:
        baseline: distance between the eyes of the depth camera, meters, above 0.
        focal: focal length of the depth camera, pixels of the map as stored, above 0.

    Returns:
        [1, 224, 224], float32.

    Raises:
        MediaError: the map cannot be read.
    """
    meters = open_depth(source)
    is_measured = meters > 0
    disparity = np.where(is_measured, baseline * focal / meters.clip(NEAREST, FARTHEST), 0)
    disparity = disparity.clip(0, LARGEST_DISPARITY).astype(np.float32) / LARGEST_DISPARITY
    # How to read this: resize values and the mask of measured pixels, then divide. Holes then do not darken their
    # surroundings.
    share = _middle_map(is_measured.astype(np.float32), Image.Resampling.BILINEAR)
    mean = _middle_map(disparity, Image.Resampling.BILINEAR) / np.maximum(share, np.float32(1e-6))
    measured = np.where(share >= _LEAST_MEASURED, mean, np.float32(0))
    return torch.from_numpy((measured - np.float32(DISPARITY_MEAN)) / np.float32(DISPARITY_DEVIATION))[None]


def thermal_input(source: Source) -> Tensor:
    """Return a thermal image as brightness, not standardized.

    No loader was published. One channel in 0..1 without standardizing comes nearest to the paper's figure on LLVIP
    (github.com/facebookresearch/ImageBind/pull/73: 62.4 of 63.4, against 55.2 with it). The short side becomes 224
    pixels (bicubic, antialiased, cut to 0..1 again), then the middle is cut out.

    Args:
        source: a thermal image, as for `bindllm.media.maps.open_thermal`.

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


def imu_input(source: Source) -> Tensor:
    """Return the signal of a motion sensor (https://arxiv.org/abs/2305.05665, section 4).

    The whole signal, however long, is resampled to 2000 steps, about ten seconds at Ego4D's 200 readings a second;
    ImageBind was trained on pieces of a few seconds, so cut longer ones first. No loader and no scale were published:
    values are not standardized.

    Returns:
        [6, 2000], float32: acceleration x y z, then rotation x y z.

    Raises:
        MediaError: the signal cannot be read.
    """
    return torch.from_numpy(open_imu(source, steps=SIGNAL[1]))
