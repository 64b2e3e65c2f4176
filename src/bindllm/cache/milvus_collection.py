"""Collections of bindllm in Milvus: made, filled, put in the place of an earlier one, and found again.

The name that a user gives is an alias of a collection that a build has finished: ``<name>_<time>_<random>``. Its
columns are ``id`` (the place of the row among the sorted content hashes), ``key`` (the content hash, in hex) and
``vector``; a property notes what it was made of.
"""

from __future__ import annotations

import json
import logging
import math
import re
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

import numpy as np

from bindllm.cache.blend import read_units
from bindllm.cache.milvus_server import MilvusServer, RefusedError, UnreachableError
from bindllm.embeddings.shards import as_hex
from bindllm.errors import InputError, StoreError, did_you_mean

if TYPE_CHECKING:
    from bindllm.embeddings.store import EmbeddingStore

FORMAT = 1
"""Number of the layout; a collection of a newer one is refused."""

EXACT_ROWS = 100_000
"""A cluster searches up to this many vectors exactly and more through a graph, unless it is told otherwise."""

INDEX_TYPES = ("AUTOINDEX", "FLAT", "HNSW", "IVF_FLAT", "IVF_SQ8")
"""Kinds of index that can be asked for, in the words of Milvus; "FLAT" is exact. Milvus-lite has all of them."""

ABANDONED = timedelta(days=1)
"""Age from which an unfinished collection on a cluster is taken for that of a killed build."""

# Key of the property that holds the note.
_NOTE = "bindllm"
# Numbers of a request, about: 4 MB, far below the 64 MB that Milvus takes.
_NUMBERS = 1 << 20
# Flushing and loading go through all data: they may take so many times as long as other requests.
_PATIENCE = 20.0


@dataclass(frozen=True)
class MilvusInfo:
    """What a collection is made of.

    Attributes:
        fingerprint: of the encoder that made the vectors, in hex.
        count: number of vectors.
        embedding_size: E.
        modality: of the media.
        index_type: one of `INDEX_TYPES`.
    """

    fingerprint: str
    count: int
    embedding_size: int
    modality: str
    index_type: str


def check_name(collection: str) -> None:
    """Refuse what Milvus would not take as a name."""
    if not re.fullmatch("[A-Za-z_][A-Za-z0-9_]{0,199}", collection):
        raise InputError(
            f"{collection!r} is no name of a collection: letters, digits and underscores, not a digit first"
        )


def check_index_type(index_type: str) -> None:
    """Refuse a kind of index that is not known, listing those that are."""
    known = ("auto", *INDEX_TYPES)
    if index_type not in known:
        raise InputError(f"unknown index type {index_type!r}. {did_you_mean(index_type, known)}")


