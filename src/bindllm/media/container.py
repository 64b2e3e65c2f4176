"""Opening audio and video files with PyAV: only plain files in known containers; every error names the file."""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Literal

import numpy as np
from PIL import Image

from bindllm.errors import MediaError, MissingExtraError, needs_extra
from bindllm.media.images import MAX_PIXELS
from bindllm.media.limits import at_most, check_time
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
}


# FFmpeg keeps some 32 bytes for each sample that the header of an MP4 or MOV file claims.
_MOST_SAMPLES = 20_000_000
_SAMPLES_OF_FRAME = 10
_MOST_BOXES = 1_000_000


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


def _check_samples(stream: BinaryIO) -> None:
    """Refuse an MP4 or MOV file whose header claims far more samples than any video has, before FFmpeg counts them.

    A header of a few hundred bytes can claim billions: samples of one constant size need no list.

    Raises:
        MediaError: the message has the number of samples.
    """
    most = min(_MOST_SAMPLES, _SAMPLES_OF_FRAME * at_most("frames", _MOST_SAMPLES))
    # How to read this: tracks -> kinds of boxes -> the first bytes of each such box.
    tracks: dict[int, dict[bytes, list[bytes]]] = defaultdict(lambda: defaultdict(list))
    for track, kind, body in _boxes(stream):
        if kind == b"cmov":
            raise MediaError("an old MOV file with a packed header; convert it to MP4")
        if kind in (b"stsz", b"stz2", b"stts", b"stsc", b"stco", b"co64", b"trun", b"elst", b"hdlr"):
            tracks[track][kind].append(body)
    for boxes in tracks.values():
        if (samples := _count_samples(boxes)) > most:
            raise MediaError(
                f"its header claims {samples:,} samples; at most {most:,} are read. "
                "Cut the file, or replace a damaged one"
            )
    stream.seek(0)


def _count_samples(boxes: dict[bytes, list[bytes]]) -> int:
    """Return the number of samples that FFmpeg would keep for a track, from the starts of its boxes."""

    def number(kind: bytes, at: int) -> int:
        # The largest of several boxes, because FFmpeg may take any of them.
        return max((int.from_bytes(body[at : at + 4], "big") for body in boxes[kind]), default=0)

    samples = max(number(b"stsz", 8), number(b"stz2", 8))
    # Each sample of PCM lasts one unit of time; they are kept in blocks of at most 1,024. A track of MOV also has a
    # handler of its data.
    handlers = {body[8:12] for body in boxes[b"hdlr"]}
    durations = [body[4:8] + body[12:16] for body in boxes[b"stts"]]
    is_sound = b"soun" in handlers and handlers <= {b"soun", b"alis", b"url "}
    if is_sound and durations == [b"\0\0\0\1" * 2]:
        # Entries of 12 bytes after the first 8: chunk, samples in it, description.
        entries = (body[at : at + 4] for body in boxes[b"stsc"] for at in range(12, len(body), 12))
        largest = max((int.from_bytes(entry, "big") for entry in entries), default=0)
        samples = max(number(b"stco", 4), number(b"co64", 4)) * -(-largest // 1024)
    samples += sum(int.from_bytes(body[4:8], "big") for body in boxes[b"trun"])
    # Each edit may repeat the samples of the whole track.
    return samples * max(1, number(b"elst", 4))


def _boxes(stream: BinaryIO) -> Iterator[tuple[int, bytes, bytes]]:
    """Yield track, kind and the first bytes of every box in a file of boxes (ISO/IEC 14496-12); of others, nothing."""
    stream.seek(0, os.SEEK_END)
    waiting, seen = [(0, stream.tell(), 0)], 0
    while waiting:
        at, end, track = waiting.pop()
        while at + 8 <= end:
            stream.seek(at)
            head = stream.read(32)
            size, kind, start = int.from_bytes(head[:4], "big"), head[4:8], 8
            # 1: the size follows in 8 bytes. 0: up to the end.
            if size == 1:
                size, start = int.from_bytes(head[8:16], "big"), 16
            size = size or end - at
            if size < start or not all(32 <= byte < 127 or byte == 0xA9 for byte in kind):
                break
            if (seen := seen + 1) > _MOST_BOXES:
                raise MediaError(f"more than {_MOST_BOXES:,} boxes in its header; replace the file")
            track = at if kind == b"trak" else track
            # Of chunks every entry counts, of other boxes the start.
            length = min(size, end - at) if kind == b"stsc" else 32
            yield track, kind, (head + stream.read(length - len(head)) if length > 32 else head)[start:length]
            # Inside all but the samples themselves: FFmpeg looks for boxes in many kinds of boxes.
            if kind != b"mdat":
                waiting.append((at + start, min(at + size, end), track))
            at += size
            track = 0 if kind == b"trak" else track


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
        _check_samples(stream)
        try:
            container = av.open(
                _Opened(stream, source, head),
                "r",
                # Frames are also decoded while a file is opened, to learn about its tracks.
                options=_OPTIONS | _max_pixels(),
                metadata_errors="replace",
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
    context.options = _max_pixels()
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
        check_time()
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
    most = at_most("pixels", MAX_PIXELS)
    if not 1 <= width * height <= most:
        raise MediaError(
            f"frames of {width} x {height} pixels; expected 1 to {most:,} pixels. "
            "Scale the video down, or replace a damaged file"
        )


def _max_pixels() -> dict[str, str]:
    return {"max_pixels": str(at_most("pixels", MAX_PIXELS))}


def _reason(error: Exception) -> str:
    """Return FFmpeg's own words without its error number and file name."""
    from av.error import ArgumentError, FFmpegError

    # FFmpeg's error for a format that is not among `_DEMUXERS`.
    if isinstance(error, ArgumentError):
        return "another kind of file"
    return error.strerror if isinstance(error, FFmpegError) else str(error)
