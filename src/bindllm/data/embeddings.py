"""The embeddings of a data set: computed once into the stores of its encoders, or again for every batch."""

from __future__ import annotations

import os
import time
from collections.abc import Collection, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from bindllm.data.collate import MediaGroup
from bindllm.data.rows import Row
from bindllm.embeddings.datastore import Datastore, Record
from bindllm.embeddings.embedder import RecentEmbeddings, embed_groups
from bindllm.embeddings.precompute import precompute_embeddings
from bindllm.embeddings.store import EmbeddingStore
from bindllm.encoders import Encoder, encoder_for, prepare
from bindllm.encoders.fusion import common_size, fuse_groups
from bindllm.encoders.tokens import group_tokens, token_size
from bindllm.encoders.trainable import tuned_encoders
from bindllm.errors import InputError, MediaError
from bindllm.media import Media
from bindllm.model.context.records import RecordReader
from bindllm.parallel import RunContext, prefetch

PREPARED_AT_ONCE = 64
"""Media that `LiveEmbeddings.precompute` has in work at the same time."""


def check_store(store: str | None, encoders: Sequence[Encoder]) -> None:
    """Raise an `InputError` if embeddings of an encoder would be stored that training changes."""
    if store is not None and (tuned := tuned_encoders(encoders)):
        number, encoder = next(iter(tuned.items()))
        raise InputError(
            f"data.store is {store}, and encoder {number + 1} ({type(encoder.base).__name__}) is tuned, so its stored "
            "embeddings would be those of other weights: set data.store: null"
        )


@dataclass
class PrecomputeTotals:
    """Counts of all stores together.

    Args:
        encoded: media that were embedded now.
        reused: media that were in a store before, or have the same content as one of these.
        failed: media that cannot be embedded, each with the reason.
    """

    encoded: int = 0
    reused: int = 0
    failed: dict[Media, str] = field(default_factory=dict)
    seconds: float = 0.0


class MediaEmbeddings:
    """Embeddings by media, over all encoders and their stores.

    Args:
        encoders: all of one embedding size; the first that serves a modality embeds it.
        token_modalities: modalities whose tokens are stored and looked up too.

    Raises:
        InputError: the encoders have different embedding sizes, so no joint space, or lack tokens (see `token_size`).
    """

    def __init__(
        self, encoders: Sequence[Encoder], folder: str | Path, *, token_modalities: Collection[str] = ()
    ) -> None:
        self.embedding_size = common_size(encoders)
        self._token_modalities = frozenset(token_modalities)
        # C, the width of the tokens.
        self._width = token_size(encoders, token_modalities) if token_modalities else 0
        self._encoders, self._folder = tuple(encoders), folder
        self._stores: dict[int, EmbeddingStore] = {}
        self._keys: dict[Media, str] = {}

    def precompute(self, media: Iterable[Media], context: RunContext = RunContext()) -> PrecomputeTotals:  # noqa: B008
        """Embed what the stores lack.

        Args:
            context: the device that the encoders run on (they are on the CPU again afterwards), and the processes that
                share the work; each is given the same media. Only the first one has the keys afterwards.

        Returns:
            The counts of all processes together.

        Raises:
            InputError: media of a modality that no encoder serves.
            StoreError: a store that cannot be written.
        """
        totals, processes = PrecomputeTotals(), context.processes
        wanted: dict[int, list[Media]] = {}
        # Each media once, in order.
        for item in dict.fromkeys(media):
            wanted.setdefault(self._number(item), []).append(item)
        # Processes that work together fill the same stores in the same order, even one that read nothing for them.
        for number in sorted({number for numbers in processes.gather(list(wanted)) for number in numbers}):
            items = wanted.get(number, [])
            encoder, store = self._encoders[number], self._store(number)
            try:
                report = precompute_embeddings(
                    store,
                    encoder.to(context.device),
                    items,
                    progress=context.progress,
                    processes=processes,
                    token_modalities=self._token_modalities,
                )
            finally:
                # An encoder that failed must not keep the accelerator's memory either.
                encoder.to("cpu")
            totals.encoded += report.encoded
            totals.reused += report.reused + report.duplicates
            totals.seconds += report.seconds
            if processes.is_first:
                reasons = dict(report.failed)
                keys = store.keys_of(items, token_modalities=self._token_modalities)
                self._keys |= keys
                totals.failed |= {
                    item: reasons.get(item.name, f"{item.name}: its content cannot be embedded")
                    for item in items
                    if item not in keys
                }
        return totals

    def key(self, media: Media) -> str:
        """Return the content hash of media that `precompute` has embedded.

        Raises:
            InputError: it has not.
        """
        if media not in self._keys:
            raise InputError(f"{media.name} was not embedded with the data; embed it first")
        return self._keys[media]

    def lookup(self, groups: Sequence[MediaGroup]) -> Tensor:
        """Return the embedding of each media group, fused where it has several: [N, E], unit norm, on the CPU.

        Raises:
            InputError: media that `precompute` was not given, or could not embed.
        """
        flat = [media for group in groups for media in group]
        rows = torch.zeros(len(flat), self.embedding_size)  # [M, E]
        numbers = torch.tensor([self._number(media) for media in flat], dtype=torch.long)
        # One lookup in each store.
        for number in numbers.unique().tolist():
            places = (numbers == number).nonzero().flatten()
            rows[places] = self._store(number).get([self.key(flat[n]) for n in places.tolist()])
        # Single media need no fusion and keep their bits.
        return rows if len(flat) == len(groups) else fuse_groups(rows, groups)

    __call__ = lookup

    def tokens(self, groups: Sequence[MediaGroup]) -> Tensor | None:
        """Return the tokens of each media group, [N, n, C], see `group_tokens`; None without ``token_modalities``.

        Raises:
            InputError: as `lookup`.
        """
        if not self._token_modalities:
            return None
        flat = [media for group in groups for media in group]
        found: list[Tensor | None] = [None] * len(flat)
        wanted: dict[int, list[int]] = {}
        for n, media in enumerate(flat):
            if media.modality in self._token_modalities:
                wanted.setdefault(self._number(media), []).append(n)
        # One lookup in each store.
        for number, positions in wanted.items():
            tokens = self._store(number).get_tokens([self.key(flat[n]) for n in positions])
            for n, item in zip(positions, tokens, strict=True):
                found[n] = item
        return group_tokens(found, [len(group) for group in groups], self._width)

    @property
    def fingerprints(self) -> list[str]:
        """Fingerprints of the encoders whose stores were used."""
        return [self._store(number).fingerprint for number in sorted(self._stores)]

    def _number(self, media: Media) -> int:
        """Number of the encoder that serves media."""
        return self._encoders.index(encoder_for(media.modality, self._encoders))

    def _store(self, number: int) -> EmbeddingStore:
        # Opened on first use: the fingerprint of an encoder reads all of its weights.
        if number not in self._stores:
            self._stores[number] = EmbeddingStore.for_encoder(self._folder, self._encoders[number])
        return self._stores[number]


