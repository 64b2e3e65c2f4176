"""The vector index: built from a store in parts, and the same whatever the number of parts."""

import json
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from bindllm.cache import factories, index_writer
from bindllm.cache.index import VectorIndex
from bindllm.cache.manifest import MANIFEST
from bindllm.cache.parts import Part
from bindllm.errors import InputError, MissingExtraError, StoreError
from index_stores import expected_rows, file_names, held, holds, picture_keys, picture_store
from store_parts import FINGERPRINT, SIZE, add, keys_of, open_store, texts, vectors

faiss = pytest.importorskip("faiss")

LOSSY = {
    "Flat": 0.0,
    "SQfp16": 1e-3,
    "HNSW8": 0.0,
    "IVF4,Flat": 0.0,
    "IVF4,SQ8": 0.02,
    "IVF4,Flat,RFlat": 0.0,
    "IVF4,PQ8x4fs,Refine(SQfp16)": 1e-3,
    "OPQ8,IVF4,PQ8x4fs,RFlat": 0.0,
}
"""How far a vector may be from the one that went in, by kind."""


def parts_of(monkeypatch, rows: int, width: int = 16) -> None:
    """Cut an exact index into parts of so many rows."""
    monkeypatch.setattr(index_writer, "PART_BYTES", rows * width * 4)


