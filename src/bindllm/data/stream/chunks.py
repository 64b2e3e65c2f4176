"""From the samples of shards to chunks: read, tokenized, embedded, and grouped into batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

from bindllm.data.formats import skip
from bindllm.data.report import Skipped
from bindllm.data.rows import Sample, make_sample
from bindllm.data.source_config import SourceConfig
from bindllm.data.stream.embed import EmbeddedSamples, embed_samples
from bindllm.data.stream.plan import Mixture, Position, StreamState, group_by_length
from bindllm.data.stream.samples import read_row
from bindllm.data.stream.shards import BAD_SHARD, TarSample
from bindllm.embeddings.embedder import Embedder
from bindllm.errors import InputError

MAX_EMPTY_CHUNKS = 10
"""Successive chunks without a usable row after which a run ends."""


@dataclass
class Chunk:
    """Samples that were read one after the other.

    Args:
        start: the first batch.
        end: the first batch of the next chunk.
        embedded: the usable samples, in the order in which they were read.
        batches: indices into ``embedded`` of the rows of each batch.
        read: number of samples that were read.
        skipped: samples and shards that cannot be used.
        remarks: samples that are used and have a fault.
    """

    start: StreamState
    end: StreamState
    embedded: EmbeddedSamples
    batches: list[list[int]]
    read: int = 0
    skipped: Skipped = field(default_factory=Skipped)
    remarks: Skipped = field(default_factory=Skipped)


@dataclass
class ChunkReader:
    """Makes chunks, each a pure function of the one before.

    A chunk ends after ``size`` samples, or when a stream begins its next pass: no sample is in a chunk twice.

    Args:
        mixture: source of the samples.
        sources: the recipe's index and configuration of each stream of the mixture.
        tokenizer: used only by this reader.
        embedder: embeds the media of the samples.
        max_length: maximum number of tokens of a sample.
        size: maximum number of samples of a chunk.
        batch_size: maximum number of rows of a batch.
        seed: of the order inside the chunks.
    """

    mixture: Mixture
    sources: Sequence[tuple[int, SourceConfig]]
    tokenizer: Any
    embedder: Embedder
    max_length: int
    size: int
    batch_size: int
    seed: Sequence[int]

    def read(self, start: StreamState, stopped: Callable[[], bool] = lambda: False) -> Iterator[Chunk]:
        """Yield chunks, starting with the chunk of a state, without end.

        Args:
            start: its chunk is the first.
            stopped: called before each sample; reading ends once it returns true.

        Raises:
            InputError: no sample can be used.
        """
        with closing(_Reading(self, start.positions, stopped)) as reading:
            # ``empty`` holds the reasons since the last usable row, for the error message.
            number, empty, last_used = start.chunk, Skipped(), start
            while True:
                # Before reading: the start of this chunk.
                positions = reading.positions
                skipped, remarks, taken = Skipped(), Skipped(), reading.taken
                samples = reading.samples(skipped, remarks)
                embedded = embed_samples(self.embedder, samples, skipped.add)
                # An incomplete chunk would have other batches than the same chunk after a resume.
                if stopped():
                    return
                batches = group_by_length(
                    [sample.length for sample in embedded.samples],
                    batch_size=self.batch_size,
                    # With the chunk's index in the seed, a saved state needs no generator.
                    seed=(*self.seed, number),
                )
                begin, end = StreamState(number, 0, positions), StreamState(number + 1, 0, reading.positions)
                yield Chunk(begin, end, embedded, batches, reading.taken - taken, skipped, remarks)
                number += 1
                if batches:
                    empty, last_used = Skipped(), end
                else:
                    empty.update(skipped)
                    _check_not_empty(empty, last_used, end)


def _check_not_empty(empty: Skipped, since: StreamState, now: StreamState) -> None:
    """Stop a run that keeps reading without finding a row to train on."""
    # The slowest stream decides, so that each of them was read in full.
    passes = min(b.pass_index - a.pass_index for a, b in zip(since.positions, now.positions, strict=True))
    if passes > 1 or now.chunk - since.chunk >= MAX_EMPTY_CHUNKS:
        raise InputError(
            f"none of the last {empty.total:,} samples of the stream can be used: {'; '.join(empty.lines())}"
        )


class _Reading:
    """Reads samples in order: tracks the position after the last one, and may hold one back for the next chunk."""

    def __init__(
        self, reader: ChunkReader, positions: Sequence[Position], stopped: Callable[[], bool]
    ) -> None:
        self.reader, self.positions, self.stopped = reader, tuple(positions), stopped
        self.taken = 0
        self._bad: list[str] = []
        self._drawn = reader.mixture.read(positions, self._bad)
        self._held: tuple[int, TarSample, tuple[Position, ...]] | None = None

    def close(self) -> None:
        """Close the shards."""
        self._drawn.close()

    def samples(self, skipped: Skipped, remarks: Skipped) -> Iterator[Sample]:
        """Yield the samples of the next chunk that can be tokenized; count the others, and faults."""
        # The pass of each stream in this chunk.
        passes: dict[int, int] = {}
        for _ in range(self.reader.size):
            if self.stopped():
                return
            drawn = next(self._drawn) if self._held is None else self._held
            self._held = None
            number, sample, positions = drawn
            pass_index = positions[number].pass_index
            # The first sample of a pass waits for the next chunk, and the position stays before it.
            if passes.setdefault(number, pass_index) != pass_index:
                self._held = drawn
                return
            self.positions, self.taken = positions, self.taken + 1
            # Damage shows while the next sample is read, so it counts in that sample's chunk.
            for message in self._bad:
                skipped.add(BAD_SHARD, message)
            self._bad.clear()
            source, config = self.reader.sources[number]
            try:
                row = read_row(sample, config, source)
                # A row may name a split of its own; only training rows are trained on.
                if row.split not in (None, "train"):
                    raise InputError(f"a row of the split {row.split}")
                made = make_sample(row, self.reader.tokenizer, self.reader.max_length)
            except InputError as error:
                skip(error, sample.name, skipped)
            else:
                for remark in row.remarks:
                    remarks.add(remark, row.name)
                yield made
