"""The embedding store: bytes kept, keys found, unchanged files not read twice, other stores refused."""

import json
import os
import pickle
import shutil
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from bindllm import EmbeddingStore, Media
from bindllm.embeddings import store as store_module
from bindllm.errors import MediaError, StoreError
from store_parts import CLOCK_TICK, FINGERPRINT, SIZE, add, keys_of, open_store, texts, vectors, write_settled


def test_round_trip_keeps_every_bit_in_the_order_of_the_keys(tmp_path):
    special = torch.tensor([[1e-45, -0.0, 3.4028235e38, 1 / 3]])
    store = open_store(tmp_path)
    add(store, 1, 2, 3)
    store.append(keys_of(texts(9)), special, texts(9))
    again = open_store(tmp_path)
    got = again.get(keys_of(texts(3, 9, 1, 3)))
    assert got.dtype == torch.float32
    expected = torch.cat([vectors(3), special, vectors(1), vectors(3)])
    assert got.numpy().tobytes() == expected.numpy().tobytes()
    assert len(again) == 4


def test_get_returns_a_copy(tmp_path):
    store = open_store(tmp_path)
    add(store, 1)
    store.get(keys_of(texts(1))).zero_()
    assert torch.equal(store.get(keys_of(texts(1))), vectors(1))


def test_keys_with_any_bytes_are_found(tmp_path):
    # Fixed-width strings often fail for zero bytes at the end and in the middle.
    keys = ["00" * 32, "00" * 31 + "01", "01" + "00" * 31, "01" + "00" * 30 + "01", "ff" * 32, "7f" * 32]
    store = open_store(tmp_path)
    store.append(keys, vectors(*range(6)), texts(*range(6)))
    assert torch.equal(store.get(keys[::-1]), vectors(5, 4, 3, 2, 1, 0))
    assert "01" + "00" * 30 + "02" not in store
    assert store.has([keys[0], "80" * 32]).tolist() == [True, False]


def test_any_arrow_reader_can_open_a_shard(tmp_path):
    file = write_settled(tmp_path / "a.png", b"x")
    media = [Media.image(file), Media.image(b"in memory"), Media.text("a dog")]
    store = open_store(tmp_path / "store")
    store.append([store.key_of(item) for item in media], vectors(0, 1, 2), media)
    (shard,) = store.folder.glob("embeddings-*.arrow")
    rows = pa.ipc.open_file(shard).read_all().to_pylist()
    found = {row["key"].hex(): (row["modality"], row["source"], row["embedding"]) for row in rows}
    assert found == {
        store.key_of(media[0]): ("image", str(file), vectors(0)[0].tolist()),
        store.key_of(media[1]): ("image", None, vectors(1)[0].tolist()),
        store.key_of(media[2]): ("text", "a dog", vectors(2)[0].tolist()),
    }


def test_missing_keys_are_counted_and_the_first_is_named(tmp_path):
    store = open_store(tmp_path)
    add(store, 1)
    with pytest.raises(
        StoreError, match=f"2 of 3 embeddings are not stored, the first with key {keys_of(texts(7))[0]}"
    ):
        store.get(keys_of(texts(1, 7, 8)))
    assert store.get([]).shape == (0, SIZE)


@pytest.mark.parametrize("key", ["abc", "zz" * 32, "", "a" * 63])
def test_a_malformed_key_is_refused(tmp_path, key):
    with pytest.raises(StoreError, match=r"64 hexadecimal digits|hexadecimal"):
        open_store(tmp_path).get([key])


def test_appending_the_same_key_twice_writes_it_once(tmp_path):
    store = open_store(tmp_path)
    store.append(keys_of(texts(1, 2, 1)), vectors(1, 2, 1), texts(1, 2, 1))
    add(store, 2)
    assert len(store) == 2
    assert len(list(store.folder.glob("embeddings-*.arrow"))) == 1


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_embeddings_that_are_not_finite_are_refused_with_their_source(tmp_path, value):
    store = open_store(tmp_path)
    embeddings = vectors(1, 2)
    embeddings[1, 2] = value
    media = [Media.text("fine"), Media.text("broken one")]
    with pytest.raises(StoreError, match="1 of 2 embeddings are not finite, the first that of 'broken one'"):
        store.append(keys_of(media), embeddings, media)
    assert len(open_store(tmp_path)) == 0


