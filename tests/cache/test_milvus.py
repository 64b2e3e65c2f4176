"""A cache in Milvus: the same answers as with Faiss, replaced in one step, and foreign collections are refused."""

import fcntl
import logging
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from milvus_parts import WIDTH, expected_rows, image_store, unit_queries

from bindllm import Media, VisualCache
from bindllm.cache import milvus
from bindllm.cache.milvus import FORMAT, INDEX_TYPES, MilvusIndex
from bindllm.errors import InputError, MissingExtraError, StoreError
from store_parts import FINGERPRINT, keys_of, texts
from tiny import ColorEncoder

pymilvus = pytest.importorskip("pymilvus")
pytest.importorskip("milvus_lite")


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A store of 300 images, and a cache of them in Milvus and in Faiss."""
    pytest.importorskip("faiss")
    folder = tmp_path_factory.mktemp("milvus")
    store = image_store(folder / "store", 300)
    with MilvusIndex.build(folder / "a.db", store) as index:
        yield store, VisualCache(index), VisualCache.build(folder / "faiss", store, factory="Flat")


def client_of(path: Path) -> "pymilvus.MilvusClient":
    return pymilvus.MilvusClient(str(path), dedicated=True)


def test_the_same_neighbors_and_mixtures_as_with_faiss(built):
    _, cache, faiss_cache = built
    queries = torch.from_numpy(unit_queries(64))
    for top_k in (1, 10, 290):
        assert torch.equal(cache.neighbors(queries, top_k), faiss_cache.neighbors(queries, top_k))
    for formula in ("released", "paper"):
        found, expected = (one.blend(queries, formula=formula) for one in (cache, faiss_cache))
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
    assert torch.equal(
        torch.cat([cache.blend(query[None]) for query in queries[:5]]), cache.blend(queries)[:5]
    )
    assert torch.equal(cache.blend(2 * queries, weight=0), 2 * queries)


def test_vectors_and_keys_come_back_as_they_were_built(built):
    store, cache, _ = built
    numbers = np.array([[0, 299, 7], [-1, 7, 0]])
    found = cache.index.vectors(numbers)
    expected = expected_rows(store)
    assert np.array_equal(found[0], expected[[0, 299, 7]])
    assert np.array_equal(found[1], np.stack([np.zeros(WIDTH, np.float32), expected[7], expected[0]]))
    assert found.dtype == np.float32
    keys = store.keys("image")
    assert cache.index.keys(numbers) == [keys[0], keys[299], keys[7], None, keys[7], keys[0]]
    assert cache.index.vectors(np.full((2, 1), -1)).tolist() == np.zeros((2, 1, WIDTH)).tolist()
    assert cache.index.vectors(np.zeros((0, 4), np.int64)).shape == (0, 4, WIDTH)
    assert cache.index.search(np.zeros((0, WIDTH), np.float32), 3).shape == (0, 3)


def test_the_size_of_a_request_does_not_matter(built, monkeypatch):
    _, cache, _ = built
    queries = torch.from_numpy(unit_queries(20))
    expected = cache.blend(queries)
    monkeypatch.setattr(milvus, "_rows_at_once", lambda size: 7)
    assert torch.equal(cache.blend(queries), expected)
    monkeypatch.setattr(milvus, "_REQUEST_HITS", 40)
    assert torch.equal(cache.blend(queries), expected)


def test_a_large_store_is_written_in_several_requests(tmp_path, monkeypatch):
    monkeypatch.setattr(milvus, "_rows_at_once", lambda size: 16)
    store = image_store(tmp_path / "store", 50)
    with MilvusIndex.build(tmp_path / "a.db", store) as index:
        assert np.array_equal(index.vectors(np.arange(50)), expected_rows(store))


def test_fewer_rows_than_neighbors(tmp_path):
    store = image_store(tmp_path / "store", 3)
    with MilvusIndex.build(tmp_path / "a.db", store) as index:
        cache = VisualCache(index, temperature=20.0)
        assert sorted(cache.neighbors(torch.from_numpy(unit_queries(1)))[0].tolist()) == [0, 1, 2]
        query = torch.from_numpy(unit_queries(1)).double()
        rows = torch.from_numpy(expected_rows(store)).double()
        mixed = torch.nn.functional.normalize(torch.softmax(20 * query @ rows.T, dim=1) @ rows)
        expected = torch.nn.functional.normalize(query + mixed)
        torch.testing.assert_close(cache.blend(query), expected, atol=1e-6, rtol=0)


def test_a_cache_of_another_encoder_is_refused(built):
    _, cache, _ = built
    with pytest.raises(StoreError, match=r"a\.db, collection bindllm_.* was built with the encoder a1a1"):
        cache.blend_groups(torch.zeros(1, WIDTH), [[Media.text("a dog")]], [ColorEncoder()])


@pytest.mark.parametrize("index_type", sorted(set(INDEX_TYPES) - {"FLAT"}))
def test_other_kinds_find_a_row_by_itself_and_keep_it_exactly(tmp_path, index_type):
    store = image_store(tmp_path / "store", 200)
    with MilvusIndex.build(tmp_path / "a.db", store, index_type=index_type) as index:
        rows = expected_rows(store)
        assert index.info.index_type == index_type
        assert index.search(rows[[3, 150]], 5)[:, 0].tolist() == [3, 150]
        assert np.array_equal(index.vectors(np.arange(200)), rows)
        found = index.search(rows[:1], 200)[0]
        # An inverted file looks at a part of its lists; what it does not find is -1, at the end.
        count = (found >= 0).sum()
        assert count == 200 if index_type == "HNSW" else count >= 1
        assert (found[count:] == -1).all()
        assert len(set(found[:count])) == count


def test_a_closed_index_opens_again_and_lets_go_of_its_path(tmp_path):
    store = image_store(tmp_path / "store", 20)
    first = MilvusIndex.build(tmp_path / "a.db", store)
    second = MilvusIndex.open(str(tmp_path / "a.db"))
    first.close()
    first.close()
    assert np.array_equal(second.vectors(np.arange(20)), expected_rows(store))
    second.close()
    with (tmp_path / "a.db" / "LOCK").open("r+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        with pytest.raises(
            StoreError,
            match=r"a\.db cannot be opened .*Resource temporarily unavailable.*one process at a time",
        ):
            MilvusIndex.open(tmp_path / "a.db")
    with MilvusIndex.open(tmp_path / "a.db") as third:
        assert third.info == first.info == milvus.MilvusInfo(FINGERPRINT, 20, WIDTH, "image", "FLAT")


def test_a_new_build_replaces_the_old_one_and_readers_of_the_old_one_get_an_error(tmp_path):
    old = MilvusIndex.build(tmp_path / "a.db", image_store(tmp_path / "store", 20))
    store = image_store(tmp_path / "store", 10, start=20)
    with MilvusIndex.build(tmp_path / "a.db", store) as new:
        assert np.array_equal(new.vectors(np.arange(30)), expected_rows(store))
        client = client_of(tmp_path / "a.db")
        assert [f"{new.source}"] == [
            f"{tmp_path / 'a.db'}, collection {name}" for name in client.list_collections()
        ]
        client.close()
        for ask in (lambda: old.search(unit_queries(1), 3), lambda: old.keys(np.array([1]))):
            with pytest.raises(StoreError, match="not rebuilt or removed since it was opened"):
                ask()
    old.close()


def test_a_build_that_stops_leaves_the_old_collection_and_nothing_else(tmp_path, monkeypatch):
    MilvusIndex.build(tmp_path / "a.db", image_store(tmp_path / "store", 20)).close()
    store = image_store(tmp_path / "store", 10, start=20)

    def stopped(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(milvus, "_load", stopped)
        with pytest.raises(KeyboardInterrupt):
            MilvusIndex.build(tmp_path / "a.db", store)
    with MilvusIndex.open(tmp_path / "a.db") as index:
        assert len(index) == 20
        assert len(index._server.call("list_collections")) == 1


KILLED = """
import os, signal, sys
from bindllm import EmbeddingStore
from bindllm.cache import milvus

