"""Opening images: every format and mode becomes upright 8-bit RGB.

SVG images may be untrusted, so they are rendered in a process of its own, and nothing outside the file is read.
"""

from __future__ import annotations

import atexit
import gzip
import io
import math
import os
import signal
import subprocess
import sys
import threading
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import (
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    ImageFile,
    ImageOps,
    JpegImagePlugin,
    PngImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)

from bindllm.errors import MediaError, MissingExtraError, reading
from bindllm.media import svg_renderer
from bindllm.media.limits import at_most, check_time, current_budget, seconds_left, warn
from bindllm.media.source import CHUNK, Source, name_of, open_stream, read_head
from bindllm.media.svg_renderer import ANSWER, FAILED, LINKS, REQUEST, TEXT

MAX_PIXELS = 100_000_000
"""Largest image (width times height) that is decoded: 100 megapixels, about 300 MB as RGB."""

MAX_SIDE = 10_000_000
"""Longest side of an image: Pillow fails on lines of some ten million pixels as if it had no memory."""

MAX_SCANS = 64
"""Most passes over the pixels of a progressive JPEG; encoders write about ten, and each may cost a few bytes."""

MAX_SVG_BYTES = 32 * 1024 * 1024
"""Largest SVG text, after unpacking, that is rendered."""

MAX_SVG_SECONDS = 20.0
"""Longest time that one SVG may take; most need a few milliseconds."""

_WARNINGS = {
    LINKS: "images that an SVG links to are not drawn; embed them",
    TEXT: "text of an SVG is drawn in the fonts of this machine, or not at all; convert it to paths",
}
_GZIP = b"\x1f\x8b"

# Bytes that decide about the format: an SVG tag may come after long comments.
_HEAD = 4096

# Tags of TIFF files.
_BITS, _PHOTOMETRIC, _SAMPLE_FORMAT = 258, 262, 339
_UNSIGNED, _SIGNED = 1, 2

# Side of an SVG if the caller gives none.
_DRAWN_SIDE = 448

# Pillow's plugin is named for each signature, so only these formats are ever decoded, and the header can be
# read without `Image.open`, which warns about large images according to a process-wide setting.
_RASTER_READERS: tuple[tuple[bytes, type[ImageFile.ImageFile]], ...] = (
    (b"\xff\xd8\xff", JpegImagePlugin.JpegImageFile),
    (b"\x89PNG\r\n\x1a\n", PngImagePlugin.PngImageFile),
    (b"GIF8", GifImagePlugin.GifImageFile),
    (b"RIFF", WebPImagePlugin.WebPImageFile),
    (b"BM", BmpImagePlugin.BmpImageFile),
    (b"II*\0", TiffImagePlugin.TiffImageFile),
    (b"MM\0*", TiffImagePlugin.TiffImageFile),
    (b"II+\0", TiffImagePlugin.TiffImageFile),
    (b"MM\0+", TiffImagePlugin.TiffImageFile),
)


def open_image(source: Source, *, size: int | None = 448) -> Image.Image:
    """Open an image as upright RGB, transparent parts on white.

    JPEG, PNG, WebP, GIF, BMP, TIFF and SVG are recognized by their content, not by their name. The first frame of an
    animation is taken and the EXIF orientation is applied; color profiles are not, nor is the resolution, even if it
    differs in both directions. 16-bit gray is scaled by its range (0..65535, 12-bit TIFF 0..4095), and inverted if the
    file says that 0 is white. 32-bit gray must lie in 0..1 (floats only), 0..255 or 0..65535.

    Args:
        source: path, bytes of a file, array [H, W], [H, W, 3] or [H, W, 4] of uint8, or Pillow image.
        size: side in pixels that the caller will shrink the image to. An SVG is rendered so that its
            longer side has this length. A JPEG is decoded at 1/2, 1/4 or 1/8 of its size if both sides
            stay at least twice this length, which bounds time and memory. All others keep their size.
            None: every pixel of a JPEG is decoded as stored, and an SVG gets 448 pixels.

    Raises:
        MediaError: missing, empty, truncated, not an image, or above `MAX_PIXELS`; it names the file.
        MissingExtraError: an SVG without the extra ``svg``.
    """
    with reading(name_of(source)):
        if isinstance(source, np.ndarray):
            return _to_rgb(_from_array(source))
        if isinstance(source, Image.Image):
            with decoding():
                check_pixels(*source.size)
                return _to_rgb(source)
        with open_stream(source) as stream:
            head = read_head(stream, _HEAD, "an image")
            if _looks_like_svg(head):
                return _render_svg(stream, size=size or _DRAWN_SIDE, name=name_of(source))
            with open_raster(stream) as image:
                if size is not None and isinstance(image, JpegImagePlugin.JpegImageFile):
                    # The decoder itself shrinks by 1/2, 1/4 or 1/8, so the full size is never in memory.
                    image.draft(None, (2 * size, 2 * size))
                return _to_rgb(image)


