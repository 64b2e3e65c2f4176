"""A small network for audio that is trained from scratch, for alignments without a pretrained tower.

Log-mel spectrograms and a plain convolutional network in the manner of PANNs (arXiv 1912.10211, section 3), small
enough for a CPU; masked in training as in SpecAugment (arXiv 1904.08779, section 2).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bindllm.encoders.imagebind.clips import RATE, mel_weights
from bindllm.errors import InputError
from bindllm.media import Media
from bindllm.media.audio import cut_audio

BANDS = 64
"""Mel bands, from 50 Hz to 8 kHz."""

MAX_SECONDS = 24.0
"""Longest audio that is embedded whole. Longer audio gives three parts of a third of this: start, middle and end."""

_WINDOW, _STEP, _PADDED = 640, 320, 1024
_LOWEST_HZ, _HIGHEST_HZ = 50.0, 8000.0
_FLOOR = 1e-5  # 50 dB below the energy of the loudest moment; anything quieter counts as silence
_SILENCE = float(np.log(_FLOOR))
_WINDOWS_AT_ONCE = 32

# Augmentation: largest changes.
_STRETCH, _PITCH_BANDS, _QUIETER = 0.15, 2, 3.0
_MASKS, _MASKED_BANDS, _MASKED_FRAMES = 2, 10, 25


class AudioTower(nn.Module):
    """Vectors of audio of any length: windows of log-mel energies through a small convolutional network.

    Loudness does not count: energies are relative to the loudest moment. Long audio is cut into windows that
    cover it, and their vectors are averaged.

    Args:
        width: channels of the first layer; each of the three following layers doubles them.
        seconds: length of a window, at least 0.5.

    Raises:
        InputError: a width or a length that is too small.
    """

    modality = "audio"
    revision = "audio-tower 1"

    def __init__(self, width: int = 32, seconds: float = 3.0) -> None:
        super().__init__()
        if width < 1 or not 0.5 <= seconds <= MAX_SECONDS:
            raise InputError(
                f"AudioTower takes a width of at least 1 and windows of 0.5 to {MAX_SECONDS:g} seconds, not "
                f"width={width}, seconds={seconds}"
            )
        self.config: dict[str, Any] = {"width": width, "seconds": seconds}
        self.embedding_size = 8 * width
        self.frames = round(seconds * RATE / _STEP)
        # Four times convolution, batch norm, ReLU and pooling; widths double, so the output has 8 * width channels.
        layers: list[nn.Module] = []
        before = 1
        for channels in (width, 2 * width, 4 * width, 8 * width):
            layers += [nn.Conv2d(before, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)]
            layers += [nn.ReLU(inplace=True), nn.AvgPool2d(2)]
            before = channels
        self.layers = nn.Sequential(*layers)

    def prepare(self, media: Media) -> Tensor:
        """Return the log energies of audio, float32 [T, 64], T at least one window.

        Raises:
            MediaError: the audio cannot be read.
        """
        # Long audio: a third of the limit at the start, in the middle and at the end.
        third = round(MAX_SECONDS / 3 * RATE)

        def spread(length: int) -> list[tuple[int, int]]:
            if length <= 3 * third:
                return [(0, length)]
            return [(start, start + third) for start in (0, (length - third) // 2, length - third)]

        parts = cut_audio(media.source, rate=RATE, cut=spread)
        # In float64: a mean of float32 channels would round.
        mono = np.concatenate([part.mean(axis=0, dtype=np.float64) for part in parts])
        least = (self.frames - 1) * _STEP + _WINDOW
        return torch.from_numpy(_log_energies(np.pad(mono, (0, max(0, least - len(mono))))))

    def augment(self, inputs: Tensor, generator: torch.Generator) -> Tensor:
        """Return one window [frames, 64]: stretched, shifted, transposed, quieter, noisier, masked (SpecAugment)."""

        def draw(low: float, high: float) -> float:
            return low + (high - low) * float(torch.rand((), generator=generator))

        length = round(len(inputs) * draw(1 - _STRETCH, 1 + _STRETCH))
        audio = F.interpolate(inputs.T[None], size=max(1, length), mode="linear")[0].T
        # Up to a third of the window may lie before or after the audio.
        start = round(draw(-self.frames / 3, max(0, len(audio) - self.frames) + self.frames / 3))
        window = F.pad(audio, (0, 0, self.frames, 2 * self.frames), value=_SILENCE)
        window = window[start + self.frames : start + 2 * self.frames]
        bands = round(draw(-_PITCH_BANDS, _PITCH_BANDS))
        window = F.pad(window, (bands, -bands), value=_SILENCE)
        window = (window - draw(0, _QUIETER)).clamp_min(_SILENCE)
        # Noise in the log domain: uniform energies, cut off at -30 dB, then shifted to a random level.
        noise = torch.rand(window.shape, generator=generator).clamp_min(1e-3).log()
        # Energies add up, so their logarithms combine by logaddexp.
        window = torch.logaddexp(window, noise + draw(2 * _SILENCE, _SILENCE / 3))
        for _ in range(_MASKS):
            # One mask along time and one along frequency, as in SpecAugment.
            for side, most in ((0, _MASKED_FRAMES), (1, _MASKED_BANDS)):
                size = round(draw(0, most))
                at = round(draw(0, window.shape[side] - size))
                window.narrow(side, at, size).fill_(_SILENCE)
        return window

    def mix(self, first: Tensor, second: Tensor, generator: torch.Generator) -> Tensor:
        """Return the sum of two windows, the second up to 9 dB below or above the first."""
        return torch.logaddexp(first, second + 4 * float(torch.rand((), generator=generator)) - 2)

    def forward(self, inputs: Sequence[Tensor]) -> Tensor:
        """Return [B, W] for B spectrograms [T, 64], each at least one window long."""
        # How to read this: all windows of all inputs form one batch, then each input averages its own.
        windows = [self._windows(audio) for audio in inputs]
        stacked = torch.cat(windows)
        # Batch norm needs the whole batch in training; in evaluation chunks bound the memory.
        chunks = [stacked] if self.training else stacked.split(_WINDOWS_AT_ONCE)
        rows = torch.cat([self._vectors(chunk) for chunk in chunks])
        return torch.stack([part.mean(dim=0) for part in rows.split([len(each) for each in windows])])

    def _windows(self, audio: Tensor) -> Tensor:
        """Return evenly spread windows that cover the audio, [S, frames, 64]."""
        # As few windows as cover the audio; evenly spread, they overlap unless it is a multiple of a window.
        count = -(-len(audio) // self.frames)
        last = len(audio) - self.frames
        starts = [round(n * last / max(1, count - 1)) for n in range(count)]
        return torch.stack([audio[start : start + self.frames] for start in starts])

    def _vectors(self, windows: Tensor) -> Tensor:
        # From -1 (silence) to 1 (as loud as the loudest moment is on average), and little above.
        features = self.layers(1 - 2 * windows[:, None] / _SILENCE).mean(dim=3)
        # Mean plus maximum over time, as PANNs pools its frames.
        return features.mean(dim=2) + features.amax(dim=2)


def _log_energies(samples: np.ndarray) -> np.ndarray:
    """Return the logarithm of mel energies relative to the loudest moment: [N] -> float32 [frames, 64]."""
    # A view: frames overlap by half without a copy.
    frames = np.lib.stride_tricks.sliding_window_view(samples, _WINDOW)[::_STEP]
    power = np.abs(np.fft.rfft(frames * np.hanning(_WINDOW), _PADDED)) ** 2
    energies = power @ mel_weights(_LOWEST_HZ, _HIGHEST_HZ, BANDS, _PADDED)
    loudest = energies.mean(axis=1).max()
    # Silence has no loudest moment; its energies are all zero already.
    relative = energies / loudest if loudest > 0 else energies
    return np.log(np.maximum(relative, _FLOOR)).astype(np.float32)
