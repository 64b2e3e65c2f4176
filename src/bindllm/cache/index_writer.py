"""Writing an index folder: building, adding and removing, one writer at a time, one part in memory.

Parts are written beside those that are there, the manifest is replaced in one step, and what it no longer names is
removed. So a writer that is killed leaves the earlier index whole, and files that the next writer removes; readers
that have a removed part mapped go on with it.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bindllm.cache import factories
from bindllm.cache.blend import read_units
from bindllm.cache.index_folder import writing
from bindllm.cache.manifest import (
    FileInfo,
    IndexInfo,
    StoreState,
    read_manifest,
    write_manifest,
)
from bindllm.cache.parts import Part, open_part, read_trained, write_index
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

CHUNK = 8192
"""Rows that are read and added at a time: 32 MB at 1,024 numbers each."""

PART_BYTES = 1 << 30
"""What one part holds at most: a writer needs about twice this memory, whatever the size of the index."""

MANY_SMALL = 8
"""More parts of less than half of `PART_BYTES` than this are merged: every search looks into each part."""

Read = Callable[[np.ndarray], np.ndarray]
"""Gives the vectors [N, E] of keys [N]."""


@dataclass(frozen=True)
class IndexChange:
    """What a change did to an index.

    Attributes:
        added: vectors that it has now and had not before.
        removed: vectors that it had before.
        count: vectors that it has now.
    """

    added: int
    removed: int
    count: int


def build(
    folder: Path,
    store: EmbeddingStore,
    *,
    factory: str,
    search: str,
    modality: str,
    keys: Sequence[str] | None,
) -> None:
    """Write an index of a store's embeddings in the place of what is there; see `VectorIndex.build`."""
    state = _state_of(folder, store, chosen=keys is not None)
    wanted = _wanted(store, modality, keys)
    if factory == "auto":
        factory = factories.choose(len(wanted), store.embedding_size)[0]
    if search == "auto":
        search = factories.default_search(factory)
    # Ahead of the lock and the folder: a mistake leaves nothing behind.
    factories.check_factory(factory, search, store.embedding_size)
    with writing(folder):
        read = partial(read_units, store)
        kind = _Kind.make(folder, factory, store.embedding_size, wanted, read)
        info = IndexInfo(
            fingerprint=store.fingerprint,
            count=len(wanted),
            embedding_size=store.embedding_size,
            factory=factory,
            search=search,
            modality=modality,
            store=state,
            trained=kind.trained,
            parts=tuple(_write_parts(folder, kind, wanted, read)),
        )
        write_manifest(folder, info)


def change(
    folder: Path, store: EmbeddingStore | None, wanted: Callable[[IndexInfo, np.ndarray], _Wanted]
) -> IndexChange:
    """Add and remove vectors.

    Args:
        folder: of an index.
        store: where new vectors come from; None where only some are removed.
        wanted: tells from the manifest and the keys that are there, sorted, which there should be.
    """
    read_manifest(folder)
    with writing(folder):
        info = read_manifest(folder)
        if store is not None and store.fingerprint != info.fingerprint:
            raise StoreError(
                f"{folder} was built with the encoder {info.fingerprint[:16]}, the store is of "
                f"{store.fingerprint[:16]}: take the store of the same encoder, or build the index again"
            )
        parts = [_open(folder, part) for part in info.parts]
        held = np.sort(np.concatenate([part.keys for part in parts]))
        keys, state = wanted(info, held)
        added, removed = missing_from(keys, held), missing_from(held, keys)
        if not len(added) and not len(removed) and state == info.store:
            return IndexChange(0, 0, len(keys))
        if not len(keys):
            raise StoreError(
                f"{folder}: nothing would be left, and an index of nothing finds nothing; nothing was changed. "
                "Delete the folder instead"
            )
        kind = _Kind.open(folder, info)
        files = list(zip(info.parts, parts, strict=True))
        if len(removed):
            files = _without(folder, kind, files, removed)
        if len(added):
            files += _opened(folder, _write_parts(folder, kind, added, partial(read_units, store)))
        files = _merged(folder, kind, files)
        new = replace(info, count=len(keys), store=state, parts=tuple(part for part, _ in files))
        write_manifest(folder, new)
        _tell_outgrown(folder, info, new)
        return IndexChange(len(added), len(removed), len(keys))


_Wanted = tuple[np.ndarray, StoreState | None]
_File = tuple[FileInfo, Part]


def update(folder: Path, store: EmbeddingStore, keys: Sequence[str] | None) -> IndexChange:
    """Add what a store has more, remove what it has no longer; see `VectorIndex.update`."""

    def wanted(info: IndexInfo, held: np.ndarray) -> _Wanted:
        chosen = keys is not None or (info.store is not None and info.store.chosen)
        state = _state_of(folder, store, chosen=chosen)
        found = _wanted(store, info.modality, keys)
        if chosen and keys is None:
            found = missing_from(held, missing_from(held, found))
        return found, state

    return change(folder, store, wanted)


def add(folder: Path, store: EmbeddingStore, keys: Sequence[str]) -> IndexChange:
    """Add the vectors of keys; see `VectorIndex.add`."""

    def wanted(info: IndexInfo, held: np.ndarray) -> _Wanted:
        new = missing_from(unique(as_keys(keys)), held)
        if len(new):
            new = _of_modality(as_hex(new), read_keys(store.folder, info.modality), info.modality, store)
        return unique(np.concatenate([held, new])), info.store

    return change(folder, store, wanted)