@contextmanager
def open_raster(stream: BinaryIO) -> Iterator[Image.Image]:
    """Yield the raster image in a stream, not decoded yet, in its stored mode.

    Raises:
        MediaError: not a raster image, above `MAX_PIXELS`, or an error of Pillow while it is open.
    """
    head = stream.read(_HEAD)
    stream.seek(0)
    with decoding(), _raster_reader(head)(stream) as image:
        # Only the header has been read so far.
        check_pixels(*image.size)
        if image.info.get("progressive"):
            _check_scans(stream)
        _scale_transparency(image)
        yield image


def _from_array(array: np.ndarray) -> Image.Image:
    shape_fits = array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (3, 4))
    if not shape_fits or array.dtype != np.uint8 or array.size == 0:
        raise MediaError("expected a filled array [H, W], [H, W, 3] or [H, W, 4] of uint8")
    check_pixels(array.shape[1], array.shape[0])
    return Image.fromarray(array)


def _raster_reader(head: bytes) -> type[ImageFile.ImageFile]:
    """Return the class that reads files which start like this one."""
    for signature, reader in _RASTER_READERS:
        if head.startswith(signature):
            return reader
    raise MediaError(
        f"not an image (it starts with {head[:12]!r}); expected JPEG, PNG, WebP, GIF, BMP, TIFF or SVG"
    )


@contextmanager
def decoding() -> Iterator[None]:
    """Turn errors of Pillow while it reads an image into a MediaError."""
    try:
        yield
    except (MediaError, MemoryError):
        raise
    # Damaged files make it raise nearly every class of exception: all of them mean "cannot be decoded".
    except Exception as error:
        raise MediaError(f"a damaged or truncated image ({error}); replace the file") from error


def check_pixels(width: int, height: int) -> None:
    """Refuse sizes above `MAX_PIXELS` or `MAX_SIDE`, and images without pixels.

    Raises:
        MediaError: the message has the size.
    """
    if min(width, height) < 1:
        raise MediaError(f"an image of {width} x {height} pixels; expected at least one")
    most = at_most("pixels", MAX_PIXELS)
    if width * height > most or max(width, height) > MAX_SIDE:
        raise MediaError(
            f"{width} x {height} pixels; at most {most:,} are decoded, {MAX_SIDE:,} on a side. "
            "Scale the image down first"
        )


def _check_scans(stream: BinaryIO) -> None:
    """Refuse a progressive JPEG of more than `MAX_SCANS` scans; the stream stays at its position."""
    position, scans, last = stream.tell(), 0, b""
    stream.seek(0)
    while part := stream.read(CHUNK):
        # The marker of a scan; within packed pixels, FF is always followed by 00. It may lie across two parts.
        scans += (last + part).count(b"\xff\xda")
        last = part[-1:]
    stream.seek(position)
    if scans > MAX_SCANS:
        raise MediaError(f"a JPEG of {scans:,} scans; at most {MAX_SCANS} are decoded. Save it again")


def stored_mode(image: Image.Image) -> str:
    """Return Pillow's words for the pixels in a file, such as "RGB;16B"; "" once they are decoded."""
    return str(image.tile[0].args) if isinstance(image, ImageFile.ImageFile) and image.tile else ""


def _scale_transparency(image: Image.Image) -> None:
    """Scale the level or color that a PNG names as transparent to 8 bits, as Pillow scales only the pixels."""
    level, stored = image.info.get("transparency"), stored_mode(image)
    if level is None:
        return
    if stored in ("L;2", "L;4"):
        image.info["transparency"] = level * (85 if stored == "L;2" else 17)
    elif stored == "RGB;16B":
        image.info["transparency"] = tuple(part >> 8 for part in level)


