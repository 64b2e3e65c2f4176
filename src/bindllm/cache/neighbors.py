"""The images that a visual cache retrieves for an embedding, with their names."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from bindllm.cache.folder import IndexInfo
from bindllm.embeddings.store import EmbeddingStore
from bindllm.errors import StoreError

if TYPE_CHECKING:
    from torch import Tensor

    from bindllm.cache.visual_cache import Index, VisualCache

STORE = "data/store"
"""Store in which image names are looked up if an index does not name one."""


def nearest_images(cache: VisualCache, embedding: Tensor) -> list[tuple[float, str]]:
    """Return similarity and name of the images that a cache retrieves for one embedding [1, E], nearest first."""
    numbers = cache.neighbors(embedding)[0].numpy()
    numbers = numbers[numbers >= 0]
    unit = (embedding[0] / embedding[0].norm()).numpy()
    similarities = cache.index.vectors(numbers) @ unit
    names = image_names(cache.index, cache.index.keys(numbers))
    return list(zip(similarities.tolist(), names, strict=True))


def image_names(index: Index, keys: Sequence[str | None]) -> list[str]:
    """Return the names of images: their paths if the index's store has them, otherwise their content hashes."""
    known = [key for key in keys if key is not None]
    sources: dict[str, str | None] = {}
    store = _store_of(index)
    if known and store is not None:
        try:
            sources = dict(zip(known, store.sources(known), strict=True))
        except StoreError:
            # A name is a convenience: the hash identifies the image too.
            sources = {}
    return [
        sources.get(key) or f"content hash {key}" if key else "(the index has no content hashes)"
        for key in keys
    ]


def _store_of(index: Index) -> EmbeddingStore | None:
    """Return the store that an index was built from, or None if it does not exist any more."""
    info = index.info
    folders = [Path(STORE) / info.fingerprint[:16]]
    if isinstance(info, IndexInfo) and info.store is not None:
        folders.insert(0, Path(index.source) / info.store.path)
    found = (EmbeddingStore.existing(folder, info.fingerprint, info.embedding_size) for folder in folders)
    return next((store for store in found if store is not None), None)