def remove(folder: Path, keys: Sequence[str]) -> IndexChange:
    """Remove the vectors of keys; see `VectorIndex.remove`."""

    def wanted(info: IndexInfo, held: np.ndarray) -> _Wanted:
        left = missing_from(held, unique(as_keys(keys)))
        chosen = info.store is not None and len(left) < len(held)
        return left, replace(info.store, chosen=True) if chosen else info.store

    return change(folder, None, wanted)


@dataclass(frozen=True)
class _Kind:
    """What new parts are made as: empty, but trained."""

    folder: Path
    factory: str
    embedding_size: int
    trained: FileInfo | None

    @classmethod
    def make(cls, folder: Path, factory: str, embedding_size: int, keys: np.ndarray, read: Read) -> _Kind:
        index = factories.make_index(factory, embedding_size)
        count = factories.train_count(index, len(keys))
        if not count:
            return cls(folder, factory, embedding_size, None)
        some = factories.spread(keys, count)
        rows = np.empty((count, embedding_size), np.float32)
        for start in range(0, count, CHUNK):
            rows[start : start + CHUNK] = read(some[start : start + CHUNK])
        try:
            index.train(rows)
        except RuntimeError as error:
            raise factories.cannot_build(factory, len(keys), error) from error
        return cls(folder, factory, embedding_size, write_index(folder, index, kind="trained"))

    @classmethod
    def open(cls, folder: Path, info: IndexInfo) -> _Kind:
        return cls(folder, info.factory, info.embedding_size, info.trained)

    def empty(self) -> Any:
        if self.trained is not None:
            return read_trained(self.folder, self.trained)
        return factories.make_index(self.factory, self.embedding_size)

    def rows_per_part(self) -> int:
        return max(1, PART_BYTES // factories.bytes_per_row(self.empty()))


def _write_parts(folder: Path, kind: _Kind, keys: np.ndarray, read: Read) -> Iterator[FileInfo]:
    """Write the vectors of the keys, sorted, as parts of about the same size."""
    for some in np.array_split(keys, -(-len(keys) // kind.rows_per_part())):
        index = kind.empty()
        try:
            for start in range(0, len(some), CHUNK):
                index.add(read(some[start : start + CHUNK]))
        except RuntimeError as error:
            raise factories.cannot_build(kind.factory, len(keys), error) from error
        yield write_index(folder, index, kind="part", keys=some)


def _without(folder: Path, kind: _Kind, files: list[_File], removed: np.ndarray) -> list[_File]:
    """Write the parts again that hold removed keys, without these."""
    hit = [(info, part) for info, part in files if len(part.rows_of(removed)[0])]
    rest = missing_from(np.sort(np.concatenate([part.keys for _, part in hit])), removed)
    return [file for file in files if file not in hit] + _rewritten(folder, kind, hit, rest)


def _merged(folder: Path, kind: _Kind, files: list[_File]) -> list[_File]:
    """Merge small parts while there are many."""
    small_rows = kind.rows_per_part() / 2
    while len(small := [file for file in files if file[0].count < small_rows]) > MANY_SMALL:
        # The smallest, so that rows are not written again with each merge.
        small = sorted(small, key=lambda file: file[0].count)[:MANY_SMALL]
        keys = np.sort(np.concatenate([part.keys for _, part in small]))
        files = [file for file in files if file not in small] + _rewritten(folder, kind, small, keys)
    return files


def _rewritten(folder: Path, kind: _Kind, files: list[_File], keys: np.ndarray) -> list[_File]:
    """Write these keys of some parts as new ones, from the vectors as the parts keep them."""

    def read(wanted: np.ndarray) -> np.ndarray:
        rows = np.empty((len(wanted), kind.embedding_size), np.float32)
        for _, part in files:
            numbers, places = part.rows_of(wanted)
            if len(numbers):
                rows[places] = part.vectors(numbers)
        return rows

    return _opened(folder, _write_parts(folder, kind, keys, read)) if len(keys) else []


def _tell_outgrown(folder: Path, before: IndexInfo, after: IndexInfo) -> None:
    """Tell when the kind that "auto" chose for so few vectors is not the one for so many."""
    was, fits = (factories.choose(info.count, info.embedding_size)[0] for info in (before, after))
    if before.factory == was != fits:
        logging.getLogger("bindllm").warning(
            "%s holds %d vectors now, for which %r is quicker than %r: build it again when searching takes too long",
            *(folder, after.count, fits, was),
        )


def _opened(folder: Path, infos: Iterable[FileInfo]) -> list[_File]:
    return [(info, _open(folder, info)) for info in infos]


def _open(folder: Path, info: FileInfo) -> Part:
    try:
        return open_part(folder, info, verify=False)
    except FileNotFoundError as error:
        raise StoreError(f"{error.filename} is missing: copy the whole folder, or build it again") from error


def _wanted(store: EmbeddingStore, modality: str, keys: Sequence[str] | None) -> np.ndarray:
    """Return the keys to index, sorted, each once."""
    if keys is not None and not len(keys):
        raise InputError("no keys to index: an index of nothing finds nothing")
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
    # From folder to folder, so that both can be moved together; from the real one, as that is where ".." leads.
    path = os.path.relpath(store.folder.resolve(), folder.resolve())
    return StoreState(path, shards_digest(store.folder), chosen)
