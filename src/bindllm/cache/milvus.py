"""The vectors of a cache in Milvus, for more images than one machine can hold.

Milvus (Wang et al., SIGMOD 2021) is a server or a cluster that stores and searches vectors; milvus-lite is the same
inside this process, with a ``.db`` path on disk. `VisualCache` takes a `MilvusIndex` like a `VectorIndex`.

The name that a user gives is an alias of a collection that a build has finished: ``<name>_<time>_<random>``. Its
columns are ``id`` (the rank of the content hash), ``key`` (the content hash, in hex) and ``vector``; a property of the
collection holds the facts of `MilvusInfo`.
"""

from __future__ import annotations

import json
import logging
import math
import re
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from bindllm.cache.blend import check_queries, read_units
from bindllm.cache.index import wanted_keys
from bindllm.cache.milvus_server import MilvusServer
from bindllm.embeddings.shards import as_hex
from bindllm.errors import InputError, StoreError, check_choice, did_you_mean

if TYPE_CHECKING:
    from bindllm.embeddings.store import EmbeddingStore

FORMAT = 1
"""Version of the layout; newer ones are refused."""

EXACT_ROWS = 100_000
"""A server searches up to this many vectors exactly, and more through a graph, unless an index type is given."""

INDEX_TYPES = ("AUTOINDEX", "FLAT", "HNSW", "IVF_FLAT", "IVF_SQ8")
"""Index types of Milvus that can be chosen; "FLAT" is exact. Milvus-lite has all of them."""

ABANDONED = timedelta(days=1)
"""Age from which an unfinished collection on a server counts as left behind by a killed build."""

_NOTE = "bindllm"
# Floats of one request, about: 4 MB, far below the limit of Milvus; and neighbors of one request.
_REQUEST_FLOATS, _REQUEST_HITS = 1 << 20, 1 << 18
# Flushing and loading go through all data: they may take this many times the timeout of other requests.
_PATIENCE = 20.0


@dataclass(frozen=True)
class MilvusInfo:
    """Facts about a collection: encoder, rows [count, E], modality of the media, and one of `INDEX_TYPES`."""

    fingerprint: str
    count: int
    embedding_size: int
    modality: str
    index_type: str