def _to_rgb(image: Image.Image) -> Image.Image:
    """Decode, turn upright, and convert every mode to RGB on white; the given image keeps its mode."""
    image.load()
    if (values := wide_gray(image)) is not None:
        return _gray_from_wide(values, image)
    image = ImageOps.exif_transpose(image)
    # A palette or a single color can be transparent, too.
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def wide_gray(image: Image.Image) -> np.ndarray | None:
    """Return the numbers of a gray image of 16 or 32 bits, upright [H, W], 0 is black; None for all other modes.

    Raises:
        MediaError: 32-bit values whose 0 is white: they have no largest value from which to subtract. Signed 8-bit
            values, which Pillow takes for unsigned ones.
    """
    sample_format = _tag(image, _SAMPLE_FORMAT, (1,))[0]
    if image.mode == "L" and sample_format == _SIGNED:
        raise MediaError("a TIFF of signed 8-bit values; save it with 16 bits, or unsigned")
    if not (image.mode.startswith("I;16") or image.mode in ("I", "F")):
        return None
    # Loaded first, since a PNG may name its orientation after its pixels.
    image.load()
    values = np.asarray(ImageOps.exif_transpose(image))
    # Pillow has no mode for unsigned 32 bits: large values would be negative.
    if image.mode == "I" and sample_format == _UNSIGNED and _tag(image, _BITS, (0,))[0] == 32:
        values = values.view(np.uint32)
    # Pillow inverts images of up to 8 bits itself.
    if not is_inverted(image):
        return values
    if not image.mode.startswith("I;16"):
        raise MediaError("a TIFF of 32 bits whose 0 is white (PhotometricInterpretation 0); save 0 as black")
    return np.uint16(_largest(image)) - values


def is_inverted(image: Image.Image) -> bool:
    """Return whether 0 is white in a TIFF file (its tag PhotometricInterpretation is 0)."""
    return _tag(image, _PHOTOMETRIC, 1) == 0


def _tag(image: Image.Image, number: int, default: Any) -> Any:
    """Return the value of a tag of a TIFF file; the default for other images."""
    is_tiff = isinstance(image, TiffImagePlugin.TiffImageFile)
    return image.tag_v2.get(number, default) if is_tiff else default


def _largest(image: Image.Image) -> int:
    """Return the largest value of a 16-bit mode: Pillow also opens TIFF files of 12 bits in it."""
    return 2 ** _tag(image, _BITS, (16,))[0] - 1


def _gray_from_wide(values: np.ndarray, image: Image.Image) -> Image.Image:
    """Scale 16-bit and 32-bit gray to 8 bits by its range; Pillow itself would clip at 255."""
    values = values.astype(np.float32)
    low, high = float(values.min()), float(values.max())
    if image.mode.startswith("I;16"):
        top = float(_largest(image))
    else:
        tops = (1.0, 255.0, 65535.0) if image.mode == "F" else (255.0, 65535.0)
        # The smallest usual range that holds all values.
        top = next((top for top in tops if high <= top), math.nan)
    # Written so that NaN fails too.
    if not (low >= 0 and high <= top):
        raise MediaError(
            f"32-bit values from {low:g} to {high:g}; expected 0..1 (floats), 0..255 or 0..65535. "
            "Scale the values first"
        )
    gray = np.rint(values * (255.0 / top)).astype(np.uint8)
    # White, as all transparent parts; without a transparent level, no value is None.
    gray[values == image.info.get("transparency")] = 255
    return Image.fromarray(gray).convert("RGB")


def _looks_like_svg(head: bytes) -> bool:
    """Return from the first bytes of a file whether it is an SVG; the only image format that is packed with gzip."""
    # Dropping the zero bytes makes UTF-16 readable enough to find the tag.
    text = head.replace(b"\0", b"").lstrip(b"\xef\xbb\xbf\xff\xfe \t\r\n").lower()
    is_markup = text.startswith(b"<?xml") or (text.startswith(b"<") and (b"<svg" in text or b":svg" in text))
    return head.startswith(_GZIP) or is_markup


