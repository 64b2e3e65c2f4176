"""Vectors that are found by their direction: indexes of Faiss (arXiv 2401.08281) in a folder, built from a store.

index.json           what the index is made of: the only file that is ever replaced
part-<id>.faiss      vectors, as Faiss writes them, memory-mapped
part-<id>.keys       content hashes of these vectors, 32 bytes each, in the same order
trained-<id>.faiss   what new parts are copies of, for kinds that are trained
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Self

import numpy as np

from bindllm.cache import factories, index_writer
from bindllm.cache.blend import unit_rows
from bindllm.cache.factories import choose
from bindllm.cache.index_writer import IndexChange
from bindllm.cache.manifest import MANIFEST, IndexInfo, read_manifest
from bindllm.cache.parts import Part, open_part, read_index
from bindllm.embeddings.shards import as_hex, missing_from, read_keys, shards_digest
from bindllm.errors import InputError, StoreError

if TYPE_CHECKING:
    from bindllm.embeddings.store import EmbeddingStore

__all__ = ["IndexChange", "IndexInfo", "VectorIndex", "choose", "unit_rows"]

VERIFY_BYTES = 1 << 28
"""An index up to this size is hashed whenever it is opened; of larger ones only the sizes are compared."""


class VectorIndex:
    """Unit vectors, found by inner product; a vector's number is its place among all parts.

    Args:
        parts: at least one vector in all.
        info: what the index is made of.
        source: path that errors name.

    Raises:
        StoreError: the index is empty, or of another width.
    """

    def __init__(self, parts: Sequence[Part], info: IndexInfo, *, source: str | Path) -> None:
        self.info, self.source = info, str(source)
        self._parts = tuple(parts)
        # The number of the first vector of each part, and of the end.
        self._starts = np.cumsum([0, *map(len, parts)])
        for part in parts:
            if part.embedding_size != info.embedding_size:
                raise StoreError(
                    f"{part.file} holds vectors of size {part.embedding_size}, expected {info.embedding_size}: "
                    "exchanged; build it again"
                )
        if not self._starts[-1]:
            raise StoreError(f"{source} is an empty index; fill it with the embeddings of pictures first")

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

        Vectors are scaled to unit length. Their order follows from the content hashes, so the same embeddings give
        the same files. Memory holds one part, never all vectors.

        Args:
            folder: where it goes; an earlier index there is replaced at the very end, any other non-empty folder
                refused.
            store: read in chunks.
            factory: kind of index, in the words of Faiss's ``index_factory``; "Flat" is exact and keeps float32,
                "SQfp16" compares all in half the memory; "auto": what `choose` says.
            search: settings of Faiss's ``ParameterSpace``, such as ``"nprobe=32,k_factor_rf=8"``; "auto": what fits
                the kind.
            modality: which embeddings.
            keys: only these; None: all of the modality.

        Raises:
            InputError: Faiss does not know such a factory or setting, or has too few vectors to train it.
            StoreError: no such embeddings, one without direction, the folder holds something else, another process
                is writing it, or the disk.
        """
        folder = Path(folder)
        index_writer.build(folder, store, factory=factory, search=search, modality=modality, keys=keys)
        return cls.open(folder)

    @staticmethod
    def update(
        folder: str | Path, store: EmbeddingStore, *, keys: Sequence[str] | None = None
    ) -> IndexChange:
        """Add what a store has more, and remove what it has no longer; the kind of index stays.

        Args:
            folder: of an index; one that is open elsewhere goes on as it was.
            store: of the same encoder.
            keys: exactly these are in the index afterwards. None: all of the modality; of an index of chosen keys
                (built with ``keys``, or some were removed), those among them that the store still has.

        Raises:
            StoreError: no index there, a store of another encoder, nothing would be left, another process is
                writing it, or the disk. The index is as it was then.
        """
        return index_writer.update(Path(folder), store, keys)

    @staticmethod
    def add(folder: str | Path, store: EmbeddingStore, keys: Sequence[str]) -> IndexChange:
        """Add the embeddings with these keys; those that are there already are not counted.

        Small parts are merged when there are many, from the vectors as they keep them: nothing is lost by that in
        "Flat", "SQfp16" and refined kinds; kinds of 8 bits or less are rounded once more.

        Raises:
            StoreError: as for `update`, and a key that is not stored.
        """
        return index_writer.add(Path(folder), store, keys)

    @staticmethod
    def remove(folder: str | Path, keys: Sequence[str]) -> IndexChange:
        """Remove the embeddings with these keys; those that are not there are not counted.

        The parts that hold them are written again, without them: afterwards they are in no file of the index. The
        index is then one of chosen keys, so that `update` does not bring them back.

        Raises:
            StoreError: as for `update`.
        """
        return index_writer.remove(Path(folder), keys)

    @classmethod
    def open(cls, folder: str | Path, *, verify: bool | None = None, search: str | None = None) -> Self:
        """Open the index in a folder, memory-mapped.

        A warning is logged when the store that it was built from is still where it was and has more or fewer
        embeddings by now.

        Args:
            folder: written by `build`.
            verify: compare the hashes of the files, which reads all of them; None: up to `VERIFY_BYTES`.
            search: settings on top of those it was built with, such as ``"nprobe=64"``; "auto": what fits the kind.

        Raises:
            InputError: settings that this kind has not.
            StoreError: names the file that is missing, damaged, exchanged, foreign or of another format.
        """
        folder = Path(folder)
        info, parts = _open_parts(folder, verify)
        try:
            for part in parts:
                part.set_search(info.search)
        except InputError as error:
            raise StoreError(
                f"{folder / MANIFEST} asks for a search that is not possible: {error}"
            ) from error
        if search is not None:
            for part in parts:
                part.set_search(factories.default_search(info.factory) if search == "auto" else search)
        index = cls(parts, info, source=folder)
        _tell_changes(folder, index)
        return index

    @classmethod
    def open_bare(cls, file: str | Path, fingerprint: str, *, search: str = "") -> Self:
        """Open a file of Faiss alone, such as the published ``knn.index``, memory-mapped; its keys are not known.

        Args:
            file: an index of inner product over unit vectors.
            fingerprint: of the encoder that made them: the file does not tell, and you vouch for it.
            search: settings, as for `build`.

        Raises:
            InputError: settings that this kind has not.
            StoreError: not a file of Faiss, damaged, of another metric, or unable to give its vectors back.
        """
        file = Path(file)
        if not file.is_file():
            raise StoreError(f"there is no index file {str(file)!r}")
        if file.stat().st_size <= VERIFY_BYTES:
            # Faiss crashes over some files that were cut short when it maps them, but not when it reads them.
            read_index(file, mapped=False)
        part = Part(read_index(file), file)
        part.set_search(search)
        return cls([part], IndexInfo(fingerprint, len(part), part.embedding_size, search=search), source=file)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def search(self, queries: np.ndarray, count: int) -> np.ndarray:
        """Return the numbers of the nearest vectors, best first, -1 where none is left.

        Args:
            queries: float32 [N, E].
            count: at most this many for each.

        Returns:
            int64 [N, min(count, len)].
        """
        factories.limit_threads()
        queries = np.ascontiguousarray(queries, np.float32)
        if queries.ndim != 2 or queries.shape[1] != self.info.embedding_size:
            raise InputError(
                f"{self.source} takes queries [N, {self.info.embedding_size}], not {list(queries.shape)}"
            )
        count = min(count, len(self))
        found = [part.search(queries, count) for part in self._parts]
        if len(found) == 1:
            return found[0][1]
        numbers = np.concatenate(
            [
                np.where(rows < 0, -1, rows + start)
                for (_, rows), start in zip(found, self._starts, strict=False)
            ],
            axis=1,
        )
        similarities = np.concatenate([part for part, _ in found], axis=1)
        similarities[numbers < 0] = -np.inf
        best = np.argsort(-similarities, axis=1, kind="stable")[:, :count]
        return np.take_along_axis(numbers, best, axis=1)

    def vectors(self, numbers: np.ndarray) -> np.ndarray:
        """Return the vectors [..., E] with these numbers [...], as the index keeps them; zeros for -1."""
        flat = numbers.reshape(-1)
        found = np.zeros((len(flat), self.info.embedding_size), np.float32)
        for part, places, rows in self._located(flat):
            found[places] = part.vectors(rows)
        return found.reshape(*numbers.shape, -1)

    def keys(self, numbers: np.ndarray) -> list[str | None]:
        """Return the content hashes of the media with these numbers [N]; None for -1, and in a bare file.

        `EmbeddingStore.sources` tells which files they are.
        """
        flat = np.asarray(numbers).reshape(-1)
        found: list[str | None] = [None] * len(flat)
        for part, places, rows in self._located(flat):
            if part.keys is not None:
                for place, key in zip(places, as_hex(part.keys[rows]), strict=True):
                    found[place] = key
        return found

    def _located(self, numbers: np.ndarray) -> list[tuple[Part, np.ndarray, np.ndarray]]:
        """Return part by part which of the numbers [N] it holds, by their places, and their rows in it."""
        if len(numbers) and numbers.max() >= len(self):
            raise InputError(
                f"{self.source} has {len(self)} vectors, and none with the number {numbers.max()}"
            )
        of_part = np.searchsorted(self._starts, numbers, side="right") - 1
        located = []
        for n in np.unique(of_part[numbers >= 0]):
            places = np.flatnonzero(of_part == n)
            located.append((self._parts[n], places, numbers[places] - self._starts[n]))
        return located


