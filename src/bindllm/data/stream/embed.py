"""Embedding the media of streamed samples on the way to a batch; nothing is written to disk."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bindllm.conversation import Conversation
from bindllm.data.collate import MediaGroup
from bindllm.data.rows import Sample
from bindllm.embeddings.embedder import Embedded, Embedder, Work
from bindllm.encoders.fusion import common_size, fuse
from bindllm.errors import InputError
from bindllm.media import Media

CANNOT_EMBED = "media that cannot be embedded"


@dataclass
class EmbeddedSamples:
    """Samples whose media are embedded.

    Args:
        samples: their media are names without content.
        embeddings: the fused embedding of each of their media groups, unit norm, [E].
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


def embed_samples(
    embedder: Embedder, samples: Iterable[Sample], skip: Callable[[str, str], None]
) -> EmbeddedSamples:
    """Embed the media of samples; a sample with media that cannot be embedded is skipped.

    The same samples in the same order give the same batches for the encoder, and so the same bits.

    Args:
        embedder: of the encoders of the model.
        samples: read only as far ahead as the memory for prepared media allows.
        skip: called with the reason and the name of each skipped sample.

    Raises:
        InputError: media of a modality that no encoder serves, or encoders of different embedding sizes.
    """
    size = common_size(embedder.encoders)
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
    return EmbeddedSamples(kept, embeddings, size)


def _fuse(group: MediaGroup, results: dict[Media, Embedded[Media]]) -> Tensor:
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
        # The weight stays with the name, for `_fuse`.
        item: Media(item.modality, f"{sample.name} media {number}", item.weight)
        for number, item in enumerate(media, start=1)
    }


def _renamed(sample: Sample, names: dict[Media, Media]) -> Sample:
    """Return the sample with names instead of media, so that their contents are freed once they are prepared."""
    light = replace(sample, conversation=_with_names(sample.conversation, names))
    # The rejected answer of preference data is a conversation of its own.
    if sample.rejected is not None:
        rejected = _with_names(sample.rejected.conversation, names)
        light = replace(light, rejected=replace(sample.rejected, conversation=rejected))
    return light


def _with_names(conversation: Conversation, names: dict[Media, Media]) -> Conversation:
    def named(part: Media | str) -> Media | str:
        return names.get(part, part) if isinstance(part, Media) else part

    return Conversation(
        tuple(
            replace(message, content=tuple(map(named, message.content))) for message in conversation.messages
        )
    )
