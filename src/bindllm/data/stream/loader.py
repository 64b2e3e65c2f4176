"""Loads streamed batches: prefetched in a thread, and resumed at the next batch that training has not had."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from typing import Any

from bindllm.data.collate import Batch, collate
from bindllm.data.report import StreamReport
from bindllm.data.rows import Sample
from bindllm.data.source_config import SourceConfig
from bindllm.data.stream.chunks import Chunk, ChunkReader, StreamOptions
from bindllm.data.stream.plan import Mixture, Position, ShardStream, StreamState
from bindllm.data.stream.shards import expand_shards, is_remote, is_stream
from bindllm.encoders import Encoder
from bindllm.errors import InputError
from bindllm.parallel import Prefetcher, RunContext

HEAD_BYTES = 65536
"""Bytes of each local shard whose content is compared when a run resumes."""


class StreamLoader:
    """Yields the batches of the streamed training sources of a recipe without end, starting at the trainer's position.

    A thread reads, decodes, embeds and tokenizes ahead. The saved state is that of the next batch that the trainer has
    not had, however far ahead the thread is; and of the batch before it, for a step that was interrupted.

    Args:
        length: batches that the trainer will take; to Lightning they are one epoch.
        position: returns how many batches the trainer has completed; by default, how many were yielded.
        context: the processes of the run, each of which calls `state_dict` when the others do, and the device that
            the encoders run on.

    Raises:
        InputError: a stream with fewer shards than there are processes.
    """

    def __init__(
        self,
        sources: Sequence[SourceConfig],
        *,
        tokenizer: Any,
        encoders: Sequence[Encoder],
        options: StreamOptions,
        length: int,
        position: Callable[[], int] | None = None,
        context: RunContext = RunContext(),  # noqa: B008 (frozen)
        token_modalities: Collection[str] = (),
    ) -> None:
        self._length, self._position, self._pad_id = length, position, tokenizer.pad_token_id
        self._processes, self._device = context.processes, context.device
        # The index in the recipe is part of the seed and of every row.
        numbered = [(n, config) for n, config in enumerate(sources) if is_training_stream(config)]
        world = (context.processes.world_size, context.processes.rank)
        streams = [
            ShardStream(config.path, expand_shards(config.path), options.seed, number, *world)
            for number, config in numbered
        ]
        mixture = Mixture(streams, [config.weight for _, config in numbered])
        self._chunks = ChunkReader(mixture, numbered, tokenizer, encoders, options, context, token_modalities)
        # Changes whenever any batch would.
        self._fingerprint = _fingerprint(streams, numbered, options)
        # The state after a number of batches, for the last two numbers.
        self._states = {0: StreamState(0, 0, (Position(),) * len(streams))}
        self._ahead: Prefetcher[Chunk] | None = None
        self.report = StreamReport()

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[Batch]:
        # A generator: nothing here runs before the first batch is requested, when the trainer knows its position.
        self.close()
        done = max(self._states) if self._position is None else self._position()
        if done not in self._states:
            raise InputError(
                f"this run cannot resume after batch {done}: its saved state is of batch {max(self._states)}; start "
                "it from scratch with --resume false"
            )
        first = self._states[done]
        started = time.perf_counter()
        # The local name stays with this iteration; a later one replaces ``_ahead``.
        self._ahead = ahead = Prefetcher(
            lambda stopped: self._chunks.read(first, stopped), device=self._device
        )
        try:
            begun: float | None = None
            asked = started
            for chunk in ahead:
                self._note_chunk(chunk, first)
                # states[n] is the state before batch n; the last one begins the next chunk.
                states = [replace(chunk.start, batch=n) for n in range(len(chunk.batches))] + [chunk.end]
                # A resumed run reads its chunk from the start, and skips the batches that it has trained on.
                skip = first.batch if chunk.start.chunk == first.chunk else 0
                for number in range(skip, len(chunk.batches)):
                    rows = [chunk.embedded.samples[n] for n in chunk.batches[number]]
                    batch = collate(rows, chunk.embedded, pad_id=self._pad_id)
                    # Both states, because a step may be interrupted before or after the trainer counts it.
                    self._states = {done: states[number], done + 1: states[number + 1]}
                    done += 1
                    # From the request of a batch until it is ready, the trainer waits.
                    now = time.perf_counter()
                    begun = self._note_batch(rows, now - asked, begun, now)
                    yield batch
                    asked = time.perf_counter()
                    self.report.seconds = asked - begun
        finally:
            self.close(ahead)

    def close(self, ahead: Prefetcher[Chunk] | None = None) -> None:
        """End the thread; a later iteration starts another.

        Args:
            ahead: end only this one; by default, the current one.
        """
        if self._ahead is not None and ahead in (None, self._ahead):
            self._ahead.close()
            self._ahead = None

    def state_dict(self) -> dict[str, Any]:
        """Return the state of every process, and the fingerprint; all processes call this together."""
        mine = {str(done): state.as_dict() for done, state in self._states.items()}
        return {
            "stream": self._fingerprint,
            "processes": self._processes.world_size,
            # Each process reads its own shards, so a checkpoint needs the states of all of them.
            "states": self._processes.gather(mine),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resume from a state of `state_dict`.

        Raises:
            InputError: it was saved by another number of processes, or with other data.
        """
        if state_dict.get("processes") != self._processes.world_size:
            raise InputError(
                f"this run was saved by {state_dict.get('processes')} processes and cannot resume in "
                f"{self._processes.world_size}: each has a share of the shards. Start it with as many devices as "
                "before, or start a new run from the weights (init_from)"
            )
        if state_dict.get("stream") != self._fingerprint:
            raise InputError(
                "this run cannot resume from that checkpoint: its shards or their sizes, formats, weights, chunk, "
                "batch size, max_length or seed differ. Restore them, or start a new run from the weights (init_from)"
            )
        # The thread may have read ahead from the earlier position.
        self.close()
        mine = state_dict["states"][self._processes.rank]
        self._states = {int(done): StreamState.from_dict(values) for done, values in mine.items()}

    def _note_chunk(self, chunk: Chunk, first: StreamState) -> None:
        """Count new samples; after a resume, the first batches of the first chunk were trained on before."""
        before = chunk.batches[: first.batch] if chunk.start.chunk == first.chunk else []
        seen = sum(map(len, before))
        self.report.read += chunk.read - seen
        self.report.waiting = len(chunk.embedded.samples) - seen
        self.report.skipped.update(chunk.skipped)
        self.report.remarks.update(chunk.remarks)

    def _note_batch(self, rows: list[Sample], waited: float, begun: float | None, now: float) -> float:
        """Count a batch; return the time of the first one."""
        self.report.rows += len(rows)
        self.report.waiting -= len(rows)
        self.report.batches += 1
        if begun is None:
            self.report.seconds_first = waited
            return now
        self.report.seconds_waited += waited
        return begun