def test_shapes_that_do_not_fit_are_refused(tmp_path):
    store = open_store(tmp_path)
    with pytest.raises(StoreError, match=r"got 1 keys, 1 media and embeddings \[1, 5\]; .*4 numbers"):
        store.append(keys_of(texts(1)), torch.ones(1, SIZE + 1), texts(1))
    with pytest.raises(StoreError, match="got 1 keys, 2 media"):
        store.append(keys_of(texts(1)), torch.ones(1, SIZE), texts(1, 2))


def test_each_encoder_has_its_own_folder(tmp_path):
    first, second = open_store(tmp_path), EmbeddingStore(tmp_path, "b2" * 32, SIZE)
    add(first, 1)
    assert len(second) == 0
    assert first.folder != second.folder
    described = json.loads((first.folder / "encoder.json").read_text())
    assert described == {"format": 1, "fingerprint": FINGERPRINT, "embedding_size": SIZE, "encoder": None}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 2}, "format 2, this bindllm reads up to 1"),
        ({"embedding_size": 5}, "created with embedding_size 5, the encoder has 4"),
        ({"fingerprint": FINGERPRINT[:16] + "00" * 24}, "created with fingerprint a1a1"),
    ],
)
def test_a_store_of_another_encoder_or_format_is_refused(tmp_path, change, message):
    path = open_store(tmp_path).folder / "encoder.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(StoreError, match=message):
        open_store(tmp_path)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"format": 1}', '{"format": Infinity}', "[" * 10**6])
def test_a_damaged_description_is_refused(tmp_path, content):
    path = open_store(tmp_path).folder / "encoder.json"
    path.write_text(content)
    with pytest.raises(
        StoreError, match=r"encoder.json (is damaged|cannot be read as JSON).*delete the file"
    ):
        open_store(tmp_path)


def test_only_regular_files_are_opened(tmp_path):
    """Opening a FIFO waits forever, and a device has no end."""
    store = open_store(tmp_path)
    add(store, 1)
    fifo = store.folder / "embeddings-fifo.arrow"
    os.mkfifo(fifo)
    with pytest.raises(StoreError, match="not a regular file"):
        store.keys()
    with pytest.warns(UserWarning, match="not a regular file.*renamed"):
        assert len(open_store(tmp_path)) == 1
    (store.folder / "encoder.json").unlink()
    (store.folder / "encoder.json").symlink_to("/dev/zero")
    with pytest.raises(StoreError, match=r"encoder\.json is not a regular file"):
        open_store(tmp_path)


@pytest.mark.parametrize("fingerprint", ["", "abc", "../" * 8, "G" * 64])
def test_a_fingerprint_must_be_hexadecimal(tmp_path, fingerprint):
    with pytest.raises(StoreError, match="16 hexadecimal digits"):
        EmbeddingStore(tmp_path, fingerprint, SIZE)


def test_a_folder_that_cannot_be_made_is_reported(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="cannot be read or written"):
        open_store(tmp_path / "file")


def test_an_unchanged_file_is_hashed_once(tmp_path, hashed, monkeypatch):
    file = write_settled(tmp_path / "a.png", b"content")
    store = open_store(tmp_path / "store")
    key = store.key_of(Media.image(file))
    store.key_of(Media.image(file))
    store.save_files()
    monkeypatch.chdir(tmp_path)
    again = open_store(tmp_path / "store")
    assert again.key_of(Media.image("a.png")) == key
    assert hashed == [str(file)]
    assert key == Media.image(b"content").content_hash()


def test_another_modality_of_the_same_file_is_another_key(tmp_path):
    file = write_settled(tmp_path / "a.png", b"content")
    store = open_store(tmp_path / "store")
    image = store.key_of(Media.image(file))
    assert store.key_of(Media.depth(file)) == Media.depth(file).content_hash() != image


