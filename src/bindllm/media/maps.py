"""Opening depth maps, in meters, and thermal images: one number for each pixel."""

from __future__ import annotations

import numpy as np
from PIL import Image

from bindllm.errors import MediaError, reading
from bindllm.media.arrays import check_numbers, holds_array, read_array
from bindllm.media.images import (
    check_pixels,
    decoding,
    is_inverted,
    open_image,
    open_raster,
    stored_mode,
    wide_gray,
)
from bindllm.media.limits import warn
from bindllm.media.source import Source, name_of, open_stream, read_head

DARKEST, BRIGHTEST = 1.0, 99.0
"""Percentiles of a thermal image that become 0 and 1, if its values have no range of their own."""

PLAUSIBLE = (0.05, 100.0)
"""Meters between which the median of a depth map is expected; a warning asks for the unit of others."""

_HEAD = 4096
_EXR = b"\x76\x2f\x31\x01"
_MILLIMETERS = 1000  # in a meter
# Pixels that are enough for percentiles.
_ENOUGH = 1_000_000


def open_depth(source: Source) -> np.ndarray:
    """Open a depth map.

    Integers are millimeters and floats are meters, in images as in arrays: a 16-bit PNG or TIFF, a 32-bit TIFF, an NPY
    or NPZ file (array ``depth``, if it holds several). A median outside of `PLAUSIBLE` gives a warning that asks for
    the unit. The EXIF orientation is applied. 0, negative, NaN and infinite values mean that nothing was measured.
    Files of other units have to be converted first; those of SUN RGB-D hold millimeters whose bits are rotated left by
    3 (https://rgbd.cs.princeton.edu, its toolbox's read3dPoints).

    Args:
        source: path or bytes of a file, an array [H, W] or [H, W, 1], or a Pillow image of 16 or 32 bits.

    Returns:
        [H, W], float32: meters, 0 where nothing was measured.

    Raises:
        MediaError: missing, damaged, of 8 bits or in color, a TIFF whose 0 is white, OpenEXR, above `MAX_PIXELS`, or
            nothing was measured at all; it names the file.
    """
    with reading(name_of(source)):
        values = _read_values(source, key="depth")
        if values is None or values.dtype.itemsize == 1:
            raise MediaError(
                "8 bits or color cannot hold depth; expected a 16-bit PNG or TIFF in millimeters, or an NPY in "
                "meters. Save the depth values, not an image of them"
            )
        is_float = values.dtype.kind == "f"
        # Overflow gives infinity, which counts as not measured.
        with np.errstate(over="ignore", invalid="ignore"):
            meters = values.astype(np.float32) / np.float32(1 if is_float else _MILLIMETERS)
        meters = np.where(np.isfinite(meters) & (meters > 0), meters, np.float32(0))
        if not meters.any():
            raise MediaError("no pixel of this depth map was measured (all are 0, negative or not finite)")
        _check_unit(meters, name_of(source), is_float=is_float)
        return meters


