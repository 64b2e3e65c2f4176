"""Encoding what a store lacks: files are read and prepared in threads while the encoder embeds the batch before.

Threads and not processes: Pillow and hashing leave Python's lock, an encoder with its weights need not be copied,
and the encoder is what takes the time. Where there are several devices, each has a process of its own (`Processes`).
"""

from __future__ import annotations

import os
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sized
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from itertools import count, islice
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from torch import Tensor

from bindllm.embeddings.store import EmbeddingStore
from bindllm.errors import InputError, MediaError, StoreError
from bindllm.media import Media
from bindllm.parallel import SINGLE_PROCESS, Processes, chunks, prefetch

if TYPE_CHECKING:
    from bindllm.encoders import Encoder

FLUSH_SECONDS = 30.0
"""Embeddings are written at least this often: a killed run loses no more than this."""

PREPARED_BYTES = 1 << 30
"""Prepared inputs that are held at the same time, about: a long video alone can be 200 MB."""

HASH_CHUNK = 32
"""Media whose content is hashed by one task; a task for each would cost more than an unchanged file does."""


@dataclass(frozen=True)
class PrecomputeReport:
    """What became of the media: each is counted once, in ``encoded``, ``reused``, ``duplicates`` or ``failed``.

    Args:
        encoded: embedded and stored by this run.
        reused: their content was in the store before.
        duplicates: their content came earlier in the same run.
        failed: (name, reason) of media that could not be read or embedded.
        seconds: wall-clock time.
    """

    encoded: int
    reused: int
    duplicates: int
    failed: tuple[tuple[str, str], ...]
    seconds: float

    def together(self, processes: Processes) -> PrecomputeReport:
        """Return the report of all processes; waits for all of them."""
        reports = [PrecomputeReport(**fields) for fields in processes.gather(asdict(self))]
        return PrecomputeReport(
            encoded=sum(report.encoded for report in reports),
            reused=sum(report.reused for report in reports),
            duplicates=sum(report.duplicates for report in reports),
            failed=tuple((name, reason) for report in reports for name, reason in report.failed),
            seconds=max(report.seconds for report in reports),
        )

    def summary(self) -> str:
        """Return the counts as a sentence.

        Example:
            >>> PrecomputeReport(encoded=3, reused=1, duplicates=0, failed=(), seconds=1.26).summary()
            '3 media embedded in 1.3 s, 1 embedded before, 0 duplicates, 0 failed.'
            >>> PrecomputeReport(0, 0, 0, (("a.png", "a.png: the file is empty"),), 0.1).summary()
            '0 media embedded in 0.1 s, 0 embedded before, 0 duplicates, 1 failed (first: a.png: the file is empty).'
        """
        first = f" (first: {self.failed[0][1]})" if self.failed else ""
        return (
            f"{self.encoded} media embedded in {self.seconds:.1f} s, {self.reused} embedded before, "
            f"{self.duplicates} duplicates, {len(self.failed)} failed{first}."
        )


def precompute_embeddings(
    store: EmbeddingStore,
    encoder: Encoder,
    media: Iterable[Media],
    *,
    batch_size: int = 32,
    workers: int | None = None,
    flush_rows: int = 4096,
    progress: bool = True,
    processes: Processes = SINGLE_PROCESS,
) -> PrecomputeReport:
    """Embed the media whose content is not in the store yet.

    Media that cannot be read are reported and do not stop the run. When it is stopped (Ctrl-C, a full disk, an
    error of the encoder), what was embedded before is stored, and the next run goes on from there.

    Several processes fill a store together when each calls this with the same media in the same order. Each hashes
    its share of the files; then each embeds the content that falls to it by its hash, so nothing is embedded twice.

    Args:
        store: a store of this encoder.
        encoder: prepares and embeds.
        media: may be a generator, which several processes hold in memory; duplicates are embedded once.
        batch_size: media of one modality that are embedded together; fewer where they are large.
        workers: threads that read and prepare; None: as ``processes`` says.
        flush_rows: embeddings are written in shards of about this many rows, or every `FLUSH_SECONDS`.
        progress: show a bar with the time left.
        processes: which of several processes this one is.

    Returns:
        What became of all media, in all processes together.

    Raises:
        InputError: media of a modality that the encoder does not serve.
        StoreError: the store belongs to another encoder, or cannot be written; says how much is saved.
    """
    if store.fingerprint != encoder.fingerprint():
        raise StoreError(
            f"{store.folder}: the store belongs to the encoder {store.fingerprint[:16]}, not to "
            f"{encoder.fingerprint()[:16]}; open it with EmbeddingStore.for_encoder(folder, encoder)"
        )
    media = media if processes.world_size == 1 else list(media)
    workers = max(1, (processes.threads or os.cpu_count() or 1) if workers is None else workers)
    pool = ThreadPoolExecutor(workers, thread_name_prefix="fill")
    with _progress_bar(shown=progress) as bar:
        task = bar.add_task("embedding", total=len(media) if isinstance(media, Sized) else None)
        run = _Run(store, encoder, flush_rows, processes, advance=lambda: bar.advance(task))
        try:
            run.work_through(media, pool, workers=workers, batch_size=batch_size)
        except StoreError:
            # What could not be written a moment ago is not tried again.
            raise
        except BaseException:
            # In the midst of a write, perhaps: what is written already is not to be written twice.
            store.refresh()
            run.flush()
            raise
        finally:
            pool.shutdown(cancel_futures=True)
    return run.finish()