class LiveEmbeddings:
    """A lookup without stores: media are prepared and encoded each time, with a gradient for encoders in training.

    It takes the place of `MediaEmbeddings`, and has the same members.

    Args:
        encoders: all of one embedding size; the first that serves a modality embeds it.
        token_modalities: modalities whose tokens are looked up too.

    Raises:
        InputError: as for `MediaEmbeddings`.
    """

    def __init__(self, encoders: Sequence[Encoder], *, token_modalities: Collection[str] = ()) -> None:
        self.embedding_size = common_size(encoders)
        self._encoders, self._token_modalities = tuple(encoders), frozenset(token_modalities)
        self._width = token_size(encoders, token_modalities) if token_modalities else 0
        self._device: torch.device | str = "cpu"
        # Tokens come with the embeddings, and are asked for right after them.
        self._last: tuple[list[MediaGroup], Tensor | None] | None = None

    def precompute(self, media: Iterable[Media], context: RunContext = RunContext()) -> PrecomputeTotals:  # noqa: B008
        """Prepare all media once, to find those that cannot be read; nothing is kept."""
        self._device, started = context.device, time.perf_counter()
        totals = PrecomputeTotals()
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            waiting = prefetch(pool, self._problem, dict.fromkeys(media), limit=lambda: PREPARED_AT_ONCE)
            totals.failed = {item: problem for item, problem in waiting if problem}
        totals.seconds = time.perf_counter() - started
        return totals

    def _problem(self, media: Media) -> tuple[Media, str]:
        """Return why a media cannot be prepared, "" if it can."""
        try:
            prepare(media, self._encoders)
        except MediaError as error:
            return media, str(error)
        return media, ""

    def key(self, media: Media) -> str:
        """Return the content hash of a media."""
        return media.content_hash()

    def lookup(self, groups: Sequence[MediaGroup]) -> Tensor:
        """Return the embedding of each media group: [N, E], unit norm, on the CPU.

        Raises:
            MediaError: a media cannot be read.
        """
        if not groups:
            return torch.zeros(0, self.embedding_size)
        options = {"device": self._device, "token_modalities": self._token_modalities, "trains": True}
        # A media of several rows is encoded once.
        found = embed_groups(groups, self._encoders, recent=RecentEmbeddings(), **options)
        self._last = list(groups), found.tokens
        return found.embeddings

    __call__ = lookup

    def tokens(self, groups: Sequence[MediaGroup]) -> Tensor | None:
        """Return the tokens of each media group, [N, n, C], see `group_tokens`; None without ``token_modalities``."""
        if not self._token_modalities:
            return None
        if not groups:
            return group_tokens([], [], self._width)
        if self._last is None or self._last[0] != list(groups):
            self.lookup(groups)
        (_, tokens), self._last = self._last, None
        return tokens


