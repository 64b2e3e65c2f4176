"""The shards of a store: damage, a full disk, merging, and several processes at once."""

import errno
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bindllm import EmbeddingStore
from bindllm.embeddings import shards
from bindllm.errors import StoreError
from store_parts import add, keys_of, open_store, texts, vectors


def store_of_many_shards(folder: Path, more: int = 1) -> EmbeddingStore:
    """A store with more small shards than it keeps."""
    store = open_store(folder)
    for n in range(shards.MANY_SMALL + more):
        add(store, n)
    return store


@pytest.mark.parametrize("kept", [0.0, 0.5, 0.99])
def test_a_truncated_shard_is_renamed_and_the_others_are_read(tmp_path, kept):
    store = open_store(tmp_path)
    add(store, 1, 2)
    (shard,) = store.folder.glob("embeddings-*.arrow")
    add(store, 3)
    content = shard.read_bytes()
    shard.write_bytes(content[: int(len(content) * kept)])
    with pytest.warns(UserWarning, match=shard.name):
        store = open_store(tmp_path)
    assert [path.name for path in store.folder.glob("*.damaged")] == [f"{shard.name}.damaged"]
    assert store.has(keys_of(texts(1, 2, 3))).tolist() == [False, False, True]
    add(store, 1, 2)
    assert torch.equal(open_store(tmp_path).get(keys_of(texts(1, 2, 3))), vectors(1, 2, 3))


def test_a_system_error_is_not_treated_as_damage(tmp_path, monkeypatch):
    add(open_store(tmp_path), 1)

    def no_more_files(_path):
        raise OSError(errno.EMFILE, "Too many open files")

    with monkeypatch.context() as patch:
        patch.setattr(pa, "memory_map", no_more_files)
        with pytest.raises(StoreError, match="Too many open files"):
            open_store(tmp_path)
    assert torch.equal(open_store(tmp_path).get(keys_of(texts(1))), vectors(1))


def test_a_file_of_another_program_is_not_read_as_a_shard(tmp_path):
    store = open_store(tmp_path)
    with pa.ipc.new_file(str(store.folder / "embeddings-x.arrow"), pa.schema([("a", pa.int64())])) as writer:
        writer.write_table(pa.table({"a": [1]}))
    with pytest.warns(UserWarning, match="columns are not those"):
        store.refresh()
    assert len(store) == 0


