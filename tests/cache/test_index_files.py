"""The files of an index folder: each damage is named, and nothing else is taken for an index."""

import json
from pathlib import Path

import numpy as np
import pytest

from bindllm.cache import index as index_module
from bindllm.cache import index_folder, index_writer
from bindllm.cache.index import VectorIndex
from bindllm.cache.manifest import MANIFEST
from bindllm.errors import InputError, StoreError
from index_stores import file_names, held, holds, picture_store
from store_parts import FINGERPRINT, SIZE

faiss = pytest.importorskip("faiss")

COUNTS = (7, 7, 6)


@pytest.fixture
def store(tmp_path):
    return picture_store(tmp_path / "store", 20)


@pytest.fixture
def built(tmp_path, store, monkeypatch) -> Path:
    """An index of twenty vectors in three parts."""
    monkeypatch.setattr(index_writer, "PART_BYTES", 8 * 16 * 4)
    index = VectorIndex.build(tmp_path / "index", store, factory="Flat")
    assert tuple(part.count for part in index.info.parts) == COUNTS
    return tmp_path / "index"


def told(built: Path) -> dict:
    return json.loads((built / MANIFEST).read_text())


@pytest.mark.parametrize("ending", ["faiss", "keys"])
@pytest.mark.parametrize("change", ["truncated", "flipped", "empty", "foreign", "longer", "another part"])
def test_a_changed_file_is_named(built, change, ending):
    first, second = (
        built / Path(part["file"]).with_suffix(f".{ending}") for part in told(built)["parts"][:2]
    )
    content = first.read_bytes()
    new = {
        "truncated": content[:-5],
        "flipped": content[:-1] + bytes([content[-1] ^ 1]),
        "empty": b"",
        "foreign": b"x" * len(content),
        "longer": content + b"\0",
        "another part": second.read_bytes(),
    }
    first.write_bytes(new[change])
    with pytest.raises(
        StoreError, match=rf"{first.stem}\.\w+ is not the file that index\.json was written with"
    ):
        VectorIndex.open(built)


def test_a_large_index_is_hashed_when_asked_for(built, monkeypatch):
    monkeypatch.setattr(index_module, "VERIFY_BYTES", 10)
    file = built / told(built)["parts"][1]["file"]
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert len(VectorIndex.open(built)) == 20
    with pytest.raises(StoreError, match=f"{file.name} is not the file"):
        VectorIndex.open(built, verify=True)
    # Of the same size, but nothing that Faiss wrote.
    file.write_bytes(b"x" * len(content))
    with pytest.raises(StoreError, match="foreign or damaged"):
        VectorIndex.open(built)


def change_part(**changes):
    return lambda told: {**told, "parts": [{**told["parts"][0], **changes}, *told["parts"][1:]]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda told: {**told, "format": 3}, "has format 3, this bindllm reads up to 2; update"),
        (lambda told: {**told, "format": 1}, "has format 1, of an earlier bindllm; build the index again"),
        (lambda told: {**told, "count": 21}, "is damaged.*count is 21, but its parts hold"),
        (lambda told: {**told, "count": 0, "parts": []}, f"{MANIFEST} is damaged"),
        (lambda told: {**told, "embedding_size": "16"}, f"{MANIFEST} is damaged"),
        (lambda told: {**told, "embedding_size": 17}, "holds vectors of size 16, expected 17"),
        (lambda told: {**told, "more": 1}, f"{MANIFEST} is damaged"),
        (lambda told: {**told, "parts": None}, f"{MANIFEST} is damaged"),
        (lambda told: {**told, "store": "../store"}, f"{MANIFEST} is damaged"),
        (lambda told: {**told, "search": "nprobe=3"}, "index.json asks for a search.*nprobe"),
        (lambda told: {name: told[name] for name in told if name != "search"}, f"{MANIFEST} is damaged"),
        (lambda told: [told], f"{MANIFEST} is damaged"),
        (change_part(file="../secret/part.faiss"), "no file of an index is called '../secret/part.faiss'"),
        (change_part(file="index.faiss"), "no file of an index is called 'index.faiss'"),
        (change_part(file="/etc/part-0123456789abcdef.faiss"), "no file of an index is called '/etc/part"),
        (change_part(count=-1), f"{MANIFEST} is damaged"),
        (lambda told: {**told, "fingerprint": "../../elsewhere"}, "no encoder has the fingerprint"),
        (change_part(count=8), f"{MANIFEST} is damaged"),
        (change_part(num_bytes=1), "is not the file"),
        (change_part(num_bytes=True), f"{MANIFEST} is damaged"),
        (change_part(sha256="0" * 64), "is not the file"),
    ],
)
def test_a_changed_manifest_is_named(built, change, message):
    (built / MANIFEST).write_text(json.dumps(change(told(built))))
    with pytest.raises(StoreError, match=message):
        VectorIndex.open(built)


