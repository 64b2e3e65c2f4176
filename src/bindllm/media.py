"""What a user hands in: one picture, sound, text, ... with a weight; and how pictures are opened.

Pictures reach every encoder through `open_image`, so that the same file always means the same pixels.
"""

from __future__ import annotations

import hashlib
import io
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal, get_args

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

from bindllm.errors import InputError, MediaError, known_names
from bindllm.svg import looks_like_svg, render_svg

Modality = Literal["image", "video", "audio", "text", "point", "depth", "thermal", "imu"]
MODALITIES: tuple[str, ...] = get_args(Modality)

Source = str | Path | bytes | np.ndarray | Image.Image

MAX_PIXELS = 100_000_000
"""Largest picture (width times height) that is decoded: 100 megapixels, about 300 MB as RGB."""

_CHUNK = 1 << 20
_HEAD = 4096

# Pillow's plugin is named for each signature, so only these formats are ever decoded, and the header can be
# read without `Image.open`, which warns about large pictures according to a process-wide setting.
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


@dataclass(frozen=True, repr=False)
class Media:
    """One image, video, audio, text, point cloud, depth map, thermal image or IMU signal.

    Nothing is opened here: a missing file is reported when an encoder prepares it.

    Args:
        modality: one of `MODALITIES`.
        source: a path, the bytes of a file, an array or a Pillow picture; for text, the text itself.
        weight: share of this media where several are fused into one group; finite and above 0.

    Raises:
        InputError: unknown modality, wrong type of source, or a weight that is not finite and above 0.

    Example:
        >>> Media.image("cat.jpg", weight=0.5)
        Media.image('cat.jpg', weight=0.5)
    """

    modality: str
    source: Source
    weight: float = 1.0

    def __post_init__(self) -> None:
        if self.modality not in MODALITIES:
            raise InputError(f"unknown modality {self.modality!r}. {known_names(self.modality, MODALITIES)}")
        expected = (str,) if self.modality == "text" else get_args(Source)
        if not isinstance(self.source, expected):
            names = " or ".join(kind.__name__ for kind in expected)
            raise InputError(
                f"the source of {self.modality} media must be {names}, not {type(self.source).__name__}"
            )
        if isinstance(self.weight, bool) or not isinstance(self.weight, int | float):
            raise InputError(f"the weight of {self.name} must be a number, not {self.weight!r}")
        if not (math.isfinite(self.weight) and self.weight > 0):
            raise InputError(f"the weight of {self.name} must be finite and above 0, not {self.weight}")

    @classmethod
    def image(cls, source: Source, weight: float = 1.0) -> Media:
        """Return a picture: path, bytes of a file, array [H, W, 3] of uint8, or Pillow picture."""
        return cls("image", source, weight)

    @classmethod
    def video(cls, source: Source, weight: float = 1.0) -> Media:
        """Return a video: path or bytes of a file, or an array of frames."""
        return cls("video", source, weight)

    @classmethod
    def audio(cls, source: Source, weight: float = 1.0) -> Media:
        """Return a sound: path or bytes of a file, or an array of samples."""
        return cls("audio", source, weight)

    @classmethod
    def text(cls, source: str, weight: float = 1.0) -> Media:
        """Return a text that an encoder embeds (the words of a prompt are not media)."""
        return cls("text", source, weight)

    @classmethod
    def point(cls, source: Source, weight: float = 1.0) -> Media:
        """Return a point cloud: path or bytes of a file, or an array of points."""
        return cls("point", source, weight)

    @classmethod
    def depth(cls, source: Source, weight: float = 1.0) -> Media:
        """Return a depth map: path or bytes of a file, or an array."""
        return cls("depth", source, weight)

    @classmethod
    def thermal(cls, source: Source, weight: float = 1.0) -> Media:
        """Return a thermal image: path or bytes of a file, or an array."""
        return cls("thermal", source, weight)

    @classmethod
    def imu(cls, source: Source, weight: float = 1.0) -> Media:
        """Return the signal of an inertial measurement unit: path or bytes of a file, or an array."""
        return cls("imu", source, weight)

    @property
    def name(self) -> str:
        """A short name for messages: the path, the first words of a text, or the size of an array."""
        if self.modality == "text":
            words = str(self.source)
            return repr(words if len(words) <= 40 else words[:37] + "...")
        return _name_of(self.source)

    def content_hash(self) -> str:
        """Return the sha256 of modality and content, in hex; the weight and the path do not count.

        A file and its bytes have the same hash. An array counts with its shape and dtype.

        Raises:
            MediaError: the file cannot be read.
        """
        digest = hashlib.sha256(f"{self.modality}\n".encode())
        for part in _content(self.source, is_text=self.modality == "text"):
            digest.update(part)
        return digest.hexdigest()

    def __repr__(self) -> str:
        name = self.name if self.modality == "text" else repr(self.name)
        weight = "" if self.weight == 1 else f", weight={self.weight}"
        return f"Media.{self.modality}({name}{weight})"


def _name_of(source: Source) -> str:
    """Return the path, or a few words about bytes, an array or a Pillow picture."""
    match source:
        case bytes():
            return f"<{len(source)} bytes>"
        case np.ndarray():
            return f"<array {list(source.shape)} {source.dtype}>"
        case Image.Image():
            return f"<picture {source.width}x{source.height} {source.mode}>"
        case _:
            return str(source)


