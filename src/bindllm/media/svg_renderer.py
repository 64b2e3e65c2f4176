"""The process that renders SVG images for `bindllm.media.images`: a file may make it hang or crash, but nothing else.

It runs as a script, answers requests on its standard input, and ends with it. It imports nothing of bindllm, so that it
starts within a tenth of a second; `images.py` passes the folders of resvg and Pillow.
"""

from __future__ import annotations

import base64
import io
import os
import re
import resource
import signal
import struct
import sys
from typing import BinaryIO
from urllib.parse import unquote_to_bytes
from xml.etree import ElementTree

REQUEST = struct.Struct(">dIII")
"""Before the text of an SVG: seconds that it may take, longer side of the result, most embedded pixels, bytes."""

ANSWER = struct.Struct(">BI")
"""Before the answer: flags, and the bytes of the PNG or of the reason of a failure."""

FAILED, LINKS, TEXT = 1, 2, 4
"""Flags: no PNG; links to images outside of the file, which are not drawn; text, which needs fonts of the machine."""

MAX_MEMORY = 2 * 1024**3
"""Bytes of address space."""

_DATA_URI = re.compile(r"\s*data:((?!image/svg)[^,]*),(.*)", re.IGNORECASE | re.DOTALL)


def serve(requests: BinaryIO, answers: BinaryIO) -> None:
    """Answer requests, one after the other, until there are no more."""
    while len(request := requests.read(REQUEST.size)) == REQUEST.size:
        seconds, size, max_pixels, length = REQUEST.unpack(request)
        # The alarm ends this process, also if the parent was killed meanwhile.
        signal.setitimer(signal.ITIMER_REAL, seconds)
        try:
            flags, answer = render(requests.read(length), size=size, max_pixels=max_pixels)
        # A panic of the renderer is a BaseException of a class that nothing exports.
        except BaseException as error:
            reason = str(error)[:500] or type(error).__name__
            flags, answer = FAILED, reason.encode(errors="replace")
        signal.setitimer(signal.ITIMER_REAL, 0)
        answers.write(ANSWER.pack(flags, len(answer)) + answer)
        answers.flush()


def render(text: bytes, *, size: int, max_pixels: int) -> tuple[int, bytes]:
    """Return flags and the PNG of an SVG on white, its longer side ``size`` pixels.

    Raises:
        ValueError: not well-formed, without area, or an embedded image above ``max_pixels``.
    """
    import resvg_py

    try:
        root = ElementTree.fromstring(text)
    except (ElementTree.ParseError, ValueError, LookupError) as error:
        raise ValueError(f"not well-formed: {error}") from error
    flags = LINKS * _remove_links(root, max_pixels)
    flags |= TEXT * any(element.tag.rpartition("}")[2] == "text" for element in root.iter())
    # Lengths in mm or inches need a resolution; CSS defines 96 dots per inch.
    return flags, resvg_py.svg_to_bytes(
        svg_string=ElementTree.tostring(root, encoding="unicode"),
        width=size,
        height=size,
        dpi=96,
        background="white",
    )


def _remove_links(root: ElementTree.Element, max_pixels: int) -> bool:
    """Leave only raster images that are embedded as data, up to a size in all; return whether there were others."""
    from PIL import Image

    # The limit below takes the place of Pillow's own warning.
    Image.MAX_IMAGE_PIXELS = None
    pixels, is_any = 0, False
    for element in root.iter():
        if element.tag.rpartition("}")[2] not in ("image", "feImage"):
            continue
        for key, value in list(element.attrib.items()):
            # Links within the file (#id) stay.
            if key.rpartition("}")[2] != "href" or value.startswith("#"):
                continue
            found = _DATA_URI.fullmatch(value)
            if found is None:
                is_any = True
                del element.attrib[key]
                continue
            is_base64 = "base64" in found[1].lower()
            data = base64.b64decode(found[2]) if is_base64 else unquote_to_bytes(found[2])
            with Image.open(io.BytesIO(data), formats=["PNG", "JPEG", "GIF", "WEBP"]) as image:
                pixels += image.width * image.height
                # The renderer draws nothing if the type is another one than that of the content.
                kind = f"data:image/{image.format.lower()};base64,"
            element.set(key, kind + base64.b64encode(data).decode())
    if pixels > max_pixels:
        raise ValueError(f"embedded images of {pixels:,} pixels; at most {max_pixels:,} are decoded")
    return is_any


def main() -> None:
    """Serve standard input and output, with limits on memory that only this process has."""
    sys.path += sys.argv[1:]
    # A lower limit that the user has set stays.
    own = resource.getrlimit(resource.RLIMIT_AS)[1]
    limit = MAX_MEMORY if own == resource.RLIM_INFINITY else min(own, MAX_MEMORY)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # The action of the system, which needs no interpreter: the renderer holds its lock.
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    # Whatever a library prints must not get between the answers.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    serve(sys.stdin.buffer, answers)


if __name__ == "__main__":
    main()
