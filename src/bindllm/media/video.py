"""Chosen frames of videos: found by their times, reached by seeking, one in memory at a time."""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from typing import TYPE_CHECKING, Self

import numpy as np

from bindllm.errors import MediaError, reading
from bindllm.media.container import check_frame_size, open_track, packets
from bindllm.media.limits import at_most
from bindllm.media.source import Source, name_of

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.packet import Packet
    from av.video.frame import VideoFrame
    from av.video.stream import VideoStream

ARRAY_RATE = Fraction(25)
"""Frames a second of a video that is given as an array, or whose file has no rate."""

MAX_FRAMES = 10_000_000
"""Longest video that is read: 46 hours at 60 frames a second."""

Pick = Callable[[int, Fraction], Sequence[int]]


def read_frames(source: Source, *, pick: Pick) -> Iterator[tuple[int, np.ndarray]]:
    """Yield the picked frames of a video, in order.

    Frames are numbered in the order in which they are shown, without those that an edit list hides. The file is
    read once without decoding, for the time of every frame; then each picked frame is decoded from the key frame
    before it. If the times are missing or not unique, the frames are counted by decoding instead, still one
    at a time. A rotation by quarter turns that the file asks for (phones do) is applied, mirroring is not.
    Transparent parts become white. A truncated file is read up to its end if its container allows it.

    Args:
        source: path or bytes of a video file, or an array [N, H, W, 3] of uint8 at `ARRAY_RATE`.
        pick: gets the number of frames and the average rate in frames a second, and returns rising numbers of
            frames. It may be called twice, if the file holds other frames than it claims.

    Yields:
        number of the frame, and the frame, uint8 [H, W, 3].

    Raises:
        MediaError: it cannot be opened or decoded, has no video track or no frames, is longer than `MAX_FRAMES`,
            or its frames are larger than `MAX_PIXELS`; it names the file.
        MissingExtraError: PyAV is not installed.

    Examples:
        >>> video = np.zeros((50, 8, 8, 3), np.uint8)
        >>> [number for number, _ in read_frames(video, pick=lambda count, rate: [0, count // 2])]
        [0, 25]
    """
    with reading(name_of(source)):
        if isinstance(source, np.ndarray):
            if source.ndim != 4 or source.shape[3] != 3 or source.dtype != np.uint8 or source.size == 0:
                raise MediaError("expected a non-empty array [N, H, W, 3] of uint8")
            yield from ((number, source[number]) for number in pick(len(source), ARRAY_RATE))
            return
        yield from _by_time(source, pick)


@dataclass(frozen=True)
class _Timeline:
    """The times in the packets of a video.

    Args:
        times: time of every frame that is shown, rising, in units of the track; None: some are missing or equal.
        keys: times of the frames that decoding can start from, rising.
    """

    times: np.ndarray | None
    keys: np.ndarray
    rate: Fraction


def _by_time(source: Source, pick: Pick) -> Iterator[tuple[int, np.ndarray]]:
    """Yield the picked frames, each found by its time."""
    # Opened again for decoding, because this pass ends at the end of the file.
    with open_track(source, "video") as (container, stream):
        timeline = _scan(container, stream)
    if timeline.times is None:
        yield from _by_counting(source, pick)
        return
    wanted = _picked(pick, len(timeline.times), timeline.rate)
    with _Finder(source, timeline) as finder:
        for position, number in enumerate(wanted):
            frame = finder.find(number)
            # If not even the first one is found, the times are wrong; later, the file is damaged.
            if frame is None and position == 0:
                break
            if frame is None:
                raise MediaError(f"frame {number} cannot be decoded; the file is damaged, replace it")
            yield number, _as_rgb(frame, finder.aspect)
        else:
            return
    # The times of the packets are not those of the frames, so the frames are counted by decoding.
    yield from _by_counting(source, pick)


def _scan(container: InputContainer, stream: VideoStream) -> _Timeline:
    """Read all packets without decoding them."""
    # 8 bytes a frame, because a long video has millions of them.
    times, keys = array("q"), array("q")
    # AVI keeps no times. FFmpeg derives them from the order of the packets, which is wrong if frames are reordered.
    # MPEG keeps them, but seeking in it ends at other frames.
    kind, is_reordered = container.format.name, stream.codec_context.has_b_frames
    complete = not (kind == "mpeg" or (kind == "avi" and is_reordered))
    for packet in packets(container, stream):
        # An edit list hides discarded packets: they are decoded but not shown.
        if packet.is_discard or _is_invisible(packet, stream):
            continue
        if packet.pts is None:
            complete = False
            break
        times.append(packet.pts)
        if packet.is_keyframe:
            keys.append(packet.pts)
        _check_count(len(times))
    # Packets come in decoding order, which differs from that of display if there are B-frames.
    rising = np.sort(np.frombuffer(times, np.int64))
    if complete and len(rising) == 0:
        raise MediaError("no frames; expected a video")
    rate = stream.average_rate
    # Without a rate in the file: intervals divided by seconds.
    if not rate or rate < 0:
        seconds = (rising[-1] - rising[0]).item() * stream.time_base if len(rising) > 1 else Fraction(0)
        rate = (len(rising) - 1) / seconds if seconds > 0 else ARRAY_RATE
    # Times identify frames, so two of them must not be equal.
    unique = complete and bool((np.diff(rising) > 0).all())
    return _Timeline(rising if unique else None, np.sort(np.frombuffer(keys, np.int64)), Fraction(rate))


def _is_invisible(packet: Packet, stream: VideoStream) -> bool:
    """Whether a VP8 packet only updates a reference: bit 4 of its first byte says "show" (RFC 6386, 9.1)."""
    return stream.codec_context.name == "vp8" and not memoryview(packet)[0] & 0x10