def _check_unit(meters: np.ndarray, name: str, *, is_float: bool) -> None:
    """Warn if the median depth is implausible: numbers have no unit of their own, so it may be another one."""
    measured = meters[meters > 0]
    median = float(np.median(measured[:: 1 + measured.size // _ENOUGH]))
    if PLAUSIBLE[0] <= median <= PLAUSIBLE[1]:
        return
    unit = "floats are meters" if is_float else "integers are millimeters"
    low, high = PLAUSIBLE
    warn(
        name,
        f"the median depth is {median:g} meters if {unit}. Which unit is it? Outside {low:g} to {high:g} meters maps "
        "look all alike: convert them if it is another unit",
        kind=unit,
    )


def open_thermal(source: Source) -> np.ndarray:
    """Open a thermal image as brightness.

    Images of 8 bits, gray or color, and arrays of uint8 are their luminance / 255. Arrays and TIFF files of floats
    within 0..1 are taken as they are. Everything else (16 bits, temperatures in any unit) has no range of its own:
    its percentiles `DARKEST` and `BRIGHTEST` (of a million evenly chosen pixels, if it has more) become 0 and 1,
    values beyond are clipped, and a constant map becomes 0. NaN and infinite values become 0.

    Args:
        source: path or bytes of a file (any image, NPY, or NPZ with the array ``thermal``), an array [H, W],
            [H, W, 1], or [H, W, 3] of uint8, or a Pillow image.

    Returns:
        [H, W], float32, 0..1.

    Raises:
        MediaError: missing, damaged, of 16 bits in color, above `MAX_PIXELS`, or without a finite value; it names the
            file.
    """
    with reading(name_of(source)):
        values = _read_values(source, key="thermal")
        # 8 bits or color: the luminance is the brightness.
        if values is None or values.ndim == 3:
            image = open_image(source if values is None else values, size=None)
            return np.asarray(image.convert("L"), dtype=np.float32) / 255
        if values.dtype == np.uint8:
            return values.astype(np.float32) / 255
        is_finite = np.isfinite(values)
        if not is_finite.any():
            raise MediaError("no value of this thermal image is finite")
        finite = values[is_finite]
        low, high = float(finite.min()), float(finite.max())
        # Integers, and floats beyond 0..1, have no range of their own.
        if values.dtype.kind != "f" or low < 0 or high > 1:
            some = finite[:: 1 + finite.size // _ENOUGH].astype(np.float64)
            low, high = (float(value) for value in np.percentile(some, (DARKEST, BRIGHTEST)))
        else:
            low, high = 0.0, 1.0
        if high == low:
            return np.zeros(values.shape, np.float32)
        scaled = np.where(is_finite, values, low).clip(low, high).astype(np.float64)
        # Halves, since the range of the largest floats overflows.
        return ((scaled / 2 - low / 2) / (high / 2 - low / 2)).astype(np.float32)


def _read_values(source: Source, *, key: str) -> np.ndarray | None:
    """Return the numbers [H, W], or [H, W, 3 or 4] of uint8, as stored; None: an image of 8 bits or in color."""
    if isinstance(source, np.ndarray):
        return _from_array(source)
    if isinstance(source, Image.Image):
        with decoding():
            check_pixels(*source.size)
            return _from_image(source, key)
    with open_stream(source) as stream:
        head = read_head(stream, _HEAD, "an image or an NPY file")
        if head.startswith(_EXR):
            raise MediaError("OpenEXR is not read here; save it as NPY, or as a 16-bit PNG or TIFF")
        if holds_array(head):
            return _from_array(read_array(stream, keys=(key,)))
        # No other format holds more than 8 bits.
        if key == "thermal" and not head.startswith((b"\x89PNG", b"II", b"MM")):
            return None
        with open_raster(stream) as image:
            return _from_image(image, key)


def _from_image(image: Image.Image, key: str) -> np.ndarray | None:
    # Writers disagree whether the tag is about the display or about the numbers.
    if key == "depth" and is_inverted(image):
        raise MediaError("a TIFF whose 0 is white (PhotometricInterpretation 0); save depth with 0 as black")
    # Before the pixels are decoded.
    level, has_16_bits = image.info.get("transparency"), ";16" in stored_mode(image)
    values = wide_gray(image)
    # As with 8 bits in color the luminance would count, of the higher 8 bits only.
    if key == "thermal" and (has_16_bits if values is None else level is not None):
        raise MediaError("16 bits in color or with transparency; save it as 16-bit gray")
    # A transparent pixel was not measured.
    return values if values is None or level is None else np.where(values == level, 0, values)


def _from_array(array: np.ndarray) -> np.ndarray:
    check_numbers(array)
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    is_color = array.ndim == 3 and array.shape[2] in (3, 4) and array.dtype == np.uint8
    if not (is_color or array.ndim == 2) or array.size == 0:
        raise MediaError(f"an array {list(array.shape)}; expected [H, W] or [H, W, 1], not empty")
    check_pixels(array.shape[1], array.shape[0])
    return array
