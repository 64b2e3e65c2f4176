"""One part of an index: a file of Faiss and the keys of its rows, written once, memory-mapped, never changed."""

from __future__ import annotations

import errno
import hashlib
import os
import threading
import uuid
from pathlib import Path
from typing import Any

import numpy as np

from bindllm.atomic import atomic_file
from bindllm.cache.factories import load_faiss, reason, set_search
from bindllm.cache.manifest import MANIFEST, FileInfo
from bindllm.embeddings.shards import KEY, KEY_BYTES
from bindllm.errors import StoreError

_READ_BYTES = 1 << 20


class Part:
    """Vectors of one file of Faiss.

    Args:
        index: of inner product, able to give its vectors back.
        file: what errors name.
        keys: content hashes of the rows, [rows]; None where they are not known.

    Raises:
        StoreError: an index of another metric, or one that cannot give its vectors back.
    """

    def __init__(self, index: Any, file: Path, keys: np.ndarray | None = None) -> None:
        faiss = load_faiss()
        self.file, self.keys = file, keys
        self._index = index
        self._lock = threading.Lock()
        if index.metric_type != faiss.METRIC_INNER_PRODUCT:
            raise StoreError(f"{file} is a Faiss index of another metric, expected one of inner product")
        # An inverted file finds a vector by its number only with a map of 8 bytes for each, made when first needed.
        # A refining index keeps the vectors beside it, in order.
        inverted = None if isinstance(index, faiss.IndexRefine) else faiss.try_extract_index_ivf(index)
        self._unmapped = inverted
        try:
            if inverted is not None:
                _first_of(inverted)
            elif index.ntotal:
                index.reconstruct(0)
        except RuntimeError as error:
            raise StoreError(
                f"{file}: an index of the type {type(index).__name__} cannot give its vectors back, which a cache "
                "needs; build it with another factory, such as 'Flat'"
            ) from error

    def __len__(self) -> int:
        return self._index.ntotal

    @property
    def embedding_size(self) -> int:
        """E, the width of the vectors."""
        return self._index.d

    def set_search(self, search: str) -> None:
        """Set how wide is searched; see `bindllm.cache.factories.set_search`."""
        set_search(self._index, search)

    def search(self, queries: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Return similarities and rows of the nearest vectors, [N, min(count, len)], best first, -1 for none."""
        return self._index.search(queries, min(count, len(self)))

    def vectors(self, rows: np.ndarray) -> np.ndarray:
        """Return the vectors of these rows [N], float32 [N, E], as the index keeps them."""
        if self._unmapped is not None:
            with self._lock:
                if self._unmapped is not None:
                    self._unmapped.make_direct_map()
                    self._unmapped = None
        return self._index.reconstruct_batch(np.ascontiguousarray(rows))

    def rows_of(self, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the rows of the keys [N] that are here, and where among the keys those are, both [found]."""
        rows = np.minimum(np.searchsorted(self.keys, keys), len(self.keys) - 1)
        places = np.flatnonzero(self.keys[rows] == keys)
        return rows[places], places


def write_index(folder: Path, index: Any, *, kind: str, keys: np.ndarray | None = None) -> FileInfo:
    """Write an index, and the keys of its rows where it has any, under a name that follows from their content.

    Raises:
        OSError, RuntimeError: the disk; nothing is left.
    """
    temporary = folder / f".{kind}-{uuid.uuid4().hex[:8]}.part"
    try:
        load_faiss().write_index(index, str(temporary))
        digest = _sha256(temporary, keys)
        info = FileInfo(f"{kind}-{digest[:16]}.faiss", index.ntotal, temporary.stat().st_size, digest)
        if keys is not None:
            with atomic_file(folder / info.keys_file) as part:
                part.write_bytes(keys.tobytes())
        with atomic_file(folder / info.file) as part:
            os.replace(temporary, part)
    finally:
        temporary.unlink(missing_ok=True)
    return info


def open_part(folder: Path, info: FileInfo, *, verify: bool) -> Part:
    """Map one part.

    Args:
        folder: of the index.
        info: what the manifest says of the part.
        verify: compare the hash too, which reads all of it.

    Raises:
        FileNotFoundError: one of its files is not there.
        StoreError: damaged, exchanged or foreign.
    """
    file, keys_file = folder / info.file, folder / info.keys_file
    for path, size in ((file, info.num_bytes), (keys_file, info.count * KEY_BYTES)):
        if path.stat().st_size != size:
            raise _exchanged(path)
    keys = np.memmap(keys_file, KEY, mode="r")
    if verify and _sha256(file, keys) != info.sha256:
        raise _exchanged(file)
    part = Part(read_index(file), file, keys)
    if len(part) != info.count:
        raise StoreError(
            f"{file} holds {len(part)} vectors, expected {info.count}: exchanged; build it again"
        )
    return part


def read_index(file: Path, *, mapped: bool = True) -> Any:
    """Read a file of Faiss, mapping its vectors or into memory.

    Raises:
        FileNotFoundError: it is not there.
        StoreError: foreign or damaged.
    """
    faiss = load_faiss()
    try:
        return faiss.read_index(str(file), faiss.IO_FLAG_MMAP_IFC if mapped else 0)
    except (RuntimeError, MemoryError) as error:
        if not file.exists():
            raise FileNotFoundError(errno.ENOENT, "a writer has removed it", str(file)) from error
        raise StoreError(
            f"{file} cannot be read as a Faiss index: foreign or damaged ({reason(error)})"
        ) from error


def read_trained(folder: Path, info: FileInfo) -> Any:
    """Read the trained, empty index that new parts are copies of.

    Raises:
        StoreError: missing, damaged or exchanged.
    """
    file = folder / info.file
    if not file.is_file():
        raise StoreError(f"{folder} has no {info.file}: copy the whole folder, or build it again")
    if file.stat().st_size != info.num_bytes or _sha256(file, None) != info.sha256:
        raise _exchanged(file)
    return read_index(file, mapped=False)


def _first_of(inverted: Any) -> None:
    """Give back the first vector of an inverted file, which needs no map."""
    lists = inverted.invlists
    for number in range(inverted.nlist):
        if lists.list_size(number):
            vector = np.zeros(inverted.d, np.float32)
            inverted.reconstruct_from_offset(number, 0, load_faiss().swig_ptr(vector))
            return


def _exchanged(file: Path) -> StoreError:
    return StoreError(
        f"{file} is not the file that {MANIFEST} was written with: damaged or exchanged; build it again"
    )


def _sha256(file: Path, keys: np.ndarray | None) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while content := stream.read(_READ_BYTES):
            digest.update(content)
    if keys is not None:
        digest.update(np.ascontiguousarray(keys).view(np.uint8))
    return digest.hexdigest()