@pytest.mark.parametrize("part_rows", [1000, 30])
def test_every_row_of_the_modality_is_there_once_in_the_order_of_the_keys(tmp_path, monkeypatch, part_rows):
    monkeypatch.setattr(index_writer, "CHUNK", 7)
    parts_of(monkeypatch, part_rows)
    store = picture_store(tmp_path / "store", 250)
    store.append(keys_of(texts(1)), torch.ones(1, 16), texts(1))
    # The same shard twice, as two processes leave it that filled the store at the same time.
    shard = next(store.folder.glob("embeddings-*.arrow"))
    shard.with_name("embeddings-again.arrow").write_bytes(shard.read_bytes())
    index = VectorIndex.build(tmp_path / "index", store)
    keys = sorted(picture_keys(*range(250)))
    rows = expected_rows(store, keys)
    assert (len(index), index.info.factory) == (250, "Flat")
    assert len(index.info.parts) == -(-250 // part_rows)
    assert index.keys(np.arange(250)) == keys == store.keys("image")
    assert np.array_equal(index.vectors(np.arange(250)), rows)
    # Faiss counts otherwise for one query than for many.
    for some in (rows, rows[[200]]):
        order = np.argsort(-(some.astype(np.float64) @ rows.T), axis=1)[:, :12]
        assert np.array_equal(index.search(some, 12), order)
    told = json.loads((tmp_path / "index" / MANIFEST).read_text())
    assert (told["fingerprint"], told["count"], told["embedding_size"]) == (FINGERPRINT, 250, 16)


def test_the_same_embeddings_give_the_same_files_whatever_the_order_they_came_in(tmp_path):
    content = []
    for name, order in (("a", (1, 2, 3)), ("b", (3, 1, 2))):
        store = open_store(tmp_path / name)
        for n in order:
            add(store, n)
        VectorIndex.build(tmp_path / f"index-{name}", store, modality="text")
        files = sorted((tmp_path / f"index-{name}").glob("part-*"))
        content.append([(file.name, file.read_bytes()) for file in files])
    assert len(content[0]) == 2
    assert content[0] == content[1]


@pytest.mark.parametrize("num_parts", [1, 3])
@pytest.mark.parametrize("factory", LOSSY)
def test_every_kind_gives_its_vectors_back_and_finds_them(tmp_path, monkeypatch, factory, num_parts):
    store = picture_store(tmp_path / "store", 300)
    per_row = factories.bytes_per_row(factories.make_index(factory, 16))
    monkeypatch.setattr(index_writer, "PART_BYTES", per_row * (300 // num_parts))
    index = VectorIndex.build(tmp_path / "index", store, factory=factory)
    assert len(index.info.parts) == num_parts
    expected = expected_rows(store, store.keys())
    found = index.vectors(np.array([[0, 299], [-1, 5]]))
    assert np.abs(found[0] - expected[[0, 299]]).max() <= LOSSY[factory]
    assert not found[1, 0].any()
    assert np.abs(found[1, 1] - expected[5]).max() <= LOSSY[factory]
    assert np.array_equal(index.search(expected, 3)[:, 0], np.arange(300))
    assert index.keys(np.array([7, -1, 299])) == [store.keys()[7], None, store.keys()[299]]


def test_fewer_vectors_than_asked_for_and_lists_without_enough(tmp_path, monkeypatch):
    parts_of(monkeypatch, 5)
    store = picture_store(tmp_path / "store", 12)
    queries = expected_rows(store, store.keys())[:4]
    exact = VectorIndex.build(tmp_path / "exact", store)
    assert len(exact.info.parts) == 3
    assert np.array_equal(np.sort(exact.search(queries, 50), axis=1), np.tile(np.arange(12), (4, 1)))
    lists = VectorIndex.build(tmp_path / "lists", store, factory="IVF4,Flat", search="nprobe=1")
    search = Part.search

    def careless(*args):
        # What Faiss says of a place that it could not fill differs from kind to kind.
        similarities, rows = search(*args)
        return np.where(rows < 0, np.float32(3e38), similarities), rows

    monkeypatch.setattr(Part, "search", careless)
    numbers = lists.search(queries, 50)
    assert numbers.shape == (4, 12)
    assert np.array_equal(numbers[:, 0], np.arange(4))
    # All that were found come first, each once, then only -1.
    for row in numbers:
        real = row[row >= 0]
        assert 1 <= len(set(real)) == len(real) < 12
        assert (row[len(real) :] == -1).all()


def test_a_build_holds_one_part_in_memory(tmp_path, monkeypatch):
    """Counted, not weighed: rows in indexes that are alive, and rows that are read at a time."""
    monkeypatch.setattr(index_writer, "CHUNK", 20)
    parts_of(monkeypatch, 50)
    store = picture_store(tmp_path / "store", 430)
    made, most, reads = [], [], []
    make, write, get = factories.make_index, index_writer.write_index, store.get

    def noted(*args):
        index = make(*args)
        made.append(weakref.ref(index))
        return index

    def written(*args, **options):
        most.append(sum(index().ntotal for index in made if index() is not None))
        return write(*args, **options)

    monkeypatch.setattr(factories, "make_index", noted)
    monkeypatch.setattr(index_writer, "write_index", written)
    monkeypatch.setattr(store, "get", lambda keys: reads.append(len(keys)) or get(keys))
    VectorIndex.build(tmp_path / "index", store, factory="Flat")
    assert most == [48] * 7 + [47] * 2
    assert (max(reads), sum(reads)) == (20, 430)


def test_training_rows_are_spread_and_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(factories, "ROWS_PER_CENTROID", 1)
    store = picture_store(tmp_path / "store", 500)
    seen, get = [], store.get
    monkeypatch.setattr(store, "get", lambda keys: seen.extend(keys) or get(keys))
    VectorIndex.build(tmp_path / "index", store, factory="IVF4,Flat")
    keys = store.keys()
    trained, added = seen[:256], seen[256:]
    assert added == keys
    places = [keys.index(key) for key in trained]
    assert set(np.diff(places)) == {1, 2}
    assert places[0] == 0
    assert places[-1] >= 498
    monkeypatch.setattr(factories, "TRAIN_BYTES", 300 * 16 * 4)
    monkeypatch.setattr(factories, "ROWS_PER_CENTROID", 64)
    assert factories.train_count(factories.make_index("IVF4,Flat", 16), 10**6) == 300


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"factory": "Nonsense"}, r"'Nonsense'.*could not parse.*'Flat'"),
        ({"factory": "PQ7"}, r"'PQ7' of inner product over 16 numbers"),
        ({"factory": "IVF64,Flat"}, "'IVF64,Flat' of 20 vectors.*'auto' chooses"),
        ({"factory": "IVF4,PQ4"}, "'IVF4,PQ4' of 20 vectors.*'auto' chooses"),
        ({"factory": "Flat", "search": "nprobe=3"}, "no search setting 'nprobe'.*exact ones none"),
        ({"factory": "IVF4,Flat", "search": "nprobes=3"}, "no search setting 'nprobes'"),
        ({"factory": "IVF4,Flat", "search": "nprobe=0"}, "'nprobe=0' is not of the form"),
        ({"factory": "IVF4,Flat", "search": "nprobe"}, "'nprobe' is not of the form"),
        ({"factory": "IVF4,Flat", "search": "nprobe=-1"}, "'nprobe=-1' is not of the form"),
        ({"keys": []}, "no keys to index"),
    ],
)
def test_kinds_and_settings_that_cannot_be(tmp_path, options, message):
    with pytest.raises(InputError, match=message):
        VectorIndex.build(tmp_path / "index", picture_store(tmp_path / "store", 20), **options)
    assert not (tmp_path / "index").exists()


