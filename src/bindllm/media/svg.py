"""Rendering SVG images, which may be untrusted: in a process of its own, and nothing outside the file is read."""

from __future__ import annotations

import atexit
import gzip
import io
import logging
import os
import signal
import subprocess
import sys
import threading
import zlib
from importlib.util import find_spec
from pathlib import Path
from typing import BinaryIO

from PIL import Image

from bindllm.errors import MediaError, MissingExtraError, printable
from bindllm.media import svg_renderer
from bindllm.media.svg_renderer import ANSWER, FAILED, LINKS, REQUEST, TEXT

MAX_SVG_BYTES = 32 * 1024 * 1024
"""Largest SVG text, after unpacking, that is rendered."""

MAX_SECONDS = 20.0
"""Longest time that one SVG may take; most need a few milliseconds."""

_WARNINGS = {
    LINKS: "images that an SVG links to are not drawn; embed them",
    TEXT: "text of an SVG is drawn in the fonts of this machine, or not at all; convert it to paths",
}
# Warnings that were given: a whole data set of one kind gives one line.
_warned: set[int] = set()

_log = logging.getLogger("bindllm")

_GZIP = b"\x1f\x8b"


def looks_like_svg(head: bytes) -> bool:
    """Return from the first bytes of a file whether it is an SVG; the only image format that is packed with gzip."""
    # Dropping the zero bytes makes UTF-16 readable enough to find the tag.
    text = head.replace(b"\0", b"").lstrip(b"\xef\xbb\xbf\xff\xfe \t\r\n").lower()
    is_markup = text.startswith(b"<?xml") or (text.startswith(b"<") and (b"<svg" in text or b":svg" in text))
    return head.startswith(_GZIP) or is_markup


def render_svg(stream: BinaryIO, *, size: int, max_pixels: int, name: str) -> Image.Image:
    """Render an SVG on white so that its longer side is ``size`` pixels.

    The proportions come from width and height, else from the viewBox, else from the bounding box of the
    drawing (100 x 100 if it is empty). Images inside are drawn only if they are embedded in the file, and text only in
    the fonts of this machine; the first file of each kind gives a warning.

    Args:
        stream: the file, plain or packed with gzip.
        size: longer side in pixels.
        max_pixels: most pixels of all embedded images together.
        name: name of the file, for warnings.

    Raises:
        MediaError: not well-formed, without area, too large, or it needs more than `MAX_SECONDS`, too much memory, or
            crashes the renderer.
        MissingExtraError: resvg_py is not installed.
    """
    flags, png = _process.render(_read(stream), size=size, max_pixels=max_pixels)
    for flag in (flag for flag in _WARNINGS if flags & flag and flag not in _warned):
        _warned.add(flag)
        _log.warning("%s: %s (further files are not reported)", printable(name), _WARNINGS[flag])
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


class _Process:
    """One renderer for each process of ours, started at the first SVG, and again after a file made it end."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._popen: subprocess.Popen[bytes] | None = None

    def render(self, text: bytes, *, size: int, max_pixels: int) -> tuple[int, bytes]:
        """Return the flags of the renderer and the PNG; the threads of a process take turns."""
        with self._lock:
            running = self._running()
            try:
                _write(running, REQUEST.pack(MAX_SECONDS, size, max_pixels, len(text)) + text)
                flags, length = ANSWER.unpack(_read_exactly(running, ANSWER.size))
                answer = _read_exactly(running, length)
            except (OSError, EOFError) as error:
                code, reason = self.stop(), f"takes more than {MAX_SECONDS:g} seconds"
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
        _close(popen)
        popen.kill()
        return popen.wait()

    def forget(self) -> None:
        """Leave the process, in a forked child, to the parent; the next SVG starts one for the child."""
        # Another thread of the parent may have held the lock.
        self._lock = threading.Lock()
        if self._popen is not None:
            _close(self._popen)
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


def _write(popen: subprocess.Popen[bytes], data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[popen.stdin.write(rest) :]


def _read_exactly(popen: subprocess.Popen[bytes], size: int) -> bytes:
    data = b""
    while len(data) < size:
        if not (more := popen.stdout.read(size - len(data))):
            raise EOFError
        data += more
    return data


def _close(popen: subprocess.Popen[bytes]) -> None:
    popen.stdin.close()
    popen.stdout.close()


_process = _Process()
atexit.register(_process.stop)
os.register_at_fork(after_in_child=_process.forget)
