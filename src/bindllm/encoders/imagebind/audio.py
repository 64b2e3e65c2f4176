"""Audio input of ImageBind: clips of two seconds, each a spectrogram of 128 mel bands by 204 frames.

The filter bank is Kaldi's (as in AST, arXiv 2104.01778, section 2.1) with ImageBind's own clips and scaling
(arXiv 2305.05665, section 4). Computed in double precision: its logarithm makes much of small differences.
"""

from __future__ import annotations

from fractions import Fraction
from functools import cache

import numpy as np
import torch
from torch import Tensor

from bindllm.encoders.imagebind.clips import CLIP_SECONDS, clip_starts
from bindllm.media.audio import cut_audio
from bindllm.media.source import Source, name_of

RATE = 16_000
"""Samples a second that the filter bank is made for."""

MEL_BANDS, FRAMES = 128, 204

_PUBLISHED_CLIPS = 3

_WINDOW, _STEP, _PADDED = 400, 160, 512
_PREEMPHASIS = 0.97
_LOWEST_HZ, _HIGHEST_HZ = 20.0, 8000.0
_LOG_FLOOR = 2.0**-23
_MEAN, _DEVIATION = -4.268, 9.138


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
        InputError: unknown coverage.
        MissingExtraError: PyAV is not installed.

    Examples:
        >>> audio_input(np.zeros(16_000, np.int16), coverage="published", max_clips=64).shape
        torch.Size([3, 1, 128, 204])
    """

    # Called with the length of the audio: only the spans that it returns are decoded and kept.
    def spans(samples: int) -> list[tuple[int, int]]:
        starts = clip_starts(
            Fraction(samples, RATE),
            published=_PUBLISHED_CLIPS,
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
        bands: number of triangles.
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