def test_search_settings_reach_every_part_and_can_be_changed_when_it_is_opened(tmp_path, monkeypatch):
    store = picture_store(tmp_path / "store", 400)
    per_row = factories.bytes_per_row(factories.make_index("IVF16,SQ8,RFlat", 16))
    monkeypatch.setattr(index_writer, "PART_BYTES", per_row * 200)
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
    store = picture_store(tmp_path / "store", 20)
    index = VectorIndex.build(tmp_path / "index", store, keys=picture_keys(3, 5, 3, 11))
    assert holds(index, store, 3, 5, 11)
    with pytest.raises(StoreError, match="no image embeddings of 1 of these 2 keys"):
        VectorIndex.build(tmp_path / "index", store, keys=picture_keys(3, 99))
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


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_build_that_ends_while_writing_leaves_the_old_index(tmp_path, monkeypatch, error):
    store = picture_store(tmp_path / "a", 20)
    VectorIndex.build(tmp_path / "index", store)
    before = file_names(tmp_path / "index")
    write, calls = faiss.write_index, []

    def stopped(index, path):
        calls.append(path)
        write(index, path)
        if len(calls) == 3:
            raise error

    monkeypatch.setattr(faiss, "write_index", stopped)
    parts_of(monkeypatch, 6)
    with pytest.raises(StoreError if isinstance(error, OSError) else KeyboardInterrupt):
        VectorIndex.build(tmp_path / "index", picture_store(tmp_path / "b", 30))
    assert holds(VectorIndex.open(tmp_path / "index"), store, *range(20))
    assert file_names(tmp_path / "index") == before
    assert file_names(tmp_path) == {"a", "b", "index"}


def test_queries_and_numbers_that_do_not_fit(tmp_path):
    index = VectorIndex.build(tmp_path / "index", picture_store(tmp_path / "store", 20))
    for queries in (np.ones((2, 15), np.float32), np.ones(16, np.float32)):
        with pytest.raises(InputError, match=r"takes queries \[N, 16\]"):
            index.search(queries, 1)
    for ask in (index.vectors, index.keys):
        with pytest.raises(InputError, match="has 20 vectors, and none with the number 20"):
            ask(np.array([3, 20]))


def test_faiss_keeps_to_the_threads_of_torch_in_every_thread(tmp_path):
    index = VectorIndex.build(tmp_path / "index", picture_store(tmp_path / "store", 20))
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
    store = picture_store(tmp_path / "store", 300)
    VectorIndex.build(tmp_path / "index", store, factory="IVF4,Flat")
    expected = expected_rows(store, store.keys())
    for _ in range(5):
        index = VectorIndex.open(tmp_path / "index")
        with ThreadPoolExecutor(4) as pool:
            for found in pool.map(index.vectors, [np.arange(300)] * 4):
                assert np.array_equal(found, expected)


def test_an_index_that_cannot_give_vectors_back_is_refused(tmp_path):
    bare = faiss.IndexIDMap(faiss.IndexFlatIP(SIZE))
    bare.add_with_ids(vectors(1, 2).numpy(), np.array([5, 6]))
    faiss.write_index(bare, str(tmp_path / "ids.index"))
    with pytest.raises(StoreError, match=r"ids\.index: .*IndexIDMap cannot give its vectors back"):
        VectorIndex.open_bare(tmp_path / "ids.index", FINGERPRINT)


def test_a_missing_faiss_is_told_with_its_extra(tmp_path, monkeypatch):
    store = picture_store(tmp_path / "store", 20)
    VectorIndex.build(tmp_path / "index", store)
    monkeypatch.setitem(__import__("sys").modules, "faiss", None)
    for ask in (
        lambda: VectorIndex.open(tmp_path / "index"),
        lambda: VectorIndex.build(tmp_path / "i", store),
    ):
        with pytest.raises(MissingExtraError, match=r"bindllm\[cache\]"):
            ask()