milvus._load = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
store = EmbeddingStore(sys.argv[1], sys.argv[2], int(sys.argv[3]))
milvus.MilvusIndex.build(sys.argv[4], store)
"""


def test_a_killed_build_leaves_the_old_collection_and_the_next_one_cleans_up(tmp_path):
    path = tmp_path / "a.db"
    MilvusIndex.build(path, image_store(tmp_path / "store", 20)).close()
    store = image_store(tmp_path / "store", 10, start=20)
    command = [sys.executable, "-c", KILLED, str(store.root), FINGERPRINT, str(WIDTH), str(path)]
    killed = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert killed.returncode == -9, killed.stderr
    with MilvusIndex.open(path) as index:
        assert len(index) == 20
        assert len(index._server.call("list_collections")) == 2
    with MilvusIndex.build(path, store) as index:
        assert len(index) == 30
        assert len(index._server.call("list_collections")) == 1


def test_several_collections_live_side_by_side_and_an_unknown_one_lists_them(tmp_path):
    store = image_store(tmp_path / "store", 20)
    MilvusIndex.build(tmp_path / "a.db", store, collection="pictures").close()
    with MilvusIndex.build(tmp_path / "a.db", store, collection="pictures_texts", modality="text") as index:
        assert len(index) == 1
    with MilvusIndex.open(tmp_path / "a.db", collection="pictures") as index:
        assert len(index) == 20
    with pytest.raises(StoreError, match=r"Did you mean 'pictures'\? Known: pictures, pictures_texts\."):
        MilvusIndex.open(tmp_path / "a.db", collection="picturs")


def make_foreign(client, name: str, *, note: str | None = None) -> None:
    properties = {} if note is None else {"properties": {"bindllm": note}}
    schema = client.create_schema(enable_dynamic_field=False)
    schema.add_field("number", pymilvus.DataType.INT64, is_primary=True)
    schema.add_field("vector", pymilvus.DataType.FLOAT_VECTOR, dim=WIDTH)
    client.create_collection(name, schema=schema, **properties)


@pytest.mark.parametrize("as_alias", [False, True])
def test_a_collection_of_something_else_is_neither_opened_nor_replaced(tmp_path, as_alias):
    client = client_of(tmp_path / "a.db")
    make_foreign(client, "thesis" if as_alias else "bindllm")
    if as_alias:
        client.create_alias("thesis", "bindllm")
    with pytest.raises(StoreError, match="was not built by bindllm"):
        MilvusIndex.open(tmp_path / "a.db")
    message = (
        "was not built by bindllm" if as_alias else "not an alias as bindllm makes them; nothing was written"
    )
    with pytest.raises(StoreError, match=message):
        MilvusIndex.build(tmp_path / "a.db", image_store(tmp_path / "store", 20))
    client = client_of(tmp_path / "a.db")
    assert client.list_collections() == ["thesis" if as_alias else "bindllm"]
    client.close()


@pytest.mark.parametrize(
    ("note", "message"),
    [
        ("{}", "was not built by bindllm, or its note is damaged"),
        ("[1]", "its note is damaged"),
        (f'{{"format": {FORMAT + 1}}}', f"has format {FORMAT + 1}, this bindllm reads up to {FORMAT}"),
        (
            '{"format": 1, "fingerprint": "ab", "count": "3", "embedding_size": 4, "modality": "image", '
            '"index_type": "FLAT"}',
            "other types than expected",
        ),
        (
            '{"format": 1, "fingerprint": "ab", "count": 3, "embedding_size": 4, "modality": "image", '
            '"index_type": "FLAT"}',
            rf"has vectors of size \[{WIDTH}\], expected 4",
        ),
    ],
)
def test_a_collection_with_another_note_is_refused(tmp_path, note, message):
    client = client_of(tmp_path / "a.db")
    make_foreign(client, "bindllm", note=note)
    client.close()
    with pytest.raises(StoreError, match=message):
        MilvusIndex.open(tmp_path / "a.db")


def test_a_collection_that_has_lost_a_row_is_refused_at_opening_and_in_use(tmp_path):
    with MilvusIndex.build(tmp_path / "a.db", image_store(tmp_path / "store", 20)) as index:
        name = index.source.rpartition(" ")[2]
        index._server.call("delete", name, ids=[7])
        with pytest.raises(StoreError, match="returned 2 of 3 rows: the collection was rebuilt or changed"):
            index.vectors(np.array([6, 7, 8]))
        with pytest.raises(StoreError, match="found 19 of 20 neighbors although its index is exact"):
            index.search(unit_queries(1), 20)
        with pytest.raises(StoreError, match="has 19 rows, expected 20"):
            MilvusIndex.open(tmp_path / "a.db")


def test_invalid_arguments_are_refused(built, tmp_path):
    store, cache, _ = built
    with pytest.raises(InputError, match=r"takes queries \[N, 24\], not \[2, 5\]"):
        cache.index.search(np.zeros((2, 5), np.float32), 3)
    with pytest.raises(InputError, match="has 300 vectors; the id 300 does not exist"):
        cache.index.vectors(np.array([300]))
    with pytest.raises(InputError, match=r"'a/b' is not the name of a collection"):
        MilvusIndex.build(tmp_path / "a.db", store, collection="a/b")
    with pytest.raises(InputError, match=r"unknown index type 'HNWS'. Did you mean 'HNSW'\?"):
        MilvusIndex.build(tmp_path / "a.db", store, index_type="HNWS")
    with pytest.raises(InputError, match=r"'localhost:19530' is not an address of Milvus"):
        MilvusIndex.open("localhost:19530")
    with pytest.raises(InputError, match="timeout is 0"):
        MilvusIndex.open(tmp_path / "a.db", timeout=0)
    with pytest.raises(StoreError, match=r"the embedded Milvus .*a\.db"):
        MilvusIndex.open(tmp_path / "a.db")
    (tmp_path / "b.db").write_text("a database of an older kind")
    with pytest.raises(StoreError, match=r"b\.db cannot be opened as an embedded Milvus \(.*File exists"):
        MilvusIndex.open(tmp_path / "b.db")
    assert not (tmp_path / "a.db").exists()


def test_a_store_without_such_embeddings_or_with_one_of_no_direction(tmp_path):
    store = image_store(tmp_path / "store", 5)
    with pytest.raises(StoreError, match="holds no audio embeddings"):
        MilvusIndex.build(tmp_path / "a.db", store, modality="audio")
    store.append(keys_of(texts(2)), torch.zeros(1, WIDTH), texts(2))
    with pytest.raises(StoreError, match=f"key {keys_of(texts(2))[0]} is zero"):
        MilvusIndex.build(tmp_path / "a.db", store, modality="text")
    client = client_of(tmp_path / "a.db")
    assert client.list_collections() == []
    client.close()


def test_nothing_is_printed(tmp_path, capfd, caplog):
    store = image_store(tmp_path / "store", 20)
    with caplog.at_level(logging.WARNING), MilvusIndex.build(tmp_path / "a.db", store) as index:
        VisualCache(index).blend(torch.from_numpy(unit_queries(2)))
        with pytest.raises(StoreError):
            MilvusIndex.open(tmp_path / "a.db", collection="nothing")
    out, err = capfd.readouterr()
    assert (out, err) == ("", "")
    assert [record.message for record in caplog.records if record.name != "bindllm"] == []


def test_a_missing_pymilvus_is_reported_with_its_extra(tmp_path, monkeypatch):
    store = image_store(tmp_path / "store", 5)
    monkeypatch.setitem(sys.modules, "pymilvus", None)
    with pytest.raises(MissingExtraError, match=r"bindllm\[milvus\]"):
        MilvusIndex.build(tmp_path / "a.db", store)
