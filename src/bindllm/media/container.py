"""Opening audio and video files with PyAV: only plain files in known containers; every error names the file."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Literal

import numpy as np
from PIL import Image

from bindllm.errors import MediaError, MissingExtraError, needs_extra
from bindllm.media.images import MAX_PIXELS
from bindllm.media.source import Source, name_of, open_stream, read_head

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.packet import Packet
    from av.stream import Stream

Track = Literal["audio", "video"]

# Names of FFmpeg's demuxers. Playlists (hls, dash, concat), devices and image sequences would open other files
# or addresses, so they are not among them.
_DEMUXERS = ("aac", "aiff", "avi", "flac", "gif", "matroska", "mov", "mp3", "mpeg", "ogg", "w64", "wav")

_EXPECTED = {
    "audio": "audio (WAV, MP3, FLAC, OGG, M4A, AAC, AIFF) or a video with an audio track (MP4, MOV, WebM, MKV, AVI)",
    "video": "a video (MP4, MOV, WebM, MKV, AVI, MPEG or GIF)",
}
_HEAD = 4096
# Lengths from here on, a little below 2 GiB, stand for an unknown one in the header of a WAV file.
_ENDLESS = 0x7FFF0000
_OPTIONS = {
    "format_whitelist": ",".join(_DEMUXERS),
    # The bytes come from us; a file that refers to others must not make FFmpeg open anything.
    "protocol_whitelist": "none",
    # An MP3 may start with a cover image of some megabytes.
    "formatprobesize": str(1 << 23),
    # Bytes of WAV in one packet. The default is so small that handling packets takes most of the time.
    "max_size": str(1 << 17),
    # Frames are also decoded while a file is opened, to learn about its tracks.
    "max_pixels": str(MAX_PIXELS),
}


class _Opened:
    """A stream as FFmpeg sees it: bytes, and only the ending of the name, which helps to recognize formats.

    A WAV file that was written into a pipe does not have its length, so FFmpeg would take its last packet for
    truncated; it sees the true length instead.
    """

    def __init__(self, stream: BinaryIO, source: str | Path | bytes, head: bytes) -> None:
        ending = Path(name_of(source)).suffix.lower()
        self.name = f"file{ending}" if re.fullmatch(r"\.[a-z0-9]{1,5}", ending) else "file"
        self.seek, self.tell = stream.seek, stream.tell
        self._stream = stream
        # Where the field of an unknown length is, and the length that it should hold.
        self._field = _unknown_length(head)
        self._length = (stream.seek(0, os.SEEK_END) - self._field - 4) if self._field else 0
        stream.seek(0)

    def read(self, size: int) -> bytes:
        at, data = self.tell(), self._stream.read(size)
        field = self._field - at
        # FFmpeg reads far more at once, so the field is never divided between two reads.
        if self._field and 0 <= field <= len(data) - 4 and self._length < _ENDLESS:
            return data[:field] + self._length.to_bytes(4, "little") + data[field + 4 :]
        return data


def _unknown_length(head: bytes) -> int:
    """Return the position of the length of the samples in the head of a WAV file, if it is unknown; else 0."""
    if head[:4] != b"RIFF" or head[8:12] != b"WAVE":
        return 0
    whole, at = int.from_bytes(head[4:8], "little"), 12
    # Chunks: a name and a length of 4 bytes each, then the content, padded to an even length.
    while head[at : at + 4] not in (b"data", b""):
        length = int.from_bytes(head[at + 4 : at + 8], "little")
        at += 8 + length + length % 2
    length = int.from_bytes(head[at + 4 : at + 8], "little")
    # Recorders write the largest length or 0. A file that knows its own length may hold 0 samples.
    is_unknown = length >= _ENDLESS or (length == 0 and not 0 < whole < _ENDLESS)
    return at + 4 if len(head) >= at + 8 and is_unknown else 0


@contextmanager
def open_track(source: Source, track: Track) -> Iterator[tuple[InputContainer, Stream]]:
    """Open a file and choose its best audio or video track (FFmpeg's choice; cover images are not video).

    Only the containers of `_DEMUXERS` are opened, recognized by content, and nothing outside the file is read.
    Errors of FFmpeg inside the ``with`` block become a MediaError.

    Raises:
        MediaError: missing, empty, damaged, not audio or video, without such a track, or frames above `MAX_PIXELS`.
        MissingExtraError: PyAV is not installed.
    """
    with needs_extra("av", extra=track, purpose=f"read {track} files"):
        import av
    if isinstance(source, np.ndarray | Image.Image):
        raise MediaError(f"expected {_EXPECTED[track]}")
    with open_stream(source) as stream:
        head = read_head(stream, _HEAD, _EXPECTED[track])
        try:
            container = av.open(
                _Opened(stream, source, head), "r", options=_OPTIONS, metadata_errors="replace"
            )
        except Exception as error:
            raise MediaError(
                f"cannot be opened as {track} (it starts with {head[:12]!r}: {_reason(error)}); "
                f"expected {_EXPECTED[track]}"
            ) from error
        with decoding(track), container:
            yield container, _choose(container, track)


def _choose(container: InputContainer, track: Track) -> Stream:
    """Return the best track of a kind, ready to decode on one thread."""
    from av.stream import Disposition

    stream = container.streams.best(track)
    if stream is None or Disposition.attached_pic in stream.disposition:
        kinds = ", ".join(sorted({other.type for other in container.streams})) or "nothing"
        raise MediaError(f"no {track} track (it holds: {kinds}); expected {_EXPECTED[track]}")
    context = stream.codec_context
    if context is None:
        raise MediaError(f"no decoder for its {track} track; convert the file")
    if track == "video":
        check_frame_size(context.width, context.height)
    context.options = {"max_pixels": str(MAX_PIXELS)}
    # Files are read in several threads at once, so more threads for each would only compete.
    context.thread_count = 1
    return stream


@contextmanager
def decoding(track: Track) -> Iterator[None]:
    """Turn errors of PyAV while a file is read into a MediaError."""
    from av.error import FFmpegError

    try:
        yield
    except (MediaError, MissingExtraError):
        raise
    # Damaged files can make PyAV itself fail as well: with unknown formats, or numbers out of range.
    except (FFmpegError, ValueError, OverflowError, OSError, RuntimeError) as error:
        raise MediaError(f"damaged or truncated {track} ({_reason(error)}); replace the file") from error


def packets(container: InputContainer, stream: Stream) -> Iterator[Packet]:
    """Yield the packets of a track that hold data, in the order of the file.

    Raises:
        MediaError: a packet is cut off by the end of the file.
    """
    for packet in container.demux(stream):
        # An empty packet would mean the end of the file to the decoder.
        if packet.size == 0:
            continue
        if packet.is_corrupt:
            raise MediaError("damaged or truncated (it ends within a packet); replace the file")
        yield packet


def check_frame_size(width: int, height: int) -> None:
    """Refuse frames of more than `MAX_PIXELS`, and of size 0, which means that FFmpeg could not decode any.

    Raises:
        MediaError: the message has the size.
    """
    if not 1 <= width * height <= MAX_PIXELS:
        raise MediaError(
            f"frames of {width} x {height} pixels; expected 1 to {MAX_PIXELS:,} pixels. "
            "Scale the video down, or replace a damaged file"
        )


def _reason(error: Exception) -> str:
    """Return FFmpeg's own words without its error number and file name."""
    from av.error import ArgumentError, FFmpegError

    # FFmpeg's error for a format that is not among `_DEMUXERS`.
    if isinstance(error, ArgumentError):
        return "another kind of file"
    return error.strerror if isinstance(error, FFmpegError) else str(error)
