"""Adding to an index, removing from it, and telling when its store has changed."""

import logging
import shutil

import numpy as np
import pytest
import torch

from bindllm import EmbeddingStore, Media
from bindllm.cache import factories, index_writer
from bindllm.cache.index import IndexChange, VectorIndex
from bindllm.errors import StoreError
from index_stores import (
    WIDTH,
    expected_rows,
    extend,
    file_names,
    held,
    holds,
    made_up,
    picture_keys,
    picture_store,
)
from store_parts import FINGERPRINT

faiss = pytest.importorskip("faiss")


@pytest.fixture
def store(tmp_path) -> EmbeddingStore:
    return picture_store(tmp_path / "store", 20)


@pytest.fixture
def folder(tmp_path, store):
    VectorIndex.build(tmp_path / "index", store)
    return tmp_path / "index"


def without(store: EmbeddingStore, folder, *numbers: int) -> EmbeddingStore:
    """A store of the same encoder, without these of the first twenty pictures."""
    smaller = EmbeddingStore(folder, FINGERPRINT, WIDTH)
    left = [n for n in range(20) if n not in numbers]
    smaller.append(picture_keys(*left), store.get(picture_keys(*left)), made_up(*left))
    return smaller


def test_an_update_follows_the_store(folder, store, tmp_path):
    assert VectorIndex.update(folder, store) == IndexChange(0, 0, 20)
    extend(store, 30, 31, 32)
    before = VectorIndex.open(folder)
    assert VectorIndex.update(folder, store) == IndexChange(3, 0, 23)
    assert holds(VectorIndex.open(folder), store, *range(20), 30, 31, 32)
    assert holds(before, store, *range(20))
    smaller = without(store, tmp_path / "smaller", 4, 9)
    assert VectorIndex.update(folder, smaller) == IndexChange(0, 5, 18)
    assert holds(VectorIndex.open(folder), store, *(n for n in range(20) if n not in (4, 9)))
    # What a reader has mapped stays, although its files are gone.
    assert holds(before, store, *range(20))


def test_keys_are_added_and_removed_by_name(folder, store):
    extend(store, 30, 31)
    assert VectorIndex.add(folder, store, picture_keys(30, 3, 30)) == IndexChange(1, 0, 21)
    assert VectorIndex.remove(folder, picture_keys(30, 5, 77)) == IndexChange(0, 2, 19)
    assert holds(VectorIndex.open(folder), store, *(n for n in range(20) if n != 5))
    with pytest.raises(StoreError, match="no image embeddings of 1 of these 1 keys"):
        VectorIndex.add(folder, store, picture_keys(99))
    assert len(VectorIndex.open(folder)) == 19


def test_nothing_to_do_writes_nothing(folder, store):
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    VectorIndex.update(folder, store)
    VectorIndex.add(folder, store, [])
    VectorIndex.add(folder, store, picture_keys(3))
    VectorIndex.remove(folder, [])
    VectorIndex.remove(folder, picture_keys(99))
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before


def test_what_was_removed_does_not_come_back_unless_it_is_asked_for(folder, store):
    VectorIndex.remove(folder, picture_keys(5))
    extend(store, 30)
    assert VectorIndex.update(folder, store) == IndexChange(0, 0, 19)
    assert VectorIndex.update(folder, store, keys=store.keys("image")) == IndexChange(2, 0, 21)
    assert holds(VectorIndex.open(folder), store, *range(20), 30)


def test_removed_vectors_are_in_no_file(folder, store):
    vector = expected_rows(store, picture_keys(5)).tobytes()
    key = bytes.fromhex(picture_keys(5)[0])
    content = b"".join(path.read_bytes() for path in folder.iterdir())
    assert vector in content
    assert key in content
    VectorIndex.remove(folder, picture_keys(5))
    content = b"".join(path.read_bytes() for path in folder.iterdir())
    assert vector not in content
    assert key not in content


def test_removing_everything_is_refused(folder, store):
    with pytest.raises(StoreError, match="nothing would be left.*Delete the folder"):
        VectorIndex.remove(folder, picture_keys(*range(20)))
    with pytest.raises(StoreError, match="holds no image embeddings"):
        VectorIndex.update(folder, EmbeddingStore(store.root / "empty", FINGERPRINT, WIDTH))
    assert len(VectorIndex.open(folder)) == 20


