"""Limits on the media of one untrusted request: a file of some kilobytes can claim any size and any decoding time.

The loaders have limits of their own, made for training sets. Under `limited` the lower ones of both hold, and decoding
has a time limit. Without it nothing here has an effect.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

from bindllm.errors import InputError, MediaError

AT_ONCE = 4
"""Media of limited requests that are decoded at the same time, in all threads: each may take some hundred megabytes."""


@dataclass(frozen=True)
class MediaLimits:
    """Decoded media of one request; limits of the loaders hold too.

    A media beyond a limit is a `MediaError`.

    Raises:
        InputError: a limit that is not above 0.
    """

    pixels: int = 50_000_000
    """most pixels of an image, a map, or a frame of a video"""
    seconds: float = 600.0
    """longest audio or video, in seconds"""
    frames: int = 36_000
    """most frames of a video"""
    points: int = 2_000_000
    """most vertices of a mesh, or readings of a motion signal; point clouds are thinned out instead"""
    mib: float = 64.0
    """largest array, mesh file or SVG after unpacking, in MiB"""
    work: float = 30.0
    """longest time for decoding all media of one request, in seconds"""

    def __post_init__(self) -> None:
        if wrong := [f"{name} is {value}" for name, value in vars(self).items() if not value > 0]:
            raise InputError(f"limits on media must be above 0, and {', '.join(wrong)}")

    @property
    def bytes(self) -> int:
        """``mib`` in bytes."""
        return round(self.mib * 2**20)


class Budget:
    """The limits of one request, and the decoding time that its media have taken."""

    def __init__(self, limits: MediaLimits) -> None:
        self.limits, self.spent = limits, 0.0


# The deadline is that of the media that this thread decodes.
_active: ContextVar[tuple[Budget | None, float]] = ContextVar("limits", default=(None, float("inf")))
_turns = threading.BoundedSemaphore(AT_ONCE)


@contextmanager
def limited(limits: MediaLimits) -> Iterator[None]:
    """Hold the media that are encoded inside to limits.

    Examples:
        >>> with limited(MediaLimits(pixels=100)):
        ...     model.encode([[Media.image("cat.png")]])  # doctest: +SKIP
        Traceback (most recent call last):
        bindllm.errors.MediaError: cat.png: 72 x 72 pixels; at most 100 are decoded...
    """
    token = _active.set((Budget(limits), float("inf")))
    try:
        yield
    finally:
        _active.reset(token)


def current_budget() -> Budget | None:
    """Return the budget of the request that this thread works for, to be given to `decoding_one` in others."""
    return _active.get()[0]


@contextmanager
def decoding_one(budget: Budget | None) -> Iterator[None]:
    """Decode one media under the limits of a request, in any thread; None: without limits."""
    if budget is None:
        yield
        return
    # Waiting for a turn is not the request's own work.
    with _turns:
        started = time.monotonic()
        token = _active.set((budget, started + budget.limits.work - budget.spent))
        try:
            check_time()
            yield
        finally:
            _active.reset(token)
            budget.spent += time.monotonic() - started


def at_most(name: str, most: float) -> float:
    """Return the lower one of a limit of a loader and that of the request.

    Args:
        name: a field of `MediaLimits`.
        most: the loader's own limit.
    """
    budget = current_budget()
    return most if budget is None else min(most, getattr(budget.limits, name))


def seconds_left() -> float:
    """Return the seconds that decoding may still take; infinity without limits."""
    return _active.get()[1] - time.monotonic()


def check_time() -> None:
    """Raise if decoding takes too long; loaders call it for each packet and each block.

    Raises:
        MediaError: the message has the limit.
    """
    if seconds_left() < 0:
        raise MediaError(
            f"decoding the media of this request takes more than {at_most('work', float('inf')):g} seconds; "
            "send smaller or fewer ones"
        )
