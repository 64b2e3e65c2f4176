"""Which pictures of a visual cache are mixed into an embedding: for people who want to see what the model was told."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

from bindllm.cache.folder import IndexInfo
from bindllm.embeddings.store import EmbeddingStore
from bindllm.errors import StoreError

if TYPE_CHECKING:
    from torch import Tensor

    from bindllm.cache.visual_cache import Index, VisualCache
    from bindllm.media import Media
    from bindllm.model.bindllm import BindLLM

STORE = "data/store"
"""Where names of pictures are looked for when an index does not tell its store."""

# Letters beside a name: the similarity, and the lines between.
_OTHER_COLUMN = 24


def print_neighbours(model: BindLLM, media: Sequence[Media]) -> None:
    """Print the pictures that the model's cache mixes into the embedding of media, the nearest first."""
    console, cache = Console(highlight=False, soft_wrap=True), model.cache
    if not media:
        console.print("no pictures were mixed in: nothing was shown to the model")
        return
    if left := sorted({item.modality for item in media} & set(cache.settings.skip)):
        console.print(f"no pictures were mixed in: media with {', '.join(left)} are left as they are")
        return
    table = Table(title=f"mixed in with weight {cache.settings.weight:g}", title_justify="left")
    table.add_column("similarity", justify="right")
    table.add_column("picture", no_wrap=True)
    nearest = nearest_pictures(cache, model.encode([list(media)], cache=False))
    for similarity, name in nearest:
        table.add_row(f"{similarity:.3f}", Text(name))
    # In a pipe there is no screen to fit: names are printed whole.
    console.width = max([console.width, *(len(name) + _OTHER_COLUMN for _, name in nearest)])
    console.print(table)


def nearest_pictures(cache: VisualCache, embedding: Tensor) -> list[tuple[float, str]]:
    """Return the pictures that a cache mixes into one embedding [1, E]: similarity and name, the nearest first."""
    numbers = cache.neighbors(embedding)[0].numpy()
    numbers = numbers[numbers >= 0]
    unit = (embedding[0] / embedding[0].norm()).numpy()
    similarities = cache.index.vectors(numbers) @ unit
    names = picture_names(cache.index, cache.index.keys(numbers))
    return list(zip(similarities.tolist(), names, strict=True))


def picture_names(index: Index, keys: Sequence[str | None]) -> list[str]:
    """Return what the pictures with these content hashes are called: their paths where a store tells, else the hash."""
    known = [key for key in keys if key is not None]
    sources: dict[str, str | None] = {}
    store = _store_of(index)
    if known and store is not None:
        try:
            sources = dict(zip(known, store.sources(known), strict=True))
        except StoreError:
            # A name is a convenience: the hash tells as much.
            sources = {}
    return [
        sources.get(key) or f"content hash {key}" if key else "(the index has no content hashes)"
        for key in keys
    ]


def _store_of(index: Index) -> EmbeddingStore | None:
    """Return the store that an index was built from, or None when it is not there any more."""
    info = index.info
    places = [Path(STORE) / info.fingerprint[:16]]
    if isinstance(info, IndexInfo) and info.store is not None:
        places.insert(0, Path(index.source) / info.store.path)
    for place in places:
        # Nothing is made here: an index of a stranger may name any place.
        if place.resolve().name == info.fingerprint[:16] and (place / "encoder.json").is_file():
            try:
                return EmbeddingStore(place.resolve().parent, info.fingerprint, info.embedding_size)
            except StoreError:
                continue
    return None