def _render_svg(stream: BinaryIO, *, size: int, name: str) -> Image.Image:
    """Render an SVG on white so that its longer side is ``size`` pixels.

    The proportions come from width and height, else from the viewBox, else from the bounding box of the
    drawing (100 x 100 if it is empty). Images inside are drawn only if they are embedded in the file, and text only in
    the fonts of this machine; the first file of each kind gives a warning. A link in a request is an error.

    Raises:
        MediaError: not well-formed, without area, too large, with embedded images above `MAX_PIXELS`, or it needs more
            than `MAX_SVG_SECONDS`, too much memory, or crashes the renderer.
        MissingExtraError: resvg_py is not installed.
    """
    flags, png = _process.render(_read_svg(stream), size=size)
    # Whoever sent a request cannot read the log, and would get an answer about an image with holes.
    if flags & LINKS and current_budget() is not None:
        raise MediaError(
            "an SVG that links to other images, which are not read; embed them as PNG or JPEG in data: URIs"
        )
    for message in (message for flag, message in _WARNINGS.items() if flags & flag):
        warn(name, message, kind=message)
    with Image.open(io.BytesIO(png), formats=["PNG"]) as image:
        return image.convert("RGB")


def _read_svg(stream: BinaryIO) -> bytes:
    """Read the whole text, unpacked, but never more than the limit."""
    packed = stream.read(2) == _GZIP
    stream.seek(0)
    most = at_most("bytes", MAX_SVG_BYTES)
    try:
        # One byte more than allowed shows that the text is too long.
        text = (gzip.GzipFile(fileobj=stream) if packed else stream).read(most + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise MediaError(f"a damaged gzip file ({error})") from error
    if len(text) > most:
        raise MediaError(f"an SVG of more than {most:,} bytes; simplify it first")
    return text


class _SvgProcess:
    """One renderer for each process of ours, started at the first SVG, and again after a file made it end."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._popen: subprocess.Popen[bytes] | None = None

    def render(self, text: bytes, *, size: int) -> tuple[int, bytes]:
        """Return the flags of the renderer and the PNG; the threads of a process take turns."""
        with self._lock:
            # Another file may have taken the whole time while this one waited.
            check_time()
            seconds = min(MAX_SVG_SECONDS, seconds_left())
            running = self._running()
            try:
                most = at_most("pixels", MAX_PIXELS)
                _send(running, REQUEST.pack(seconds, size, most, len(text)) + text)
                flags, length = ANSWER.unpack(_receive(running, ANSWER.size))
                answer = _receive(running, length)
            except (OSError, EOFError) as error:
                code, reason = self.stop(), f"takes more than {seconds:g} seconds"
                if code != -signal.SIGALRM:
                    reason = f"needs too much memory or crashes the renderer ({code})"
                raise MediaError(f"an SVG that {reason}; simplify it first") from error
            # Ctrl-C leaves half an answer in the pipe.
            except BaseException:
                self.stop()
                raise
        if flags & FAILED:
            raise MediaError(f"an SVG that cannot be rendered ({answer.decode()})")
        return flags, answer

    def stop(self) -> int:
        """End the process, and return its exit code."""
        if self._popen is None:
            return 0
        popen, self._popen = self._popen, None
        _close_pipes(popen)
        popen.kill()
        return popen.wait()

    def forget(self) -> None:
        """Leave the process, in a forked child, to the parent; the next SVG starts one for the child."""
        # Another thread of the parent may have held the lock.
        self._lock = threading.Lock()
        if self._popen is not None:
            _close_pipes(self._popen)
            # It never ends for the child, which must not wait for it.
            self._popen.returncode = 0
        self._popen = None

    def _running(self) -> subprocess.Popen[bytes]:
        if self._popen is None:
            package = find_spec("resvg_py")
            if package is None:
                raise MissingExtraError("resvg-py", extra="svg", purpose="render SVG images")
            folders = [str(Path(file).parents[1]) for file in (package.origin, Image.__file__)]
            # Isolated (-I, -S): no module of the working directory. In a group of its own, Ctrl-C reaches only us.
            self._popen = subprocess.Popen(
                [sys.executable, "-I", "-S", svg_renderer.__file__, *folders],
                # Unbuffered, so that a forked child can close its copies without writing anything.
                bufsize=0,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
        return self._popen


def _send(popen: subprocess.Popen[bytes], data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[popen.stdin.write(rest) :]


def _receive(popen: subprocess.Popen[bytes], size: int) -> bytes:
    data = b""
    while len(data) < size:
        if not (more := popen.stdout.read(size - len(data))):
            raise EOFError
        data += more
    return data


def _close_pipes(popen: subprocess.Popen[bytes]) -> None:
    popen.stdin.close()
    popen.stdout.close()


_process = _SvgProcess()
atexit.register(_process.stop)
os.register_at_fork(after_in_child=_process.forget)
