"""The vector index: built from a store, searched, and opened from a single Faiss file."""

import json
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from bindllm.cache import factories
from bindllm.cache.folder import MANIFEST
from bindllm.cache.index import VectorIndex
from bindllm.errors import InputError, MissingExtraError, StoreError
from index_stores import expected_rows, file_names, held, holds, image_keys, image_store
from store_parts import FINGERPRINT, SIZE, add, keys_of, open_store, texts, vectors

faiss = pytest.importorskip("faiss")

LOSSY = {
    "Flat": 0.0,
    "SQfp16": 1e-3,
    "SQ8": 0.02,
    "HNSW8": 0.0,
    "IVF4,Flat": 0.0,
    "IVF4,SQ8": 0.02,
    "IVF4,Flat,RFlat": 0.0,
    "IVF4,PQ8x4fs,Refine(SQfp16)": 1e-3,
    "OPQ8,IVF4,PQ8x4fs,RFlat": 0.0,
}
"""Largest difference of a vector from the one that was built, by kind."""


def test_every_row_of_the_modality_is_there_once_in_the_order_of_the_keys(tmp_path, monkeypatch):
    monkeypatch.setattr(factories, "CHUNK", 7)
    store = image_store(tmp_path / "store", 250)
    store.append(keys_of(texts(1)), torch.ones(1, 16), texts(1))
    # The same shard twice, as left by two processes that filled the store at the same time.
    shard = next(store.folder.glob("embeddings-*.arrow"))
    shard.with_name("embeddings-again.arrow").write_bytes(shard.read_bytes())
    index = VectorIndex.build(tmp_path / "index", store)
    keys = sorted(image_keys(*range(250)))
    rows = expected_rows(store, keys)
    assert (len(index), index.info.factory) == (250, "Flat")
    assert index.keys(np.arange(250)) == keys == store.keys("image")
    assert np.array_equal(index.vectors(np.arange(250)), rows)
    # Faiss computes one query differently from many.
    for some in (rows, rows[[200]]):
        order = np.argsort(-(some.astype(np.float64) @ rows.T), axis=1)[:, :12]
        assert np.array_equal(index.search(some, 12), order)
    written = json.loads((tmp_path / "index" / MANIFEST).read_text())
    assert (written["fingerprint"], written["count"], written["embedding_size"]) == (FINGERPRINT, 250, 16)


def test_the_same_embeddings_give_the_same_files_in_whatever_order_they_came(tmp_path):
    content = []
    for name, order in (("a", (1, 2, 3)), ("b", (3, 1, 2))):
        store = open_store(tmp_path / name)
        for n in order:
            add(store, n)
        VectorIndex.build(tmp_path / f"index-{name}", store, modality="text")
        files = sorted((tmp_path / f"index-{name}").glob("vectors-*"))
        content.append([(file.name, file.read_bytes()) for file in files])
    assert len(content[0]) == 2
    assert content[0] == content[1]


@pytest.mark.parametrize("factory", LOSSY)
def test_every_kind_gives_its_vectors_back_and_finds_them(tmp_path, monkeypatch, factory):
    monkeypatch.setattr(factories, "CHUNK", 70)
    store = image_store(tmp_path / "store", 300)
    index = VectorIndex.build(tmp_path / "index", store, factory=factory)
    expected = expected_rows(store, store.keys())
    found = index.vectors(np.array([[0, 299], [-1, 5]]))
    assert np.abs(found[0] - expected[[0, 299]]).max() <= LOSSY[factory]
    assert not found[1, 0].any()
    assert np.abs(found[1, 1] - expected[5]).max() <= LOSSY[factory]
    assert np.array_equal(index.search(expected, 3)[:, 0], np.arange(300))
    assert index.keys(np.array([7, -1, 299])) == [store.keys()[7], None, store.keys()[299]]


@pytest.mark.parametrize("factory", ["Flat", "SQfp16", "SQ8"])
def test_a_file_that_is_written_in_chunks_is_the_one_that_faiss_writes(tmp_path, factory):
    store = image_store(tmp_path / "store", 300)
    index = VectorIndex.build(tmp_path / "index", store, factory=factory)
    rows = expected_rows(store, store.keys())
    whole = factories.make_index(factory, 16)
    if not whole.is_trained:
        whole.train(rows)
    whole.add(rows)
    written = (tmp_path / "index" / index.info.file).read_bytes()
    assert written == faiss.serialize_index(whole).tobytes()


