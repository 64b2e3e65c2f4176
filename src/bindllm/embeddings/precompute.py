"""Precomputing the embeddings of a data set: files that the store does not have are embedded and written to it."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sized
from dataclasses import asdict, dataclass
from itertools import count, islice
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress
from torch import Tensor

from bindllm.embeddings.embedder import BATCH_SIZE, Embedder, Work
from bindllm.embeddings.store import EmbeddingStore
from bindllm.errors import MediaError, StoreError
from bindllm.media import Media
from bindllm.parallel import SINGLE_PROCESS, Processes, chunks, prefetch

if TYPE_CHECKING:
    from bindllm.encoders import Encoder

FLUSH_SECONDS = 30.0
"""Embeddings are written at least this often: a killed run loses at most this much work."""

FLUSH_BYTES = 1 << 28
"""Tokens are also written once they take this much memory: a shard of 2,000 images of 7 x 7 tokens."""

HASH_CHUNK = 32
"""Media whose content is hashed by one task; one task for each would cost more than checking an unchanged file."""


CHECKED, SAME = 3, 0.02
"""Stored media of a modality that `check_stored` embeds again, and the largest distance of unit vectors that counts as
rounding: half precision differs by 0.014."""


def check_stored(folder: str | Path, encoder: Encoder, media: Iterable[Media]) -> None:
    """Embed some stored media again: an encoder that changed without its fingerprint would mix two kinds of rows.

    Nothing is written.

    Args:
        media: of any modality; `CHECKED` stored ones of each that the encoder serves are embedded.

    Raises:
        StoreError: a stored embedding differs from a new one.
    """
    fingerprint = encoder.fingerprint()
    store = EmbeddingStore.existing(Path(folder, fingerprint[:16]), fingerprint, encoder.embedding_size)
    if store is None or not len(store):
        return
    own = [item for item in dict.fromkeys(media) if item.modality in encoder.modalities]
    for modality in dict.fromkeys(item.modality for item in own):
        keys = store.keys_of([item for item in own if item.modality == modality][:CHECKED])
        for item, key in keys.items():
            with torch.no_grad():
                new = encoder.embed(modality, [encoder.prepare(item)])[0].float().cpu()
            (old,) = store.get([key])
            # Written so that NaN fails too.
            if not torch.dist(old, new) <= SAME:
                raise StoreError(
                    f"{store.folder}: {item.name} is stored with another embedding than {type(encoder).__name__} makes "
                    f"now (cosine {float(old @ new):.3f}), and its fingerprint is the same. Weights or preprocessing "
                    "have changed: change the revision in its `fingerprint`, or delete that folder"
                )


@dataclass(frozen=True)
class PrecomputeReport:
    """Counts of a run; each media is counted once, in ``encoded``, ``reused``, ``duplicates`` or ``failed``.

    Args:
        encoded: embedded and stored by this run.
        reused: their content was in the store before.
        duplicates: their content came earlier in the same run.
        failed: (name, reason) of media that could not be read or embedded.
    """

    encoded: int
    reused: int
    duplicates: int
    failed: tuple[tuple[str, str], ...]
    seconds: float

    def over(self, processes: Processes) -> PrecomputeReport:
        """Return the sum over all processes; waits for all of them."""
        reports = [PrecomputeReport(**fields) for fields in processes.gather(asdict(self))]
        return PrecomputeReport(
            encoded=sum(report.encoded for report in reports),
            reused=sum(report.reused for report in reports),
            duplicates=sum(report.duplicates for report in reports),
            failed=tuple((name, reason) for report in reports for name, reason in report.failed),
            seconds=max(report.seconds for report in reports),
        )


def precompute_embeddings(
    store: EmbeddingStore,
    encoder: Encoder,
    media: Iterable[Media],
    *,
    batch_size: int = BATCH_SIZE,
    flush_rows: int = 4096,
    progress: bool = True,
    processes: Processes = SINGLE_PROCESS,
    token_modalities: Collection[str] = (),
) -> PrecomputeReport:
    """Embed the media whose content is not in the store yet.

    Media that cannot be read are reported and do not stop the run. If the run is interrupted (Ctrl-C, a full disk,
    an error of the encoder), all embeddings so far are stored, and the next run continues from there.

    Several processes share a store if each calls this with the same media in the same order. Each hashes its share
    of the files, then embeds the content that its rank owns by hash, so no content is embedded twice.

    Args:
        media: may be a generator, which several processes hold in memory; duplicates are embedded once.
        batch_size: maximum number of media of one modality that are embedded together; fewer if they are large.
        flush_rows: embeddings are written in shards of about this many rows, or every `FLUSH_SECONDS`.
        token_modalities: modalities whose tokens are stored too. Media whose embedding is stored without its tokens are
            embedded again; the stored embedding stays.

    Returns:
        Counts of all media, over all processes.

    Raises:
        InputError: media of a modality that the encoder does not serve.
        StoreError: the store belongs to another encoder or cannot be written; says how much is saved.
    """
    _check_owner(store, encoder)
    # Several processes go through the media twice, which a generator does not allow.
    media = media if processes.world_size == 1 else list(media)
    columns = (*Progress.get_default_columns(), MofNCompleteColumn())
    options = {"batch_size": batch_size, "threads": processes.num_threads}
    with (
        Progress(*columns, console=Console(stderr=True), disable=not progress) as bar,
        Embedder([encoder], token_modalities=token_modalities, **options) as embedder,
    ):
        task = bar.add_task("embedding", total=len(media) if isinstance(media, Sized) else None)
        run = _Run(store, embedder, flush_rows, processes, advance=lambda: bar.advance(task))
        try:
            run.process(media)
        except StoreError:
            # A write that has just failed is not tried again.
            raise
        except BaseException:
            # A write may have been interrupted: rows that reached the disk must not be written twice.
            store.refresh()
            run.flush()
            raise
    return run.report()


def _check_owner(store: EmbeddingStore, encoder: Encoder) -> None:
    if store.fingerprint != encoder.fingerprint():
        raise StoreError(
            f"{store.folder}: the store belongs to the encoder {store.fingerprint[:16]}, not to "
            f"{encoder.fingerprint()[:16]}; open it with EmbeddingStore.for_encoder(folder, encoder)"
        )


_Keyed = tuple[Media, str | MediaError, bytes | None]
"""A media with its content hash (or the reason why it has none), and the state of its file."""


_Identified = tuple[str, bytes | None, Media]
"""Content hash, state of the file, media."""


class _Run:
    """The steps of one run in their order, with its counts and the rows that are not written yet."""

    def __init__(
        self,
        store: EmbeddingStore,
        embedder: Embedder,
        flush_rows: int,
        processes: Processes,
        *,
        advance: Callable[[], None],
    ) -> None:
        self._store, self._embedder, self._processes = store, embedder, processes
        self._flush_rows = flush_rows
        self._advance = advance
        self._counts: Counter[str] = Counter()
        self._failed: list[tuple[str, str]] = []
        # Content that came earlier in this run.
        self._seen: set[str] = set()
        self._rows: list[tuple[str, Tensor, Media, Tensor | None]] = []
        self._token_bytes = 0
        self._started = self._flushed = time.monotonic()

    def process(self, media: Iterable[Media]) -> None:
        """Hash, embed and store this process's part of the media."""
        if self._processes.world_size > 1:
            # All files are hashed first, each by one process, so that content can be assigned by its hash.
            self._hash_share(media)
        works = self._select(self._with_keys(media))
        # A pipeline of generators: nothing is hashed or read before the next step has room for it.
        for result in self._embedder.embed(works, check=self._check_unchanged):
            key, _, item = result.key
            if result.error:
                self._fail(item, result.error)
            else:
                self._rows.append((key, result.embedding, item, result.tokens))
                self._token_bytes += 0 if result.tokens is None else result.tokens.nbytes
                self._count("embedded")
        self.flush()

    def flush(self) -> None:
        """Write the rows and file records in memory; they stay in memory if writing fails."""
        self._flushed = time.monotonic()
        if self._rows:
            keys, embeddings, media, tokens = zip(*self._rows, strict=True)
            try:
                self._store.append(keys, torch.stack(embeddings), media, tokens=tokens)
            except StoreError as error:
                raise StoreError(
                    f"{error}. {self._counts['stored']} embeddings of this run are stored, {len(keys)} are lost; "
                    "the next run continues from there"
                ) from error
            self._counts["stored"] += len(keys)
            self._rows, self._token_bytes = [], 0
            # Two processes that merge the same shards at once could leave rows twice.
            if self._processes.is_first:
                self._store.compact()
        self._store.save_files()

    def report(self) -> PrecomputeReport:
        """Return the counts over all processes; waits for all of them."""
        report = PrecomputeReport(
            encoded=self._counts["stored"],
            reused=self._counts["reused"],
            duplicates=self._counts["duplicates"],
            failed=tuple(self._failed),
            seconds=time.monotonic() - self._started,
        ).over(self._processes)
        if self._processes.world_size > 1:
            # Shards of the other processes can be merged now, too.
            self._store.refresh()
            if self._processes.is_first:
                self._store.compact()
        return report

    def _hash_share(self, media: Iterable[Media]) -> None:
        """Hash this process's share of the files and wait for the others: then the store has a record of every file.

        Files without a record have no key yet, so positions divide them; media are the same in each process.
        """
        for _ in self._with_keys(islice(media, self._processes.rank, None, self._processes.world_size)):
            if time.monotonic() - self._flushed >= FLUSH_SECONDS:
                self.flush()
        self.flush()
        self._processes.barrier()
        self._store.refresh()

    def _with_keys(self, media: Iterable[Media]) -> Iterator[list[_Keyed]]:
        """Hash the content of files that are new or changed (in threads)."""
        # A chunk for each thread, and one that is ready.
        limit = self._embedder.threads + 1
        return prefetch(self._embedder.pool, self._find_keys, chunks(media, HASH_CHUNK), limit=lambda: limit)

    def _find_keys(self, chunk: list[Media]) -> list[_Keyed]:
        found: list[_Keyed] = []
        for media in chunk:
            # An error is a result: a file that cannot be read must not end the run.
            try:
                found.append((media, *self._store.identify(media)))
            except MediaError as error:
                found.append((media, error, None))
        return found

    def _select(self, keyed: Iterable[list[_Keyed]]) -> Iterator[Work[_Identified]]:
        """Yield the media that this process has to embed, and count the others."""
        # Over all media, so it is the same in every process.
        positions = count()
        for chunk in keyed:
            mine = [item for item in chunk if self._owns(item[1], next(positions))]
            # The bar of each process counts all media.
            for _ in range(len(chunk) - len(mine)):
                self._advance()
            known = [(key, media.modality) for media, key, _ in mine if isinstance(key, str)]
            keys = [key for key, _ in known]
            # One lookup for the whole chunk, because each searches all shards.
            found = self._store.has(
                keys, tokens=[name in self._embedder.token_modalities for _, name in known]
            )
            stored = dict(zip(keys, found, strict=True))
            for media, key, state in mine:
                if isinstance(key, MediaError):
                    self._fail(media, str(key))
                elif key in self._seen:
                    self._count("duplicates")
                else:
                    self._seen.add(key)
                    if stored[key]:
                        self._count("reused")
                    else:
                        yield Work((key, state, media), media)

    def _owns(self, key: str | MediaError, position: int) -> bool:
        """Return whether this process counts a media; without a content hash its position decides."""
        if isinstance(key, MediaError):
            return position % self._processes.world_size == self._processes.rank
        return self._processes.owns(key)

    def _check_unchanged(self, work: Work[_Identified]) -> None:
        """Raise if a file changed between hashing and preparing it (in a thread).

        Files may still be arriving: an embedding must never be stored under the key of other content. The state is
        compared, too, because a file may have come back after another one was read in its place.
        """
        key, state, media = work.key
        if state is not None and self._store.identify(media) != (key, state):
            raise MediaError(f"{media.name}: the file changed while it was read; run again")

    def _fail(self, media: Media, error: str) -> None:
        self._failed.append((media.name, error))
        self._count("failed")

    def _count(self, outcome: str) -> None:
        """Count one media, and write the rows if there are enough or it is time."""
        self._counts[outcome] += 1
        self._advance()
        is_full = len(self._rows) >= self._flush_rows or self._token_bytes >= FLUSH_BYTES
        if is_full or time.monotonic() - self._flushed >= FLUSH_SECONDS:
            self.flush()
