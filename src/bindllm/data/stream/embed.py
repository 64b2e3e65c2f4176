"""Decoding and embedding streamed media on the way: threads read ahead of the encoder, and nothing is stored."""

from __future__ import annotations

import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor

from bindllm.conversation import Conversation
from bindllm.data.collate import MediaGroup
from bindllm.data.rows import Sample
from bindllm.encoders import Encoder, encoder_for
from bindllm.encoders.fusion import common_size, fuse
from bindllm.errors import InputError, MediaError
from bindllm.media import Media
from bindllm.parallel.ahead import ahead_in_threads

CANNOT_EMBED = "media that cannot be embedded"

TOGETHER = 32
"""Media of one modality that are embedded together."""

PREPARED_BYTES = 1 << 29
"""Prepared inputs that wait for the encoder, about: a long video alone can be 200 MB."""


class _Work(NamedTuple):
    """A sample on its way: names stand for its media, whose contents are prepared, or the reason why they cannot be."""

    sample: Sample
    inputs: dict[Media, Tensor]
    error: str = ""


@dataclass
class EmbeddedSamples:
    """Samples whose media are embedded.

    Args:
        samples: their media are names, without content.
        embeddings: of each of their media groups, fused, unit norm, [E].
        embedding_size: E.
    """

    samples: list[Sample]
    embeddings: dict[MediaGroup, Tensor]
    embedding_size: int

    def lookup(self, groups: Sequence[MediaGroup]) -> Tensor:
        """Return the embedding of each media group, [N, E]."""
        if not groups:
            return torch.zeros(0, self.embedding_size)
        return torch.stack([self.embeddings[group] for group in groups])


@dataclass
class StreamEmbedder:
    """Embeds the media of samples.

    The same samples in the same order give the same batches for the encoder, and so the same bits.

    Args:
        encoders: the first that serves a modality embeds it.
        device: where they run.
        workers: threads that decode.

    Attributes:
        seconds_waited: time without anything to embed, while samples were read and decoded.
        seconds_embedding: time of the encoders.

    Raises:
        InputError: the encoders have different embedding sizes.
    """

    encoders: Sequence[Encoder]
    device: torch.device | str = "cpu"
    workers: int = field(default_factory=lambda: os.cpu_count() or 1)
    seconds_waited: float = field(default=0.0, init=False)
    seconds_embedding: float = field(default=0.0, init=False)

    def __post_init__(self) -> None:
        self.embedding_size = common_size(self.encoders)
        self._pool = ThreadPoolExecutor(self.workers, thread_name_prefix="decode")
        self._serving: dict[str, Encoder] = {}
        self._largest = 0

    def close(self) -> None:
        """End the threads, and give the device's memory back."""
        self._pool.shutdown(cancel_futures=True)
        for encoder in self._serving.values():
            encoder.to("cpu")
        self._serving = {}

    @torch.no_grad()
    def embed(self, samples: Iterable[Sample], left_out: Callable[[str, str], None]) -> EmbeddedSamples:
        """Embed the media of samples; one whose media cannot be embedded is left out.

        Args:
            samples: taken one after the other, a few more than are in work.
            left_out: is told the reason, and which sample it was.

        Raises:
            InputError: media of a modality that no encoder serves.
        """
        kept: list[Sample] = []
        vectors: dict[Media, Tensor] = {}
        waiting: defaultdict[str, dict[Media, Tensor]] = defaultdict(dict)
        works = ahead_in_threads(self._pool, self._prepare, samples, ahead=self._ahead)
        while (work := self._next(works)) is not None:
            if work.error:
                left_out(CANNOT_EMBED, work.error)
                continue
            kept.append(work.sample)
            for media, inputs in work.inputs.items():
                batch = waiting[media.modality]
                batch[media] = inputs
                if len(batch) >= TOGETHER or sum(value.nbytes for value in batch.values()) >= PREPARED_BYTES:
                    vectors |= self._embedded(waiting.pop(media.modality))
        for batch in waiting.values():
            vectors |= self._embedded(batch)
        return self._fused(kept, vectors, left_out)

    def _next(self, works: Iterator[_Work]) -> _Work | None:
        """Wait for the next sample that is decoded."""
        started = time.perf_counter()
        try:
            return next(works, None)
        finally:
            self.seconds_waited += time.perf_counter() - started

    def _ahead(self) -> int:
        """Samples that may be in work or waiting, as memory allows."""
        most = self.workers + TOGETHER
        return min(most, max(1, PREPARED_BYTES // self._largest)) if self._largest else 2

    def _prepare(self, sample: Sample) -> _Work:
        """Decode the media of a sample (in a thread), and leave their contents behind."""
        heavy = [media for group in sample.conversation.media_groups for media in group]
        # All of the conversation: an answer that was cut may have cut media off too.
        names = {media: _name(media, sample, n) for n, media in enumerate(dict.fromkeys(heavy))}
        light = replace(sample, conversation=_renamed(sample.conversation, names))
        if sample.rejected is not None:
            rejected = _renamed(sample.rejected.conversation, names)
            light = replace(light, rejected=replace(sample.rejected, conversation=rejected))
        shown = {media for group in light.media for media in group}
        inputs: dict[Media, Tensor] = {}
        for media, name in names.items():
            if name not in shown:
                continue
            try:
                inputs[name] = encoder_for(media.modality, self.encoders).prepare(media)
            except MediaError as error:
                return _Work(light, {}, f"{sample.name}: {error}")
            except Exception as error:
                error.add_note(f"while preparing media of {sample.name}")
                raise
        self._largest = max(self._largest, sum(value.nbytes for value in inputs.values()))
        return _Work(light, inputs)

    def _embedded(self, batch: dict[Media, Tensor]) -> dict[Media, Tensor]:
        started = time.perf_counter()
        modality = next(iter(batch)).modality
        if modality not in self._serving:
            self._serving[modality] = encoder_for(modality, self.encoders).to(self.device)
        rows = self._serving[modality].embed(modality, list(batch.values())).cpu()
        self.seconds_embedding += time.perf_counter() - started
        return dict(zip(batch, rows, strict=True))

    def _fused(
        self, samples: list[Sample], vectors: dict[Media, Tensor], left_out: Callable[[str, str], None]
    ) -> EmbeddedSamples:
        """Fuse each media group; a sample whose group has no direction is left out."""
        kept: list[Sample] = []
        embeddings: dict[MediaGroup, Tensor] = {}
        for sample in samples:
            try:
                embeddings |= {group: _fuse(group, vectors) for group in sample.media}
                kept.append(sample)
            except InputError as error:
                left_out(CANNOT_EMBED, f"{sample.name}: {error}")
        return EmbeddedSamples(kept, embeddings, self.embedding_size)


def _fuse(group: MediaGroup, vectors: dict[Media, Tensor]) -> Tensor:
    rows = torch.stack([vectors[media] for media in group])
    if not rows.isfinite().all():
        raise InputError("its embedding is not finite")
    return fuse(rows, torch.tensor([media.weight for media in group]))


def _name(media: Media, sample: Sample, number: int) -> Media:
    """What stands for a media once it is embedded: its place, which no other media of a run has."""
    return Media(media.modality, f"{sample.name} media {number + 1}", media.weight)


def _renamed(conversation: Conversation, names: dict[Media, Media]) -> Conversation:
    """The same conversation with other media."""
    return Conversation(
        tuple(
            replace(
                message,
                content=tuple(
                    names.get(part, part) if isinstance(part, Media) else part for part in message.content
                ),
            )
            for message in conversation.messages
        )
    )
