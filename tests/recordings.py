"""Synthetic audio, video and PNG files for the tests of loaders, and videos whose frames show their own number."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bindllm.errors import MediaError

HEIGHT, WIDTH = 64, 96
_BITS, _BAR = 10, 9
_FULL_SCALE = {"u8": 127, "s16": 32767, "s32": 2**31 - 1024}


def wav(samples: np.ndarray, rate: int, *, codec: int = 1) -> bytes:
    """Return samples [C, N] as a WAV file; codec 1: integers, 3: floats."""
    data = np.ascontiguousarray(samples.T).tobytes()
    channels, size = len(samples), samples.dtype.itemsize
    form = struct.pack("<HHIIHH", codec, channels, rate, rate * channels * size, channels * size, 8 * size)
    head = b"WAVEfmt " + struct.pack("<I", len(form)) + form + b"data" + struct.pack("<I", len(data))
    return b"RIFF" + struct.pack("<I", len(head) + len(data)) + head + data


def sound_file(container: str, codec: str, samples: np.ndarray, rate: int, *, form: str) -> bytes:
    """Return samples [C, N] in -1..1 as a file of another container, the encoder fed with a sample format."""
    import av

    layout = {1: "mono", 2: "stereo", 6: "5.1"}[len(samples)]
    scaled = samples * _FULL_SCALE.get(form.rstrip("p"), 1) + (128 if form == "u8" else 0)
    file = io.BytesIO()
    with av.open(file, "w", format=container) as output:
        stream = output.add_stream(codec, rate=rate, layout=layout, options={"strict": "-2"})
        stream.codec_context.format = form
        for start in range(0, samples.shape[1], 1024):
            block = scaled[:, start : start + 1024]
            block = block if form.endswith("p") else block.T.reshape(1, -1)
            block = np.ascontiguousarray(block.astype(_dtype(form)))
            frame = av.AudioFrame.from_ndarray(block, format=form, layout=layout)
            frame.sample_rate, frame.pts = rate, start
            output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    return file.getvalue()


def _dtype(form: str) -> type:
    kinds = {"u8": np.uint8, "s16": np.int16, "s32": np.int32, "flt": np.float32, "dbl": np.float64}
    return kinds[form.rstrip("p")]


def numbered(number: int) -> np.ndarray:
    """Return a frame that shows a number below 1024 as ten dark or bright bars: uint8 [64, 96, 3]."""
    frame = np.full((HEIGHT, WIDTH, 3), 20, np.uint8)
    for bit in range(_BITS):
        if number >> bit & 1:
            frame[:, bit * _BAR : (bit + 1) * _BAR] = 235
    return frame


def number_of(frame: np.ndarray) -> int:
    """Return the number that a frame shows."""
    bars = (frame[:, bit * _BAR + 2 : (bit + 1) * _BAR - 2] for bit in range(_BITS))
    return sum(1 << bit for bit, bar in enumerate(bars) if bar.mean() > 128)


def video_file(
    container: str,
    codec: str,
    frames: Sequence[np.ndarray],
    *,
    rate: int | Fraction = 25,
    pixels: str = "yuv420p",
    options: dict[str, str] | None = None,
    times: Sequence[int] | None = None,
    rotation: int = 0,
    aspect: Fraction | None = None,
) -> bytes:
    """Return frames [H, W, 3] as a video file; ``times`` are those of the frames in units of 1/1000 second."""
    import av

    file = io.BytesIO()
    with av.open(file, "w", format=container) as output:
        stream = output.add_stream(codec, rate=rate, options=options or {})
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = pixels
        if aspect is not None:
            stream.codec_context.sample_aspect_ratio = aspect
        if times is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        if rotation:
            stream.set_display_rotation(rotation)
        for number, values in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(values, format="rgb24").reformat(format=pixels)
            if times is not None:
                frame.pts, frame.time_base = times[number], Fraction(1, 1000)
            output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    return file.getvalue()


def png(size: tuple[int, int], bits: int, kind: int, content: bytes, level: bytes | None = None) -> bytes:
    """Return a PNG of these bytes, each line after a zero byte; kind 0: gray, 2: color, 4: gray with alpha.

    ``level`` is the gray or the color that is transparent, 2 bytes a channel. Pillow writes only some of these files.
    """
    chunks = [(b"IHDR", struct.pack(">2I5B", *size, bits, kind, 0, 0, 0)), (b"tRNS", level)]
    chunks += [(b"IDAT", zlib.compress(content)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in chunks
        if data is not None
    )


def assert_refused(open_file: Callable[[Path], Any], content: bytes | None, path: Path, reason: str) -> None:
    """A file of this content (None: a missing file) is a `MediaError` with its path and the reason."""
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(MediaError, match=reason) as caught:
        open_file(path)
    assert str(path) in str(caught.value)
