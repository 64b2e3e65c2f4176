"""Adding to an index, removing from it, and the warning when its store has changed."""

import logging
import shutil

import numpy as np
import pytest
import torch

from bindllm import EmbeddingStore, Media
from bindllm.cache import factories
from bindllm.cache.index import IndexChange, VectorIndex
from bindllm.errors import StoreError
from index_stores import (
    WIDTH,
    expected_rows,
    extend,
    file_names,
    held,
    holds,
    image_keys,
    image_store,
    made_up,
)
from store_parts import FINGERPRINT

faiss = pytest.importorskip("faiss")


@pytest.fixture
def store(tmp_path) -> EmbeddingStore:
    return image_store(tmp_path / "store", 20)


@pytest.fixture
def folder(tmp_path, store):
    VectorIndex.build(tmp_path / "index", store)
    return tmp_path / "index"


def without(store: EmbeddingStore, folder, *numbers: int) -> EmbeddingStore:
    """A store of the same encoder, without these of the first twenty images."""
    smaller = EmbeddingStore(folder, FINGERPRINT, WIDTH)
    left = [n for n in range(20) if n not in numbers]
    smaller.append(image_keys(*left), store.get(image_keys(*left)), made_up(*left))
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
    # A reader keeps the files that it has mapped, although they were removed.
    assert holds(before, store, *range(20))


def test_keys_are_added_and_removed_by_name(folder, store):
    extend(store, 30, 31)
    assert VectorIndex.add(folder, store, image_keys(30, 3, 30)) == IndexChange(1, 0, 21)
    assert VectorIndex.remove(folder, image_keys(30, 5, 77)) == IndexChange(0, 2, 19)
    assert holds(VectorIndex.open(folder), store, *(n for n in range(20) if n != 5))
    with pytest.raises(StoreError, match="no image embeddings of 1 of these 1 keys"):
        VectorIndex.add(folder, store, image_keys(99))
    assert len(VectorIndex.open(folder)) == 19


def test_a_change_of_nothing_writes_nothing(folder, store):
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    VectorIndex.update(folder, store)
    VectorIndex.add(folder, store, [])
    VectorIndex.add(folder, store, image_keys(3))
    VectorIndex.remove(folder, [])
    VectorIndex.remove(folder, image_keys(99))
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before


def test_removed_images_do_not_come_back_unless_they_are_asked_for(folder, store):
    VectorIndex.remove(folder, image_keys(5))
    extend(store, 30)
    assert VectorIndex.update(folder, store) == IndexChange(0, 0, 19)
    assert VectorIndex.update(folder, store, keys=store.keys("image")) == IndexChange(2, 0, 21)
    assert holds(VectorIndex.open(folder), store, *range(20), 30)


def test_removed_vectors_are_in_no_file(folder, store):
    vector = expected_rows(store, image_keys(5)).tobytes()
    key = bytes.fromhex(image_keys(5)[0])
    content = b"".join(path.read_bytes() for path in folder.iterdir())
    assert vector in content
    assert key in content
    VectorIndex.remove(folder, image_keys(5))
    content = b"".join(path.read_bytes() for path in folder.iterdir())
    assert vector not in content
    assert key not in content


def test_removing_everything_is_refused(folder, store):
    with pytest.raises(StoreError, match="no vectors would be left.*Delete the folder"):
        VectorIndex.remove(folder, image_keys(*range(20)))
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


# With matrix products (PCA, RR, OPQ) or random numbers (LSQ) a code depends on the rows that are encoded together.
KINDS = """
Flat SQfp16 SQ4 PQ4x4 PQ4x4fs RQ2x4 RaBitQ LSQ2x4 RR16,SQ6 HNSW8 HNSW8_SQ8 IVF4,Flat IVF4,SQ4 IVF4,SQ8 IVF4,PQ4x4
IVF4,RQ2x4 IVF4,RaBitQ IVF4,LSQ2x4 PCA8,IVF4,SQ8 OPQ4,IVF4,PQ4x4 IVF4,PQ4x4fs,Refine(SQfp16) IVF4,PQ4x4,Refine(SQ4)
"""