def test_missing_files_are_named(built):
    part = told(built)["parts"][1]["file"]
    (built / part).with_suffix(".keys").unlink()
    with pytest.raises(StoreError, match=f"has no {Path(part).stem}.keys: copy the whole folder"):
        VectorIndex.open(built)
    (built / part).unlink()
    with pytest.raises(StoreError, match=f"has no {part}"):
        VectorIndex.open(built)
    for content in (b"\xff{", b"", b"{}", b'{"format": 2'):
        (built / MANIFEST).write_bytes(content)
        with pytest.raises(StoreError, match="damaged"):
            VectorIndex.open(built)
    (built / MANIFEST).unlink()
    with pytest.raises(StoreError, match="not the folder of an index"):
        VectorIndex.open(built)


def test_a_damaged_index_is_not_written_to_but_may_be_built_again(built, store):
    part = built / told(built)["parts"][0]["file"]
    part.write_bytes(b"")
    for change in (
        lambda: VectorIndex.remove(built, store.keys()[:1]),
        lambda: VectorIndex.add(built, picture_store(store.root, 21), picture_store(store.root, 21).keys()),
    ):
        with pytest.raises(StoreError, match=f"{part.name} is not the file"):
            change()
    (built / MANIFEST).write_text("{")
    before = file_names(built)
    with pytest.raises(StoreError, match="damaged"):
        VectorIndex.update(built, store)
    assert file_names(built) == before
    VectorIndex.build(built, store, factory="Flat")
    assert holds(VectorIndex.open(built), store, *range(20 if len(store) == 20 else 21))
    assert len(file_names(built)) == 7


def test_the_trained_index_that_new_parts_are_made_from(tmp_path, store):
    folder = tmp_path / "lists"
    VectorIndex.build(folder, store, factory="IVF4,Flat", keys=store.keys()[:18])
    before = held(VectorIndex.open(folder))
    trained = next(folder.glob("trained-*.faiss"))
    content = trained.read_bytes()
    trained.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(StoreError, match=f"{trained.name} is not the file"):
        VectorIndex.add(folder, store, store.keys())
    trained.unlink()
    with pytest.raises(StoreError, match=f"has no {trained.name}"):
        VectorIndex.add(folder, store, store.keys())
    assert held(VectorIndex.open(folder)) == before


def test_the_files_of_an_earlier_layout_are_replaced(built, store):
    (built / "index.faiss").write_bytes(b"of format 1")
    (built / MANIFEST).write_text(json.dumps({"format": 1, "count": 20}))
    VectorIndex.build(built, store, factory="Flat")
    assert len(file_names(built)) == 7
    assert "index.faiss" not in file_names(built)


def test_a_folder_of_something_else_is_not_touched(tmp_path, store):
    (tmp_path / "index").mkdir()
    (tmp_path / "index" / "thesis.txt").write_text("precious")
    with pytest.raises(StoreError, match="not an index of bindllm"):
        VectorIndex.build(tmp_path / "index", store)
    (tmp_path / "file").write_text("precious")
    with pytest.raises(StoreError, match="not an index of bindllm"):
        VectorIndex.build(tmp_path / "file", store)
    assert file_names(tmp_path / "index") == {"thesis.txt"}
    assert file_names(tmp_path) == {"index", "store", "file"}