class MilvusIndex:
    """Unit vectors in a Milvus collection, searched by inner product; the interface of `VectorIndex`.

    Open or build one with the class methods, and close it at the end, best with a ``with`` statement.

    Example:
        store = EmbeddingStore.for_encoder("data/store", encoder)
        with MilvusIndex.build("http://host:19530", store, collection="images") as index:
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

        An earlier collection of this name answers until the new one is complete, and is removed then. A build that is
        killed leaves it unchanged.

        Args:
            uri: A path that ends in ``.db`` (milvus-lite), or an address such as ``http://host:19530``.
            store: The embeddings, read in chunks, so memory stays bounded.
            collection: The name: letters, digits and underscores.
            index_type: One of `INDEX_TYPES`; "auto": "FLAT" in milvus-lite and up to `EXACT_ROWS`, else "HNSW".
            token: ``user:password`` or an API key, if the server asks for one.

        Raises:
            InputError: An invalid name or index type.
            StoreError: No such embeddings, one without direction, a collection of this name that bindllm has not
                built, or Milvus does not answer or refuses.
        """
        if not re.fullmatch("[A-Za-z_][A-Za-z0-9_]{0,199}", collection):
            raise InputError(
                f"{collection!r} is not the name of a collection: letters, digits and underscores, not a digit first"
            )
        check_choice("index type", index_type, ("auto", *INDEX_TYPES))
        # Everything that can be refused without a server comes first.
        keys = wanted_keys(store, modality)
        server = MilvusServer(uri, token=token, timeout=timeout)
        if index_type == "auto":
            index_type = "FLAT" if server.is_lite or len(keys) <= EXACT_ROWS else "HNSW"
        info = MilvusInfo(store.fingerprint, len(keys), store.embedding_size, modality, index_type)
        # A failed build must not keep the path of milvus-lite locked.
        with ExitStack() as cleanup:
            cleanup.callback(server.close)
            if server.is_lite:
                Path(uri).absolute().parent.mkdir(parents=True, exist_ok=True)
            # The name moves to the new collection only after its rows were counted.
            with _replacement(server, collection, info) as name:
                _fill(server, name, store, keys)
                _load(server, name, info)
            cleanup.pop_all()
        return cls(server, name, info)

    @classmethod
    def open(
        cls, uri: str | Path, *, collection: str = "bindllm", token: str | None = None, timeout: float = 30.0
    ) -> Self:
        """Open a collection that was built earlier, and load it in Milvus if necessary.

        The arguments are those of `build`.

        Raises:
            StoreError: No such collection (lists the known ones), one that bindllm has not built, that has lost rows
                or is of a newer format, or Milvus does not answer or refuses.
        """
        server = MilvusServer(uri, token=token, timeout=timeout)
        # milvus-lite would make a new, empty one.
        if server.is_lite and not Path(uri).exists():
            raise StoreError(f"the embedded Milvus {str(uri)!r} does not exist; build it first")
        with ExitStack() as cleanup:
            cleanup.callback(server.close)
            if (name := _target(server, collection)) is None:
                known = did_you_mean(collection, server.call("list_aliases")["aliases"])
                raise StoreError(f"{server.address} has no collection {collection!r}. {known}")
            info = _read_info(server, name)
            _load(server, name, info)
            cleanup.pop_all()
        return cls(server, name, info)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __len__(self) -> int:
        return self.info.count

    def close(self) -> None:
        """Close the connection; milvus-lite releases its path. A later search connects again."""
        self._server.close()

    def search(self, queries: np.ndarray, count: int) -> np.ndarray:
        """Return the ids of the nearest vectors, best first, -1 if there are no more.

        Args:
            queries: float32 [N, E].

        Returns:
            int64 [N, min(count, len)].

        Raises:
            StoreError: Milvus does not answer, refuses, or gives an incomplete answer.
        """
        check_queries(queries, self.info.embedding_size, self.source)
        count = min(count, len(self))
        # -1 stays if an approximate index finds fewer.
        found = np.full((len(queries), count), -1, np.int64)
        # A request is limited by the floats that it sends and the neighbors that it gets back.
        step = max(1, min(_rows_at_once(self.info.embedding_size), _REQUEST_HITS // count))
        for start in range(0, len(queries), step):
            part = queries[start : start + step]
            answers = self._server.call(
                "search",
                self._name,
                data=list(part),
                limit=count,
                anns_field="vector",
                output_fields=["id"],
                search_params={"params": _search_params(self.info, count)},
            )
            self._check_answers(answers, len(part), count)
            for row, hits in enumerate(answers, start):
                found[row, : len(hits)] = [hit["id"] for hit in hits]
        # A rebuilt collection may have more rows than this one had.
        if found.size and not -1 <= found.min() <= found.max() < len(self):
            raise self._changed(f"returned the id {found.max()} of {len(self)}")
        return found

    def vectors(self, ids: np.ndarray) -> np.ndarray:
        """Return the vectors [..., E] with these ids [...], float32, exactly as they were built; zeros for -1.

        Raises:
            StoreError: Milvus does not answer, refuses, or lacks one of them.
        """
        size = self.info.embedding_size
        # Each vector is fetched once, because queries share neighbors.
        wanted, rows_of = np.unique(ids, return_inverse=True)
        rows = np.zeros((len(wanted), size), np.float32)
        for row, vector in zip(np.flatnonzero(wanted >= 0), self._column("vector", wanted), strict=True):
            rows[row] = vector
        return rows[rows_of.reshape(-1)].reshape(*ids.shape, size)

    def keys(self, ids: np.ndarray) -> list[str | None]:
        """Return the content hashes, in hex, of the vectors with these ids [...], flat; None for -1.

        Raises:
            StoreError: Milvus does not answer, refuses, or lacks one of them.
        """
        wanted = np.unique(ids[ids >= 0])
        known = dict(zip(wanted.tolist(), self._column("key", wanted), strict=True))
        return [known.get(number) for number in ids.reshape(-1).tolist()]

    def _column(self, field: str, ids: np.ndarray) -> list[Any]:
        """Return one column of the rows with these ids, without -1, in their order."""
        ids, found = ids[ids >= 0], []
        if len(ids) and ids.max() >= len(self):
            raise InputError(f"{self.source} has {len(self)} vectors; the id {ids.max()} does not exist")
        step = _rows_at_once(self.info.embedding_size)
        for start in range(0, len(ids), step):
            part = ids[start : start + step].tolist()
            answers = self._server.call("get", self._name, ids=part, output_fields=["id", field])
            # Arrays at once: Python floats would take eight times the memory.
            convert = (lambda value: np.array(value, np.float32)) if field == "vector" else str
            got = {row["id"]: convert(row[field]) for row in answers}
            # The answer has its rows in any order, and leaves out unknown ids.
            if missing := set(part) - set(got):
                raise self._changed(f"returned {len(part) - len(missing)} of {len(part)} rows")
            found.extend(got[number] for number in part)
        return found

    def _check_answers(self, answers: Any, queries: int, count: int) -> None:
        """Raise if an answer is incomplete: every query needs one, and an exact index finds all neighbors."""
        if len(answers) != queries or any(len(hits) > count for hits in answers):
            raise StoreError(f"{self.source} answered {len(answers)} of {queries} queries; nothing was used")
        fewest = min(len(hits) for hits in answers)
        if fewest < count and self.info.index_type == "FLAT":
            raise StoreError(
                f"{self.source} found {fewest} of {count} neighbors although its index is exact: a part of the "
                "collection does not answer; nothing was used. Check the nodes of the cluster"
            )

    def _changed(self, problem: str) -> StoreError:
        return StoreError(
            f"{self.source} {problem}: the collection was rebuilt or changed since it was opened; open it again"
        )


def _rows_at_once(embedding_size: int) -> int:
    """Return how many vectors one request carries."""
    return max(1, min(16_384, _REQUEST_FLOATS // embedding_size))


def _build_params(info: MilvusInfo) -> dict[str, int]:
    if info.index_type == "HNSW":
        return {"M": 16, "efConstruction": 200}
    # About as many lists as a list has vectors, within the limit of Milvus.
    lists = max(1, min(65_536, math.isqrt(info.count)))
    return {"nlist": lists} if info.index_type.startswith("IVF") else {}


def _search_params(info: MilvusInfo, count: int) -> dict[str, int]:
    if info.index_type == "HNSW":
        # HNSW needs at least as many candidates as neighbors; more of them raise recall.
        return {"ef": min(32_768, max(128, 4 * count))}
    lists = _build_params(info).get("nlist")
    return {"nprobe": max(1, lists // 16)} if lists else {}


def _target(server: MilvusServer, collection: str) -> str | None:
    """Return the real name of a collection, None if it does not exist."""
    if collection in server.call("list_collections"):
        return collection
    if collection in server.call("list_aliases")["aliases"]:
        return server.call("describe_alias", collection)["collection_name"]
    return None


def _read_info(server: MilvusServer, name: str) -> MilvusInfo:
    """Return the facts about a collection, or raise a StoreError if bindllm has not built it, or a newer one has."""
    found = server.call("describe_collection", name)
    # Milvus may drop unknown properties; milvus-lite drops the description.
    note = found["properties"].get(_NOTE) or found["description"]
    try:
        facts = json.loads(note)
        if (number := int(facts.pop("format"))) > FORMAT:
            raise StoreError(
                f"{server.address}: the collection {name} has format {number}, this bindllm reads up to {FORMAT}; "
                "update bindllm"
            )
        info = MilvusInfo(**facts)
        if [type(value) for value in asdict(info).values()] != [str, int, int, str, str]:
            raise TypeError("values of other types than expected")
        sizes = [int(field["params"]["dim"]) for field in found["fields"] if field["name"] == "vector"]
    # Deep nesting exceeds the stack.
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise StoreError(
            f"{server.address}: the collection {name} was not built by bindllm, or its note is damaged "
            f"({error!r}); build a cache under another name"
        ) from error
    if sizes != [info.embedding_size]:
        raise StoreError(
            f"{server.address}: the collection {name} has vectors of size {sizes}, expected {info.embedding_size}: "
            "exchanged; build it again"
        )
    return info


def _load(server: MilvusServer, name: str, info: MilvusInfo) -> None:
    """Load a collection, and raise a StoreError if rows are missing."""
    server.call("load_collection", name, patience=_PATIENCE)
    # Strong: rows that were written just now are counted.
    answer = server.call("query", name, output_fields=["count(*)"], consistency_level="Strong")
    if (count := answer[0]["count(*)"]) != info.count:
        raise StoreError(
            f"{server.address}: the collection {name} has {count} rows, expected {info.count}: some were lost or "
            "removed; build it again"
        )


@contextmanager
def _replacement(server: MilvusServer, collection: str, info: MilvusInfo) -> Iterator[str]:
    """Yield the name of a new empty collection; on success it replaces the earlier one, else it is removed."""
    earlier = _target(server, collection)
    if earlier == collection:
        raise StoreError(
            f"{server.address} has a collection {collection!r} that is not an alias as bindllm makes them; nothing "
            "was written. Choose another name or remove it"
        )
    if earlier is not None:
        # Raises if bindllm has not built it: a foreign collection must not be replaced.
        _read_info(server, earlier)
    _remove_abandoned(server, collection, earlier)
    # The time dates a collection that a killed build has left.
    name = f"{collection}_{datetime.now(UTC):%Y%m%d%H%M%S}_{uuid.uuid4().hex[:8]}"
    try:
        _create(server, name, info)
        yield name
        # From here on, readers get the new collection.
        server.call("create_alias" if earlier is None else "alter_alias", name, collection)
    except BaseException:
        _remove(server, name)
        raise
    if earlier is not None:
        _remove(server, earlier)


def _create(server: MilvusServer, name: str, info: MilvusInfo) -> None:
    from pymilvus import DataType, MilvusClient

    # Written twice, because each kind of server drops one of both.
    note = json.dumps({"format": FORMAT, **asdict(info)})
    schema = MilvusClient.create_schema(auto_id=False, enable_dynamic_field=False, description=note)
    schema.add_field("id", DataType.INT64, is_primary=True)
    schema.add_field("key", DataType.VARCHAR, max_length=64)
    schema.add_field("vector", DataType.FLOAT_VECTOR, dim=info.embedding_size)
    server.call(
        "create_collection", name, schema=schema, properties={_NOTE: note}, consistency_level="Bounded"
    )
    index = MilvusClient.prepare_index_params()
    index.add_index("vector", index_type=info.index_type, metric_type="IP", params=_build_params(info))
    # Milvus indexes rows as they arrive, so there is nothing to wait for.
    server.call("create_index", name, index, sync=False)


def _fill(server: MilvusServer, name: str, store: EmbeddingStore, keys: np.ndarray) -> None:
    """Write the embeddings of the keys at unit length, numbered in order of their keys, and flush them."""
    # Ids are positions among the sorted keys, as in a `VectorIndex`, so both give the same neighbors for ties.
    step = _rows_at_once(store.embedding_size)
    for start in range(0, len(keys), step):
        part = keys[start : start + step]
        columns = zip(range(start, start + len(part)), as_hex(part), read_units(store, part), strict=True)
        # Not "insert": pymilvus may send a request again whose answer was lost, which would double its rows.
        server.call("upsert", name, [{"id": n, "key": key, "vector": row} for n, key, row in columns])
    server.call("flush", name, patience=_PATIENCE)


def _remove_abandoned(server: MilvusServer, collection: str, current: str | None) -> None:
    """Remove leftovers of killed builds: at once from milvus-lite, which one process owns, else after `ABANDONED`."""
    for name in server.call("list_collections"):
        match = re.fullmatch(rf"{collection}_([0-9]{{14}})_[0-9a-f]{{8}}", name)
        if match is None or name == current:
            continue
        started = datetime.strptime(match[1], "%Y%m%d%H%M%S").replace(tzinfo=UTC)
        if server.is_lite or datetime.now(UTC) - started > ABANDONED:
            _remove(server, name)
        else:
            logging.getLogger("bindllm").warning(
                "%s: the collection %s, begun %s UTC, is kept because another build may be writing it. If none is, "
                "remove it",
                *(server.address, name, f"{started:%Y-%m-%d %H:%M:%S}"),
            )


def _remove(server: MilvusServer, name: str) -> None:
    """Remove a collection that is no longer needed; if that fails, a later build does it."""
    try:
        server.call("drop_collection", name)
    except StoreError as error:
        logging.getLogger("bindllm").warning("%s; the collection %s is not needed any more", error, name)