def is_training_stream(config: SourceConfig) -> bool:
    """Tell whether a source is streamed for training."""
    return is_stream(config.path) and config.split in (None, "train")


def check_streams(sources: Sequence[SourceConfig]) -> None:
    """Refuse sources that cannot be streamed together.

    Raises:
        InputError: streamed and other training sources in one recipe, shards that are both trained on and held out,
            a training stream with a limit, or a held-out one without.
    """
    # How to read this: limits, then streams next to other sources, then shards on both sides.
    streams = [config for config in sources if is_training_stream(config)]
    for config in streams:
        if config.limit is not None:
            raise InputError(
                f"{config.path}: a stream that is trained on has no limit; name fewer shards, or give it a split"
            )
    held_out = [config for config in sources if is_stream(config.path) and not is_training_stream(config)]
    for config in held_out:
        if config.limit is None:
            raise InputError(
                f"{config.path}: held-out rows of a stream are kept in memory, so give this source a limit, such as 500"
            )
    others = [config for config in sources if not is_stream(config.path)]
    mixed = [config.path for config in others if config.split in (None, "train")]
    if streams and mixed:
        raise InputError(
            f"{streams[0].path} is streamed and {mixed[0]} is not: a run trains only on streams or on none. Pack the "
            "other source into shards too (docs/streaming.md), or only evaluate on it, with split: validation or test"
        )
    # By real path or URL, because two patterns may write one file in different ways.
    trained = {_whole(shard): config.path for config in streams for shard in expand_shards(config.path)}
    for config in held_out:
        if both := [shard for shard in expand_shards(config.path) if _whole(shard) in trained]:
            other = trained[_whole(both[0])]
            raise InputError(
                f"{both[0]} is held out by {config.path} and trained on by {other}; give each its own shards"
            )


def _whole(shard: str) -> str:
    """Return a shard's URL or real path, which is the same however a recipe writes it."""
    return shard if is_remote(shard) else os.path.realpath(shard)


def _fingerprint(
    streams: Sequence[ShardStream], numbered: Sequence[tuple[int, SourceConfig]], options: StreamOptions
) -> str:
    """Return hex digits that change when any batch would, as far as known without reading the shards."""
    # The settings, then each stream with its shards: a state is a position in exactly this order.
    digest = hashlib.sha256(repr(options).encode())
    for stream, (number, config) in zip(streams, numbered, strict=True):
        digest.update(repr((number, sorted(asdict(config).items()))).encode())
        for shard in stream.shards:
            size, head = -1, b""
            # Web servers are not contacted; a file that is missing now may exist in a later pass.
            with suppress(OSError):
                if os.path.isfile(shard):
                    with open(shard, "rb") as file:
                        # Shards are large: the first samples stand for all.
                        size, head = os.path.getsize(shard), file.read(HEAD_BYTES)
            digest.update(
                f"{shard}\n{size}\n".encode("utf-8", "surrogateescape") + hashlib.sha256(head).digest()
            )
    return digest.hexdigest()