def test_fewer_vectors_than_asked_for_and_lists_without_enough(tmp_path):
    store = image_store(tmp_path / "store", 12)
    queries = expected_rows(store, store.keys())[:4]
    exact = VectorIndex.build(tmp_path / "exact", store)
    assert np.array_equal(np.sort(exact.search(queries, 50), axis=1), np.tile(np.arange(12), (4, 1)))
    lists = VectorIndex.build(tmp_path / "lists", store, factory="IVF4,Flat", search="nprobe=1")
    ids = lists.search(queries, 50)
    assert ids.shape == (4, 12)
    assert np.array_equal(ids[:, 0], np.arange(4))
    # Vectors that were found come first, each once, then only -1.
    for row in ids:
        real = row[row >= 0]
        assert 1 <= len(set(real)) == len(real) < 12
        assert (row[len(real) :] == -1).all()


def test_training_rows_are_spread_and_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(factories, "ROWS_PER_CENTROID", 1)
    store = image_store(tmp_path / "store", 500)
    seen, get = [], store.get
    monkeypatch.setattr(store, "get", lambda keys: seen.extend(keys) or get(keys))
    VectorIndex.build(tmp_path / "index", store, factory="IVF4,Flat")
    keys = store.keys()
    trained, added = seen[:256], seen[256:]
    assert added == keys
    rows = [keys.index(key) for key in trained]
    assert set(np.diff(rows)) == {1, 2}
    assert rows[0] == 0
    assert rows[-1] >= 498
    monkeypatch.setattr(factories, "TRAIN_BYTES", 300 * 16 * 4)
    monkeypatch.setattr(factories, "ROWS_PER_CENTROID", 64)
    assert factories.train_count(factories.make_index("IVF4,Flat", 16), 10**6) == 300


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"factory": "Nonsense"}, r"'Nonsense'.*could not parse.*'Flat'"),
        ({"factory": "PQ7"}, r"'PQ7' of inner product with 16 dimensions"),
        ({"factory": "IVF64,Flat"}, "'IVF64,Flat' of 20 vectors.*'auto' chooses"),
        ({"factory": "IVF4,PQ4"}, "'IVF4,PQ4' of 20 vectors.*'auto' chooses"),
        ({"factory": "Flat", "search": "nprobe=3"}, "no search setting 'nprobe'.*exact ones none"),
        ({"factory": "IVF4,Flat", "search": "nprobes=3"}, "no search setting 'nprobes'"),
        ({"factory": "IVF4,Flat", "search": "nprobe=0"}, "'nprobe=0' is not of the form"),
        ({"factory": "IVF4,Flat", "search": "nprobe"}, "'nprobe' is not of the form"),
        ({"factory": "IVF4,Flat", "search": "nprobe=-1"}, "'nprobe=-1' is not of the form"),
        ({"keys": []}, "the list of keys is empty"),
    ],
)
def test_kinds_and_settings_that_do_not_exist_leave_neither_a_folder_nor_a_lock(tmp_path, options, message):
    store = image_store(tmp_path / "store", 20)
    with pytest.raises(InputError, match=message):
        VectorIndex.build(tmp_path / "caches" / "index", store, **options)
    assert not (tmp_path / "caches").exists() or file_names(tmp_path / "caches") == set()


def test_search_settings_are_kept_and_can_be_changed_when_it_is_opened(tmp_path):
    store = image_store(tmp_path / "store", 400)
    VectorIndex.build(tmp_path / "index", store, factory="IVF16,SQ8,RFlat", search="nprobe=1")
    queries = np.random.default_rng(0).standard_normal((50, 16), np.float32)
    rows = expected_rows(store, store.keys())
    exact = np.argsort(-(queries @ rows.T), axis=1)[:, :10]

    def recall(search: str | None) -> float:
        found = VectorIndex.open(tmp_path / "index", search=search).search(queries, 10)
        return np.mean([len({*a} & {*b}) / 10 for a, b in zip(found, exact, strict=True)])

    assert recall(None) == recall("nprobe=1") < 0.6
    assert recall("nprobe=16,k_factor_rf=20") == 1.0
    with pytest.raises(InputError, match="no search setting 'efSearch'"):
        recall("efSearch=3")


