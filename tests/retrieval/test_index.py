"""The vector index: built from a store, opened as it was written, and nothing else taken for one."""

import json
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from store_parts import FINGERPRINT, SIZE, add, keys_of, open_store, texts, vectors

from bindllm import EmbeddingStore, Media
from bindllm.errors import InputError, MissingExtraError, StoreError
from bindllm.retrieval import index as index_module
from bindllm.retrieval.index import FILE, MANIFEST, VectorIndex, unit_rows

faiss = pytest.importorskip("faiss")


def wide_store(folder: Path, count: int, size: int = 16) -> EmbeddingStore:
    store = EmbeddingStore(folder, FINGERPRINT, size)
    media = [Media.image(f"picture {n}".encode()) for n in range(count)]
    rows = torch.randn(count, size, generator=torch.Generator().manual_seed(1))
    for start in range(0, count, 100):
        part = slice(start, start + 100)
        store.append(keys_of(media[part]), rows[part], media[part])
    return store


def rows_by_key(store: EmbeddingStore, modality: str, count: int) -> np.ndarray:
    make = {"text": texts, "image": lambda *n: [Media.image(f"picture {i}".encode()) for i in n]}[modality]
    return unit_rows(store.get(sorted(keys_of(make(*range(count))))).numpy())


def test_a_flat_index_holds_every_row_of_the_modality_once_in_the_order_of_the_keys(tmp_path, monkeypatch):
    monkeypatch.setattr(index_module, "CHUNK", 7)
    store = wide_store(tmp_path / "store", 250)
    store.append(keys_of(texts(1)), torch.ones(1, 16), texts(1))
    # The same shard twice, as two processes leave it that filled the store at the same time.
    shard = next(store.folder.glob("embeddings-*.arrow"))
    shard.with_name("embeddings-again.arrow").write_bytes(shard.read_bytes())
    index = VectorIndex.build(tmp_path / "index", store)
    expected = rows_by_key(store, "image", 250)
    assert len(index) == 250
    assert np.array_equal(index.vectors(np.arange(250)), expected)
    assert np.array_equal(index.search(expected[[3, 200]], 1), [[3], [200]])
    told = json.loads((tmp_path / "index" / MANIFEST).read_text())
    assert (told["fingerprint"], told["count"], told["embedding_size"], told["factory"]) == (
        FINGERPRINT,
        250,
        16,
        "Flat",
    )


def test_the_same_embeddings_give_the_same_file_whatever_the_order_they_came_in(tmp_path):
    for name, order in (("a", (1, 2, 3)), ("b", (3, 1, 2))):
        store = open_store(tmp_path / name)
        for n in order:
            add(store, n)
        VectorIndex.build(tmp_path / f"index-{name}", store, modality="text")
    assert (tmp_path / "index-a" / FILE).read_bytes() == (tmp_path / "index-b" / FILE).read_bytes()


@pytest.mark.parametrize(
    ("factory", "error"),
    [("SQfp16", 1e-3), ("HNSW8", 0.0), ("IVF4,Flat", 0.0), ("IVF4,SQ8", 0.02), ("IVF4,Flat,RFlat", 0.0)],
)
def test_other_kinds_give_their_vectors_back_after_they_are_opened_again(tmp_path, factory, error):
    store = wide_store(tmp_path / "store", 300)
    VectorIndex.build(tmp_path / "index", store, factory=factory)
    index = VectorIndex.open(tmp_path / "index")
    expected = rows_by_key(store, "image", 300)
    found = index.vectors(np.array([[0, 299], [-1, 5]]))
    assert np.abs(found[0] - expected[[0, 299]]).max() <= error
    assert not found[1, 0].any()
    assert np.abs(found[1, 1] - expected[5]).max() <= error
    assert index.search(expected[[7]], 3)[0, 0] == 7


def test_training_rows_are_spread_and_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(index_module, "TRAIN_ROWS", 200)
    seen = []
    original = index_module._chunks
    monkeypatch.setattr(
        index_module, "_chunks", lambda store, keys: seen.append(keys) or original(store, keys)
    )
    VectorIndex.build(tmp_path / "index", wide_store(tmp_path / "store", 500), factory="IVF4,Flat")
    trained, added = seen
    assert trained == added[::3]
    assert len(trained) <= 200


def test_a_factory_that_faiss_cannot_build(tmp_path):
    store = wide_store(tmp_path / "store", 20)
    with pytest.raises(InputError, match=r"'Nonsense'.*could not parse.*'Flat'"):
        VectorIndex.build(tmp_path / "index", store, factory="Nonsense")
    with pytest.raises(InputError, match="'IVF64,Flat' of 20 vectors"):
        VectorIndex.build(tmp_path / "index", store, factory="IVF64,Flat")
    assert not (tmp_path / "index").exists()


def test_an_index_that_cannot_give_vectors_back_is_refused(tmp_path):
    bare = faiss.IndexIDMap(faiss.IndexFlatIP(SIZE))
    bare.add_with_ids(vectors(1, 2).numpy(), np.array([5, 6]))
    faiss.write_index(bare, str(tmp_path / "ids.index"))
    with pytest.raises(StoreError, match=r"ids\.index: .*IndexIDMap cannot give its vectors back"):
        VectorIndex.open_bare(tmp_path / "ids.index", FINGERPRINT)


