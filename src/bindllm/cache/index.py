"""The vector index: unit vectors that are searched by inner product, a Faiss index (https://arxiv.org/abs/2401.08281).

An index folder is built from an embedding store, and every change writes its file again. The trained parts (lists,
codebooks) and the codes of the images that stay are copied, so that their vectors do not change.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from bindllm.cache import factories
from bindllm.cache.blend import check_queries, read_units
from bindllm.cache.folder import (
    MANIFEST,
    IndexInfo,
    StoreState,
    map_files,
    publish,
    read_faiss,
    read_manifest,
    write_manifest,
    writing,
)
from bindllm.embeddings.shards import (
    as_hex,
    as_keys,
    missing_from,
    read_keys,
    shards_digest,
    unique,
)
from bindllm.errors import InputError, StoreError

if TYPE_CHECKING:
    from bindllm.embeddings.store import EmbeddingStore

VERIFY_BYTES = 1 << 28
"""A file up to this size is hashed whenever it is opened; of a larger one only the size is compared."""


@dataclass(frozen=True)
class IndexChange:
    """The result of a change to an index."""

    added: int
    removed: int
    count: int


class VectorIndex:
    """Unit vectors, searched by inner product; the id of a vector is its row.

    Args:
        index: A Faiss index of inner product that can reconstruct its vectors.
        keys: Content hashes of the rows, [rows]; None if unknown.

    Raises:
        StoreError: The index is empty, has another metric, or cannot reconstruct its vectors.
    """

    def __init__(
        self, index: Any, info: IndexInfo, *, source: str | Path, keys: np.ndarray | None = None
    ) -> None:
        self.info, self.source = info, str(source)
        self._index, self._keys, self._lock = index, keys, threading.Lock()
        # An inverted file finds a vector by its id through a map of 8 bytes a row, which is made at the first need.
        self._unmapped = factories.check_index(index, str(source))

    @classmethod
    def build(
        cls,
        folder: str | Path,
        store: EmbeddingStore,
        *,
        factory: str = "auto",
        search: str = "auto",
        modality: str = "image",
        keys: Sequence[str] | None = None,
    ) -> Self:
        """Build the index of a store's embeddings, and open it.

        Vectors are scaled to unit length and sorted by content hash, so the same embeddings give the same files.
        "Flat" and "SQ..." are written in chunks; the other kinds are held in memory until they are written.

        Args:
            folder: Where the index is written. An earlier index there is replaced at the very end; any other
                non-empty folder is refused.
            factory: Kind of index as in Faiss's ``index_factory``: "Flat" is exact and keeps float32, "SQfp16"
                compares all vectors in half the memory; "auto": as `factories.choose` says.
            search: Settings of Faiss's ``ParameterSpace``, such as ``"nprobe=32,k_factor_rf=8"``; "auto": the
                defaults of the kind.
            keys: Content hashes of the embeddings; None: all of the modality.

        Raises:
            InputError: Faiss does not know the factory or setting, or has too few vectors to train it.
            StoreError: No such embeddings, one without direction, the folder holds something else, another process
                is writing it, or the disk fails.
        """
        folder = Path(folder)
        # Before the keys are read: embeddings that arrive in between then show as a change of the store.
        state = _state_of(folder, store, chosen=keys is not None)
        wanted = wanted_keys(store, modality, keys)
        if factory == "auto":
            factory = factories.choose(len(wanted), store.embedding_size)[0]
        if search == "auto":
            search = factories.default_search(factory)
        # Before the lock and the folder, so that a mistake leaves nothing behind.
        factories.check_factory(factory, search, store.embedding_size)
        read = partial(read_units, store)
        with writing(folder):
            index = factories.train(factory, store.embedding_size, wanted, read)
            info = IndexInfo(
                fingerprint=store.fingerprint,
                count=len(wanted),
                embedding_size=store.embedding_size,
                factory=factory,
                search=search,
                modality=modality,
                store=state,
            )
            publish(folder, info, wanted, partial(cls._write, index, info, wanted, read, folder))
        return cls.open(folder)

    @classmethod
    def update(
        cls, folder: str | Path, store: EmbeddingStore, *, keys: Sequence[str] | None = None
    ) -> IndexChange:
        """Add the embeddings that are new in a store, and remove the ones it no longer has; the kind stays.

        Args:
            folder: Of an index. Processes that have it open keep using the earlier version.
            keys: Exactly these are in the index afterwards. None: all of the modality, or, for an index of chosen
                keys (built with ``keys``, or after a removal), those of its keys that the store still has.

        Raises:
            StoreError: No index there, a store of another encoder, nothing would be left, another process is
                writing it, or the disk fails. The index is unchanged then.
        """
        folder = Path(folder)

        def wanted(info: IndexInfo, held: np.ndarray) -> _Wanted:
            chosen = keys is not None or (info.store is not None and info.store.chosen)
            state = _state_of(folder, store, chosen=chosen)
            found = wanted_keys(store, info.modality, keys)
            if chosen and keys is None:
                # Held keys, minus the ones that the store lacks: the intersection.
                found = missing_from(held, missing_from(held, found))
            return found, state

        return cls._change(folder, store, wanted)

    @classmethod
    def add(cls, folder: str | Path, store: EmbeddingStore, keys: Sequence[str]) -> IndexChange:
        """Add the embeddings with these keys; keys that are already in the index do not count.

        Raises:
            StoreError: As for `update`, and for a key that is not stored.
        """

        def wanted(info: IndexInfo, held: np.ndarray) -> _Wanted:
            new = missing_from(unique(as_keys(keys)), held)
            # Only new keys must be stored: the store may have lost some of the held ones since.
            if len(new):
                new = _of_modality(as_hex(new), read_keys(store.folder, info.modality), info.modality, store)
            return unique(np.concatenate([held, new])), info.store

        return cls._change(Path(folder), store, wanted)

    @classmethod
    def remove(cls, folder: str | Path, keys: Sequence[str]) -> IndexChange:
        """Remove the embeddings with these keys; keys that are not in the index do not count.

        Afterwards they are in no file of the index, and the index is one of chosen keys: `update` does not bring
        them back. The vectors of the other images do not change, and the store is not needed.

        Raises:
            StoreError: As for `update`.
        """

        def wanted(info: IndexInfo, held: np.ndarray) -> _Wanted:
            left = missing_from(held, unique(as_keys(keys)))
            chosen = info.store is not None and len(left) < len(held)
            return left, replace(info.store, chosen=True) if chosen else info.store

        return cls._change(Path(folder), None, wanted)

    @classmethod
    def open(cls, folder: str | Path, *, verify: bool | None = None, search: str | None = None) -> Self:
        """Open the index in a folder, memory-mapped.

        Logs a warning if its store is still there and has gained or lost embeddings since.

        Args:
            verify: Compare the hashes of the files, which reads all of them; None: up to `VERIFY_BYTES`.
            search: Settings on top of the index's own, such as ``"nprobe=64"``; "auto": the defaults of the kind.

        Raises:
            InputError: This kind does not have the setting.
            StoreError: Names the file that is missing, damaged, exchanged, foreign or of another format.
        """
        folder = Path(folder)
        opened = cls._map(folder, verify)
        # The manifest may be untrusted: a bad setting there is a damaged index, not a wrong argument.
        try:
            factories.set_search(opened._index, opened.info.search)
        except InputError as error:
            raise StoreError(
                f"{folder / MANIFEST} asks for a search that is not possible: {error}"
            ) from error
        if search is not None:
            own = factories.default_search(opened.info.factory) if search == "auto" else search
            factories.set_search(opened._index, own)
        opened._warn_of_changes(folder)
        return opened

    @classmethod
    def open_bare(cls, file: str | Path, fingerprint: str, *, search: str = "") -> Self:
        """Open a single Faiss file, such as the published ``knn.index``, memory-mapped; its keys are unknown.

        Args:
            file: An index of inner product over unit vectors.
            fingerprint: Of the encoder that made them. The file does not say, so you vouch for it.

        Raises:
            InputError: This kind does not have the setting.
            StoreError: Not a Faiss file, damaged, of another metric, or unable to reconstruct its vectors.
        """
        file = Path(file)
        if not file.is_file():
            raise StoreError(f"the index file {str(file)!r} does not exist")
        if file.stat().st_size <= VERIFY_BYTES:
            # Faiss crashes on some truncated files when it maps them, but not when it reads them.
            read_faiss(file, mapped=False)
        index = read_faiss(file)
        factories.set_search(index, search)
        return cls(index, IndexInfo(fingerprint, index.ntotal, index.d, search=search), source=file)

    def __len__(self) -> int:
        return self._index.ntotal

    def search(self, queries: np.ndarray, count: int) -> np.ndarray:
        """Return the ids of the nearest vectors, best first, -1 if there are no more.

        Args:
            queries: float32 [N, E].

        Returns:
            int64 [N, min(count, len)].
        """
        # In every call, because the limit belongs to the calling thread.
        factories.limit_threads()
        queries = np.ascontiguousarray(queries, np.float32)
        check_queries(queries, self.info.embedding_size, self.source)
        return self._index.search(queries, min(count, len(self)))[1]  # [N, C]

    def vectors(self, ids: np.ndarray) -> np.ndarray:
        """Return the vectors [..., E] with these ids [...], as the index keeps them; zeros for -1."""
        flat = self._checked(ids)
        if self._unmapped is not None:
            with self._lock:
                # Checked again under the lock: of two threads only the first makes the map.
                if self._unmapped is not None:
                    self._unmapped.make_direct_map()
                    self._unmapped = None
        # -1 is not a row: row 0 is read in its place, and zeroed below.
        found = self._index.reconstruct_batch(np.maximum(flat, 0))
        found[flat < 0] = 0
        return found.reshape(*ids.shape, self.info.embedding_size)

    def keys(self, ids: np.ndarray) -> list[str | None]:
        """Return the content hashes of the media with these ids [N]; None for -1, and for a bare file.

        `EmbeddingStore.sources` maps them to files.
        """
        flat = self._checked(np.asarray(ids))
        if self._keys is None:
            return [None] * len(flat)
        return [None if n < 0 else key for n, key in zip(flat, as_hex(self._keys[flat]), strict=True)]

    @classmethod
    def _map(cls, folder: Path, verify: bool | None) -> Self:
        while True:
            info = read_manifest(folder)
            checked = info.num_bytes <= VERIFY_BYTES if verify is None else verify
            try:
                index, keys = map_files(folder, info, verify=checked)
            except FileNotFoundError as error:
                # A writer may have replaced the file since the manifest was read.
                if read_manifest(folder) != info:
                    continue
                raise StoreError(
                    f"{folder} has no {Path(error.filename).name}: copy the whole folder, or build it again"
                ) from error
            if (index.ntotal, index.d) != (info.count, info.embedding_size):
                raise StoreError(
                    f"{folder / info.file} holds {index.ntotal} vectors of size {index.d}, expected {info.count} of "
                    f"size {info.embedding_size}: exchanged; build it again"
                )
            return cls(index, info, source=folder, keys=keys)

    @classmethod
    def _change(
        cls, folder: Path, store: EmbeddingStore | None, wanted: Callable[[IndexInfo, np.ndarray], _Wanted]
    ) -> IndexChange:
        """Write the index again with the sorted keys that ``wanted`` returns for the manifest and the present keys."""
        read_manifest(folder)
        with writing(folder):
            # Verified at any size: a damaged vector must not be copied into the next version.
            before = cls._map(folder, True)
            info, held = before.info, np.asarray(before._keys)
            if store is not None and store.fingerprint != info.fingerprint:
                raise StoreError(
                    f"{folder} was built with the encoder {info.fingerprint[:16]}, the store is of "
                    f"{store.fingerprint[:16]}: pass the store of the same encoder, or build the index again"
                )
            keys, state = wanted(info, held)
            added, removed = missing_from(keys, held), missing_from(held, keys)
            if not len(added) and not len(removed):
                # The vectors are the same, but the store has changed or the keys now count as chosen.
                if state != info.store:
                    write_manifest(folder, replace(info, store=state))
                return IndexChange(0, 0, len(keys))
            if not len(keys):
                raise StoreError(
                    f"{folder}: no vectors would be left, and an empty index cannot be searched; the index is "
                    "unchanged. Delete the folder instead"
                )
            after = replace(info, count=len(keys), store=state)
            publish(folder, after, keys, partial(before._rewrite, after, keys, store))
        return IndexChange(len(added), len(removed), len(keys))

    @classmethod
    def _write(
        cls,
        index: Any,
        info: IndexInfo,
        keys: np.ndarray,
        read: factories.Read,
        source: Path,
        file: Path,
        held: factories.Held | None = None,
    ) -> Self:
        """Write the vectors of the keys to a file, and make sure that it can be opened before it is published."""
        factories.write(index, keys, read, file, held=held)
        return cls(read_faiss(file), info, source=source)

    def _rewrite(self, info: IndexInfo, keys: np.ndarray, store: EmbeddingStore | None, file: Path) -> None:
        """Write an index of other keys that is trained like this one; vectors of keys that stay do not change."""
        index = factories.make_index(info.factory, info.embedding_size)
        # New training would move every list and codebook: only the vectors are dropped.
        if not index.is_trained:
            index = read_faiss(Path(self.source) / self.info.file, mapped=False)
            index.reset()
        own = np.asarray(self._keys)
        copied = factories.has_codes(index)
        held = factories.Held(own, factories.codes_of(self._index)) if copied else None

        def read(some: np.ndarray) -> np.ndarray:
            rows = np.empty((len(some), info.embedding_size), np.float32)
            inside = np.isin(some, own, assume_unique=True)
            # Keys are sorted, so the position of a key is its row.
            rows[inside] = self.vectors(np.searchsorted(own, some[inside]))
            if not inside.all():
                rows[~inside] = read_units(store, some[~inside])
            return rows

        written = self._write(index, info, keys, read, Path(self.source), file, held)
        # Vectors that are not copied must come out as they went in, so they are read back from both files.
        kept = own[:0] if copied else own[np.isin(own, keys, assume_unique=True)]
        for some in np.split(kept, range(factories.CHUNK, len(kept), factories.CHUNK)):
            old, new = (np.searchsorted(one, some) for one in (own, keys))
            if not np.array_equal(self.vectors(old), written.vectors(new)):
                raise StoreError(
                    f"{self.source}: an index {info.factory!r} cannot be changed without rounding the vectors of "
                    "other images again; the index is unchanged. Build it again, from scratch"
                )

    def _warn_of_changes(self, folder: Path) -> None:
        """Log a warning if the store has changed since; a store that is gone is not needed."""
        state = self.info.store
        store = folder / state.path if state is not None else None
        # The digest is cheap; the keys are read only if it differs.
        if store is None or not store.is_dir() or shards_digest(store) == state.digest:
            return
        log = logging.getLogger("bindllm")
        try:
            stored = read_keys(store, self.info.modality)
        except StoreError as error:
            log.warning("%s: cannot compare it with its store: %s", folder, error)
            return
        held = np.asarray(self._keys)
        # New embeddings do not concern an index of chosen keys.
        more = 0 if state.chosen else len(missing_from(stored, held))
        fewer = len(missing_from(held, stored))
        if more or fewer:
            log.warning(
                "%s: the store %s has changed since: %d %s embeddings more and %d fewer than this index. The index is "
                "used unchanged; 'bindllm index %s ...' updates it",
                *(folder, store.resolve(), more, self.info.modality, fewer, folder),
            )

    def _checked(self, ids: np.ndarray) -> np.ndarray:
        """Return ids flat, all of them in the index or -1."""
        flat = np.ascontiguousarray(ids.reshape(-1))
        if len(flat) and flat.max() >= len(self):
            raise InputError(f"{self.source} has {len(self)} vectors; the id {flat.max()} does not exist")
        return flat


_Wanted = tuple[np.ndarray, StoreState | None]


def wanted_keys(store: EmbeddingStore, modality: str, keys: Sequence[str] | None = None) -> np.ndarray:
    """Return the keys to index, sorted, each once; None: all of the modality.

    Raises:
        InputError, StoreError: No such embeddings.
    """
    if keys is not None and not len(keys):
        raise InputError("the list of keys is empty, and an empty index cannot be searched")
    stored = read_keys(store.folder, modality)
    if not len(stored):
        raise StoreError(
            f"{store.folder} holds no {modality} embeddings: fill the store with such media first"
        )
    return stored if keys is None else _of_modality(keys, stored, modality, store)


def _of_modality(keys: Sequence[str], stored: np.ndarray, modality: str, store: EmbeddingStore) -> np.ndarray:
    """Return chosen keys sorted, each once, all of them stored for the modality."""
    chosen = unique(as_keys(keys))
    if len(others := missing_from(chosen, stored)):
        raise StoreError(
            f"{store.folder} holds no {modality} embeddings of {len(others)} of these {len(chosen)} keys, the first "
            f"{as_hex(others[:1])[0]}: store them first, or leave them out"
        )
    return chosen


def _state_of(folder: Path, store: EmbeddingStore, *, chosen: bool) -> StoreState:
    # Relative, so that both can be moved together; from the real folder, because that is where ".." leads.
    path = os.path.relpath(store.folder.resolve(), folder.resolve())
    return StoreState(path, shards_digest(store.folder), chosen)