def test_an_index_of_chosen_keys(tmp_path):
    store = image_store(tmp_path / "store", 20)
    index = VectorIndex.build(tmp_path / "index", store, keys=image_keys(3, 5, 3, 11))
    assert holds(index, store, 3, 5, 11)
    with pytest.raises(StoreError, match="no image embeddings of 1 of these 2 keys"):
        VectorIndex.build(tmp_path / "index", store, keys=image_keys(3, 99))
    with pytest.raises(StoreError, match="content hash of 64"):
        VectorIndex.build(tmp_path / "index", store, keys=["cat.png"])
    assert held(VectorIndex.open(tmp_path / "index")) == held(index)


def test_a_store_without_such_embeddings_or_with_one_of_no_direction(tmp_path):
    store = open_store(tmp_path / "store")
    with pytest.raises(StoreError, match="holds no text embeddings"):
        VectorIndex.build(tmp_path / "index", store, modality="text")
    add(store, 1)
    store.append(keys_of(texts(2)), torch.zeros(1, SIZE), texts(2))
    with pytest.raises(StoreError, match=f"key {keys_of(texts(2))[0]} is zero"):
        VectorIndex.build(tmp_path / "index", store, modality="text")
    assert not (tmp_path / "index").exists()


def test_queries_and_ids_that_do_not_fit(tmp_path):
    index = VectorIndex.build(tmp_path / "index", image_store(tmp_path / "store", 20))
    for queries in (np.ones((2, 15), np.float32), np.ones(16, np.float32)):
        with pytest.raises(InputError, match=r"takes queries \[N, 16\]"):
            index.search(queries, 1)
    for ask in (index.vectors, index.keys):
        with pytest.raises(InputError, match="has 20 vectors; the id 20 does not exist"):
            ask(np.array([3, 20]))


def test_faiss_uses_the_threads_of_torch_in_every_thread(tmp_path):
    index = VectorIndex.build(tmp_path / "index", image_store(tmp_path / "store", 20))
    found = []

    def search() -> None:
        index.search(np.eye(16, dtype=np.float32)[:1], 1)
        found.append(faiss.omp_get_max_threads())

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        thread = threading.Thread(target=search)
        thread.start()
        thread.join()
        assert (found, torch.get_num_threads()) == ([3], 3)
    finally:
        torch.set_num_threads(before)


def test_threads_may_ask_for_vectors_of_inverted_lists_at_once(tmp_path):
    """The map that this needs is made when it is first asked for."""
    store = image_store(tmp_path / "store", 300)
    VectorIndex.build(tmp_path / "index", store, factory="IVF4,Flat")
    expected = expected_rows(store, store.keys())
    for _ in range(5):
        index = VectorIndex.open(tmp_path / "index")
        with ThreadPoolExecutor(4) as pool:
            for found in pool.map(index.vectors, [np.arange(300)] * 4):
                assert np.array_equal(found, expected)


def test_a_missing_faiss_is_reported_with_its_extra(tmp_path, monkeypatch):
    store = image_store(tmp_path / "store", 20)
    VectorIndex.build(tmp_path / "index", store)
    monkeypatch.setitem(sys.modules, "faiss", None)
    for ask in (
        lambda: VectorIndex.open(tmp_path / "index"),
        lambda: VectorIndex.build(tmp_path / "i", store),
    ):
        with pytest.raises(MissingExtraError, match=r"bindllm\[cache\]"):
            ask()


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        ("IVF4,PQ8x4fs", "'IVF4,PQ8x4fs' .*cannot reconstruct its vectors"),
        ("OPQ8,IVF4,PQ8x4fs", "cannot reconstruct its vectors"),
        ("IVF4,RaBitQfs", "cannot reconstruct its vectors"),
        ("IDMap,Flat", "cannot reconstruct its vectors"),
        ("HNSW8_PQ8", "another metric"),
        ("LSH", "cannot build"),
    ],
)
def test_a_kind_that_a_cache_cannot_use_is_refused_before_any_work(tmp_path, monkeypatch, factory, message):
    monkeypatch.setattr(factories, "train", lambda *_: pytest.fail("trained"))
    with pytest.raises(InputError, match=message):
        VectorIndex.build(tmp_path / "index", image_store(tmp_path / "store", 20), factory=factory)
    assert not (tmp_path / "index").exists()


