"""Stores of synthetic images for the tests of the index, and the expected content of an index."""

from pathlib import Path

import numpy as np
import torch

from bindllm import EmbeddingStore, Media
from bindllm.cache.blend import unit_rows
from bindllm.cache.index import VectorIndex
from store_parts import FINGERPRINT, keys_of

WIDTH = 16


def made_up(*numbers: int) -> list[Media]:
    return [Media.image(f"picture {n}".encode()) for n in numbers]


def image_keys(*numbers: int) -> list[str]:
    return keys_of(made_up(*numbers))


def extend(store: EmbeddingStore, *numbers: int) -> None:
    """Append made-up images, each with an embedding that follows from its number."""
    media = made_up(*numbers)
    width = store.embedding_size
    rows = torch.from_numpy(np.stack([np.random.default_rng(n).standard_normal(width) for n in numbers]))
    store.append(keys_of(media), rows, media)


def image_store(folder: Path, count: int, width: int = WIDTH) -> EmbeddingStore:
    """A store of images 0 to count - 1, in several shards."""
    store = EmbeddingStore(folder, FINGERPRINT, width)
    for start in range(0, count, 100):
        extend(store, *range(start, min(start + 100, count)))
    return store


def expected_rows(store: EmbeddingStore, keys: list[str]) -> np.ndarray:
    return unit_rows(store.get(keys).numpy())


def held(index: VectorIndex) -> dict[str, bytes]:
    """Key and vector of everything that an index holds."""
    numbers = np.arange(len(index))
    vectors = index.vectors(numbers)
    found = dict(zip(index.keys(numbers), (row.tobytes() for row in vectors), strict=True))
    assert len(found) == len(index), "a key twice"
    return found


def holds(index: VectorIndex, store: EmbeddingStore, *numbers: int) -> bool:
    """Return whether an exact index holds these images, each once and with its own vector, and finds each."""
    keys = image_keys(*numbers)
    rows = expected_rows(store, keys)
    same = held(index) == {key: row.tobytes() for key, row in zip(keys, rows, strict=True)}
    return same and index.keys(index.search(rows, 1)[:, 0]) == keys


def file_names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}
