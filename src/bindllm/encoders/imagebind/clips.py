"""Audio and video as ImageBind takes them: clips of two seconds, a few spread over a file or enough to cover it.

Facts: ImageBind, arXiv 2305.05665, section 4 and appendix B; the arithmetic is that of its released preprocessing. The
filter bank of audio is Kaldi's (as in AST, arXiv 2104.01778, section 2.1). It is computed in double precision: its
logarithm makes much of small differences.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from fractions import Fraction
from functools import cache
from math import ceil

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from bindllm.encoders.imagebind.network import normalize_pixels
from bindllm.errors import MediaError
from bindllm.media.audio import cut_audio
from bindllm.media.source import Source, name_of
from bindllm.media.video import read_frames

CLIP_SECONDS = 2
"""Length of a clip of either kind, in seconds."""

RATE = 16_000
"""Samples a second that the filter bank is made for."""

MEL_BANDS, FRAMES = 128, 204

SIDE, CROPS = 224, 3
"""Pixels across a crop of a frame, and crops along its longer side."""

MAX_ASPECT = 100
"""Longest frame that is scaled, as a multiple of its short side."""

_AUDIO_CLIPS, _VIDEO_CLIPS = 3, 5

_WINDOW, _STEP, _PADDED = 400, 160, 512
_PREEMPHASIS = 0.97
_LOWEST_HZ, _HIGHEST_HZ = 20.0, 8000.0
_LOG_FLOOR = 2.0**-23
_MEAN, _DEVIATION = -4.268, 9.138


def clip_starts(
    duration: Fraction | float, *, published: int, coverage: str, max_clips: int, name: str
) -> list[Fraction]:
    """Return the starts of the clips of a file, in seconds, as exact fractions.

    "published" spreads a fixed number of clips evenly from the start to the end; if the file is shorter than a clip,
    all of them are the same. The published code subtracts in double precision, so these starts may be a tiny fraction
    below the exact ones, and a clip then starts one sample or frame earlier. "full" puts clips one after the other, the
    last one ending with the file; a file that needs more than ``max_clips`` gets that many, evenly spread, with a
    warning.

    Args:
        published: number of clips that the published preprocessing takes.
        coverage: "published" or "full".
        max_clips: most clips under "full", at least 1.

    Examples:
        >>> [float(start) for start in clip_starts(
        ...     Fraction(5), published=3, coverage="published", max_clips=64, name="bark.wav")]
        [0.0, 1.5, 3.0]
        >>> [float(start) for start in clip_starts(
        ...     Fraction(5), published=3, coverage="full", max_clips=64, name="bark.wav")]
        [0.0, 2.0, 3.0]
    """
    if coverage == "published":
        # As published: one subtraction in double precision, and only then exact fractions. 2.3 - 2 is a little less
        # than 0.3, so the last clip of 2.3 seconds starts at sample 4799, not 4800.
        return _spread(Fraction(max(float(duration) - CLIP_SECONDS, 0.0)), published)
    # Fractions, since frame times are rational: floats would pick another frame at exact borders.
    last = max(duration - CLIP_SECONDS, Fraction(0))
    # Full coverage: the last clip ends with the file and may overlap the one before.
    count = max(1, ceil(duration / CLIP_SECONDS))
    if count <= max_clips:
        return [min(Fraction(number * CLIP_SECONDS), last) for number in range(count)]
    logging.getLogger("bindllm").warning(
        "%s: %.0f seconds need %d clips of %d seconds; only %d, evenly spread, are read (max_clips)",
        name, duration, count, CLIP_SECONDS, max_clips,
    )  # fmt: skip
    return _spread(last, max_clips)


def _spread(last: Fraction, count: int) -> list[Fraction]:
    """Return ``count`` starts from 0 to ``last``; a single one is in the middle."""
    if count == 1:
        return [last / 2]
    return [last * number / (count - 1) for number in range(count)]


def audio_input(source: Source, *, coverage: str, max_clips: int) -> Tensor:
    """Return the clips of an audio file, or of a video's audio track, as spectrograms of log energies.

    Every clip is computed from its own samples. The released code shifts the clips of audio under 6 seconds by
    each other's mean, since they overlap and it subtracts in place: if the audio has an offset, single frames
    then differ by up to 0.7. The weights were trained on clips of their own, so that is not repeated here.

    A clip of fewer than 400 samples (25 ms, one frame), on which the released code fails, is filled up with zeros
    to one frame. As published, frames that a short clip lacks are 0 after the logarithm, not silence. Silence
    itself is the floor of the logarithm everywhere, -1.278 after scaling.

    Args:
        source: path, bytes or array, as `cut_audio` takes them.
        coverage: "published": three clips from start to end; "full": clips that cover all of it.
        max_clips: most clips under "full"; S does not pass it.

    Returns:
        [S, 1, 128, 204] float32: mel bands from low to high, frames in time.

    Raises:
        MediaError: the audio cannot be read.
        MissingExtraError: PyAV is not installed.

    Examples:
        >>> audio_input(np.zeros(16_000, np.int16), coverage="published", max_clips=64).shape
        torch.Size([3, 1, 128, 204])
    """

    # Called with the length of the audio: only the spans that it returns are decoded and kept.
    def spans(samples: int) -> list[tuple[int, int]]:
        starts = clip_starts(
            Fraction(samples, RATE),
            published=_AUDIO_CLIPS,
            coverage=coverage,
            max_clips=max_clips,
            name=name_of(source),
        )
        return [(int(start * RATE), int((start + CLIP_SECONDS) * RATE)) for start in starts]

    clips = cut_audio(source, rate=RATE, cut=spans)
    return torch.from_numpy(np.stack([_image(clip) for clip in clips]))


def _image(clip: np.ndarray) -> np.ndarray:
    """Return the scaled log energies of a clip [C, n]: [1, 128, 204] float32."""
    # The mean of all channels is subtracted from the first channel: the model was trained this way.
    samples = clip[0] - clip.mean(dtype=np.float64)
    if len(samples) < _WINDOW:
        samples = np.pad(samples, (0, _WINDOW - len(samples)))
    energies = _filter_bank(samples)[:FRAMES]
    # Missing frames stay 0 before scaling, which is louder than silence: as published.
    image = np.zeros((MEL_BANDS, FRAMES))
    image[:, : len(energies)] = energies.T
    return ((image - _MEAN) / _DEVIATION).astype(np.float32)[None]


def _filter_bank(samples: np.ndarray) -> np.ndarray:
    """Return the log energies of whole frames: [N] -> [frames, 128]."""
    frames = np.lib.stride_tricks.sliding_window_view(samples, _WINDOW)[::_STEP]
    # How to read this: Kaldi's filter bank, step by step: offset, pre-emphasis, Hann window, power, mel, log.
    frames = frames - frames.mean(axis=1, keepdims=True)
    # The first sample of a frame counts as its own predecessor.
    before = np.concatenate([frames[:, :1], frames[:, :-1]], axis=1)
    frames = (frames - _PREEMPHASIS * before) * np.hanning(_WINDOW)
    power = np.abs(np.fft.rfft(frames, _PADDED)) ** 2
    # Kaldi leaves the highest frequency out.
    power[:, -1] = 0.0
    return np.log(np.maximum(power @ mel_weights(_LOWEST_HZ, _HIGHEST_HZ, MEL_BANDS, _PADDED), _LOG_FLOOR))


@cache
def mel_weights(lowest: float, highest: float, bands: int, size: int) -> np.ndarray:
    """Return triangles that are evenly spaced and linear in mel, as weights of the frequencies.

    Args:
        lowest: in hertz, where the first triangle begins.
        highest: in hertz, where the last one ends.
        size: samples of the Fourier transform, at `RATE`.

    Returns:
        [size / 2 + 1, bands].
    """

    def mel(hertz: float | np.ndarray) -> np.ndarray:
        return 1127.0 * np.log1p(np.asarray(hertz) / 700.0)

    edges = np.linspace(mel(lowest), mel(highest), bands + 2)
    at = mel(np.arange(size // 2 + 1) * (RATE / size))[:, None]
    left, center, right = edges[:-2], edges[1:-1], edges[2:]
    return np.maximum(0.0, np.minimum((at - left) / (center - left), (right - at) / (right - center)))


def video_input(source: Source, *, coverage: str, max_clips: int) -> Tensor:
    """Return the clips of a video, each its first and last frame in three crops along the longer side.

    A clip in which no frame starts (fewer than one frame in two seconds) shows the last one before it; a video of
    one frame shows that frame twice.

    Args:
        source: path, bytes or array, as `read_frames` takes them.
        coverage: "published": five clips from start to end; "full": clips that cover all of it.

    Returns:
        [S * 3, 3, 2, 224, 224] float32, normalized RGB: S clips, the three crops of a clip next to each other.

    Raises:
        MediaError: the video cannot be read, or its frames are longer than `MAX_ASPECT` times their short side.
        MissingExtraError: PyAV is not installed.

    Examples:
        >>> video_input(np.zeros((10, 60, 80, 3), np.uint8), coverage="published", max_clips=64).shape
        torch.Size([15, 3, 2, 224, 224])
    """
    name = name_of(source)
    clips: list[tuple[int, int]] = []

    # How to read this: `pick` runs after the first pass over the file, which counts frames without decoding. It fills
    # `clips`; the loop below then decodes only those frames, in order.
    def pick(count: int, rate: Fraction | float) -> Sequence[int]:
        # Published: in double precision, so that a border of a clip may be one frame earlier. Full: exact.
        rate = rate if coverage == "full" else float(rate)
        starts = clip_starts(
            count / rate, published=_VIDEO_CLIPS, coverage=coverage, max_clips=max_clips, name=name
        )
        clips[:] = [_first_and_last(start, count, rate) for start in starts]
        return sorted({number for clip in clips for number in clip})

    views: Tensor | None = None
    for number, frame in read_frames(source, pick=pick):
        if views is None:
            views = torch.empty(len(clips), CROPS, 3, 2, SIDE, SIDE)
        crops = _crops(frame, name)
        for clip, frames in enumerate(clips):
            # A frame may belong to several clips, or be both the first and the last of one.
            for position, shown in enumerate(frames):
                if shown == number:
                    views[clip, :, :, position] = crops
    assert views is not None, "at least one frame is picked"
    return views.flatten(0, 1)


def _first_and_last(start: Fraction, count: int, rate: Fraction | float) -> tuple[int, int]:
    """Return the first and the last frame that start within a clip."""
    # ceil: the first frame that starts at or after the clip does.
    first = min(ceil(rate * start), count - 1)
    stop = min(ceil(rate * (start + CLIP_SECONDS)), count)
    return first, max(first, stop - 1)


def _crops(frame: np.ndarray, name: str) -> Tensor:
    """Return three squares of a frame, uint8 [H, W, 3]: [3 crops, 3, 224, 224] float32."""
    height, width = frame.shape[:2]
    short, long = min(height, width), max(height, width)
    if long > MAX_ASPECT * short:
        raise MediaError(
            f"{name}: frames of {width} x {height} pixels are longer than {MAX_ASPECT} times their short side; "
            "crop the video first"
        )
    # The short side becomes 224; the crops slide along the long side.
    along = SIDE * long // short
    size = (SIDE, along) if width >= height else (along, SIDE)
    pixels = torch.from_numpy(np.ascontiguousarray(frame.transpose(2, 0, 1))).float() / 255
    if size != (height, width):
        pixels = F.interpolate(pixels[None], size=size, mode="bilinear", align_corners=False)[0]
    offsets = (0, ceil((along - SIDE) / 2), along - SIDE)
    axis = 2 if width >= height else 1
    # Crops are views until they are stacked.
    squares = torch.stack([pixels.narrow(axis, offset, SIDE) for offset in offsets])
    return normalize_pixels(squares)
