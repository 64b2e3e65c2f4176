"""A loader of streamed batches: filled ahead of the training, and resumed at the batch that it has not had yet."""

from __future__ import annotations

import copy
import hashlib
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from bindllm.data.collate import Batch, Lookup, collate
from bindllm.data.report import StreamReport
from bindllm.data.rows import Sample
from bindllm.data.source_config import SourceConfig
from bindllm.data.stream.ahead import Ahead
from bindllm.data.stream.chunks import Chunk, ChunkReader
from bindllm.data.stream.embed import StreamEmbedder
from bindllm.data.stream.plan import StreamState, Mixture, ShardStream
from bindllm.data.stream.shards import expand_shards, is_remote, is_stream
from bindllm.encoders import Encoder
from bindllm.errors import InputError
from bindllm.parallel.ranks import Ranks

if TYPE_CHECKING:
    from lightning.pytorch import Trainer


class StreamLoader:
    """Yields batches without end, from where the trainer stands.

    A thread reads, decodes, embeds and tokenizes ahead. What is saved is the position of the next batch that the trainer
    has not had, whatever the thread has made by then; and of the one before, for a step that was cut off.

    Args:
        chunks: yields the chunks from a state on; its second argument tells whether to stop.
        collate: makes a batch of samples.
        start: where a run begins.
        length: batches that the trainer will take; Lightning counts a run as one epoch of so many.
        fingerprint: changes when any batch would.
        position: gives the number of batches that the trainer is done with; None: those that were handed out.
        ranks: the processes of the run; each calls `state_dict` when the others do.
        device: where the encoders run.
    """

    def __init__(
        self,
        chunks: Callable[[StreamState, Callable[[], bool]], Iterator[Chunk]],
        collate: Callable[[list[Sample], Lookup], Batch],
        *,
        start: StreamState,
        length: int,
        fingerprint: str,
        position: Callable[[], int] | None = None,
        ranks: Ranks = Ranks(),  # noqa: B008 (frozen)
        device: torch.device | str = "cpu",
    ) -> None:
        self._chunks, self._collate = chunks, collate
        self._length, self._fingerprint = length, fingerprint
        self._position, self._ranks, self._device = position, ranks, device
        # The next batch after so many: of the last two numbers of batches.
        self._states: dict[int, StreamState] = {0: start}
        self._ahead: Ahead[Chunk] | None = None
        self.report = StreamReport()

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[Batch]:
        # A generator: nothing here runs before the first batch is asked for, when the trainer knows its position.
        self.close()
        done = max(self._states) if self._position is None else self._position()
        if done not in self._states:
            raise InputError(
                f"this run cannot go on after batch {done}: its saved state is of batch {max(self._states)}; start "
                "it afresh with --resume false"
            )
        first = self._states[done]
        started = time.perf_counter()
        self._ahead = ahead = Ahead(lambda stopped: self._chunks(first, stopped), device=self._device)
        try:
            begun: float | None = None
            asked = started
            for chunk in ahead:
                self._note_chunk(chunk, first)
                positions = [
                    StreamState(chunk.start.chunk, n, chunk.start.positions) for n in range(len(chunk.batches))
                ]
                positions.append(chunk.end)
                for number in range(
                    first.batch if chunk.start.chunk == first.chunk else 0, len(chunk.batches)
                ):
                    rows = [chunk.embedded.samples[n] for n in chunk.batches[number]]
                    batch = self._collate(rows, chunk.embedded.lookup)
                    self._states = {done: positions[number], done + 1: positions[number + 1]}
                    done += 1
                    now = time.perf_counter()
                    begun = self._note_batch(rows, now - asked, begun, now)
                    yield batch
                    asked = time.perf_counter()
                    self.report.seconds = asked - begun
        finally:
            self.close(ahead)

    def close(self, ahead: Ahead[Chunk] | None = None) -> None:
        """End the thread; a later iteration starts another.

        Args:
            ahead: end this one only; None: whichever there is.
        """
        if self._ahead is not None and ahead in (None, self._ahead):
            self._ahead.close()
            self._ahead = None

    def state_dict(self) -> dict[str, Any]:
        """Return where every process stands, and what must not change until a resume; all of them call this."""
        mine = {str(done): state.as_dict() for done, state in self._states.items()}
        return {
            "stream": self._fingerprint,
            "processes": self._ranks.count,
            "states": self._ranks.gather(mine),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a state of `state_dict`.

        Raises:
            InputError: it is of another number of processes, or of other data.
        """
        if state_dict.get("processes") != self._ranks.count:
            raise InputError(
                f"this run was saved by {state_dict.get('processes')} processes and cannot go on in "
                f"{self._ranks.count}: each has a share of the shards. Start it with as many devices as before, or "
                "start a new run from the weights (start_from)"
            )
        if state_dict.get("stream") != self._fingerprint:
            raise InputError(
                "this run cannot go on from that checkpoint: its shards or their sizes, formats, weights, chunk, batch "
                "size, max_length or seed differ. Restore them, or start a new run from the weights (start_from)"
            )
        self.close()
        mine = state_dict["states"][self._ranks.number]
        self._states = {int(done): StreamState.from_dict(values) for done, values in mine.items()}

    def _note_chunk(self, chunk: Chunk, first: StreamState) -> None:
        """Count what was read anew; after a resume, the first batches of the first chunk were trained on before."""
        before = chunk.batches[: first.batch] if chunk.start.chunk == first.chunk else []
        seen = sum(map(len, before))
        self.report.read += chunk.read - seen
        self.report.waiting = len(chunk.embedded.samples) - seen
        self.report.skipped.update(chunk.skipped)

    def _note_batch(self, rows: list[Sample], waited: float, begun: float | None, now: float) -> float:
        """Count a batch that is handed out; return when the first one was."""
        self.report.rows += len(rows)
        self.report.waiting -= len(rows)
        self.report.batches += 1
        if begun is None:
            self.report.seconds_first = waited
            return now
        self.report.seconds_waited += waited
        return begun


_ORDER_OF_ROWS = 3


@dataclass(frozen=True)
class StreamOptions:
    """What the data section of a recipe says about all streams.

    Args:
        batch_size: rows of a batch, per process.
        max_length: longest row in tokens.
        seed: of the order.
        chunk: samples that are shuffled and grouped by length together.
    """

    batch_size: int
    max_length: int
    seed: int
    chunk: int


def is_training_stream(config: SourceConfig) -> bool:
    """Tell whether a source is streamed for training."""
    return is_stream(config.path) and config.split in (None, "train")


def check_streams(sources: Sequence[SourceConfig]) -> None:
    """Refuse what cannot be streamed together.

    Raises:
        InputError: streamed and other training sources in one recipe, shards that are both trained on and held out,
            a limit where there can be none, or none where there must be one.
    """
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
            f"{streams[0].path} is streamed and {mixed[0]} is not: a run trains on streams alone or on none. Pack the "
            "other source into shards too (docs/streaming.md), or let it be measured alone, with split: validation or "
            "test"
        )
    trained = {_whole(shard): config.path for config in streams for shard in expand_shards(config.path)}
    for config in held_out:
        if both := [shard for shard in expand_shards(config.path) if _whole(shard) in trained]:
            other = trained[_whole(both[0])]
            raise InputError(
                f"{both[0]} is held out by {config.path} and trained on by {other}; give each its own shards"
            )


def _whole(shard: str) -> str:
    """A shard's URL, or its path from the root, which is the same however a recipe writes it."""
    return shard if is_remote(shard) else os.path.abspath(shard)


def stream_loader(
    sources: Sequence[SourceConfig],
    *,
    tokenizer: Any,
    encoders: Sequence[Encoder],
    options: StreamOptions,
    length: int,
    position: Callable[[], int] | None = None,
    ranks: Ranks | None = None,
    device: torch.device | str = "cpu",
) -> StreamLoader:
    """Return the loader of the streamed training sources of a recipe.

    Args:
        sources: all of the recipe; those that are not streamed for training are passed over.
        tokenizer: of the decoder; copied.
        encoders: for the media.
        options: what holds for all streams.
        length: batches that the trainer will take.
        position: number of batches that the trainer is done with.
        ranks: which process this is; None: the only one.
        device: where the encoders run.

    Raises:
        InputError: a stream with fewer shards than there are processes.
    """
    streams = _Streams(sources, tokenizer, encoders, options, ranks or Ranks(), device)
    return StreamLoader(
        streams.chunks,
        partial(collate, pad_id=tokenizer.pad_token_id),
        start=StreamState(0, 0, streams.mixture.start()),
        length=length,
        fingerprint=streams.fingerprint(),
        position=position,
        ranks=streams.ranks,
        device=device,
    )


class _Streams:
    """The training streams of a recipe, and all that is done with their samples before they are a batch."""

    def __init__(
        self,
        sources: Sequence[SourceConfig],
        tokenizer: Any,
        encoders: Sequence[Encoder],
        options: StreamOptions,
        ranks: Ranks,
        device: torch.device | str,
    ) -> None:
        self.tokenizer, self.encoders, self.options = tokenizer, encoders, options
        self.ranks, self.device = ranks, device
        self.numbered = [(n, config) for n, config in enumerate(sources) if is_training_stream(config)]
        streams = [
            ShardStream(
                config.path, expand_shards(config.path), options.seed, number, ranks.count, ranks.number
            )
            for number, config in self.numbered
        ]
        self.mixture = Mixture(streams, [config.weight for _, config in self.numbered])

    def chunks(self, start: StreamState, stopped: Callable[[], bool]) -> Iterator[Chunk]:
        """Read in the loader's thread, with a tokenizer of its own: none may be used by two at the same time."""
        # The processors are shared by the processes of a machine.
        workers = self.ranks.threads or os.cpu_count() or 1
        with closing(StreamEmbedder(self.encoders, self.device, workers)) as embedder:
            reader = ChunkReader(
                self.mixture,
                self.numbered,
                copy.deepcopy(self.tokenizer),
                embedder,
                max_length=self.options.max_length,
                size=self.options.chunk,
                batch_size=self.options.batch_size,
                seed=(self.options.seed, _ORDER_OF_ROWS, self.ranks.number),
            )
            yield from reader.read(start, stopped)

    def fingerprint(self) -> str:
        """Hex digits that change when any batch would, as far as can be told without reading the shards."""
        digest = hashlib.sha256(repr(self.options).encode())
        for stream, (number, config) in zip(self.mixture.streams, self.numbered, strict=True):
            digest.update(repr((number, sorted(asdict(config).items()))).encode())
            for shard in stream.shards:
                # A web server is not asked; a file that is missing now may be there in a later pass.
                size = os.path.getsize(shard) if os.path.isfile(shard) else -1
                digest.update(f"{shard}\n{size}\n".encode("utf-8", "surrogateescape"))
        return digest.hexdigest()


def processes_of(trainer: Trainer | None) -> Ranks:
    """Return which process of a run this is; without a trainer, the only one."""
    if trainer is None or trainer.world_size == 1:
        return Ranks()
    threads = max(1, (os.cpu_count() or 1) // trainer.num_devices)
    return Ranks(trainer.global_rank, trainer.world_size, gather=_gather, threads=threads)


def _gather(value: Any) -> list[Any]:
    """Return the values of all processes; waits for all of them."""
    values: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return values
