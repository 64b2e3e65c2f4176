"""From the samples of shards to chunks: read, tokenised, embedded, and grouped into batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

from bindllm.data.formats import leave_out
from bindllm.data.report import Skipped
from bindllm.data.source_config import SourceConfig
from bindllm.data.stream.embed import EmbeddedSamples, embed_samples
from bindllm.data.stream.plan import Bookmark, Mixture, Place, group_by_length
from bindllm.data.stream.samples import read_row
from bindllm.data.stream.shards import TarSample
from bindllm.data.tokenise import Sample, make_sample
from bindllm.embeddings.embedder import Embedder
from bindllm.errors import InputError

BAD_SHARD = "shards that are missing, truncated or damaged, counted in each pass; what comes before the damage is used"

MAX_BARREN_CHUNKS = 10
"""Chunks in a row without a row that can be used, after which a run ends."""


@dataclass
class Chunk:
    """Samples that were read one after the other.

    Args:
        start: the first batch.
        end: the first batch of the next chunk.
        embedded: those that can be used, in the order in which they were read.
        batches: places in ``embedded`` of the rows of each batch.
        read: samples that were read.
        skipped: what was left out.
    """

    start: Bookmark
    end: Bookmark
    embedded: EmbeddedSamples
    batches: list[list[int]]
    read: int = 0
    skipped: Skipped = field(default_factory=Skipped)


@dataclass
class ChunkReader:
    """Makes chunks, each a pure function of the one before.

    A chunk ends after ``size`` samples, or where a stream begins its next pass: no sample is twice in a chunk.

    Args:
        mixture: where samples come from.
        sources: what the recipe says about each stream of the mixture, and its number there.
        tokenizer: used by this reader alone.
        embedder: of their media.
        max_length: longest sample in tokens.
        size: samples of a chunk at most.
        batch_size: rows of a batch at most.
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

    def read(self, start: Bookmark, stopped: Callable[[], bool] = lambda: False) -> Iterator[Chunk]:
        """Yield chunks from the one of a bookmark on, without end.

        Args:
            start: its chunk is the first.
            stopped: asked before each sample; true ends the reading.

        Raises:
            InputError: nothing that is read can be used.
        """
        with closing(_Reading(self, start.places, stopped)) as reading:
            number, barren, fruitful = start.chunk, Skipped(), start
            while True:
                places = reading.places
                skipped, taken = Skipped(), reading.taken
                embedded = embed_samples(self.embedder, reading.samples(skipped), skipped.add)
                if stopped():
                    return
                batches = group_by_length(
                    [sample.length for sample in embedded.samples],
                    batch_size=self.batch_size,
                    seed=(*self.seed, number),
                )
                number += 1
                begin, end = Bookmark(number - 1, 0, places), Bookmark(number, 0, reading.places)
                yield Chunk(begin, end, embedded, batches, reading.taken - taken, skipped)
                if batches:
                    barren, fruitful = Skipped(), end
                else:
                    barren.update(skipped)
                    _check(barren, fruitful, end)


def _check(barren: Skipped, since: Bookmark, now: Bookmark) -> None:
    """Stop a run that reads and reads, and finds nothing to learn from."""
    laps = min(end.lap - begin.lap for begin, end in zip(since.places, now.places, strict=True))
    if laps > 1 or now.chunk - since.chunk >= MAX_BARREN_CHUNKS:
        raise InputError(
            f"none of the last {barren.total:,} samples of the stream can be used: {'; '.join(barren.lines())}"
        )


class _Reading:
    """One walk through the samples: the place after the last one that was given, and one that may be held back."""

    def __init__(self, reader: ChunkReader, places: Sequence[Place], stopped: Callable[[], bool]) -> None:
        self.reader, self.places, self.stopped = reader, tuple(places), stopped
        self.taken = 0
        self._bad: list[str] = []
        self._drawn = reader.mixture.read(places, self._bad)
        self._held: tuple[int, TarSample, tuple[Place, ...]] | None = None

    def close(self) -> None:
        """Close the shards."""
        self._drawn.close()

    def samples(self, skipped: Skipped) -> Iterator[Sample]:
        """Yield the samples of the next chunk that can be tokenised; count the others."""
        laps: dict[int, int] = {}
        for _ in range(self.reader.size):
            if self.stopped():
                return
            drawn = next(self._drawn) if self._held is None else self._held
            self._held = None
            number, sample, places = drawn
            if laps.setdefault(number, places[number].lap) != places[number].lap:
                self._held = drawn
                return
            self.places, self.taken = places, self.taken + 1
            for message in self._bad:
                skipped.add(BAD_SHARD, message)
            self._bad.clear()
            if (made := self._made(number, sample, skipped)) is not None:
                yield made

    def _made(self, number: int, sample: TarSample, skipped: Skipped) -> Sample | None:
        reader = self.reader
        source, config = reader.sources[number]
        try:
            row, split = read_row(sample, config, source)
            if split not in (None, "train"):
                raise InputError(f"a row of the split {split}")
            return make_sample(row, reader.tokenizer, reader.max_length)
        except InputError as error:
            leave_out(error, sample.name, skipped)
            return None
