"""A cache of the images of a folder, and the images that it mixes in."""

import logging
from functools import partial

import numpy as np
import pytest
import torch

from bindllm import EmbeddingStore, VisualCache
from bindllm.cache.build import build_or_update, find_images
from bindllm.errors import InputError, StoreError
from store_parts import CountingEncoder, expected, image_bytes, write_images, write_settled
from tiny import ColorEncoder

pytest.importorskip("faiss")


def test_a_folder_of_images_becomes_a_cache_of_these_alone(tmp_path, caplog):
    media = write_images(tmp_path / "pictures", 6)
    write_images(tmp_path / "pictures" / "more", 2, start=6)
    write_settled(tmp_path / "pictures" / "again.PNG", image_bytes(0))
    others = write_images(tmp_path / "others", 3, start=20)
    where = {"folder": tmp_path / "cache", "store": tmp_path / "store"}
    VisualCache.from_images([item.source for item in others], CountingEncoder(), **where)
    encoder = CountingEncoder()
    cache = VisualCache.from_images(tmp_path / "pictures", encoder, **where, top_k=3, weight=0.25)
    assert (len(cache), cache.settings.top_k, cache.settings.weight) == (8, 3, 0.25)
    assert len(encoder.prepared) == 8
    again = CountingEncoder()
    assert len(VisualCache.from_images(str(tmp_path / "pictures"), again, **where)) == 8
    assert again.prepared == []
    opened = VisualCache.open(tmp_path / "cache", top_k=3, weight=0.25)
    assert not caplog.records

    # The nearest image of an image is itself, and its key leads back to its file.
    rows = expected(media)
    nearest = opened.neighbors(rows, 1)[:, 0].numpy()
    store = EmbeddingStore.for_encoder(tmp_path / "store", ColorEncoder())
    keys = opened.index.keys(nearest)
    assert keys == [item.content_hash() for item in media]
    sources = store.sources(keys)
    assert sources[1:] == [str(item.source) for item in media[1:]]
    assert sources[0] in (str(media[0].source), str(tmp_path / "pictures" / "again.PNG"))
    assert torch.equal(opened.blend(rows), cache.blend(rows))


def test_a_refresh_sees_an_image_that_was_replaced_with_the_same_size_and_time(tmp_path, monkeypatch):
    monkeypatch.setattr("bindllm.embeddings.store.SETTLED_NS", 0)
    media = write_images(tmp_path / "pictures", 2)
    encoder = ColorEncoder()
    store = EmbeddingStore.for_encoder(tmp_path / "store", encoder)
    refresh = partial(build_or_update, tmp_path / "cache", store, encoder, images=tmp_path / "pictures")
    assert refresh().change == "built"
    other = write_settled(tmp_path / "other.png", image_bytes(7).ljust(media[0].source.stat().st_size, b"\0"))
    other.rename(media[0].source)
    assert refresh().change == "updated: 1 added, 1 removed"
    assert refresh().change == "updated: 0 added, 0 removed"


def test_images_that_cannot_be_read_are_counted_and_named(tmp_path, caplog):
    caplog.set_level(logging.INFO, "bindllm")
    media = write_images(tmp_path / "pictures", 3)
    (tmp_path / "pictures" / "0broken.png").write_bytes(b"not a picture")
    (tmp_path / "pictures" / "captions.txt").write_text("a cat")
    where = {"folder": tmp_path / "cache", "store": tmp_path / "store"}
    cache = VisualCache.from_images(tmp_path / "pictures", ColorEncoder(), **where)
    assert "1 of 4 images cannot be read and are skipped; the first: " in caplog.text
    assert "0broken.png" in caplog.text
    assert "1 of 5 files are not images" in caplog.text
    assert sorted(cache.index.keys(np.arange(3))) == sorted(item.content_hash() for item in media)
    missing = [media[0].source, tmp_path / "nowhere.png"]
    assert len(VisualCache.from_images(missing, ColorEncoder(), **where)) == 1
    assert "nowhere.png" in caplog.text
    with pytest.raises(InputError, match=r"none of the 1 images can be read; the first: .*nowhere\.png"):
        VisualCache.from_images(missing[1:], ColorEncoder(), **where)
    assert len(VisualCache.open(tmp_path / "cache")) == 1


def test_a_wrong_folder_of_images_is_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.txt").write_text("a")
    for given, message in (
        (tmp_path / "nowhere", "'.*nowhere' does not exist"),
        (tmp_path / "a.txt", r"a\.txt' is a file; give its folder, or in Python a list of paths"),
        (tmp_path / "empty", "holds 0 files and no images"),
        (tmp_path, "holds 1 files and no images"),
        ([], "the list of images is empty"),
    ):
        with pytest.raises(InputError, match=message):
            find_images(given)


def test_factory_and_search_settings_reach_the_index(tmp_path):
    write_images(tmp_path / "pictures", 40)
    where = {"folder": tmp_path / "cache", "store": tmp_path / "store"}
    options = {"factory": "IVF4,SQ8", "search": "nprobe=2"}
    cache = VisualCache.from_images(tmp_path / "pictures", ColorEncoder(), **where, **options)
    assert (cache.index.info.factory, cache.index.info.search) == ("IVF4,SQ8", "nprobe=2")
    store = EmbeddingStore.for_encoder(tmp_path / "store", ColorEncoder())
    built = VisualCache.build(tmp_path / "built", store, **options, top_k=30)
    queries = torch.eye(16)
    assert (built.neighbors(queries) == -1).any()
    every = VisualCache.open(tmp_path / "built", search="nprobe=4", top_k=30)
    assert not (every.neighbors(queries) == -1).any()
    with pytest.raises(StoreError, match="another process|not the folder"):
        VisualCache.open(tmp_path / "nowhere")


class Elsewhere:
    """An index that is not a `VectorIndex`, with only the members that a cache needs."""

    def __init__(self, inner) -> None:
        self.info, self.source = inner.info, "elsewhere"
        self._inner = inner

    def __len__(self) -> int:
        return len(self._inner)

    def search(self, queries: np.ndarray, count: int) -> np.ndarray:
        return self._inner.search(queries, count)

    def vectors(self, numbers: np.ndarray) -> np.ndarray:
        return self._inner.vectors(numbers)

    def keys(self, numbers: np.ndarray) -> list[str | None]:
        return self._inner.keys(numbers)


def test_any_object_with_the_same_methods_is_an_index(tmp_path):
    write_images(tmp_path / "pictures", 12)
    where = {"folder": tmp_path / "cache", "store": tmp_path / "store"}
    cache = VisualCache.from_images(tmp_path / "pictures", ColorEncoder(), **where)
    queries = torch.randn(5, 16, generator=torch.Generator().manual_seed(0))
    other = VisualCache(Elsewhere(cache.index))
    assert torch.equal(other.blend(queries), cache.blend(queries))
    assert repr(other) == "VisualCache('elsewhere', 12 images of size 16)"