def test_a_store_of_another_encoder_and_a_folder_without_an_index(folder, store, tmp_path):
    other = EmbeddingStore(tmp_path / "store", "b2" * 32, WIDTH)
    extend(other, 1)
    with pytest.raises(StoreError, match="built with the encoder a1a1.*the store is of b2b2"):
        VectorIndex.update(folder, other)
    with pytest.raises(StoreError, match="not the folder of an index"):
        VectorIndex.update(tmp_path / "nowhere", store)
    assert file_names(tmp_path) == {"index", "store"}


@pytest.mark.parametrize(
    ("factory", "lost"),
    [
        ("Flat", 0.0),
        ("SQfp16", 0.0),
        ("IVF4,PQ8x4fs,Refine(SQfp16)", 0.0),
        ("HNSW8", 0.0),
        ("IVF4,SQ8", 0.03),
    ],
)
def test_many_small_parts_are_merged_without_loss(tmp_path, store, monkeypatch, factory, lost):
    extend(store, *range(20, 300))
    first = picture_keys(*range(270))
    VectorIndex.build(tmp_path / "index", store, factory=factory, keys=first)
    sizes = []
    # 8 rows a part, so that 4 and more are not small.
    per_row = factories.bytes_per_row(factories.make_index(factory, WIDTH))
    for n in range(270, 300):
        VectorIndex.add(tmp_path / "index", store, picture_keys(n))
        index = VectorIndex.open(tmp_path / "index")
        sizes.append([part.count for part in index.info.parts])
        assert sum(sizes[-1]) == len(index) == n + 1
        monkeypatch.setattr(index_writer, "PART_BYTES", 8 * per_row)
    assert max(len(counts) for counts in sizes) <= 1 + 3 + index_writer.MANY_SMALL
    assert 8 in sizes[-1]
    assert max(sizes[-1][1:]) <= 8
    keys = store.keys("image")
    found = {key: np.frombuffer(row, np.float32) for key, row in held(index).items()}
    assert sorted(found) == keys
    monkeypatch.undo()
    VectorIndex.build(tmp_path / "once", store, factory=factory, keys=first)
    VectorIndex.update(tmp_path / "once", store, keys=keys)
    once = VectorIndex.open(tmp_path / "once")
    assert len(once.info.parts) == 2
    for key, row in zip(once.keys(np.arange(300)), once.vectors(np.arange(300)), strict=True):
        np.testing.assert_allclose(found[key], row, atol=lost, rtol=0)
    assert np.array_equal(index.keys(index.search(expected_rows(store, keys), 1)[:, 0]), keys)


def test_removing_from_many_parts_keeps_to_the_size_of_a_part(tmp_path, monkeypatch):
    store = picture_store(tmp_path / "store", 100)
    monkeypatch.setattr(index_writer, "PART_BYTES", 10 * WIDTH * 4)
    monkeypatch.setattr(index_writer, "CHUNK", 4)
    VectorIndex.build(tmp_path / "index", store, factory="Flat")
    gone = [n for n in range(100) if n % 3]
    assert VectorIndex.remove(tmp_path / "index", picture_keys(*gone)) == IndexChange(0, 66, 34)
    index = VectorIndex.open(tmp_path / "index")
    assert holds(index, store, *(n for n in range(100) if n % 3 == 0))
    assert [part.count for part in index.info.parts] == [9, 9, 8, 8]
    assert len(file_names(tmp_path / "index")) == 9


def test_an_index_that_outgrows_its_kind_is_told_once(tmp_path, store, monkeypatch, caplog):
    monkeypatch.setattr(factories, "EXACT_NUMBERS", 22 * WIDTH)
    VectorIndex.build(tmp_path / "index", store)
    for n in (30, 31):
        extend(store, n)
        VectorIndex.update(tmp_path / "index", store)
    assert not caplog.text
    for n in (32, 33):
        extend(store, n)
        VectorIndex.update(tmp_path / "index", store)
    assert caplog.text.count("'IVF16,SQ8' is quicker than 'Flat'") == 1
    assert "holds 23 vectors" in caplog.text