def _content(source: Source, *, is_text: bool) -> Iterator[bytes | memoryview]:
    """Yield what identifies the content: a word for its kind first, so that kinds never collide."""
    if is_text:
        yield b"text\n" + str(source).encode("utf-8", "surrogatepass")
    elif isinstance(source, np.ndarray):
        yield f"array {source.dtype.str} {source.shape}\n".encode()
        yield np.ascontiguousarray(source).tobytes()
    elif isinstance(source, Image.Image):
        orientation, transparency = source.getexif().get(0x0112), source.info.get("transparency")
        yield f"picture {source.mode} {source.size} {orientation} {transparency}\n".encode()
        yield bytes(source.getpalette() or ())
        yield source.tobytes()
    else:
        yield b"file\n"
        with _stream(source) as stream:
            while chunk := stream.read(_CHUNK):
                yield chunk


@contextmanager
def _stream(source: str | Path | bytes) -> Iterator[BinaryIO]:
    """Open a file or bytes for reading; what the system refuses becomes a MediaError that names the file."""
    if isinstance(source, bytes):
        yield io.BytesIO(source)
        return
    path = Path(source)
    if path.is_dir():
        raise MediaError(f"{path}: this is a folder; expected a file")
    try:
        stream = path.open("rb")
    except OSError as error:
        raise MediaError(f"{path}: cannot be opened ({error.strerror}); check the path") from error
    with stream:
        yield stream


def open_image(source: Source, *, size: int = 448) -> Image.Image:
    """Open a picture as upright RGB, transparent parts on white.

    JPEG, PNG, WebP, GIF, BMP, TIFF and SVG are recognised by their content, not by their name. The first
    frame of an animation is taken and the EXIF orientation is applied; colour profiles are not. 16-bit grey
    is scaled by its range (0..65535). 32-bit grey must lie in 0..1 (floats only), 0..255 or 0..65535.

    Args:
        source: path, bytes of a file, array [H, W], [H, W, 3] or [H, W, 4] of uint8, or Pillow picture.
        size: side in pixels that the caller will shrink the picture to. An SVG is rendered so that its
            longer side has this length. A JPEG is decoded at 1/2, 1/4 or 1/8 of its size where both sides
            stay at least twice this length, which bounds time and memory. All others keep their size.

    Raises:
        MediaError: missing, empty, truncated, not a picture, or above `MAX_PIXELS`; it names the file.
        MissingExtraError: an SVG without the extra ``svg``.
    """
    name = _name_of(source)
    if isinstance(source, np.ndarray):
        return _to_rgb(_from_array(source, name), name)
    if isinstance(source, Image.Image):
        with _reading(name):
            _check_size(source, name)
            return _to_rgb(source, name)
    with _stream(source) as stream:
        head = stream.read(_HEAD)
        stream.seek(0)
        if not head:
            raise MediaError(f"{name}: the file is empty; expected a picture")
        if looks_like_svg(head):
            return render_svg(stream, size=size, name=name)
        with _reading(name), _raster_reader(head, name)(stream) as image:
            _check_size(image, name)
            if isinstance(image, JpegImagePlugin.JpegImageFile):
                image.draft(None, (2 * size, 2 * size))
            return _to_rgb(image, name)


def _from_array(array: np.ndarray, name: str) -> Image.Image:
    shape_fits = array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (3, 4))
    if not shape_fits or array.dtype != np.uint8 or array.size == 0:
        raise MediaError(f"{name}: expected a filled array [H, W], [H, W, 3] or [H, W, 4] of uint8")
    return Image.fromarray(array)


def _raster_reader(head: bytes, name: str) -> type[ImageFile.ImageFile]:
    """Return the class that reads files which start like this one."""
    for signature, reader in _RASTER_READERS:
        if head.startswith(signature):
            return reader
    raise MediaError(
        f"{name}: not a picture (it starts with {head[:12]!r}); expected JPEG, PNG, WebP, GIF, BMP, TIFF or SVG"
    )


@contextmanager
def _reading(name: str) -> Iterator[None]:
    """Turn what Pillow raises while it reads a picture into a MediaError."""
    try:
        yield
    except (MediaError, MemoryError):
        raise
    # Damaged files make it raise nearly every class of exception: all of them mean "cannot be decoded".
    except Exception as error:
        raise MediaError(f"{name}: a damaged or truncated picture ({error}); replace the file") from error


def _check_size(image: Image.Image, name: str) -> None:
    if image.width * image.height > MAX_PIXELS:
        raise MediaError(
            f"{name}: {image.width} x {image.height} pixels; at most {MAX_PIXELS:,} are decoded. "
            "Scale the picture down first"
        )


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    """Decode, turn upright, and convert every mode to RGB on white; the picture given keeps its mode."""
    image.load()
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        return _grey_from_wide(image, name)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def _grey_from_wide(image: Image.Image, name: str) -> Image.Image:
    """Scale 16-bit and 32-bit grey to 8 bits by its range; Pillow itself would clip at 255."""
    values = np.asarray(image, dtype=np.float32)
    low, high = float(values.min()), float(values.max())
    if image.mode.startswith("I;16"):
        top = 65535.0
    else:
        tops = (1.0, 255.0, 65535.0) if image.mode == "F" else (255.0, 65535.0)
        top = next((top for top in tops if high <= top), math.nan)
    if not (low >= 0 and high <= top):
        raise MediaError(
            f"{name}: 32-bit values from {low:g} to {high:g}; expected 0..1 (floats), 0..255 or 0..65535. "
            "Scale the values first"
        )
    return Image.fromarray(np.rint(values * (255.0 / top)).astype(np.uint8)).convert("RGB")
