"""What a recipe with streamed sources trains on: its streams, joined, in the share of one process."""

from __future__ import annotations

import copy
import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch

from bindllm.data.collate import collate
from bindllm.data.source_config import SourceConfig
from bindllm.data.stream.chunks import Chunk, ChunkReader
from bindllm.data.stream.loader import StreamLoader
from bindllm.data.stream.plan import Bookmark, Mixture, ShardStream
from bindllm.data.stream.remote import is_remote
from bindllm.data.stream.shards import expand_shards, is_stream
from bindllm.embeddings.embedder import Embedder
from bindllm.encoders import Encoder
from bindllm.errors import InputError
from bindllm.parallel import Processes

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
    processes: Processes | None = None,
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
        processes: which process this is; None: the only one.
        device: where the encoders run.

    Raises:
        InputError: a stream with fewer shards than there are processes.
    """
    streams = _Streams(sources, tokenizer, encoders, options, processes or Processes(), device)
    return StreamLoader(
        streams.chunks,
        partial(collate, pad_id=tokenizer.pad_token_id),
        start=Bookmark(0, 0, streams.mixture.start()),
        length=length,
        fingerprint=streams.fingerprint(),
        position=position,
        processes=streams.processes,
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
        processes: Processes,
        device: torch.device | str,
    ) -> None:
        self.tokenizer, self.encoders, self.options = tokenizer, encoders, options
        self.processes, self.device = processes, device
        self.numbered = [(n, config) for n, config in enumerate(sources) if is_training_stream(config)]
        streams = [
            ShardStream(
                config.path,
                expand_shards(config.path),
                options.seed,
                number,
                processes.world_size,
                processes.rank,
            )
            for number, config in self.numbered
        ]
        self.mixture = Mixture(streams, [config.weight for _, config in self.numbered])

    def chunks(self, start: Bookmark, stopped: Callable[[], bool]) -> Iterator[Chunk]:
        """Read in the loader's thread, with a tokenizer of its own: none may be used by two at the same time."""
        threads = self.processes.num_threads
        with Embedder(self.encoders, device=self.device, threads=threads) as embedder:
            reader = ChunkReader(
                self.mixture,
                self.numbered,
                copy.deepcopy(self.tokenizer),
                embedder,
                max_length=self.options.max_length,
                size=self.options.chunk,
                batch_size=self.options.batch_size,
                seed=(self.options.seed, _ORDER_OF_ROWS, self.processes.rank),
            )
            try:
                yield from reader.read(start, stopped)
            finally:
                # Frees their memory on the accelerator.
                for encoder in self.encoders:
                    encoder.to("cpu")

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
