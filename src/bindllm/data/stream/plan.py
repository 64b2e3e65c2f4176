"""The order of streamed samples: a pure function of the seed and of the position in each stream.

A pass reads the shards of a source in a shuffled order; each process takes every ``world_size``-th of them. Samples are
read in the order of their shard into a chunk; only the chunk is shuffled and grouped by length. So the state of a run
is a few numbers, and resuming reads at most one chunk again.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Self

import numpy as np

from bindllm.data.stream.shards import ShardError, TarSample, read_shard
from bindllm.errors import InputError

# Second entry of the seed of a random generator, so that different orders are independent.
_ORDER_OF_SHARDS = 2

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Position:
    """The position of a process in a stream.

    Args:
        pass_index: current pass over the shards, from 0.
        shard: index of the shard in the order of this pass, from 0.
        sample: samples of the shard that were read.
        drawn: samples of the stream that were read in total.
    """

    pass_index: int = 0
    shard: int = 0
    sample: int = 0
    drawn: int = 0


@dataclass(frozen=True)
class StreamState:
    """The next batch of a process.

    Args:
        chunk: index of its chunk, from 0.
        batch: index of the batch in the chunk, from 0.
        positions: where the chunk starts in each stream.
    """

    chunk: int
    batch: int
    positions: tuple[Position, ...]

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for a saved state."""
        return asdict(self) | {"positions": [asdict(position) for position in self.positions]}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Return the state that `as_dict` wrote."""
        positions = tuple(Position(**position) for position in values["positions"])
        return cls(values["chunk"], values["batch"], positions)


@dataclass
class ShardStream:
    """The samples of one source, in endless passes over its shards.

    Raises:
        InputError: fewer shards than processes.
    """

    path: str
    shards: Sequence[str]
    seed: int = 0
    source: int = 0
    world_size: int = 1
    rank: int = 0
    _warned: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        if len(self.shards) < self.world_size:
            raise InputError(
                f"{self.path} has {len(self.shards)} shards for {self.world_size} processes, and each needs one of its "
                "own: use more, smaller shards, or fewer devices"
            )

    def shard_order(self, pass_index: int) -> list[str]:
        """Return the shards that this process reads in a pass, in their order."""
        # A new generator for each pass: its order follows from its index, without the passes before it.
        rng = np.random.default_rng([self.seed, _ORDER_OF_SHARDS, self.source, pass_index])
        # All processes draw the same permutation, and each takes every ``world_size``-th entry.
        return [self.shards[n] for n in rng.permutation(len(self.shards))[self.rank :: self.world_size]]

    def read(self, position: Position, bad: list[str]) -> Iterator[tuple[TarSample, Position]]:
        """Yield samples from a position on, without end, each with the position after it.

        Args:
            bad: receives a message for each shard that is missing or damaged.

        Raises:
            InputError: no shard of a whole pass gives a sample.
        """
        # Shards without a sample since the last sample, with the reason.
        empty: dict[str, str] = {}
        while True:
            shards = self.shard_order(position.pass_index)
            for number in range(position.shard, len(shards)):
                # The first shard is entered in the middle, all others at their start.
                if number != position.shard:
                    position = replace(position, shard=number, sample=0)
                # Counts as empty until it gives a sample.
                empty[shards[number]] = f"{shards[number]}: no sample"
                try:
                    for sample in read_shard(shards[number], skip=position.sample):
                        empty.clear()
                        position = replace(position, sample=position.sample + 1, drawn=position.drawn + 1)
                        yield sample, position
                except ShardError as error:
                    bad.append(str(error))
                    if shards[number] not in self._warned:
                        self._warned.add(shards[number])
                        logger.warning("%s; the stream continues with the next shard", error)
                # The shards of a process differ from pass to pass: it gives up once it has tried all of them.
                if len(empty) == len(self.shards):
                    raise InputError(
                        f"data source {self.path}: none of its {len(self.shards)} shards gives a sample, "
                        f"for example: {(bad or list(empty.values()))[-1]}"
                    )
            position = replace(position, pass_index=position.pass_index + 1, shard=0, sample=0)


class Mixture:
    """Several streams as one, in proportion to their weights at any moment.

    Args:
        weights: share of each among the samples, above 0; only their ratios count.
    """

    def __init__(self, streams: Sequence[ShardStream], weights: Sequence[float]) -> None:
        self.streams, self._weights = tuple(streams), tuple(weights)

    def read(
        self, positions: Sequence[Position], bad: list[str]
    ) -> Iterator[tuple[int, TarSample, tuple[Position, ...]]]:
        """Yield samples from these positions on, without end: index of the stream, sample, and the positions after it.

        Args:
            bad: receives a message for each shard that is missing or damaged.
        """
        current = list(positions)
        readers = [stream.read(start, bad) for stream, start in zip(self.streams, positions, strict=True)]
        while True:
            # The stream with the lowest count relative to its weight; the half avoids a tie of zeros at the start.
            number = min(range(len(current)), key=lambda n: ((current[n].drawn + 0.5) / self._weights[n], n))
            sample, current[number] = next(readers[number])
            yield number, sample, tuple(current)


def group_by_length(lengths: Sequence[int], *, batch_size: int, seed: Sequence[int]) -> list[list[int]]:
    """Return the rows of a chunk in batches of similar length, in a shuffled order.

    The batch sizes differ by at most one row: a short batch would count as much as a full one in training.

    Examples:
        >>> batches = group_by_length([3, 9, 4, 8, 4], batch_size=3, seed=[0])
        >>> sorted(sorted(batch) for batch in batches)
        [[0, 2, 4], [1, 3]]
    """
    if not lengths:
        return []
    rng = np.random.default_rng(list(seed))
    # Shuffled before the stable sort, so that rows of equal length are in random order.
    rows = rng.permutation(len(lengths))
    rows = rows[np.argsort(np.asarray(lengths)[rows], kind="stable")]
    # ``-(-a // b)`` rounds up; array_split spreads the remainder over all batches.
    batches = np.array_split(rows, -(-len(rows) // batch_size))
    return [batches[n].tolist() for n in rng.permutation(len(batches))]
