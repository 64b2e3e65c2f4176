"""The assignment of rows to batches, and a loader that resumes exactly after an interruption.

Rows of similar length share a batch, so there is little padding. The order is a pure function of the seed and the
epoch, and only the trainer keeps the position in it. So a resumed run sees the batches that it would have seen.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from itertools import cycle, islice

import numpy as np

from bindllm.data.collate import Batch
from bindllm.errors import InputError

# Rows are sorted by length inside chunks of this many batches: enough to find neighbors of nearly the same
# length, few enough that the rows of a batch still change from epoch to epoch.
CHUNK_BATCHES = 50


class LengthGroupedBatches:
    """The batches of each epoch, as lists of row indices.

    An epoch draws ``round(weight * rows)`` rows of each source (at least one). The draws walk through shuffled
    passes over the source, one pass after the other, also across epochs: with weight 1 each row comes exactly once
    per epoch, with weight 2 twice, with weight 0.5 every second epoch, and over any number of epochs the counts of
    two rows of a source differ by at most one. The last batch may be short.

    Args:
        sources: index of the source of each row, from 0; all rows are of one source by default.
        weights: draws per row and epoch of each source; 1 by default.
        world_size: number of processes that share an epoch. Each takes every ``world_size``-th batch; the first
            batches are repeated until all processes have as many.

    Raises:
        InputError: a batch size below 1.

    Examples:
        >>> batches = LengthGroupedBatches([3, 9, 4, 8], batch_size=2)
        >>> sorted(sorted(batch) for batch in batches.epoch(0))
        [[0, 2], [1, 3]]
    """

    def __init__(
        self,
        lengths: Sequence[int],
        *,
        batch_size: int,
        seed: int = 0,
        sources: Sequence[int] | None = None,
        weights: Sequence[float] = (1.0,),
        world_size: int = 1,
        rank: int = 0,
    ) -> None:
        if batch_size < 1:
            raise InputError(f"batch_size must be at least 1, not {batch_size}")
        self._lengths = np.asarray(lengths, dtype=np.int64)
        source_of = np.zeros_like(self._lengths) if sources is None else np.asarray(sources)
        self._rows = [np.flatnonzero(source_of == number) for number in range(len(weights))]
        # At least one draw, so that a small weight does not remove a source.
        self._draws = [
            max(1, round(w * len(r))) if len(r) else 0 for w, r in zip(weights, self._rows, strict=True)
        ]
        self._batch_size, self._seed = batch_size, seed
        self._world_size, self._rank = world_size, rank

    def __len__(self) -> int:
        """Number of batches of an epoch in one process."""
        # ``-(-a // b)`` rounds up.
        batches = -(-sum(self._draws) // self._batch_size)
        return -(-batches // self._world_size)

    def epoch(self, number: int) -> list[list[int]]:
        """Return the batches of an epoch, counted from 0."""
        rows = np.concatenate([self._drawn(source, number) for source in range(len(self._rows))])
        rng = self._rng(0, number)
        # Before grouping, so that a chunk has other rows in each epoch.
        rng.shuffle(rows)
        chunk = self._batch_size * CHUNK_BATCHES
        batches: list[list[int]] = []
        for start in range(0, len(rows), chunk):
            piece = rows[start : start + chunk]
            # Stable, so that rows of equal length stay in random order.
            piece = piece[np.argsort(self._lengths[piece], kind="stable")]
            batches += [
                piece[i : i + self._batch_size].tolist() for i in range(0, len(piece), self._batch_size)
            ]
        # Batches come sorted by length; training must not see them in that order.
        batches = [batches[i] for i in rng.permutation(len(batches))]
        return share(batches, world_size=self._world_size, rank=self._rank)

    def fingerprint(self) -> str:
        """Return hex digits that change when any epoch would."""
        digest = hashlib.sha256(self._lengths.tobytes())
        for rows in self._rows:
            digest.update(rows.astype(np.int64).tobytes())
        digest.update(repr((self._draws, self._batch_size, self._seed, self._world_size)).encode())
        return digest.hexdigest()

    def _drawn(self, source: int, epoch: int) -> np.ndarray:
        """Return the rows of a source in an epoch: a window on its endless sequence of shuffled passes."""
        rows, draws = self._rows[source], self._draws[source]
        if not draws:
            return rows
        first, last = epoch * draws, (epoch + 1) * draws - 1
        # The window may begin in one pass and end in a later one.
        passes = range(first // len(rows), last // len(rows) + 1)
        sequence = np.concatenate([self._rng(1, source, number).permutation(rows) for number in passes])
        skip = first - passes.start * len(rows)
        return sequence[skip : skip + draws]

    def _rng(self, *stream: int) -> np.random.Generator:
        return np.random.default_rng([self._seed, *stream])


def sorted_batches(lengths: Sequence[int], *, batch_size: int) -> list[list[int]]:
    """Return all rows once, in order of length: for evaluation, in which the order of batches does not matter.

    Examples:
        >>> sorted_batches([3, 9, 4], batch_size=2)
        [[0, 2], [1]]
    """
    order = np.argsort(np.asarray(lengths), kind="stable").tolist()
    return [order[i : i + batch_size] for i in range(0, len(order), batch_size)]


def share(batches: list[list[int]], *, world_size: int, rank: int) -> list[list[int]]:
    """Return the batches of one process; the first ones are repeated until all processes have as many."""
    # Up to a multiple of ``world_size``: with unequal numbers of steps the processes would wait for each other.
    even = -(-len(batches) // world_size) * world_size
    return list(islice(cycle(batches), rank, even, world_size))


class BatchLoader:
    """Yields the same batches, in the same order, every time."""

    def __init__(self, batches: list[list[int]], make: Callable[[list[int]], Batch]) -> None:
        self._batches, self._make = batches, make

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[Batch]:
        return map(self._make, self._batches)


class ResumableLoader:
    """Yields the batches of an epoch, starting at the trainer's position.

    Lightning counts epochs and completed batches, and restores both on resume; this loader asks it at the start of
    each epoch instead of counting a second time. To a checkpoint it adds a fingerprint of the data, so that a run is
    not resumed on other rows.

    Args:
        position: returns the current epoch and the number of its completed batches.
        repeat: how many times in a row each batch comes.
        content: a fingerprint of the rows themselves; the plan depends on their lengths only.
    """

    def __init__(
        self,
        batches: LengthGroupedBatches,
        make: Callable[[list[int]], Batch],
        *,
        position: Callable[[], tuple[int, int]] = lambda: (0, 0),
        repeat: int = 1,
        content: str = "",
    ) -> None:
        self._batches, self._make, self._position, self._repeat = batches, make, position, repeat
        self._content = content

    def __len__(self) -> int:
        return len(self._batches) * self._repeat

    def __iter__(self) -> Iterator[Batch]:
        # A generator: nothing here runs before the first batch is requested, when the trainer knows its position.
        epoch, done = self._position()
        batches = self._batches.epoch(epoch)
        for step in range(done, len(self)):
            # An objective may take several steps on one batch.
            yield self._make(batches[step // self._repeat])

    def state_dict(self) -> dict[str, str]:
        """Return the fingerprint that a resumed run must have, too."""
        return {"rows": f"{self._batches.fingerprint()} x {self._repeat}", "content": self._content}

    def load_state_dict(self, state_dict: dict[str, str]) -> None:
        """Compare with the run that wrote the checkpoint.

        Raises:
            InputError: the rows, the batch size, the seed or the weights have changed.
        """
        if state_dict != self.state_dict():
            raise InputError(
                "this run cannot resume from that checkpoint: its training rows, batch size, seed, source weights "
                "or number of processes differ. Restore them, or start a new run from the weights (init_from)"
            )
