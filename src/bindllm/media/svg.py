"""Rendering SVG images, which may be untrusted: nothing outside the file is read."""

from __future__ import annotations

import gzip
import io
import re
import zlib
from typing import BinaryIO
from xml.etree import ElementTree

from PIL import Image

from bindllm.errors import MediaError, MissingExtraError

MAX_SVG_BYTES = 32 * 1024 * 1024
"""Largest SVG text, after unpacking, that is rendered."""

MAX_DEPTH = 100
"""Deepest nesting of elements, references followed; at some hundreds the renderer's recursion ends the process."""

# Coordinates of a million and more overflow in the renderer, which then ends the process.
_LARGE = re.compile(r"(?<![\d.])0*[1-9]\d{6,}|\de\+?0*(?:[6-9]|[1-9]\d)", re.IGNORECASE)
_GEOMETRY = re.compile(r"d|points|transform|[cr]?[xy][12]?|r|width|height|stroke-width")

_GZIP = b"\x1f\x8b"
_REFERENCE = re.compile(r"^\s*#(.+?)\s*$|url\(\s*['\"]?#([^'\")]+)")
_INLINE_RASTER = re.compile(r"\s*data:image/(png|jpe?g|gif|webp)[;,]", re.IGNORECASE)


def looks_like_svg(head: bytes) -> bool:
    """Return from the first bytes of a file whether it is an SVG; the only image format that is packed with gzip."""
    # Dropping the zero bytes makes UTF-16 readable enough to find the tag.
    text = head.replace(b"\0", b"").lstrip(b"\xef\xbb\xbf\xff\xfe \t\r\n").lower()
    is_markup = text.startswith(b"<?xml") or (text.startswith(b"<") and (b"<svg" in text or b":svg" in text))
    return head.startswith(_GZIP) or is_markup


def render_svg(stream: BinaryIO, *, size: int) -> Image.Image:
    """Render an SVG on white so that its longer side is ``size`` pixels.

    The proportions come from width and height, else from the viewBox, else from the bounding box of the
    drawing (100 x 100 if it is empty). Images inside are drawn only if they are embedded in the file.

    Args:
        stream: the file, plain or packed with gzip.
        size: longer side in pixels.

    Raises:
        MediaError: not well-formed, without area, too large or nested too deeply.
        MissingExtraError: resvg_py is not installed.
    """
    try:
        import resvg_py
    except ImportError as error:
        raise MissingExtraError("resvg-py", extra="svg", purpose="render SVG images") from error

    try:
        root = ElementTree.fromstring(_read(stream))
    except (ElementTree.ParseError, ValueError, LookupError) as error:
        raise MediaError(f"not a well-formed SVG ({error})") from error
    _check_depth(root)
    _check_coordinates(root)
    _drop_outside_images(root)
    try:
        # Lengths in mm or inches need a resolution; CSS defines 96 dots per inch.
        png = resvg_py.svg_to_bytes(
            svg_string=ElementTree.tostring(root, encoding="unicode"),
            width=size,
            height=size,
            dpi=96,
            background="white",
        )
    except ValueError as error:
        raise MediaError(f"an SVG that cannot be rendered ({error})") from error
    # A panic of the renderer is a BaseException of a class that nothing exports.
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise MediaError(f"an SVG that the renderer cannot handle ({error})") from error
    with Image.open(io.BytesIO(png), formats=["PNG"]) as image:
        return image.convert("RGB")


def _read(stream: BinaryIO) -> bytes:
    """Read the whole text, unpacked, but never more than the limit."""
    packed = stream.read(2) == _GZIP
    stream.seek(0)
    try:
        # One byte more than allowed shows that the text is too long.
        text = (gzip.GzipFile(fileobj=stream) if packed else stream).read(MAX_SVG_BYTES + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise MediaError(f"a damaged gzip file ({error})") from error
    if len(text) > MAX_SVG_BYTES:
        raise MediaError(f"an SVG of more than {MAX_SVG_BYTES:,} bytes; simplify it first")
    return text


def _check_depth(root: ElementTree.Element) -> None:
    """Refuse an SVG whose elements, with ``#references`` followed, nest deeper than `MAX_DEPTH`."""
    by_id = {element.get("id"): element for element in root.iter() if element.get("id")}
    heights: dict[ElementTree.Element, int] = {}

    def height(element: ElementTree.Element, above: int) -> int:
        if above + heights.get(element, 1) > MAX_DEPTH:
            raise MediaError(f"an SVG nested deeper than {MAX_DEPTH} levels; simplify it first")
        if element not in heights:
            heights[element] = 1  # also ends circular references, which the renderer ignores
            texts = [*element.attrib.values(), element.text or ""]
            found = (match for text in texts for match in _REFERENCE.finditer(text))
            referred = (by_id.get(match[1] or match[2]) for match in found)
            below = [*element, *(other for other in referred if other is not None)]
            heights[element] = 1 + max((height(other, above + 1) for other in below), default=0)
        return heights[element]

    height(root, 0)


def _check_coordinates(root: ElementTree.Element) -> None:
    """Refuse shapes with coordinates of a million or more; the size of the whole image may be any."""
    shapes = (element for element in root.iter() if element is not root)
    for key, value in (item for element in shapes for item in element.attrib.items()):
        if _GEOMETRY.fullmatch(key) and (found := _LARGE.search(value)):
            raise MediaError(
                f"an SVG with a coordinate of a million or more ({key}: {found[0]}); scale it down"
            )


def _drop_outside_images(root: ElementTree.Element) -> None:
    """Remove links to files and addresses: only a raster image embedded as data may be drawn."""
    for element in root.iter():
        if element.tag.rpartition("}")[2] not in ("image", "feImage"):
            continue
        for key, value in list(element.attrib.items()):
            is_link = key.rpartition("}")[2] == "href"
            # Links within the file (#id) stay.
            if is_link and not value.startswith("#") and not _INLINE_RASTER.match(value):
                del element.attrib[key]
