"""Limits on the media of one untrusted request: a file of some kilobytes can claim any size and any decoding time.

The loaders have limits of their own, made for training sets. Under `limited` the lower ones of both hold, decoding has
a time limit, and warnings about media go to the request and not into the log, which its sender cannot read.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import NamedTuple

from bindllm.errors import InputError, MediaError, printable

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
    """The limits of one request, the decoding time that its media have taken, and the warnings about them."""

    def __init__(self, limits: MediaLimits) -> None:
        self.limits, self.spent, self._warnings = limits, 0.0, {}

    @property
    def warnings(self) -> tuple[str, ...]:
        """Each with the name of its media; a media that occurs twice in the request counts once."""
        return tuple(self._warnings)

    def add_warnings(self, name: str, messages: tuple[str, ...]) -> None:
        """Add warnings about a media, also those of an earlier request whose embedding of it is used again."""
        self._warnings |= dict.fromkeys(f"{name}: {message}" for message in messages)


class _Active(NamedTuple):
    budget: Budget | None = None
    # Of the media that this thread decodes.
    deadline: float = float("inf")
    messages: list[str] | None = None


_UNLIMITED = _Active()
_active: ContextVar[_Active] = ContextVar("limits", default=_UNLIMITED)
_turns = threading.BoundedSemaphore(AT_ONCE)
_log = logging.getLogger("bindllm")
# Kinds of warnings that were logged: a whole data set of one kind gives one line.
_logged: set[str] = set()


@contextmanager
def limited(limits: MediaLimits) -> Iterator[Budget]:
    """Hold the media that are encoded inside to limits.

    Yields:
        the budget of the request, with the warnings about its media.

    Examples:
        >>> with limited(MediaLimits(pixels=100)):
        ...     model.encode([[Media.image("cat.png")]])  # doctest: +SKIP
        Traceback (most recent call last):
        bindllm.errors.MediaError: cat.png: 72 x 72 pixels; at most 100 are decoded...
    """
    budget = Budget(limits)
    token = _active.set(_Active(budget))
    try:
        yield budget
    finally:
        _active.reset(token)


def current_budget() -> Budget | None:
    """Return the budget of the request that this thread works for, to be given to `decoding_one` in others."""
    return _active.get().budget


@contextmanager
def decoding_one(budget: Budget | None) -> Iterator[list[str]]:
    """Decode one media under the limits of a request, in any thread; None: without limits.

    Yields:
        the warnings about it, without its name; empty without limits, as they are logged.
    """
    messages: list[str] = []
    if budget is None:
        yield messages
        return
    # Waiting for a turn is not the request's own work.
    with _turns:
        started = time.monotonic()
        token = _active.set(_Active(budget, started + budget.limits.work - budget.spent, messages))
        try:
            check_time()
            yield messages
        finally:
            _active.reset(token)
            budget.spent += time.monotonic() - started


def at_most(name: str, most: float) -> float:
    """Return the lower one of a limit of a loader and that of the request."""
    budget = current_budget()
    return most if budget is None else min(most, getattr(budget.limits, name))


def warn(name: str, message: str, *, kind: str = "") -> None:
    """Report that a media is not used as it was meant: to the request that it came with, else in the log.

    Args:
        kind: the log has only the first warning of a kind; empty: every one.
    """
    if (messages := _active.get().messages) is not None:
        messages.append(message)
        return
    if kind in _logged:
        return
    if kind:
        _logged.add(kind)
        message = f"{message} (further files are not reported)"
    _log.warning("%s: %s", printable(name), message)


def seconds_left() -> float:
    """Return the seconds that decoding may still take; infinity without limits."""
    return _active.get().deadline - time.monotonic()


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