def test_a_file_beside_the_index_stays(built, store):
    (built / "notes.txt").write_text("mine")
    (built / "part-of-my-notes.faiss.txt").write_text("mine")
    VectorIndex.build(built, store, factory="SQfp16")
    assert {"notes.txt", "part-of-my-notes.faiss.txt"} <= file_names(built)


def test_a_reader_sees_the_new_index_when_a_writer_replaces_it_meanwhile(built, store, monkeypatch):
    read, open_part = index_module.read_manifest, index_module.open_part
    smaller = store.keys()[:5]
    calls = []

    def replaced(folder, info, **options):
        if not calls:
            calls.append(info)
            VectorIndex.build(built, store, factory="Flat", keys=smaller)
        return open_part(folder, info, **options)

    monkeypatch.setattr(index_module, "_tell_changes", lambda *_: None)
    monkeypatch.setattr(index_module, "open_part", replaced)
    assert sorted(held(VectorIndex.open(built))) == smaller
    assert read is index_module.read_manifest


def test_a_mistake_leaves_neither_a_folder_nor_a_lock(tmp_path, store):
    before = file_names(tmp_path)
    for factory in ("Flatt", "IVF4,Flat,Nope"):
        with pytest.raises(InputError, match=factory):
            VectorIndex.build(tmp_path / "caches" / "a", store, factory=factory)
    assert file_names(tmp_path) == before
    # Known only when the lists are trained.
    with pytest.raises(InputError, match="IVF64,Flat"):
        VectorIndex.build(tmp_path / "a", store, factory="IVF64,Flat")
    assert file_names(tmp_path) == before


def test_a_lock_that_a_killed_writer_left_holds_nobody_up(built, store):
    lock = built.with_name(f".{built.name}.lock")
    lock.touch()
    assert VectorIndex.remove(built, store.keys()[:1]).removed == 1
    assert not lock.exists()


def test_a_second_writer_gets_an_error_at_once_and_a_reader_none(built, store):
    with index_folder.writing(built):
        for write in (
            lambda: VectorIndex.build(built, store),
            lambda: VectorIndex.update(built, store),
            lambda: VectorIndex.remove(built / ".." / "index", store.keys()[:1]),
        ):
            with pytest.raises(StoreError, match="another process is writing this index"):
                write()
        assert len(VectorIndex.open(built)) == 20
    assert VectorIndex.remove(built, store.keys()[:1]).removed == 1


@pytest.mark.parametrize("content", [b"", b"Ix", b"not an index at all" * 50, b"IxFI" + b"\x00" * 20])
def test_a_bare_file_that_is_no_index(tmp_path, content):
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


def test_bare_files_of_another_metric_or_without_vectors(tmp_path):
    with pytest.raises(StoreError, match="no index file"):
        VectorIndex.open_bare(tmp_path / "nowhere.index", FINGERPRINT)
    for index, message in (
        (faiss.IndexFlatL2(SIZE), "another metric"),
        (faiss.IndexFlatIP(SIZE), "empty index"),
    ):
        faiss.write_index(index, str(tmp_path / "a.index"))
        with pytest.raises(StoreError, match=rf"a\.index is an?.* {message}"):
            VectorIndex.open_bare(tmp_path / "a.index", FINGERPRINT)


def test_the_vectors_of_a_bare_file_have_no_keys(tmp_path):
    index = faiss.IndexFlatIP(SIZE)
    index.add(np.eye(SIZE, dtype=np.float32))
    faiss.write_index(index, str(tmp_path / "knn.index"))
    bare = VectorIndex.open_bare(tmp_path / "knn.index", FINGERPRINT)
    assert bare.keys(np.array([0, -1])) == [None, None]
    assert (bare.info.fingerprint, bare.info.count, bare.info.embedding_size) == (FINGERPRINT, SIZE, SIZE)