def build_datastore(rows: Iterable[Row], embeddings: MediaEmbeddings) -> Datastore:
    """Return a datastore of rows: one record for each media group, with the texts of all rows that show it.

    The text of a caption is the caption. Of any other row it is the question and its answer. Answers that their rows
    call unwanted are skipped.

    Args:
        rows: rows whose media are embedded already.

    Raises:
        InputError: no row has media and a wanted answer.
    """
    found: dict[tuple[str, ...], Record] = {}
    groups: dict[tuple[str, ...], MediaGroup] = {}
    for row in rows:
        for message, answer in pairwise(row.conversation.messages):
            if not message.media or answer.role != "assistant" or row.desirable is False:
                continue
            text = answer.text if row.task == "caption" else f"{message.text} {answer.text}"
            keys = tuple(embeddings.key(media) for media in message.media)
            group = tuple(message.media)
            known = found.setdefault(keys, Record(keys, group[0].name, group[0].modality, ()))
            found[keys] = replace(known, texts=tuple(dict.fromkeys([*known.texts, text.strip()])))
            groups.setdefault(keys, group)
    if not found:
        raise InputError("a datastore needs rows with media and a wanted answer, and these have none")
    vectors = embeddings.lookup([groups[keys] for keys in found])
    return Datastore(vectors, [*found.values()], embeddings.fingerprints)


class RetrievedRecords:
    """A lookup that also returns the records of a datastore, for training and evaluation.

    The records of the media itself and those with an equal embedding are excluded: an answer must not be copied from
    the row that it belongs to.

    Args:
        seed: draw the records at random instead of the nearest ones; None: the nearest ones.

    Attributes:
        itself: records that were excluded because they show the same media, over all media groups.
        equal: records that were excluded because of an equal embedding.
    """

    def __init__(
        self,
        embeddings: MediaEmbeddings,
        reader: RecordReader,
        count: int,
        *,
        seed: int | None = None,
    ) -> None:
        self.embeddings, self.reader, self.count, self._seed = embeddings, reader, count, seed
        self.itself = self.equal = 0
        self._found: dict[MediaGroup, tuple[Tensor, Tensor]] = {}

    def retrieve(self, groups: Iterable[MediaGroup]) -> None:
        """Find the records of media groups, all at once."""
        wanted = [group for group in dict.fromkeys(groups) if group not in self._found]
        store, keys = self.reader.datastore, [[self.embeddings.key(m) for m in group] for group in wanted]
        # All of them if they are drawn: the order is random, the exclusion is the same.
        count = self.count if self._seed is None else len(store)
        found = store.search(self.embeddings.lookup(wanted), count, keys=keys, exclude_equal=True)
        self.itself, self.equal = self.itself + int(found.itself.sum()), self.equal + int(found.equal.sum())
        for group, own, ids, scores in zip(wanted, keys, found.ids, found.scores, strict=True):
            if self._seed is not None:
                # Drawn by the content of the media, so the same whatever is asked before.
                generator = torch.Generator().manual_seed(int(own[0][:12], 16) ^ self._seed)
                number = int((ids >= 0).sum())
                drawn = torch.randperm(number, generator=generator)[: self.count]
                missing = (0, min(self.count, len(store)) - len(drawn))
                ids = torch.nn.functional.pad(ids[drawn], missing, value=-1)
                scores = torch.nn.functional.pad(scores[drawn], missing)
            self._found[group] = ids, scores

    def records(self, groups: Sequence[MediaGroup]) -> tuple[Tensor, Tensor, Tensor]:
        """Return embeddings [N, K, E], scores [N, K] and text ids [N, K, S] of the records of N media groups."""
        return self.reader.read(*self._lookup(groups))

    def ids(self, groups: Sequence[MediaGroup]) -> Tensor:
        """Return the indices of the records of N media groups, nearest first, -1 if there are no more: [N, K]."""
        return self._lookup(groups)[0]

    def _lookup(self, groups: Sequence[MediaGroup]) -> tuple[Tensor, Tensor]:
        """Return ids and scores of the records of N media groups, [N, K] each."""
        self.retrieve(groups)
        if groups:
            ids, scores = zip(*(self._found[group] for group in groups), strict=True)
            return torch.stack(ids), torch.stack(scores)
        none = torch.zeros(0, min(self.count, len(self.reader.datastore)))
        return none.long(), none

    def drawn(self, seed: int) -> RetrievedRecords:
        """Return the same lookup with as many records that are drawn at random."""
        return RetrievedRecords(self.embeddings, self.reader, self.count, seed=seed)

    def __call__(self, groups: Sequence[MediaGroup]) -> Tensor:
        """Return the embedding of each media group, [N, E]."""
        return self.embeddings.lookup(groups)

    def tokens(self, groups: Sequence[MediaGroup]) -> Tensor | None:
        """Return the tokens of each media group, see `MediaEmbeddings.tokens`."""
        return self.embeddings.tokens(groups)