def rows_at_once(embedding_size: int) -> int:
    """Return how many vectors one request carries."""
    return max(1, min(16_384, _NUMBERS // embedding_size))


def target(server: MilvusServer, collection: str) -> str | None:
    """Return the real name of a collection, None where there is none of this name."""
    if collection in server.call("list_collections"):
        return collection
    try:
        return server.call("describe_alias", collection)["collection_name"]
    except RefusedError:
        return None


def known_collections(server: MilvusServer) -> list[str]:
    """Return the names under which finished collections of bindllm can be opened."""
    made = (_made_by_build(name) for name in server.call("list_collections"))
    return sorted(name for name in {match[1] for match in made if match} if target(server, name))


def read_info(server: MilvusServer, name: str) -> MilvusInfo:
    """Return what a collection is made of.

    Raises:
        StoreError: bindllm has not built it, or a newer one has.
    """
    told = server.call("describe_collection", name)
    # A server may drop properties that it does not know; milvus-lite drops the description.
    note = told["properties"].get(_NOTE) or told["description"]
    try:
        found = json.loads(note)
        if (number := int(found.pop("format"))) > FORMAT:
            raise StoreError(
                f"{server.address}: the collection {name} has format {number}, this bindllm reads up to {FORMAT}; "
                "update bindllm"
            )
        info = MilvusInfo(**found)
        if [type(value) for value in asdict(info).values()] != [str, int, int, str, str]:
            raise TypeError("values of other types than expected")
        sizes = [field["params"]["dim"] for field in told["fields"] if field["name"] == "vector"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise StoreError(
            f"{server.address}: the collection {name} was not built by bindllm, or its note is damaged "
            f"({error!r}); build a cache under another name"
        ) from error
    if [int(size) for size in sizes] != [info.embedding_size]:
        raise StoreError(
            f"{server.address}: the collection {name} has vectors of size {sizes}, expected {info.embedding_size}: "
            "exchanged; build it again"
        )
    return info


def load(server: MilvusServer, name: str) -> None:
    """Have a collection loaded, however long it takes as long as it goes on.

    Raises:
        StoreError: Milvus does not answer, refuses, or stands still.
    """
    server.call("load_collection", name, _async=True)
    progress, since = None, time.monotonic()
    while (state := server.call("get_load_state", name))["state"].name != "Loaded":
        if state.get("progress") != progress:
            progress, since = state.get("progress"), time.monotonic()
        elif time.monotonic() - since > server.timeout * _PATIENCE:
            raise StoreError(
                f"{server.address}: loading the collection {name} stands at {progress} %; check the memory of the "
                "cluster's query nodes"
            )
        time.sleep(0.2)


def check_count(server: MilvusServer, name: str, info: MilvusInfo) -> None:
    """Refuse a collection that has other than the noted number of rows."""
    answer = server.call("query", name, output_fields=["count(*)"], consistency_level="Strong")
    if (count := answer[0]["count(*)"]) != info.count:
        raise StoreError(
            f"{server.address}: the collection {name} has {count} rows, expected {info.count}: some were lost or "
            "removed; build it again"
        )


@contextmanager
def replacement(server: MilvusServer, collection: str, info: MilvusInfo) -> Iterator[str]:
    """Yield the name of a new empty collection; on success it takes the place of the earlier one, which is removed.

    On an error the new one is removed, and what killed builds left is removed first: at once from milvus-lite, which
    one process has to itself, and after `ABANDONED` from a cluster, where another build may be at work.

    Raises:
        StoreError: a collection that bindllm has not built has the name, or Milvus does not answer or refuses.
    """
    if (earlier := target(server, collection)) is not None:
        if earlier == collection:
            raise StoreError(
                f"{server.address} has a collection {collection!r} that is not an alias as bindllm makes them; "
                "nothing was written. Choose another name or remove it"
            )
        read_info(server, earlier)
    _remove_abandoned(server, collection, earlier)
    name = f"{collection}_{datetime.now(UTC):%Y%m%d%H%M%S}_{uuid.uuid4().hex[:8]}"
    try:
        _create(server, name, info)
        yield name
        replaced = _switch(server, collection, name)
    except UnreachableError:
        # Removing the new one would only wait for the same server again; a later build does.
        raise
    except BaseException:
        _remove(server, name)
        raise
    if replaced is not None:
        _remove(server, replaced)


def fill(server: MilvusServer, name: str, store: EmbeddingStore, keys: np.ndarray) -> None:
    """Write the embeddings of the keys at unit length, numbered in their order, and have Milvus keep them.

    Raises:
        StoreError: an embedding without direction, or Milvus does not answer or refuses.
    """
    step = rows_at_once(store.embedding_size)
    for start in range(0, len(keys), step):
        part = keys[start : start + step]
        columns = zip(range(start, start + len(part)), as_hex(part), read_units(store, part), strict=True)
        # Not "insert": a request that arrived although its answer was lost would double its rows.
        server.call("upsert", name, [{"id": n, "key": key, "vector": row} for n, key, row in columns])
    server.call("flush", name, patience=_PATIENCE)


def _create(server: MilvusServer, name: str, info: MilvusInfo) -> None:
    from pymilvus import DataType, MilvusClient

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
    # The index is made of what is written later; there is nothing to wait for.
    server.call("create_index", name, index, sync=False)


def _build_params(info: MilvusInfo) -> dict[str, int]:
    if info.index_type == "HNSW":
        return {"M": 16, "efConstruction": 200}
    if info.index_type.startswith("IVF"):
        # About as many lists as a list has vectors, within what Milvus takes.
        return {"nlist": max(1, min(65_536, math.isqrt(info.count)))}
    return {}


def search_params(info: MilvusInfo, count: int) -> dict[str, int]:
    """Return how thoroughly to search for this many neighbours."""
    if info.index_type == "HNSW":
        return {"ef": min(32_768, max(128, 4 * count))}
    if info.index_type.startswith("IVF"):
        return {"nprobe": max(1, _build_params(info)["nlist"] // 16)}
    return {}


def _switch(server: MilvusServer, collection: str, name: str) -> str | None:
    """Let the alias mean the new collection; return the one that it meant before."""
    before = target(server, collection)
    if before is None:
        try:
            server.call("create_alias", name, collection)
            return None
        except RefusedError:
            # Another build, or the first attempt of this request, may have been quicker.
            if (before := target(server, collection)) is None:
                raise
    if before == name:
        return None
    server.call("alter_alias", name, collection)
    return before


def _remove_abandoned(server: MilvusServer, collection: str, current: str | None) -> None:
    for name in server.call("list_collections"):
        match = _made_by_build(name)
        if match is None or match[1] != collection or name == current:
            continue
        started = datetime.strptime(match[2], "%Y%m%d%H%M%S").replace(tzinfo=UTC)
        if server.is_lite or datetime.now(UTC) - started > ABANDONED:
            _remove(server, name)
        else:
            logging.getLogger("bindllm").warning(
                "%s: the collection %s, begun %s UTC, is left alone: another build may be writing it. If none is, "
                "remove it",
                server.address,
                name,
                f"{started:%Y-%m-%d %H:%M:%S}",
            )


def _remove(server: MilvusServer, name: str) -> None:
    """Remove a collection that nobody needs any more; where that fails, a later build does it."""
    try:
        server.call("drop_collection", name)
    except StoreError as error:
        logging.getLogger("bindllm").warning("%s; the collection %s is not needed any more", error, name)


def _made_by_build(name: str) -> re.Match[str] | None:
    return re.fullmatch("(.+)_([0-9]{14})_[0-9a-f]{8}", name)