@pytest.mark.parametrize("change", ["size", "time", "link", "mv", "cp -p"])
def test_a_file_that_was_replaced_is_hashed_again(tmp_path, change):
    """Also with the same size and the same time of modification."""
    file = write_settled(tmp_path / "a.png", b"content")
    other = write_settled(tmp_path / "b.png", b"CONTENT")
    link = tmp_path / "link.png"
    link.symlink_to(file)
    store = open_store(tmp_path / "store")
    assert store.key_of(Media.image(link)) == Media.image(b"content").content_hash()
    store.save_files()
    time.sleep(CLOCK_TICK)
    if change == "size":
        write_settled(file, b"new content")
    elif change == "time":
        file.write_bytes(b"CONTENT")
        os.utime(file, ns=(10**18, 10**18 + 1))
    elif change == "link":
        link.unlink()
        link.symlink_to(other)
    elif change == "mv":
        other.rename(file)
    else:
        shutil.copy2(other, file)
    for opened in (store, open_store(tmp_path / "store")):
        assert opened.key_of(Media.image(link)) == Media.image(link.read_bytes()).content_hash()


def test_the_time_of_a_file_written_just_now_is_not_trusted(tmp_path, monkeypatch, hashed):
    monkeypatch.setattr(store_module, "SETTLED_NS", 10**12)
    file = Media.image(write_settled(tmp_path / "a.png", b"content"))
    store = open_store(tmp_path / "store")
    assert store.key_of(file) == store.key_of(file)
    assert hashed == [file.name] * 2
    store.save_files()
    assert not list(store.folder.glob("files-*"))


@pytest.mark.parametrize("how", ["another file", "other bytes"])
def test_a_file_that_changes_while_it_is_hashed_is_not_recorded(tmp_path, monkeypatch, how):
    file = write_settled(tmp_path / "a.png", b"content")
    other = write_settled(tmp_path / "b.png", b"CONTENT")
    original = Media.content_hash

    def changed(media, *stream):
        time.sleep(CLOCK_TICK)
        other.rename(file) if how == "another file" else shutil.copy2(other, file)
        return original(media, *stream)

    store = open_store(tmp_path / "store")
    with monkeypatch.context() as patch:
        patch.setattr(Media, "content_hash", changed)
        # Either way the first file's inode changes, so the hash belongs to no file that is there now.
        with pytest.raises(MediaError, match=r"a\.png: the file changed while it was read; run again"):
            store.key_of(Media.image(file))
    assert store.key_of(Media.image(file)) == Media.image(b"CONTENT").content_hash()


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(MediaError, match=r"nowhere\.png"):
        open_store(tmp_path).key_of(Media.image(tmp_path / "nowhere.png"))


