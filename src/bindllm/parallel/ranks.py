"""The processes that fill one store together, on one machine or on many."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

SHARE_DIGITS = 8
"""Leading hexadecimal digits of a content hash that decide whose it is: more than four thousand million shares."""


def _only_me(value: Any) -> list[Any]:
    return [value]


@dataclass(frozen=True)
class Ranks:
    """One process among those that fill a store together; without arguments, the only one.

    Work is divided by content, so media of the same content meet in one process, whatever the order and the names
    of their files, and whichever processes there are in the next run.

    Args:
        number: of this process, from 0.
        count: of all processes.
        gather: takes a value, plain JSON, and returns those of all processes in order of their numbers; it waits
            for all of them, and raises where one of them is gone.
        threads: for this process to read with; None: one for each processor.
    """

    number: int = 0
    count: int = 1
    gather: Callable[[Any], list[Any]] = _only_me
    threads: int | None = None

    @property
    def first(self) -> bool:
        """Whether this process does what only one may do."""
        return self.number == 0

    def wait(self) -> None:
        """Return when every process has come this far."""
        self.gather(None)

    def owns(self, key: str) -> bool:
        """Whether the content with this hash is for this process to embed.

        Example:
            >>> [Ranks(number, 2).owns("0000000b" + 56 * "0") for number in range(2)]
            [False, True]
        """
        return int(key[:SHARE_DIGITS], 16) % self.count == self.number
