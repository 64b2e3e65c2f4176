"""From the samples of shards to chunks: read, tokenized, embedded and grouped into batches, without a file on disk."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from bindllm.data.collate import MediaGroup
from bindllm.data.report import Skipped
from bindllm.data.rows import Sample, make_sample
from bindllm.data.source_config import SourceConfig
from bindllm.data.stream.plan import Mixture, Position, StreamState, group_by_length
from bindllm.data.stream.samples import read_row
from bindllm.data.stream.shards import BAD_SHARD, TarSample
from bindllm.embeddings.embedder import Embedder, EmbeddingResult, Work
from bindllm.encoders import Encoder
from bindllm.encoders.fusion import common_size, fuse
from bindllm.encoders.tokens import group_tokens, token_size
from bindllm.errors import InputError
from bindllm.media import Media
from bindllm.parallel import RunContext

CANNOT_EMBED = "media that cannot be embedded"
MAX_EMPTY_CHUNKS = 10
"""Successive chunks without a usable row after which a run ends."""


# Second entry of the seed, as `plan._ORDER_OF_SHARDS`.
_ORDER_OF_ROWS = 3


@dataclass(frozen=True)
class StreamOptions:
    """Settings of the data section of a recipe that hold for all streams.

    Args:
        batch_size: rows of a batch, per process.
        max_length: maximum number of tokens of a row.
        seed: seed of the order.
        chunk: samples that are shuffled and grouped by length together.
    """

    batch_size: int
    max_length: int
    seed: int
    chunk: int


@dataclass
class EmbeddedSamples:
    """Samples whose media are embedded.

    Args:
        samples: their media are names without content.
        embeddings: the fused embedding of each of their media groups, unit norm, [E].
        media_tokens: the tokens of each of their media that has any, from `reduce_tokens`.
        token_width: C; 0 if tokens are not asked for.
    """

    samples: list[Sample]
    embeddings: dict[MediaGroup, Tensor]
    embedding_size: int
    media_tokens: dict[Media, Tensor] = field(default_factory=dict)
    token_width: int = 0

    def __call__(self, groups: Sequence[MediaGroup]) -> Tensor:
        """Return the embedding of each media group, [N, E]."""
        if not groups:
            return torch.zeros(0, self.embedding_size)
        return torch.stack([self.embeddings[group] for group in groups])

    def tokens(self, groups: Sequence[MediaGroup]) -> Tensor | None:
        """Return the tokens of each media group, [N, n, C], see `group_tokens`; None if they are not asked for."""
        if not self.token_width:
            return None
        found = [self.media_tokens.get(media) for group in groups for media in group]
        return group_tokens(found, [len(group) for group in groups], self.token_width)


@dataclass
class Chunk:
    """Samples that were read one after the other.

    Args:
        start: the first batch.
        end: the first batch of the next chunk.
        embedded: the usable samples, in the order in which they were read.
        batches: indices into ``embedded`` of the rows of each batch.
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

    A chunk ends after ``options.chunk`` samples, or when a stream begins its next pass: no sample is in a chunk twice.

    Args:
        sources: the recipe's index and configuration of each stream of the mixture.
        tokenizer: tokenizer of the decoder; copied, because the loader's thread must not share it.
        encoders: embed the media of the samples; on the CPU again afterwards.
        context: the device that the encoders run on, and the rank of this process.
        token_modalities: modalities whose tokens are kept with the samples of a chunk.
    """

    mixture: Mixture
    sources: Sequence[tuple[int, SourceConfig]]
    tokenizer: Any
    encoders: Sequence[Encoder]
    options: StreamOptions
    context: RunContext
    token_modalities: Collection[str] = ()

    def read(self, start: StreamState, stopped: Callable[[], bool] = lambda: False) -> Iterator[Chunk]:
        """Yield chunks, starting with the chunk of a state, without end.

        Args:
            stopped: called before each sample; reading ends once it returns true.

        Raises:
            InputError: no sample can be used.
        """
        threads, device = self.context.processes.num_threads, self.context.device
        try:
            with (
                Embedder(
                    self.encoders, device=device, threads=threads, token_modalities=self.token_modalities
                ) as embedder,
                closing(_Reading(self, start.positions, stopped)) as reading,
            ):
                yield from self._chunks(reading, embedder, start)
        finally:
            # Frees their memory on the accelerator.
            for encoder in self.encoders:
                encoder.to("cpu")

    def _chunks(self, reading: _Reading, embedder: Embedder, start: StreamState) -> Iterator[Chunk]:
        # ``empty`` holds the reasons since the last usable row, for the error message.
        number, empty, last_used = start.chunk, Skipped(), start
        while True:
            # Before reading: the start of this chunk.
            positions = reading.positions
            skipped, remarks, taken = Skipped(), Skipped(), reading.taken
            embedded = embed_samples(embedder, reading.samples(skipped, remarks), skipped.add)
            # An incomplete chunk would have other batches than the same chunk after a resume.
            if reading.stopped():
                return
            batches = group_by_length(
                [sample.length for sample in embedded.samples],
                batch_size=self.options.batch_size,
                # With the chunk's index in the seed, a saved state needs no generator.
                seed=(self.options.seed, _ORDER_OF_ROWS, self.context.processes.rank, number),
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
        self.tokenizer = copy.deepcopy(reader.tokenizer)
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
        for _ in range(self.reader.options.chunk):
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
                made = make_sample(row, self.tokenizer, self.reader.options.max_length)
            except InputError as error:
                skipped.add_error(error, sample.name)
            else:
                for remark in row.remarks:
                    remarks.add(remark, row.name)
                yield made


def embed_samples(
    embedder: Embedder, samples: Iterable[Sample], skip: Callable[[str, str], None]
) -> EmbeddedSamples:
    """Embed the media of samples; a sample with media that cannot be embedded is skipped.

    The same samples in the same order give the same batches for the encoder, and so the same bits.

    Args:
        samples: read only as far ahead as the memory for prepared media allows.
        skip: called with the reason and the name of each skipped sample.

    Raises:
        InputError: media of a modality that no encoder serves, or encoders of different embedding sizes.
    """
    size, wanted = common_size(embedder.encoders), embedder.token_modalities
    width = token_size(embedder.encoders, wanted) if wanted else 0
    read: list[Sample] = []

    def works() -> Iterator[Work[Media]]:
        for sample in samples:
            names = _names(sample)
            # Without its media: a chunk of their contents would not fit into memory.
            read.append(light := _renamed(sample, names))
            # Media of an answer that was cut off are not needed.
            needed = {name for group in light.media for name in group}
            yield from (Work(name, media, name.source) for media, name in names.items() if name in needed)

    # All samples in one call, so that batches are filled across samples.
    results = {result.key: result for result in embedder.embed(works())}
    kept: list[Sample] = []
    embeddings: dict[MediaGroup, Tensor] = {}
    for sample in read:
        try:
            # All or nothing: a sample is never trained on with a part of its media.
            embeddings |= {group: _fuse(group, results) for group in sample.media}
            kept.append(sample)
        except InputError as error:
            skip(CANNOT_EMBED, f"{sample.name}: {error}")
    media_tokens = {name: result.tokens for name, result in results.items() if result.tokens is not None}
    return EmbeddedSamples(kept, embeddings, size, media_tokens, width)


def _fuse(group: MediaGroup, results: dict[Media, EmbeddingResult[Media]]) -> Tensor:
    for media in group:
        if error := results[media].error:
            raise InputError(error)
    rows = torch.stack([results[media].embedding for media in group])  # [M, E]
    return fuse(rows, torch.tensor([media.weight for media in group]))


def _names(sample: Sample) -> dict[Media, Media]:
    """Return the replacement of each media of a sample: its position, which no other media of a run has."""
    # Of the whole conversation: an answer that was cut off may have had media too.
    media = dict.fromkeys(item for group in sample.conversation.media_groups for item in group)
    return {
        # Two sources may read other media of one shard. The weight stays with the name, for `_fuse`.
        item: Media(item.modality, f"{sample.name} media {number} of source {sample.source + 1}", item.weight)
        for number, item in enumerate(media, start=1)
    }


def _renamed(sample: Sample, names: dict[Media, Media]) -> Sample:
    """Return the sample with names instead of media, so that their contents are freed once they are prepared."""
    messages = tuple(
        replace(message, content=tuple(names.get(part, part) for part in message.content))
        for message in sample.conversation.messages
    )
    # The rejected answer of preference data is a conversation of its own.
    rejected = None if sample.rejected is None else _renamed(sample.rejected, names)
    conversation = replace(sample.conversation, messages=messages)
    return replace(sample, conversation=conversation, rejected=rejected)