def test_a_pickled_store_does_not_contain_its_maps(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    store = open_store(Path("store"))
    add(store, *range(50))
    pickled = pickle.dumps(store)
    assert len(pickled) < 1000
    monkeypatch.chdir("/")
    assert torch.equal(pickle.loads(pickled).get(keys_of(texts(7, 3))), vectors(7, 3))


class Rows(torch.utils.data.Dataset):
    def __init__(self, store: EmbeddingStore, keys: list[str]) -> None:
        self.store, self.keys = store, keys

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.store.get([self.keys[index]])[0]


def test_data_loader_workers_read_it(tmp_path):
    store = open_store(tmp_path)
    add(store, *range(20))
    rows = Rows(store, keys_of(texts(*range(20))))
    loader = torch.utils.data.DataLoader(rows, batch_size=4, num_workers=2)
    assert torch.equal(torch.cat(list(loader)), vectors(*range(20)))


def test_a_read_only_store_is_used_without_writing(tmp_path, monkeypatch):
    file = write_settled(tmp_path / "a.png", b"content")
    store = open_store(tmp_path / "store")
    add(store, 1)
    before = set(store.folder.iterdir())
    monkeypatch.setattr(store_module.os, "access", lambda *_args: False)
    reader = open_store(tmp_path / "store")
    reader.key_of(Media.image(file))
    reader.save_files()
    assert torch.equal(reader.get(keys_of(texts(1))), vectors(1))
    assert set(store.folder.iterdir()) == before


def test_a_file_name_that_is_not_utf8_is_recorded(tmp_path):
    path = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.png")
    Path(path).write_bytes(b"content")
    store = open_store(tmp_path / "store")
    media = Media.image(path)
    store.append([store.key_of(media)], vectors(1), [media])
    assert np.allclose(store.get([store.key_of(media)]), vectors(1))


def test_keys_of_a_modality_are_sorted_without_repetitions(tmp_path):
    store = open_store(tmp_path)
    assert store.keys() == []
    add(store, 3, 1, 2)
    images = [Media.image(f"file {n}".encode()) for n in range(2)]
    store.append(keys_of(images), vectors(4, 5), images)
    # The same shard twice, as two processes leave it that filled the store at the same time.
    shard = next(store.folder.glob("embeddings-*.arrow"))
    shard.with_name("embeddings-again.arrow").write_bytes(shard.read_bytes())
    assert store.keys("text") == sorted(keys_of(texts(1, 2, 3)))
    assert store.keys("image") == sorted(keys_of(images))
    assert store.keys() == sorted(keys_of(texts(1, 2, 3)) + keys_of(images))
    assert store.keys("audio") == []
    shard.write_bytes(b"damaged")
    with pytest.raises(StoreError, match=f"{shard.name} cannot be read"):
        store.keys()


def test_sources_in_the_order_of_the_keys(tmp_path):
    store = open_store(tmp_path / "store")
    add(store, 1, 2)
    file = write_settled(tmp_path / "a.png", b"file")
    media = [Media.image(file), Media.image(b"from memory")]
    # Another process appends.
    open_store(tmp_path / "store").append(keys_of(media), vectors(3, 4), media)
    keys = keys_of([*texts(2), *media, *texts(9, 1)])
    assert store.sources(keys) == ["text 2", str(file), None, None, "text 1"]
    assert store.sources([]) == []


def grids() -> list[torch.Tensor]:
    """Tokens of several grids and widths, as a model of several modalities has them."""
    shapes = [(7, 7, 6), (3, 4, 5, 8), (9, 6)]
    return [
        torch.randn(*shape, generator=torch.Generator().manual_seed(n)).half()
        for n, shape in enumerate(shapes)
    ]


def test_tokens_come_back_with_every_bit_and_their_grid(tmp_path):
    store, media = open_store(tmp_path), texts(1, 2, 3, 4)
    store.append(keys_of(media), vectors(1, 2, 3, 4), media, tokens=[*grids(), None])
    for reader in (store, open_store(tmp_path), pickle.loads(pickle.dumps(store))):
        found = reader.get_tokens(keys_of(texts(3, 1, 2, 3)))
        expected = [grids()[n] for n in (2, 0, 1, 2)]
        assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
        found[0].zero_()
        assert torch.equal(reader.get_tokens(keys_of(texts(3)))[0], grids()[2])
    assert store.has(keys_of(media), tokens=[True] * 4).tolist() == [True, True, True, False]
    assert store.has(keys_of(media), tokens=[False] * 4).all()
    assert store.get_tokens([]) == []
    with pytest.raises(
        StoreError, match=f"1 of 2 tokens are not stored, the first with key {keys_of(texts(4))[0]}"
    ):
        store.get_tokens(keys_of(texts(1, 4)))
    # An Arrow reader sees the shape and the numbers.
    (shard,) = store.folder.glob("tokens-*.arrow")
    rows = {row["key"].hex(): row for row in pa.ipc.open_file(shard).read_all().to_pylist()}
    assert rows[keys_of(texts(3))[0]]["shape"] == [9, 6, 0, 0]
    assert len(rows[keys_of(texts(1))[0]]["values"]) == 7 * 7 * 6


def test_tokens_are_added_to_embeddings_that_stay(tmp_path):
    store = open_store(tmp_path)
    add(store, 1, 2)
    before = {path: path.read_bytes() for path in store.folder.glob("embeddings-*.arrow")}
    assert not list(store.folder.glob("tokens-*"))
    assert store.has(keys_of(texts(1, 2)), tokens=[True, False]).tolist() == [False, True]
    assert store.keys_of(texts(1, 2), token_modalities=["text"]) == {}
    store.append(keys_of(texts(1)), 7 * vectors(1), texts(1), tokens=grids()[:1])
    assert {path: path.read_bytes() for path in store.folder.glob("embeddings-*.arrow")} == before
    assert torch.equal(open_store(tmp_path).get(keys_of(texts(1))), vectors(1))
    assert list(store.keys_of(texts(1, 2), token_modalities=["text"])) == texts(1)
    assert list(store.keys_of(texts(1, 2), token_modalities=["image"])) == texts(1, 2)


def test_one_tensor_of_tokens_for_each_key(tmp_path):
    with pytest.raises(ValueError, match="shorter"):
        open_store(tmp_path).append(keys_of(texts(1, 2)), vectors(1, 2), texts(1, 2), tokens=grids()[:1])