@pytest.mark.parametrize("factory", KINDS.split())
def test_a_change_leaves_the_vectors_of_other_images_as_they_were(tmp_path, store, factory, monkeypatch):
    monkeypatch.setattr(factories, "CHUNK", 100)
    extend(store, *range(20, 300))
    folder = tmp_path / "index"
    index = VectorIndex.build(folder, store, factory=factory, keys=image_keys(*range(290)))
    before, query = held(index), index.vectors(np.array([200]))
    VectorIndex.add(folder, store, image_keys(*range(290, 300)))
    shutil.rmtree(store.root)
    for gone in ((0,), (5, 11), (250,)):
        VectorIndex.remove(folder, image_keys(*gone))
    index = VectorIndex.open(folder)
    after = held(index)
    assert set(after) == set(image_keys(*(n for n in range(300) if n not in (0, 5, 11, 250))))
    kept = set(after) & set(before)
    assert {key: after[key] for key in kept} == {key: before[key] for key in kept}
    assert len(file_names(folder)) == 3
    assert index.search(query, 3).min() >= 0


def test_a_kind_that_would_round_vectors_again_is_not_changed(tmp_path, store):
    extend(store, *range(20, 300))
    folder = tmp_path / "index"
    before = held(VectorIndex.build(folder, store, factory="RaBitQfs"))
    with pytest.raises(StoreError, match="'RaBitQfs' cannot be changed without rounding"):
        VectorIndex.remove(folder, image_keys(0))
    assert held(VectorIndex.open(folder)) == before


def test_images_of_another_store_of_the_encoder_are_added(folder, store, tmp_path):
    other = EmbeddingStore(tmp_path / "other", FINGERPRINT, WIDTH)
    extend(other, 30)
    assert VectorIndex.add(folder, other, image_keys(30)) == IndexChange(1, 0, 21)
    extend(store, 30)
    assert holds(VectorIndex.open(folder), store, *range(20), 30)


def test_a_store_whose_files_were_merged_needs_no_new_vectors(tmp_path, monkeypatch):
    store = EmbeddingStore(tmp_path / "store", FINGERPRINT, WIDTH)
    for n in range(20):
        extend(store, n)
    VectorIndex.build(tmp_path / "index", store)
    before = VectorIndex.open(tmp_path / "index").info
    store.compact()
    monkeypatch.setattr("bindllm.cache.index.publish", lambda *_: pytest.fail("rebuilt"))
    assert VectorIndex.update(tmp_path / "index", store) == IndexChange(0, 0, 20)
    after = VectorIndex.open(tmp_path / "index").info
    assert (after.file, after.store != before.store) == (before.file, True)


def test_a_changed_store_is_reported_when_the_index_is_opened(folder, store, caplog):
    VectorIndex.open(folder)
    assert not caplog.records
    extend(store, 30, 31, 32)
    index = VectorIndex.open(folder)
    assert "3 image embeddings more and 0 fewer than this index" in caplog.text
    assert f"'bindllm index {folder} ...' updates it" in caplog.text
    assert caplog.records[0].levelno == logging.WARNING
    assert holds(index, store, *range(20))
    VectorIndex.update(folder, store)
    caplog.clear()
    VectorIndex.open(folder)
    assert not caplog.records


def test_fewer_embeddings_are_reported_and_merged_or_other_ones_are_not(tmp_path, caplog):
    store = EmbeddingStore(tmp_path / "store", FINGERPRINT, WIDTH)
    for n in range(20):
        extend(store, n)
    VectorIndex.build(tmp_path / "index", store)
    chosen = VectorIndex.build(tmp_path / "chosen", store, keys=image_keys(1, 2))
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
            write([*image_keys(1), store.key_of(sound[0])])
    assert held(VectorIndex.open(folder)) == before
    assert VectorIndex.update(folder, store) == IndexChange(0, 0, 20)


def test_a_damaged_store_does_not_keep_an_index_from_opening(folder, store, caplog):
    shard = next(store.folder.glob("embeddings-*.arrow"))
    shard.write_bytes(b"damaged")
    assert len(VectorIndex.open(folder)) == 20
    assert "cannot compare it with its store" in caplog.text
    assert shard.read_bytes() == b"damaged"