def _open_parts(folder: Path, verify: bool | None) -> tuple[IndexInfo, list[Part]]:
    while True:
        info = read_manifest(folder)
        checked = info.num_bytes <= VERIFY_BYTES if verify is None else verify
        try:
            return info, [open_part(folder, part, verify=checked) for part in info.parts]
        except FileNotFoundError as error:
            # A writer may have replaced this part since the manifest was read.
            if read_manifest(folder) == info:
                raise StoreError(
                    f"{folder} has no {Path(error.filename).name}: copy the whole folder, or build it again"
                ) from error


def _tell_changes(folder: Path, index: VectorIndex) -> None:
    """Warn when the store has changed since; one that is not there any more is not needed."""
    state = index.info.store
    store = folder / state.path if state is not None else None
    if store is None or not store.is_dir() or shards_digest(store) == state.digest:
        return
    log = logging.getLogger("bindllm")
    try:
        stored = read_keys(store, index.info.modality)
    except StoreError as error:
        log.warning("%s: whether its store has changed cannot be told: %s", folder, error)
        return
    held = np.sort(np.concatenate([part.keys for part in index._parts]))
    more = 0 if state.chosen else len(missing_from(stored, held))
    fewer = len(missing_from(held, stored))
    if more or fewer:
        log.warning(
            "%s: the store %s has changed since: %d %s embeddings more and %d fewer than this index. It is used as it "
            "is; 'bindllm index %s ...' renews it",
            *(folder, store.resolve(), more, index.info.modality, fewer, folder),
        )