class _Finder:
    """A video that is open for seeking; frames are identified by their times."""

    def __init__(self, source: Source, timeline: _Timeline) -> None:
        assert timeline.times is not None
        self._source, self._times, self._keys = source, timeline.times, timeline.keys
        self._resources = ExitStack()
        self._frames: Iterator[VideoFrame] = iter(())
        self._reached: int | None = None

    def __enter__(self) -> Self:
        self._open()
        return self

    def __exit__(self, *error: object) -> None:
        self._resources.__exit__(*error)

    def find(self, number: int) -> VideoFrame | None:
        """Return a frame; None if no frame has its time, even after everything before it is decoded."""
        target = self._times[number].item()
        # The last key frame at or before the target.
        key = bisect_right(self._keys, target) - 1
        # Without a key frame in between, decoding further is cheaper than seeking.
        if (
            self._reached is not None
            and self._reached < target
            and (key < 0 or self._keys[key] <= self._reached)
        ):
            frame = self._decode_to(target)
            if frame is not None:
                return frame
        # A key frame may be none: then the one before it is tried, and at last the beginning of the file.
        for start in self._keys[max(0, key - 1) : key + 1][::-1].tolist():
            if self._seek(start):
                frame = self._decode_to(target)
                if frame is not None and not frame.is_corrupt:
                    return frame
        # At last from the beginning, which needs no seeking.
        self._open()
        return self._decode_to(target)

    def _open(self) -> None:
        """Start from the beginning of the file."""
        self._resources.close()
        self._container, self._stream = self._resources.enter_context(open_track(self._source, "video"))
        self.aspect = self._stream.sample_aspect_ratio
        self._frames = _frames(self._container, self._stream)
        self._reached = None

    def _seek(self, start: int) -> bool:
        """Go to a key frame; False: this container cannot."""
        from av.error import FFmpegError

        try:
            self._container.seek(start, stream=self._stream)
        except FFmpegError:
            return False
        self._frames = _frames(self._container, self._stream)
        self._reached = None
        return True

    def _decode_to(self, target: int) -> VideoFrame | None:
        for frame in self._frames:
            if frame.pts is not None:
                self._reached = frame.pts
                # Frames come in the order of display: past the target, it cannot follow.
                if frame.pts >= target:
                    return frame if frame.pts == target else None
        return None


def _by_counting(source: Source, pick: Pick) -> Iterator[tuple[int, np.ndarray]]:
    """Yield the picked frames of a video whose frames must be decoded to be counted."""
    # Two passes with one frame in memory: ``pick`` needs the number of frames first.
    with open_track(source, "video") as (container, stream):
        rate, aspect = stream.average_rate or stream.guessed_rate or ARRAY_RATE, stream.sample_aspect_ratio
        count = 0
        for _ in _frames(container, stream):
            count += 1
            _check_count(count)
    if count == 0:
        raise MediaError("no frame can be decoded; the file is damaged, replace it")
    wanted = _picked(pick, count, Fraction(rate))
    with open_track(source, "video") as (container, stream):
        frames = enumerate(_frames(container, stream))
        for number in wanted:
            # Numbers rise, so one pass over the frames finds them all.
            frame = next((frame for at, frame in frames if at == number), None)
            if frame is None:
                raise MediaError("the file changed while it was read; run again")
            yield number, _as_rgb(frame, aspect)


def _frames(container: InputContainer, stream: VideoStream) -> Iterator[VideoFrame]:
    """Decode from the current position; packets that cannot be decoded give no frame."""
    from av.error import FFmpegError

    for packet in packets(container, stream):
        try:
            frames = packet.decode()
        except FFmpegError:
            continue
        yield from frames
    # None makes the decoder give the frames that it still holds.
    yield from stream.decode(None)


def _as_rgb(frame: VideoFrame, aspect: Fraction | None) -> np.ndarray:
    """Return a frame upright and with square pixels as uint8 [H, W, 3], transparent parts on white.

    ``aspect`` is the width of a stored pixel over its height; None and 0 mean that it is unknown.
    """
    width, height, aspect = frame.width, frame.height, aspect or Fraction(1)
    # One side grows and none shrinks, so that no pixel is lost.
    size = (round(width * aspect), height) if aspect >= 1 else (width, round(height / aspect))
    check_frame_size(*size)
    shown = dict(zip(("width", "height"), size, strict=True)) if size != (width, height) else {}
    if any(part.is_alpha for part in frame.format.components):
        values = frame.to_ndarray(format="rgba", **shown).astype(np.uint16)
        alpha = values[..., 3:]
        # Over white in integers; 127 rounds to the nearest.
        rgb = ((values[..., :3] * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)
    else:
        rgb = frame.to_ndarray(format="rgb24", **shown)
    # Both count counterclockwise: the file in degrees, rot90 in quarter turns.
    turns, rest = divmod(frame.rotation, 90)
    return np.ascontiguousarray(np.rot90(rgb, turns)) if turns and not rest else rgb


def _check_count(count: int) -> None:
    if count > (most := at_most("frames", MAX_FRAMES)):
        raise MediaError(f"more than {most:,} frames; cut the video first")


def _picked(pick: Pick, count: int, rate: Fraction) -> list[int]:
    """Return the numbers of the picked frames, of a video that is not too long."""
    # Without limits of a request, only the number of frames counts.
    if count / rate > (most := at_most("seconds", float("inf"))):
        raise MediaError(
            f"a video of {float(count / rate):,.0f} seconds; at most {most:,} are read. Cut it first"
        )
    wanted = list(pick(count, rate))
    # Our own faults, never the file's.
    assert all(a < b for a, b in pairwise(wanted)), "frames are picked in rising order"
    assert all(0 <= number < count for number in wanted), f"frames are picked from {count}"
    return wanted