def test_a_changed_store_is_told_when_the_index_is_opened(folder, store, caplog):
    VectorIndex.open(folder)
    assert not caplog.records
    extend(store, 30, 31, 32)
    index = VectorIndex.open(folder)
    assert "3 image embeddings more and 0 fewer than this index" in caplog.text
    assert f"'bindllm index {folder} ...' renews it" in caplog.text
    assert caplog.records[0].levelno == logging.WARNING
    assert holds(index, store, *range(20))
    VectorIndex.update(folder, store)
    caplog.clear()
    VectorIndex.open(folder)
    assert not caplog.records


def test_fewer_embeddings_are_told_and_merged_or_other_ones_are_not(tmp_path, caplog):
    store = EmbeddingStore(tmp_path / "store", FINGERPRINT, WIDTH)
    for n in range(20):
        extend(store, n)
    VectorIndex.build(tmp_path / "index", store)
    chosen = VectorIndex.build(tmp_path / "chosen", store, keys=picture_keys(1, 2))
    store.compact()
    VectorIndex.open(tmp_path / "index")
    extend(store, 30)
    VectorIndex.open(tmp_path / "chosen")
    assert not caplog.records
    shards = sorted(store.folder.glob("embeddings-*.arrow"))
    assert len(shards) < 20
    for shard in shards:
        shard.unlink()
    # An open store has its shards mapped, and would not write what it still has.
    store = EmbeddingStore(tmp_path / "store", FINGERPRINT, WIDTH)
    extend(store, *range(2, 18))
    VectorIndex.open(tmp_path / "chosen")
    assert "0 image embeddings more and 1 fewer" in caplog.text
    VectorIndex.open(tmp_path / "index")
    assert "0 image embeddings more and 4 fewer" in caplog.text
    assert VectorIndex.update(tmp_path / "chosen", store) == IndexChange(0, 1, 1)
    assert len(chosen) == 2


def test_index_and_store_are_moved_together_or_the_store_is_gone(folder, store, tmp_path, caplog):
    (tmp_path / "elsewhere").mkdir()
    for name in ("index", "store"):
        shutil.move(tmp_path / name, tmp_path / "elsewhere" / name)
    moved = EmbeddingStore(tmp_path / "elsewhere" / "store", FINGERPRINT, WIDTH)
    VectorIndex.open(tmp_path / "elsewhere" / "index")
    assert not caplog.records
    extend(moved, 30)
    VectorIndex.open(tmp_path / "elsewhere" / "index")
    assert "1 image embeddings more" in caplog.text
    caplog.clear()
    shutil.rmtree(moved.root)
    assert len(VectorIndex.open(tmp_path / "elsewhere" / "index")) == 20
    assert not caplog.records


def test_an_index_that_is_reached_by_a_link_finds_its_store(store, tmp_path, caplog):
    (tmp_path / "disk" / "deep" / "caches").mkdir(parents=True)
    (tmp_path / "caches").symlink_to(tmp_path / "disk" / "deep" / "caches", target_is_directory=True)
    VectorIndex.build(tmp_path / "caches" / "a", store)
    extend(store, 30)
    VectorIndex.open(tmp_path / "caches" / "a")
    assert "1 image embeddings more" in caplog.text


def test_keys_of_another_modality_are_refused(folder, store):
    sound = [Media.audio(b"a bark")]
    store.append([store.key_of(sound[0])], torch.ones(1, WIDTH), sound)
    before = held(VectorIndex.open(folder))
    for write in (
        lambda keys: VectorIndex.add(folder, store, keys),
        lambda keys: VectorIndex.update(folder, store, keys=keys),
        lambda keys: VectorIndex.build(folder, store, keys=keys),
    ):
        with pytest.raises(StoreError, match=f"no image embeddings of 1 of .*{store.key_of(sound[0])}"):
            write([*picture_keys(1), store.key_of(sound[0])])
    assert held(VectorIndex.open(folder)) == before
    assert VectorIndex.update(folder, store) == IndexChange(0, 0, 20)


def test_a_damaged_store_does_not_keep_an_index_from_opening(folder, store, caplog):
    shard = next(store.folder.glob("embeddings-*.arrow"))
    shard.write_bytes(b"damaged")
    assert len(VectorIndex.open(folder)) == 20
    assert "whether its store has changed cannot be told" in caplog.text
    assert shard.read_bytes() == b"damaged"