def test_a_store_without_such_embeddings_or_with_one_of_no_direction(tmp_path):
    store = open_store(tmp_path / "store")
    with pytest.raises(StoreError, match="holds no text embeddings"):
        VectorIndex.build(tmp_path / "index", store, modality="text")
    add(store, 1)
    store.append(keys_of(texts(2)), torch.zeros(1, SIZE), texts(2))
    with pytest.raises(StoreError, match=f"key {keys_of(texts(2))[0]} is zero"):
        VectorIndex.build(tmp_path / "index", store, modality="text")


def test_a_folder_of_something_else_is_not_replaced(tmp_path):
    store = wide_store(tmp_path / "store", 20)
    (tmp_path / "index").mkdir()
    (tmp_path / "index" / "thesis.txt").write_text("precious")
    with pytest.raises(StoreError, match="not an index of bindllm"):
        VectorIndex.build(tmp_path / "index", store)
    assert (tmp_path / "index" / "thesis.txt").read_text() == "precious"


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_build_that_ends_while_writing_leaves_the_old_index(tmp_path, monkeypatch, error):
    VectorIndex.build(tmp_path / "index", wide_store(tmp_path / "a", 20))

    def stopped(_, path):
        Path(path).write_bytes(b"half")
        raise error

    monkeypatch.setattr(faiss, "write_index", stopped)
    with pytest.raises(StoreError if isinstance(error, OSError) else KeyboardInterrupt):
        VectorIndex.build(tmp_path / "index", wide_store(tmp_path / "b", 30))
    assert len(VectorIndex.open(tmp_path / "index")) == 20
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "index"]


@pytest.fixture
def built(tmp_path) -> Path:
    VectorIndex.build(tmp_path / "index", wide_store(tmp_path / "store", 20))
    return tmp_path / "index"


@pytest.mark.parametrize("change", ["truncated", "flipped", "empty", "foreign"])
def test_a_changed_index_file_is_named(built, change):
    content = (built / FILE).read_bytes()
    flipped = bytes([content[-1] ^ 1])
    new = {
        "truncated": content[:-5],
        "flipped": content[:-1] + flipped,
        "empty": b"",
        "foreign": b"x" * len(content),
    }
    (built / FILE).write_bytes(new[change])
    with pytest.raises(StoreError, match=rf"{FILE} is not the file"):
        VectorIndex.open(built)


def test_a_large_file_is_hashed_when_asked_for(built, monkeypatch):
    monkeypatch.setattr(index_module, "VERIFY_BYTES", 10)
    content = (built / FILE).read_bytes()
    (built / FILE).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert len(VectorIndex.open(built)) == 20
    with pytest.raises(StoreError, match="is not the file"):
        VectorIndex.open(built, verify=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda told: {**told, "format": 2}, "has format 2, this bindllm reads up to 1"),
        (lambda told: {**told, "count": 21}, f"{FILE} holds 20 vectors of size 16, expected 21"),
        (lambda told: {**told, "embedding_size": "16"}, f"{MANIFEST} is damaged"),
        (lambda told: {**told, "more": 1}, f"{MANIFEST} is damaged"),
        (
            lambda told: {name: value for name, value in told.items() if name != "sha256"},
            f"{MANIFEST} is damaged",
        ),
        (lambda told: [told], f"{MANIFEST} is damaged"),
    ],
)
def test_a_changed_manifest_is_named(built, change, message):
    told = json.loads((built / MANIFEST).read_text())
    (built / MANIFEST).write_text(json.dumps(change(told)))
    with pytest.raises(StoreError, match=message):
        VectorIndex.open(built)


def test_missing_files_are_named(built):
    (built / FILE).unlink()
    with pytest.raises(StoreError, match=f"has no {FILE}"):
        VectorIndex.open(built)
    (built / MANIFEST).write_bytes(b"\xff{")
    with pytest.raises(StoreError, match="damaged"):
        VectorIndex.open(built)
    (built / MANIFEST).unlink()
    with pytest.raises(StoreError, match="not the folder of an index"):
        VectorIndex.open(built)


def test_a_kill_between_the_two_renames_is_told(built):
    built.rename(built.with_name(".index.old"))
    with pytest.raises(StoreError, match=r"whole in .*\.index\.old: rename it to index"):
        VectorIndex.open(built)


@pytest.mark.parametrize("content", [b"", b"Ix", b"not an index at all" * 50, b"IxFI" + b"\x00" * 20])
def test_a_bare_file_that_is_no_index(tmp_path, content):
    (tmp_path / "knn.index").write_bytes(content)
    with pytest.raises(StoreError, match=r"knn\.index cannot be read as a Faiss index"):
        VectorIndex.open_bare(tmp_path / "knn.index", FINGERPRINT)


def test_bare_files_of_another_metric_or_without_vectors(tmp_path):
    with pytest.raises(StoreError, match="no index file"):
        VectorIndex.open_bare(tmp_path / "nowhere.index", FINGERPRINT)
    for index, message in (
        (faiss.IndexFlatL2(SIZE), "another metric"),
        (faiss.IndexFlatIP(SIZE), "empty index"),
    ):
        faiss.write_index(index, str(tmp_path / "a.index"))
        with pytest.raises(
            StoreError, match=rf"a\.index is an.*{message}|a\.index is a Faiss index of {message}"
        ):
            VectorIndex.open_bare(tmp_path / "a.index", FINGERPRINT)


def test_faiss_keeps_to_the_threads_of_torch_in_every_thread(built):
    index = VectorIndex.open(built)
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


def test_a_missing_faiss_is_told_with_its_extra(built, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "faiss", None)
    with pytest.raises(MissingExtraError, match=r"bindllm\[cache\]"):
        VectorIndex.open(built)
