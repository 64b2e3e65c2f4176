"""Windowed-sinc resampling of any part of a sound: the same numbers as resampling the whole of it."""

from __future__ import annotations

from math import gcd

import numpy as np

_CROSSINGS = 6
"""Half width of the kernel, in zero crossings of its sinc."""

_ROLLOFF_PERCENT = 99
"""Cut-off frequency in percent of the lower of both Nyquist frequencies."""

_PRODUCTS = 1 << 20
"""Products that are held at once: outputs of a block times taps."""


class Resampler:
    """Sinc interpolation with a Hann window: half width 6 zero crossings, roll-off 0.99, signal zero outside.

    With o and n the rates divided by their greatest common divisor and f = 0.99 min(o, n), sample j of the result
    is the sum over i of x[i] h((i/o - j/n) f) f/o, where h(t) = sinc(t) cos^2(pi t / 12) for |t| < 6 and 0 beyond.
    The result has ceil(n N / o) samples. At equal rates the samples are passed on as they are.

    Args:
        source_rate: samples a second of what is given.
        rate: samples a second of what is wanted.
    """

    def __init__(self, source_rate: int, rate: int) -> None:
        divisor = gcd(source_rate, rate)
        self._source, self._target = source_rate // divisor, rate // divisor
        # The reach of the kernel in source samples, 6 o / f, as an exact fraction.
        self._reach = (100 * _CROSSINGS * self._source, _ROLLOFF_PERCENT * min(self._source, self._target))

    def length(self, samples: int) -> int:
        """Return how many samples come out for ``samples`` that go in."""
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
            samples: [C, n] float32, the source from sample ``first`` on; it covers `needs` but for what lies
                before or behind the whole sound, which counts as 0.
            first: where ``samples`` starts in the whole sound.
            start: first result.
            stop: result to stop before.

        Returns:
            [C, stop - start] float32.
        """
        if stop <= start:
            return np.empty((len(samples), 0), np.float32)
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
            phases, which = np.unique(outputs % self._target, return_inverse=True)
            weights = self._weights(phases)[which]
            from_sample = self._first(outputs) - low
            index = from_sample[:, None] + np.arange(self._taps())
            for channel, values in enumerate(samples):
                result[channel, outputs - start] = np.einsum("jt,jt->j", values[index], weights)
        return result

    def _taps(self) -> int:
        reach, unit = self._reach
        return 2 * reach // unit + 1

    def _first(self, output: int | np.ndarray) -> int | np.ndarray:
        """Return the first source sample within reach of an output: ceil(j o / n - reach), in integers."""
        reach, unit = self._reach
        return -((reach * self._target - output * self._source * unit) // (self._target * unit))

    def _weights(self, phases: np.ndarray) -> np.ndarray:
        """Return the kernel around outputs ``phases``: [P, taps] float32."""
        samples = self._first(phases)[:, None] + np.arange(self._taps())
        lowest = _ROLLOFF_PERCENT / 100 * min(self._source, self._target)
        distance = (samples / self._source - phases[:, None] / self._target) * lowest
        window = np.cos(np.pi * distance / (2 * _CROSSINGS)) ** 2
        kernel = np.where(np.abs(distance) < _CROSSINGS, np.sinc(distance) * window, 0.0)
        return (kernel * (lowest / self._source)).astype(np.float32)
