"""Vectors that are found by their direction: a Faiss index (arXiv 2401.08281) in a folder, built from a store.

index.faiss    the index, as Faiss writes it, memory-mapped where Faiss can
index.json     which encoder made the vectors, how many, how wide, the kind of index, hash and size of the file
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bindllm.atomic import atomic_folder, set_aside_name
from bindllm.errors import InputError, MissingExtraError, StoreError

if TYPE_CHECKING:
    from bindllm.retrieval.store import EmbeddingStore

FORMAT = 1
"""Number of the layout; an index of a newer one is refused."""

FILE, MANIFEST = "index.faiss", "index.json"

CHUNK = 8192
"""Rows that are read from the store and added at a time: 32 MB at 1,024 numbers each."""

TRAIN_ROWS = 1 << 16
"""Rows, evenly spread over the store, that an index with a codebook is trained on at most."""

VERIFY_BYTES = 1 << 28
"""Index files up to this size are hashed whenever they are opened; of larger ones only the size is compared."""


@dataclass(frozen=True)
class IndexInfo:
    """What an index is made of.

    Attributes:
        fingerprint: of the encoder that made the vectors, in hex.
        count: number of vectors.
        embedding_size: E.
        factory: kind of index, in the words of Faiss's ``index_factory``; "" for a file that does not tell.
        num_bytes: size of the index file.
        sha256: of the index file; "" where it is not known.
    """

    fingerprint: str
    count: int
    embedding_size: int
    factory: str
    num_bytes: int
    sha256: str


class VectorIndex:
    """Unit vectors, found by inner product.

    Args:
        index: a Faiss index of inner product.
        info: what it is made of.
        source: path that errors name.

    Raises:
        StoreError: the index is empty, of another metric or width, or cannot give its vectors back.
    """

    def __init__(self, index: Any, info: IndexInfo, *, source: str | Path) -> None:
        faiss = _faiss()
        self.info, self.source = info, str(source)
        if (index.ntotal, index.d) != (info.count, info.embedding_size):
            raise StoreError(
                f"{source} holds {index.ntotal} vectors of size {index.d}, expected {info.count} of size "
                f"{info.embedding_size}: damaged or exchanged; build it again"
            )
        if index.metric_type != faiss.METRIC_INNER_PRODUCT:
            raise StoreError(f"{source} is a Faiss index of another metric, expected one of inner product")
        if not info.count:
            raise StoreError(f"{source} is an empty index; fill it with the embeddings of pictures first")
        self._index = index
        try:
            # What an inverted file lacks to give a vector back by its number: 8 bytes for each.
            if (inverted := faiss.try_extract_index_ivf(index)) is not None:
                inverted.make_direct_map()
            self.vectors(np.zeros(1, np.int64))
        except RuntimeError as error:
            raise StoreError(
                f"{source}: an index of the type {type(index).__name__} cannot give its vectors back, which a cache "
                "needs; build it with another factory, such as 'Flat'"
            ) from error

    @classmethod
    def build(
        cls, folder: str | Path, store: EmbeddingStore, *, factory: str = "Flat", modality: str = "image"
    ) -> VectorIndex:
        """Build the index of all embeddings of one modality in a store, write it in one step, and open it.

        The order follows from the content hashes, so the same embeddings give the same file. Vectors are scaled to
        unit length. Memory holds the index and one chunk, never all vectors beside it.

        Args:
            folder: where it goes; an earlier index there is replaced, any other non-empty folder refused.
            store: read in chunks.
            factory: kind of index, in the words of Faiss's ``index_factory``; "Flat" is exact.
            modality: which embeddings.

        Raises:
            InputError: Faiss does not know such a factory for this width.
            StoreError: no such embeddings, one without direction, the folder holds something else, or the disk.
        """
        faiss, folder = _faiss(), Path(folder)
        _refuse_foreign(folder)
        keys = _keys_of(store, modality)
        try:
            index = faiss.index_factory(store.embedding_size, factory, faiss.METRIC_INNER_PRODUCT)
        except RuntimeError as error:
            raise InputError(
                f"Faiss builds no index {factory!r} of inner product over {store.embedding_size} numbers "
                f"({_reason(error)}); 'Flat' is exact and always works"
            ) from error
        _limit_threads()
        try:
            if not index.is_trained:
                spread = keys[:: -(-len(keys) // TRAIN_ROWS)]
                index.train(np.concatenate(list(_chunks(store, spread))))
            for rows in _chunks(store, keys):
                index.add(rows)
        except RuntimeError as error:
            raise InputError(
                f"Faiss cannot build an index {factory!r} of {len(keys)} vectors ({_reason(error)}); "
                "'Flat' always works"
            ) from error
        _write(folder, index, fingerprint=store.fingerprint, factory=factory)
        return cls.open(folder)

    @classmethod
    def open(cls, folder: str | Path, *, verify: bool | None = None) -> VectorIndex:
        """Open the index in a folder, memory-mapped.

        Args:
            folder: written by `build`.
            verify: compare the hash of the file, which reads all of it; None: up to `VERIFY_BYTES`.

        Raises:
            StoreError: names the file that is missing, damaged, exchanged, foreign or of a newer format.
        """
        folder = Path(folder)
        info, file = _read_info(folder), folder / FILE
        if not file.is_file():
            raise StoreError(f"{folder} has no {FILE}: copy the whole folder, or build it again")
        size = file.stat().st_size
        verify = size <= VERIFY_BYTES if verify is None else verify
        if size != info.num_bytes or (verify and _sha256(file) != info.sha256):
            raise StoreError(
                f"{file} is not the file that {MANIFEST} was written with: damaged or exchanged; build it again"
            )
        return cls(_read(file, inverted="IVF" in info.factory), info, source=file)

    @classmethod
    def open_bare(cls, file: str | Path, fingerprint: str) -> VectorIndex:
        """Open a file of Faiss alone, such as the published ``knn.index``, memory-mapped.

        Args:
            file: an index of inner product over unit vectors.
            fingerprint: of the encoder that made them: the file does not tell, and you vouch for it.

        Raises:
            StoreError: not a file of Faiss, damaged, of another metric, or unable to give its vectors back.
        """
        file = Path(file)
        if not file.is_file():
            raise StoreError(f"there is no index file {str(file)!r}")
        index = _read(file, inverted=False)
        info = IndexInfo(fingerprint, index.ntotal, index.d, "", file.stat().st_size, "")
        return cls(index, info, source=file)

    def __len__(self) -> int:
        return self.info.count

    def search(self, queries: np.ndarray, count: int) -> np.ndarray:
        """Return the numbers of the nearest vectors, best first, -1 where none is left.

        Args:
            queries: float32 [N, E].
            count: at most this many for each.

        Returns:
            int64 [N, min(count, len)].
        """
        _limit_threads()
        return self._index.search(np.ascontiguousarray(queries), min(count, len(self)))[1]

    def vectors(self, numbers: np.ndarray) -> np.ndarray:
        """Return the vectors [..., E] with these numbers [...], as the index keeps them; zeros for -1."""
        flat = numbers.reshape(-1)
        found = np.zeros((len(flat), self.info.embedding_size), np.float32)
        real = flat >= 0
        found[real] = self._index.reconstruct_batch(np.ascontiguousarray(flat[real]))
        return found.reshape(*numbers.shape, -1)


def unit_rows(rows: np.ndarray) -> np.ndarray:
    """Return rows [..., E] at unit length, float32; a row without direction becomes NaN.

    Example:
        >>> unit_rows(np.array([[3.0, 4.0]], np.float32))
        array([[0.6, 0.8]], dtype=float32)
    """
    rows = np.asarray(rows, np.float32)
    # In double precision no square of a float32 overflows, or becomes zero.
    norms = np.sqrt(np.square(rows, dtype=np.float64).sum(axis=-1, keepdims=True))
    with np.errstate(invalid="ignore", divide="ignore"):
        return (rows / norms).astype(np.float32)


def _keys_of(store: EmbeddingStore, modality: str) -> list[str]:
    """Return the keys of all embeddings of a modality, sorted, each once."""
    import pyarrow as pa
    import pyarrow.compute as pc

    while True:
        keys: set[bytes] = set()
        try:
            for shard in store.folder.glob("embeddings-*.arrow"):
                batch = pa.ipc.open_file(pa.memory_map(str(shard))).get_batch(0)
                keys.update(
                    batch.column("key").filter(pc.equal(batch.column("modality"), modality)).to_pylist()
                )
        except FileNotFoundError:
            # Another process has merged this shard into a new one since the folder was listed.
            continue
        except (OSError, ValueError, pa.ArrowException) as error:
            raise StoreError(f"{shard} cannot be read ({error}); open the store to set it aside") from error
        if not keys:
            raise StoreError(
                f"{store.folder} holds no {modality} embeddings: fill the store with such media first"
            )
        return [key.hex() for key in sorted(keys)]


def _chunks(store: EmbeddingStore, keys: list[str]) -> Iterator[np.ndarray]:
    """Yield the embeddings of the keys at unit length, float32 [at most CHUNK, E]."""
    for start in range(0, len(keys), CHUNK):
        part = keys[start : start + CHUNK]
        rows = unit_rows(store.get(part).numpy())
        broken = np.flatnonzero(~np.isfinite(rows).all(axis=1))
        if len(broken):
            raise StoreError(
                f"{store.folder}: the embedding with key {part[broken[0]]} is zero or not finite, so it has no "
                "direction"
            )
        yield rows


def _write(folder: Path, index: Any, *, fingerprint: str, factory: str) -> None:
    try:
        with atomic_folder(folder) as part:
            _faiss().write_index(index, str(part / FILE))
            size, digest = (part / FILE).stat().st_size, _sha256(part / FILE)
            info = IndexInfo(fingerprint, index.ntotal, index.d, factory, size, digest)
            text = json.dumps({"format": FORMAT, **asdict(info)}, indent=2)
            (part / MANIFEST).write_text(text + "\n", encoding="utf-8")
    except (OSError, RuntimeError) as error:
        raise StoreError(
            f"{folder}: the index cannot be written ({_reason(error)}); an earlier one there is whole. "
            "Check the free space and the permissions"
        ) from error


def _refuse_foreign(folder: Path) -> None:
    if folder.exists() and not (folder / MANIFEST).is_file() and (folder.is_file() or any(folder.iterdir())):
        raise StoreError(
            f"{folder} exists and is not an index of bindllm (no {MANIFEST}); nothing was written. "
            "Choose another folder or empty it"
        )


def _read_info(folder: Path) -> IndexInfo:
    path = folder / MANIFEST
    if not path.is_file():
        aside = set_aside_name(folder)
        hint = f"; an earlier one is whole in {aside}: rename it to {folder.name}" if aside.is_dir() else ""
        raise StoreError(f"{folder} is not the folder of an index (no {MANIFEST}){hint}")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if (number := int(found.pop("format"))) > FORMAT:
            raise StoreError(f"{path} has format {number}, this bindllm reads up to {FORMAT}; update bindllm")
        info = IndexInfo(**found)
        types = [type(value) for value in asdict(info).values()]
        if types != [str, int, int, str, int, str]:
            raise TypeError("values of other types than expected")
        return info
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise StoreError(f"{path} is damaged ({error!r}); build the index again") from error


def _read(file: Path, *, inverted: bool) -> Any:
    """Read an index, mapping its vectors: Faiss has one way for inverted files and another for all others."""
    faiss = _faiss()
    flag = faiss.IO_FLAG_MMAP if inverted else getattr(faiss, "IO_FLAG_MMAP_IFC", faiss.IO_FLAG_MMAP)
    try:
        return faiss.read_index(str(file), flag)
    except (RuntimeError, MemoryError) as error:
        raise StoreError(
            f"{file} cannot be read as a Faiss index: foreign or damaged ({_reason(error)})"
        ) from error


def _reason(error: Exception) -> str:
    """Return what an error of Faiss says, without the C++ signature ahead of it."""
    return str(error).rpartition(": ")[2].strip()


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _limit_threads() -> None:
    """Let Faiss use as many threads as torch: it brings an OpenMP of its own, which counts for each thread."""
    import torch

    _faiss().omp_set_num_threads(torch.get_num_threads())


def _faiss() -> Any:
    try:
        import faiss
    except ImportError as error:
        raise MissingExtraError("faiss-cpu", extra="cache", purpose="search a visual cache") from error
    return faiss
