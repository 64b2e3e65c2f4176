"""Parts of audio files and audio tracks, cut and resampled without holding a long recording in memory.

`Resampler` gives the same numbers for any part as resampling the whole would.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from math import gcd
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from bindllm.errors import MediaError, reading
from bindllm.media.container import open_track, packets
from bindllm.media.limits import at_most, warn
from bindllm.media.source import ARRAY_RATE, Source, Waveform, name_of

if TYPE_CHECKING:
    from av.audio.frame import AudioFrame
    from av.audio.stream import AudioStream
    from av.packet import Packet

MAX_SECONDS = 24 * 3600
"""Longest audio that is read; a few kilobytes can claim years of silence."""

MAX_RATE = 384_000
"""Highest sample rate that is read, in samples a second."""

MAX_CHANNELS = 64

LOUDEST = 100.0
"""Largest value that is read. Full scale is 1: a little above is loud, far above is another unit."""

_KEPT = 1 << 23
"""Values (samples times channels) up to which the first pass is kept, so that short audio is decoded once."""

_BLOCK = 1 << 16

_CROSSINGS = 6
"""Half width of the kernel, in zero crossings of its sinc."""

_ROLLOFF_PERCENT = 99
"""Cut-off frequency in percent of the lower of both Nyquist frequencies."""

_PRODUCTS = 1 << 20
"""Products that are held at once: outputs of a block times taps."""


class _Block(NamedTuple):
    """Samples [C, n] in file order, of the type that the file has, and their rate."""

    rate: int
    samples: np.ndarray


def cut_audio(
    source: Source, *, rate: int, cut: Callable[[int], Sequence[tuple[int, int]]]
) -> list[np.ndarray]:
    """Return parts of an audio file, with the same numbers as if the whole was resampled.

    A file is decoded once to learn its exact length and, unless it is short, once more for the parts; memory
    depends on the parts, not on the file. Gaps between packets are closed: samples are taken in their
    order. Values of 8, 16 and 32 bits are divided by 128, 32768 and 2**31; floating-point values may pass 1 a
    little, up to `LOUDEST`. Silence is valid audio.

    Args:
        source: path or bytes of an audio file or of a video with an audio track, or an array [N] or [C, N] of
            int16 or floats at `ARRAY_RATE`, or at the rate of a `Waveform`.
        rate: samples a second of the parts.
        cut: gets the length in samples at ``rate`` and returns spans (start, stop) at ``rate``; they are
            limited to the length.

    Returns:
        one [C, n] float32 for each span, C channels, in -1..1.

    Raises:
        MediaError: it cannot be opened or decoded, has no audio track or no samples, holds NaN or infinity, or
            passes `MAX_SECONDS`, `MAX_RATE`, `MAX_CHANNELS` or `LOUDEST`; it names the file.
        MissingExtraError: PyAV is not installed.

    Examples:
        >>> [part.shape for part in cut_audio(np.zeros(48_000), rate=8_000, cut=lambda n: [(0, 10), (n - 5, n)])]
        [(1, 10), (1, 5)]
    """
    with reading(name_of(source)):
        # The first pass finds the exact length, which ``cut`` needs before anything is resampled.
        total, source_rate, kept = _survey(_blocks(source, warn=True))
        resampler = Resampler(source_rate, rate)
        length = resampler.length(total)
        # Limited to the recording; a span that ends before its start becomes empty.
        spans = [
            (min(max(0, start), length), min(max(0, start, stop), length)) for start, stop in cut(length)
        ]
        return _cut(_blocks(source) if kept is None else kept, spans, resampler, total)


def _survey(blocks: Iterable[_Block]) -> tuple[int, int, list[_Block] | None]:
    """Return the number of samples, their rate, and the blocks unless they are too many to keep."""
    total, rate = 0, 0
    kept: list[_Block] | None = []
    for rate, samples in blocks:
        total += samples.shape[1]
        if total > (most := at_most("seconds", MAX_SECONDS)) * rate:
            raise MediaError(f"audio longer than {most:,} seconds; cut it first")
        if kept is not None:
            kept.append(_Block(rate, samples))
            if total * len(samples) > _KEPT:
                # Too long to keep: the blocks are decoded a second time.
                kept = None
    if total == 0:
        raise MediaError("no samples; expected audio")
    return total, rate, kept


def _cut(
    blocks: Iterable[_Block], spans: list[tuple[int, int]], resampler: Resampler, total: int
) -> list[np.ndarray]:
    """Resample the spans while the blocks pass by, and hold only the samples that the next span needs."""
    # How to read this: ``held`` covers the samples first..end; spans are resampled in the order of their starts.
    needs = [resampler.needs(*span) for span in spans]
    # In reverse, so that `pop` gives the earliest.
    waiting = sorted(range(len(spans)), key=lambda number: spans[number], reverse=True)
    parts: list[np.ndarray] = [np.empty(0)] * len(spans)
    held: list[np.ndarray] = []
    first = end = 0
    for _, samples in blocks:
        held.append(samples)
        end += samples.shape[1]
        # Needs may reach past the end of the recording; the signal is zero there.
        while waiting and end >= min(needs[waiting[-1]][1], total):
            number = waiting.pop()
            start, stop = spans[number]
            values = _as_float(np.concatenate(held, axis=1))
            parts[number] = resampler.apply(values, first, start=start, stop=stop)
        if not waiting:
            return parts
        lowest = needs[waiting[-1]][0]
        # Later spans need nothing before this, so memory holds only the blocks from here on.
        while held and first + held[0].shape[1] <= lowest:
            first += held.pop(0).shape[1]
    if waiting:
        raise MediaError("the file changed while it was read; run again")
    return parts


def _blocks(source: Source, *, warn: bool = False) -> Iterator[_Block]:
    """Yield the samples of an array or a file, checked; ``warn`` of packets that could not be decoded."""
    blocks = _array_blocks(source) if isinstance(source, np.ndarray) else _file_blocks(source, warn=warn)
    for block in blocks:
        # Integers can neither be NaN nor exceed full scale.
        loudest = np.abs(block.samples).max(initial=0.0) if block.samples.dtype.kind == "f" else 0.0
        # Written so that NaN fails too.
        if not loudest <= LOUDEST:
            raise MediaError(
                f"holds a sample of {loudest:g}; expected finite values with full scale at 1 "
                f"(at most {LOUDEST:g}). Scale or repair it first"
            )
        yield block


def wav_bytes(array: np.ndarray) -> bytes:
    """Return samples [N] or [C, N] of int16, or of floats as float32, as a WAV file; unlike an array it has a hash.

    Raises:
        MediaError: samples of another shape or type.
    """
    channels, rate = _array_channels(array)
    is_float = channels.dtype.kind == "f"
    count, width = len(channels), 4 if is_float else 2
    data = channels.T.astype("<f4" if is_float else "<i2").tobytes()
    # Format 3 is floats, 1 is integers.
    layout = (3 if is_float else 1, count, rate, rate * count * width, count * width, 8 * width)
    head = b"WAVEfmt " + struct.pack("<IHHIIHH", 16, *layout) + b"data" + struct.pack("<I", len(data))
    return b"RIFF" + struct.pack("<I", len(head) + len(data)) + head + data


def _array_channels(array: np.ndarray) -> tuple[np.ndarray, int]:
    """Return samples [C, N] and their rate."""
    fits = array.ndim in (1, 2) and (array.dtype == np.int16 or np.issubdtype(array.dtype, np.floating))
    if not fits or (array.ndim == 2 and not 1 <= len(array) <= MAX_CHANNELS):
        raise MediaError(
            f"expected samples [N] or [C, N] (at most {MAX_CHANNELS} channels) of int16 or floats "
            f"in -1..1 at {ARRAY_RATE} a second, or at the sampling_rate that is given"
        )
    rate = array.rate if isinstance(array, Waveform) else ARRAY_RATE
    channels = np.atleast_2d(np.asarray(array))
    _check_layout(rate, len(channels))
    return channels, rate


def _array_blocks(array: np.ndarray) -> Iterator[_Block]:
    channels, rate = _array_channels(array)
    for start in range(0, channels.shape[1], _BLOCK):
        yield _Block(rate, channels[:, start : start + _BLOCK])


def _file_blocks(source: Source, *, warn: bool) -> Iterator[_Block]:
    # Frame by frame, since the parts that are wanted are not known yet and the whole may not fit in memory.
    known: tuple[int, int] | None = None
    with open_track(source, "audio") as (container, stream):
        for frame in _frames(packets(container, stream), stream, name=name_of(source) if warn else ""):
            layout = frame.sample_rate, frame.layout.nb_channels
            if known is None:
                known = layout
                _check_layout(*layout)
            # Some streams change in the middle, but a resampler has one rate.
            if layout != known:
                raise MediaError(
                    f"changes from {known[0]} samples a second on {known[1]} channels to {layout[0]} "
                    f"on {layout[1]}; convert it to one layout first"
                )
            values = frame.to_ndarray()
            # Packed formats come as one row with the channels taking turns.
            if not frame.format.is_planar:
                values = values.reshape(-1, layout[1]).T
            yield _Block(frame.sample_rate, values)


def _frames(parts: Iterable[Packet], stream: AudioStream, *, name: str) -> Iterator[AudioFrame]:
    """Decode packets; a few damaged ones are skipped, as a player would, with a warning if there is a name."""
    from av.error import FFmpegError

    count = damaged = 0
    for packet in parts:
        count += 1
        try:
            frames = packet.decode()
        except FFmpegError:
            damaged += 1
        else:
            yield from frames
    # None makes the decoder give the frames that it still holds.
    yield from stream.decode(None)
    # A player skips a few as well; above one percent too much of the recording is missing.
    if damaged > 1 + count // 100:
        raise MediaError(f"{damaged} of {count} audio packets are damaged; replace the file")
    if damaged and name:
        warn(name, f"{damaged} of {count} audio packets are damaged and were skipped")


def _check_layout(rate: int, channels: int) -> None:
    if not (1 <= rate <= MAX_RATE and 1 <= channels <= MAX_CHANNELS):
        raise MediaError(
            f"{rate} samples a second on {channels} channels; "
            f"at most {MAX_RATE} on {MAX_CHANNELS} are read. Convert it first"
        )


def _as_float(values: np.ndarray) -> np.ndarray:
    """Return float32 with full scale at 1."""
    # 8-bit samples are unsigned with silence at 128; all wider integers are signed.
    if values.dtype == np.uint8:
        return (values.astype(np.float32) - 128) / 128
    if np.issubdtype(values.dtype, np.integer):
        return values.astype(np.float32) / np.float32(2 ** (8 * values.dtype.itemsize - 1))
    return values.astype(np.float32)


class Resampler:
    """Sinc interpolation with a Hann window: half width 6 zero crossings, roll-off 0.99, signal zero outside.

    With o and n the rates divided by their greatest common divisor and f = 0.99 min(o, n), sample j of the result
    is the sum over i of x[i] h((i/o - j/n) f) f/o, where h(t) = sinc(t) cos^2(pi t / 12) for |t| < 6 and 0 beyond.
    The result has ceil(n N / o) samples. At equal rates the samples do not change.
    """

    def __init__(self, source_rate: int, rate: int) -> None:
        divisor = gcd(source_rate, rate)
        self._source, self._target = source_rate // divisor, rate // divisor
        # The reach of the kernel in source samples, 6 o / f, as an exact fraction.
        self._reach = (100 * _CROSSINGS * self._source, _ROLLOFF_PERCENT * min(self._source, self._target))

    def length(self, samples: int) -> int:
        """Return how many samples come out for ``samples`` that go in."""
        # ``-(-a // b)`` rounds up without floats, which would be inexact for long recordings.
        return -(-self._target * samples // self._source)

    def needs(self, start: int, stop: int) -> tuple[int, int]:
        """Return the span of source samples that results ``start`` to ``stop`` depend on; may pass both ends."""
        if self._source == self._target:
            return start, max(start, stop)
        first = self._first(start)
        return first, first if stop <= start else self._first(stop - 1) + self._taps()

    def apply(self, samples: np.ndarray, first: int, *, start: int, stop: int) -> np.ndarray:
        """Return results ``start`` to ``stop``.

        Args:
            samples: [C, n] float32, the source from sample ``first`` on. It covers `needs`; samples before or
                after the whole recording count as 0.
            first: position of ``samples`` in the whole recording.

        Returns:
            [C, stop - start] float32.
        """
        if stop <= start:
            return np.empty((len(samples), 0), np.float32)
        # Cut or padded with zeros to low..high, so source sample i is at index i - low.
        low, high = self.needs(start, stop)
        before, after = max(0, first - low), max(0, high - first - samples.shape[1])
        samples = samples[:, max(0, low - first) : max(0, high - first)]
        samples = np.pad(samples, ((0, 0), (before, after)))
        if self._source == self._target:
            return samples
        result = np.empty((len(samples), stop - start), np.float32)
        step = max(1, _PRODUCTS // self._taps())
        for at in range(start, stop, step):
            outputs = np.arange(at, min(at + step, stop))
            # Weights depend only on j mod n: each phase is computed once.
            phases, which = np.unique(outputs % self._target, return_inverse=True)
            weights = self._weights(phases)[which]
            from_sample = self._first(outputs) - low
            index = from_sample[:, None] + np.arange(self._taps())  # [outputs, taps]
            for channel, values in enumerate(samples):
                result[channel, outputs - start] = np.einsum("jt,jt->j", values[index], weights)
        return result

    def _taps(self) -> int:
        reach, unit = self._reach
        # All source samples within reach on both sides of an output.
        return 2 * reach // unit + 1

    def _first(self, output: int | np.ndarray) -> int | np.ndarray:
        """Return the first source sample within reach of an output: ceil(j o / n - reach), in integers."""
        reach, unit = self._reach
        return -((reach * self._target - output * self._source * unit) // (self._target * unit))

    def _weights(self, phases: np.ndarray) -> np.ndarray:
        """Return the kernel around outputs ``phases``: [P, taps] float32."""
        samples = self._first(phases)[:, None] + np.arange(self._taps())
        # f of the class docstring.
        lowest = _ROLLOFF_PERCENT / 100 * min(self._source, self._target)
        distance = (samples / self._source - phases[:, None] / self._target) * lowest
        window = np.cos(np.pi * distance / (2 * _CROSSINGS)) ** 2
        kernel = np.where(np.abs(distance) < _CROSSINGS, np.sinc(distance) * window, 0.0)  # [P, taps]
        return (kernel * (lowest / self._source)).astype(np.float32)