def test_a_full_disk_is_reported_and_leaves_the_old_rows(tmp_path, monkeypatch):
    store = open_store(tmp_path)
    add(store, 1)
    before = sorted(path.name for path in store.folder.iterdir())

    def full(*_args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(pa.ipc.RecordBatchFileWriter, "write_table", full)
    with pytest.raises(StoreError, match="No space left on device.*earlier embeddings are intact"):
        add(store, 2)
    assert sorted(path.name for path in store.folder.iterdir()) == before
    monkeypatch.undo()
    assert torch.equal(store.get(keys_of(texts(1))), vectors(1))
    add(store, 2)
    assert len(open_store(tmp_path)) == 2


def test_many_small_shards_become_one(tmp_path):
    store, count = store_of_many_shards(tmp_path, 5), shards.MANY_SMALL + 5
    other = open_store(tmp_path)
    store.compact()
    assert len(list(store.folder.glob("embeddings-*.arrow"))) == 6
    for reader in (store, other, open_store(tmp_path)):
        assert torch.equal(reader.get(keys_of(texts(*range(count)))), vectors(*range(count)))


def test_a_crash_between_merging_and_removing_loses_nothing(tmp_path, monkeypatch):
    store, count = store_of_many_shards(tmp_path), shards.MANY_SMALL + 1

    def killed(*_args, **_options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", killed)
        with pytest.raises(KeyboardInterrupt):
            store.compact()
    again = open_store(tmp_path)
    assert len(again) == count
    assert len(list(again.folder.glob("embeddings-*.arrow"))) == count + 1
    assert torch.equal(again.get(keys_of(texts(*range(count)))), vectors(*range(count)))
    again.compact()
    assert len(list(again.folder.glob("embeddings-*.arrow"))) < count
    assert torch.equal(open_store(tmp_path).get(keys_of(texts(*range(count)))), vectors(*range(count)))


def test_two_processes_that_merge_the_same_shards_write_the_same_file(tmp_path):
    store = store_of_many_shards(tmp_path)
    copies = {path: path.read_bytes() for path in store.folder.glob("embeddings-*.arrow")}
    other = open_store(tmp_path)
    store.compact()
    for path, content in copies.items():
        path.write_bytes(content)
    other.compact()
    assert len(list(store.folder.glob("embeddings-*.arrow"))) == 2


def test_large_shards_are_not_merged(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "SMALL_BYTES", 0)
    store = store_of_many_shards(tmp_path)
    before = set(store.folder.iterdir())
    store.compact()
    assert set(store.folder.iterdir()) == before


def test_only_old_part_files_are_removed(tmp_path):
    store = open_store(tmp_path)
    old, young = store.folder / ".embeddings-a.arrow.1.part", store.folder / ".embeddings-b.arrow.2.part"
    old.write_bytes(b"x")
    young.write_bytes(b"x")
    os.utime(old, (1, 1))
    store.compact()
    assert (old.exists(), young.exists()) == (False, True)


def test_a_shard_merged_away_while_the_folder_is_listed(tmp_path, monkeypatch):
    store = open_store(tmp_path)
    add(store, 1)
    add(store, 2)
    victim = sorted(store.folder.glob("embeddings-*.arrow"))[0]
    original = shards._Shard.__init__

    def vanish(self, path, schema):
        victim.unlink(missing_ok=True)
        original(self, path, schema)

    monkeypatch.setattr(shards._Shard, "__init__", vanish)
    assert len(open_store(tmp_path)) == 1


def test_rows_of_another_process_are_found(tmp_path):
    reader, writer = open_store(tmp_path), open_store(tmp_path)
    add(writer, 1)
    assert torch.equal(reader.get(keys_of(texts(1))), vectors(1))


def test_leftovers_of_a_killed_merge_are_removed(tmp_path):
    store = store_of_many_shards(tmp_path)
    files = {file: file.read_bytes() for file in store.folder.glob("embeddings-*.arrow")}
    store.compact()
    merged = set(store.folder.glob("embeddings-*.arrow"))
    # As if it had been killed with five of its removals to go.
    for file, content in [(file, files[file]) for file in sorted(files.keys() - merged)[:5]]:
        file.write_bytes(content)
    store = open_store(tmp_path)
    store.compact()
    assert set(store.folder.glob("embeddings-*.arrow")) == merged
    assert len(store) == shards.MANY_SMALL + 1


def tokens(n: int) -> torch.Tensor:
    return torch.full((n + 1, 2), float(n)).half()


def add_tokens(store: EmbeddingStore, *numbers: int) -> None:
    media = texts(*numbers)
    store.append(keys_of(media), vectors(*numbers), media, tokens=[tokens(n) for n in numbers])


def test_many_small_shards_of_tokens_become_one(tmp_path):
    store, count = open_store(tmp_path), shards.MANY_SMALL + 5
    for n in range(count):
        add_tokens(store, n)
    store.compact()
    assert len(list(store.folder.glob("tokens-*.arrow"))) == 6
    for reader in (store, open_store(tmp_path)):
        found = reader.get_tokens(keys_of(texts(*range(count))))
        assert all(torch.equal(each, tokens(n)) for n, each in enumerate(found))


def test_damaged_tokens_cost_no_embedding(tmp_path):
    store = open_store(tmp_path)
    add_tokens(store, 1, 2)
    (shard,) = store.folder.glob("tokens-*.arrow")
    shard.write_bytes(shard.read_bytes()[:-300])
    with pytest.warns(UserWarning, match=shard.name):
        store = open_store(tmp_path)
    assert store.has(keys_of(texts(1, 2)), tokens=[True, True]).tolist() == [False, False]
    assert torch.equal(store.get(keys_of(texts(1, 2))), vectors(1, 2))
    add_tokens(store, 1)
    assert torch.equal(store.get_tokens(keys_of(texts(1)))[0], tokens(1))


def test_shapes_that_do_not_fit_the_numbers_are_damage(tmp_path):
    store = open_store(tmp_path)
    add_tokens(store, 1, 2)
    (path,) = store.folder.glob("tokens-*.arrow")
    table = pa.ipc.open_file(path).read_all()
    wrong = table.set_column(
        1, table.schema.field(1), pa.array([[9, 9, 0, 0], [2, 2, 0, 0]], table.schema.field(1).type)
    )
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(wrong)
    with pytest.warns(UserWarning, match="the shapes of its arrays do not fit their numbers"):
        assert not open_store(tmp_path).has(keys_of(texts(1)), tokens=[True])[0]


def test_a_crash_between_tokens_and_embeddings_is_harmless(tmp_path, monkeypatch):
    store = open_store(tmp_path)

    def killed(*_args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(store._embeddings, "append", killed)
        with pytest.raises(KeyboardInterrupt):
            add_tokens(store, 1)
    store = open_store(tmp_path)
    assert len(store) == 0
    assert not store.has(keys_of(texts(1)), tokens=[True])[0]
    add_tokens(store, 1)
    assert torch.equal(store.get_tokens(keys_of(texts(1)))[0], tokens(1))


@given(st.lists(st.lists(st.integers(1, 5), min_size=1, max_size=4), min_size=1, max_size=6))
def test_arrays_of_any_shape_come_back(sizes):
    arrays = [np.random.default_rng(n).random(shape).astype(np.float16) for n, shape in enumerate(sizes)]
    values, offsets, shapes = shards._arrays(*shards.array_columns(arrays))
    for n, array in enumerate(arrays):
        found = values[offsets[n] : offsets[n + 1]].reshape(shapes[n][shapes[n] > 0])
        assert np.array_equal(found, array)