class _Work(NamedTuple):
    """One media on its way: its key, then what the encoder takes, or why it cannot be read."""

    media: Media
    key: str = ""
    inputs: Tensor | None = None
    error: MediaError | None = None


class _Run:
    """The steps of one fill, in their order, and what they have counted."""

    def __init__(
        self,
        store: EmbeddingStore,
        encoder: Encoder,
        flush_rows: int,
        processes: Processes,
        *,
        advance: Callable[[], None],
    ) -> None:
        self._store = store
        self._encoder = encoder
        self._flush_rows = flush_rows
        self._processes = processes
        self._advance = advance
        self._counts: Counter[str] = Counter()
        self._failed: list[tuple[str, str]] = []
        self._seen: set[str] = set()
        self._rows: list[tuple[str, Tensor, Media]] = []
        self._largest = 0
        self._started = self._flushed = time.monotonic()

    def work_through(
        self, media: Iterable[Media], pool: ThreadPoolExecutor, *, workers: int, batch_size: int
    ) -> None:
        """Do this process's part, with threads that hash and prepare ahead of the encoder."""
        if self._processes.world_size > 1:
            self.hash_share(media, pool, ahead=workers + 1)
        keyed = prefetch(pool, self.find_keys, chunks(media, HASH_CHUNK), limit=lambda: workers + 1)
        ahead = partial(self.fitting, workers + batch_size)
        prepared = prefetch(pool, self.prepare, self.select(keyed), limit=ahead)
        for batch in self.batches(prepared, batch_size):
            self.embed(batch)
        self.flush()

    def hash_share(self, media: Iterable[Media], pool: ThreadPoolExecutor, *, ahead: int) -> None:
        """Hash this process's share of the files, and wait for the others: the store then knows every file.

        The sources are the same in each process, so their places can divide what has no key yet.
        """
        share = islice(media, self._processes.rank, None, self._processes.world_size)
        for _ in prefetch(pool, self.find_keys, chunks(share, HASH_CHUNK), limit=lambda: ahead):
            if time.monotonic() - self._flushed >= FLUSH_SECONDS:
                self.flush()
        self.flush()
        self._processes.barrier()
        self._store.refresh()

    def find_keys(self, chunk: list[Media]) -> list[_Work]:
        """Hash the content of files that are new or changed (in a thread)."""
        return [self._find_key(media) for media in chunk]

    def _find_key(self, media: Media) -> _Work:
        try:
            return _Work(media, self._store.key_of(media))
        except MediaError as error:
            return _Work(media, error=error)

    def select(self, keyed: Iterable[list[_Work]]) -> Iterator[_Work]:
        """Pass on what must be encoded, by this process."""
        places = count()
        for chunk in keyed:
            mine = [work for work in chunk if self._owns(work, next(places))]
            for _ in range(len(chunk) - len(mine)):
                self._advance()
            keys = [work.key for work in mine if work.error is None]
            stored = dict(zip(keys, self._store.has(keys), strict=True))
            for work in mine:
                if work.media.modality not in self._encoder.modalities:
                    raise InputError(
                        f"{work.media.name} is {work.media.modality} media; "
                        f"the encoder serves {', '.join(self._encoder.modalities)}"
                    )
                if work.error is not None:
                    self._fail(work.media, str(work.error))
                elif work.key in self._seen:
                    self._done("duplicates")
                else:
                    self._seen.add(work.key)
                    if stored[work.key]:
                        self._done("reused")
                    else:
                        yield work

    def _owns(self, work: _Work, place: int) -> bool:
        """Whether media is for this process to count; what cannot be read has no key, and goes by its place."""
        if work.error is not None:
            return place % self._processes.world_size == self._processes.rank
        return self._processes.owns(work.key)

    def prepare(self, work: _Work) -> _Work:
        """Read and prepare one media (in a thread)."""
        media = work.media
        try:
            inputs = self._encoder.prepare(media)
            # Files may still be arriving: an embedding must never be stored under the key of other content.
            if isinstance(media.source, str | Path) and self._store.key_of(media) != work.key:
                raise MediaError(f"{media.name}: the file changed while it was read; run again")
        except MediaError as error:
            return work._replace(error=error)
        except Exception as error:
            error.add_note(f"while preparing {media.name}")
            raise
        self._largest = max(self._largest, inputs.nbytes)
        return work._replace(inputs=inputs)

    def fitting(self, number: int) -> int:
        """Return how many prepared media may be held beside the next batch, or in it: at most ``number``.

        Half of the memory is for either. Until one is prepared its size is not known, and two must do.
        """
        return min(number, max(1, PREPARED_BYTES // 2 // self._largest) if self._largest else 2)

    def batches(self, prepared: Iterable[_Work], size: int) -> Iterator[list[_Work]]:
        """Group what is prepared by modality, in order."""
        waiting: defaultdict[str, list[_Work]] = defaultdict(list)
        for work in prepared:
            if work.error is not None:
                self._fail(work.media, str(work.error))
                continue
            batch = waiting[work.media.modality]
            batch.append(work)
            # Not below one: media that are larger than all of the memory are embedded one by one.
            if len(batch) >= self.fitting(size):
                yield waiting.pop(work.media.modality)
        yield from waiting.values()

    def embed(self, batch: list[_Work]) -> None:
        """Embed one batch, and keep its rows for the next flush."""
        embeddings = self._encoder.embed(batch[0].media.modality, [work.inputs for work in batch]).cpu()
        for work, embedding in zip(batch, embeddings, strict=True):
            if embedding.isfinite().all():
                self._rows.append((work.key, embedding, work.media))
                self._done("embedded")
            else:
                self._fail(work.media, f"{work.media.name}: its embedding is not finite")

    def flush(self) -> None:
        """Write what is embedded and hashed; it stays in hand when that fails."""
        self._flushed = time.monotonic()
        if self._rows:
            keys, embeddings, media = zip(*self._rows, strict=True)
            try:
                self._store.append(keys, torch.stack(embeddings), media)
            except StoreError as error:
                raise StoreError(
                    f"{error}. {self._counts['stored']} embeddings of this run are stored, {len(keys)} are lost; "
                    "the next run goes on from there"
                ) from error
            self._counts["stored"] += len(keys)
            self._rows = []
            # Two processes that merge the same shards at once may leave rows twice.
            if self._processes.is_first:
                self._store.compact()
        self._store.save_files()

    def finish(self) -> PrecomputeReport:
        """Return what became of the media, when every process is done."""
        report = PrecomputeReport(
            encoded=self._counts["stored"],
            reused=self._counts["reused"],
            duplicates=self._counts["duplicates"],
            failed=tuple(self._failed),
            seconds=time.monotonic() - self._started,
        ).together(self._processes)
        if self._processes.world_size > 1:
            self._store.refresh()
            if self._processes.is_first:
                self._store.compact()
        return report

    def _fail(self, media: Media, reason: str) -> None:
        self._failed.append((media.name, reason))
        self._done("failed")

    def _done(self, how: str) -> None:
        """Count one media; write when there is enough or it is time."""
        self._counts[how] += 1
        self._advance()
        if len(self._rows) >= self._flush_rows or time.monotonic() - self._flushed >= FLUSH_SECONDS:
            self.flush()


def _progress_bar(*, shown: bool) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        disable=not shown,
    )
