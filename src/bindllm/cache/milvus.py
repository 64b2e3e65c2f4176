"""The vectors of a cache in Milvus, for more pictures than one machine can hold.

Milvus (Wang et al., SIGMOD 2021) is a server or a cluster that keeps and searches vectors; milvus-lite is the same
inside this process, with a path on disk. `VisualCache` takes a `MilvusIndex` as it takes a `VectorIndex`.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from bindllm.cache.milvus_collection import (
    EXACT_ROWS,
    MilvusInfo,
    check_count,
    check_index_type,
    check_name,
    fill,
    known_collections,
    load,
    read_info,
    replacement,
    rows_at_once,
    search_params,
    target,
)
from bindllm.cache.milvus_server import MilvusServer, RefusedError
from bindllm.embeddings.shards import read_keys
from bindllm.errors import InputError, StoreError, did_you_mean

if TYPE_CHECKING:
    from bindllm.embeddings.store import EmbeddingStore

# Neighbours that one request asks for, about.
_HITS = 1 << 18


class MilvusIndex:
    """Unit vectors in a Milvus collection, found by inner product; the interface of `VectorIndex`.

    Open or build one by the class methods, and close it at the end, best by a ``with`` statement.

    Example:
        store = EmbeddingStore.for_encoder("data/store", encoder)
        with MilvusIndex.build("http://host:19530", store, collection="pictures") as index:
            model.generate("What do you hear?", media=[Media.audio("bark.wav")], cache=VisualCache(index))
    """

    def __init__(self, server: MilvusServer, name: str, info: MilvusInfo) -> None:
        self.info, self.source = info, f"{server.address}, collection {name}"
        self._server, self._name = server, name

    @classmethod
    def build(
        cls,
        uri: str | Path,
        store: EmbeddingStore,
        *,
        collection: str = "bindllm",
        modality: str = "image",
        index_type: str = "auto",
        token: str | None = None,
        timeout: float = 30.0,
    ) -> Self:
        """Build a collection of all embeddings of one modality in a store, and open it.

        Rows are numbered by their content hash, so the same embeddings get the same numbers. An earlier collection of
        this name answers until the new one is whole, and is removed then; a build that is killed leaves it as it was.

        Args:
            uri: a path that ends in ``.db`` (milvus-lite), or an address such as ``http://host:19530``.
            store: read in chunks, so memory stays bounded.
            collection: name: letters, digits and underscores.
            modality: which embeddings.
            index_type: one of `INDEX_TYPES`; "auto": "FLAT" in milvus-lite and up to `EXACT_ROWS`, else "HNSW".
            token: ``user:password`` or a key, where the cluster asks for one.
            timeout: seconds after which a request is given up, all attempts together.

        Raises:
            InputError: a name or a kind of index that cannot be.
            StoreError: no such embeddings, one without direction, a collection that bindllm has not built has the
                name, or Milvus does not answer or refuses.
        """
        check_name(collection)
        check_index_type(index_type)
        keys = read_keys(store.folder, modality)
        if not len(keys):
            raise StoreError(
                f"{store.folder} holds no {modality} embeddings: fill the store with such media first"
            )
        server = MilvusServer(uri, token=token, timeout=timeout)
        if index_type == "auto":
            index_type = "FLAT" if server.is_lite or len(keys) <= EXACT_ROWS else "HNSW"
        info = MilvusInfo(store.fingerprint, len(keys), store.embedding_size, modality, index_type)
        try:
            if server.is_lite:
                Path(uri).absolute().parent.mkdir(parents=True, exist_ok=True)
            with replacement(server, collection, info) as name:
                fill(server, name, store, keys)
                load(server, name)
                check_count(server, name, info)
        except BaseException:
            server.close()
            raise
        return cls(server, name, info)

    @classmethod
    def open(
        cls, uri: str | Path, *, collection: str = "bindllm", token: str | None = None, timeout: float = 30.0
    ) -> Self:
        """Open a collection that was built before, and have it loaded where it is not.

        Args:
            uri: as for `build`, like the others.
            collection: likewise.
            token: likewise.
            timeout: likewise.

        Raises:
            StoreError: no such collection (lists those there are), one that bindllm has not built, that has lost rows
                or is of a newer format, or Milvus does not answer or refuses.
        """
        check_name(collection)
        server = MilvusServer(uri, token=token, timeout=timeout)
        if server.is_lite and not Path(uri).exists():
            raise StoreError(f"there is no embedded Milvus {str(uri)!r}; build it first")
        try:
            name = target(server, collection)
            if name is None:
                known = did_you_mean(collection, known_collections(server))
                raise StoreError(f"{server.address} has no collection {collection!r}. {known}")
            info = read_info(server, name)
            load(server, name)
            check_count(server, name, info)
        except BaseException:
            server.close()
            raise
        return cls(server, name, info)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __len__(self) -> int:
        return self.info.count

    def __repr__(self) -> str:
        return f"MilvusIndex({self.source!r}, {len(self)} vectors of size {self.info.embedding_size})"

    def close(self) -> None:
        """Close the connection; milvus-lite lets go of its path. A later search connects again."""
        self._server.close()

    def search(self, queries: np.ndarray, count: int) -> np.ndarray:
        """Return the numbers of the nearest vectors, best first, -1 where none is left.

        Args:
            queries: float32 [N, E].
            count: at most this many for each.

        Returns:
            int64 [N, min(count, len)].

        Raises:
            StoreError: Milvus does not answer, refuses, or leaves out an answer.
        """
        if queries.ndim != 2 or queries.shape[1] != self.info.embedding_size:
            raise InputError(
                f"{self.source} takes queries [N, {self.info.embedding_size}], not {list(queries.shape)}"
            )
        count = min(count, len(self))
        found = np.full((len(queries), count), -1, np.int64)
        step = max(1, min(rows_at_once(self.info.embedding_size), _HITS // count))
        for start in range(0, len(queries), step):
            part = queries[start : start + step]
            answers = self._call(
                "search",
                data=list(part),
                limit=count,
                anns_field="vector",
                output_fields=["id"],
                search_params={"params": search_params(self.info, count)},
            )
            self._check_answers(answers, len(part), count)
            for row, hits in enumerate(answers, start):
                found[row, : len(hits)] = [hit["id"] for hit in hits]
        if found.size and not -1 <= found.min() <= found.max() < len(self):
            raise self._changed(f"names the vector {found.max()} of {len(self)}")
        return found

    def vectors(self, numbers: np.ndarray) -> np.ndarray:
        """Return the vectors [..., E] with these numbers [...], float32, as they were built; zeros for -1.

        Raises:
            StoreError: Milvus does not answer, refuses, or has not all of them.
        """
        size = self.info.embedding_size
        wanted, places = np.unique(numbers, return_inverse=True)
        rows = np.zeros((len(wanted), size), np.float32)
        for row, vector in zip(np.flatnonzero(wanted >= 0), self._column("vector", wanted), strict=True):
            rows[row] = vector
        return rows[places.reshape(-1)].reshape(*numbers.shape, size)

    def keys(self, numbers: np.ndarray) -> list[str | None]:
        """Return the content hashes, in hex, of the vectors with these numbers [...], flat; None for -1.

        Raises:
            StoreError: Milvus does not answer, refuses, or has not all of them.
        """
        wanted = np.unique(numbers[numbers >= 0])
        known = dict(zip(wanted.tolist(), self._column("key", wanted), strict=True))
        return [known.get(number) for number in numbers.reshape(-1).tolist()]

    def _column(self, field: str, numbers: np.ndarray) -> list[Any]:
        """Return one column of the rows with those of these numbers that are not -1, in their order."""
        numbers, found = numbers[numbers >= 0], []
        if len(numbers) and numbers.max() >= len(self):
            raise InputError(
                f"{self.source} has {len(self)} vectors, and none with the number {numbers.max()}"
            )
        step = rows_at_once(self.info.embedding_size)
        for start in range(0, len(numbers), step):
            part = numbers[start : start + step].tolist()
            answers = self._call("get", ids=part, output_fields=["id", field])
            # As arrays at once: as numbers of Python they would take eight times the memory.
            convert = (lambda value: np.array(value, np.float32)) if field == "vector" else str
            got = {row["id"]: convert(row[field]) for row in answers}
            if missing := set(part) - set(got):
                raise self._changed(f"gave {len(part) - len(missing)} of {len(part)} rows")
            found.extend(got[number] for number in part)
        return found

    def _call(self, name: str, **options: Any) -> Any:
        try:
            return self._server.call(name, self._name, **options)
        except RefusedError as error:
            if not self._server.call("has_collection", self._name):
                raise self._changed("is gone") from error
            raise

    def _check_answers(self, answers: Any, queries: int, count: int) -> None:
        """Refuse an answer that is not whole: every query has one, and an exact index finds all neighbours."""
        if len(answers) != queries or any(len(hits) > count for hits in answers):
            raise StoreError(f"{self.source} answered {len(answers)} of {queries} queries; nothing was used")
        fewest = min(len(hits) for hits in answers)
        if fewest < count and self.info.index_type == "FLAT":
            raise StoreError(
                f"{self.source} found {fewest} of {count} neighbours although its index is exact: a part of the "
                "collection does not answer; nothing was used. Check the nodes of the cluster"
            )

    def _changed(self, what: str) -> StoreError:
        return StoreError(
            f"{self.source} {what}: it was built again or changed since it was opened; open it again"
        )