def test_threads_may_load_faiss_at_once(tmp_path, monkeypatch):
    """Its import takes a second, and `sys.modules` has half of the module meanwhile."""
    (tmp_path / "faiss.py").write_text("import time\ntime.sleep(0.2)\nIndexFlatIP = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "faiss")
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: factories.load_faiss().IndexFlatIP, range(8)))
    assert found == [1] * 8


# ---- Single Faiss files


@pytest.mark.parametrize("content", [b"", b"Ix", b"not an index at all" * 50, b"IxFI" + b"\x00" * 20])
def test_a_bare_file_that_is_not_an_index(tmp_path, content):
    (tmp_path / "knn.index").write_bytes(content)
    with pytest.raises(StoreError, match=r"knn\.index cannot be read as a Faiss index"):
        VectorIndex.open_bare(tmp_path / "knn.index", FINGERPRINT)


@pytest.mark.parametrize("factory", ["Flat", "IVF2,SQ8", "HNSW8", "IVF2,PQ2x4fs,Refine(SQfp16)"])
def test_a_bare_file_that_is_cut_off_anywhere(tmp_path, factory):
    index = faiss.index_factory(SIZE, factory, faiss.METRIC_INNER_PRODUCT)
    rows = np.random.default_rng(0).standard_normal((40, SIZE), np.float32)
    if not index.is_trained:
        index.train(rows)
    index.add(rows)
    file = tmp_path / "knn.index"
    faiss.write_index(index, str(file))
    content = file.read_bytes()
    assert len(VectorIndex.open_bare(file, FINGERPRINT)) == 40
    for size in range(0, len(content), max(1, len(content) // 60)):
        file.write_bytes(content[:size])
        with pytest.raises(StoreError, match=r"knn\.index"):
            VectorIndex.open_bare(file, FINGERPRINT)


def test_bare_files_of_another_metric_without_vectors_or_that_cannot_give_them_back(tmp_path):
    with pytest.raises(StoreError, match="does not exist"):
        VectorIndex.open_bare(tmp_path / "nowhere.index", FINGERPRINT)
    mapped = faiss.IndexIDMap(faiss.IndexFlatIP(SIZE))
    mapped.add_with_ids(vectors(1, 2).numpy(), np.array([5, 6]))
    fast_scan = faiss.index_factory(SIZE, "IVF1,PQ2x4fs", faiss.METRIC_INNER_PRODUCT)
    fast_scan.train(vectors(*range(20)).numpy())
    fast_scan.add(vectors(1, 2).numpy())
    for index, message in (
        (faiss.IndexFlatL2(SIZE), ": .*another metric"),
        (faiss.IndexFlatIP(SIZE), " is an empty index"),
        (mapped, ": .*IndexIDMap.* cannot reconstruct its vectors"),
        (fast_scan, ": .*IndexIVFPQFastScan.* cannot reconstruct its vectors"),
    ):
        faiss.write_index(index, str(tmp_path / "a.index"))
        with pytest.raises(StoreError, match=rf"a\.index{message}"):
            VectorIndex.open_bare(tmp_path / "a.index", FINGERPRINT)


def test_the_vectors_of_a_bare_file_have_no_keys(tmp_path):
    index = faiss.IndexFlatIP(SIZE)
    index.add(np.eye(SIZE, dtype=np.float32))
    faiss.write_index(index, str(tmp_path / "knn.index"))
    bare = VectorIndex.open_bare(tmp_path / "knn.index", FINGERPRINT)
    assert bare.keys(np.array([0, -1])) == [None, None]
    assert (bare.info.fingerprint, bare.info.count, bare.info.embedding_size) == (FINGERPRINT, SIZE, SIZE)
