"""The visual cache: kNN retrieval over image embeddings, mixed into the embeddings of other modalities.

The bind network is trained on images only, and the embedding of an audio clip or a text lies next to those of images
in the joint space. Before the bind network sees it, its nearest image embeddings are mixed in: ImageBind-LLM
(https://arxiv.org/abs/2309.03905), section 3.4, after Tip-Adapter (https://arxiv.org/abs/2111.03930). Nothing is
trained.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, Self

import numpy as np
import torch
from torch import Tensor

from bindllm.cache.blend import (
    MILVUS_TOKEN,
    CacheConfig,
    CacheSettings,
    best,
    index_command,
    is_milvus,
    mix,
    retrieve,
    similarities_of,
    unit_rows,
)
from bindllm.cache.factories import check_factory
from bindllm.cache.folder import IndexInfo
from bindllm.cache.index import VectorIndex
from bindllm.embeddings.store import EmbeddingStore
from bindllm.errors import InputError, StoreError

if TYPE_CHECKING:
    from bindllm.encoders import Encoder
    from bindllm.media import Media

STORE = "data/store"
"""Store in which image names are looked up if an index does not name one."""

# Faiss rounds differently for a batch than for one query. A few more candidates than `top_k` are fetched and ranked
# again exactly, so that rounding does not decide which neighbors are mixed in.
_SPARE = 8
# Floats of the candidates that are compared at once, about: in double precision they fit into a processor's cache.
_FLOATS = 1 << 18


class Info(Protocol):
    """The facts about an index that a cache needs."""

    @property
    def fingerprint(self) -> str:
        """Fingerprint of the encoder that made the vectors."""

    @property
    def count(self) -> int:
        """Number of vectors."""

    @property
    def embedding_size(self) -> int:
        """E."""


class Index(Protocol):
    """Unit vectors that are searched by inner product: a `VectorIndex`, a `MilvusIndex`, or your own."""

    source: str

    @property
    def info(self) -> Info:
        """Facts about the index."""

    def __len__(self) -> int:
        """Return the number of vectors."""

    def search(self, queries: np.ndarray, count: int) -> np.ndarray:
        """Return the ids of the nearest vectors, int64 [N, min(count, len)], best first, -1 if there are no more."""

    def vectors(self, ids: np.ndarray) -> np.ndarray:
        """Return the vectors with these ids [...], float32 [..., E]; zeros for -1."""

    def keys(self, ids: np.ndarray) -> list[str | None]:
        """Return the content hashes of the media with these ids; None for -1 or if unknown."""


class VisualCache:
    """Image embeddings of one encoder, and the settings for mixing them into other embeddings.

    Args:
        index: The image embeddings.
        settings: How they are mixed in; None: the defaults of `CacheSettings`.
        **changes: Single settings by name, such as ``top_k=3``.

    Raises:
        InputError: A setting is out of its range.

    Example:
        ```python
        cache = VisualCache.build("runs/cache", EmbeddingStore.for_encoder("data/store", encoder))
        cache = VisualCache.open("runs/cache", weight=0.3)
        model.generate("What do you hear?", media=[Media.audio("bark.wav")], cache=cache)
        ```
    """

    def __init__(self, index: Index, settings: CacheSettings | None = None, **changes: Any) -> None:
        self.index = index
        self.settings = replace(settings or CacheSettings(), **changes)

    @classmethod
    def build(
        cls,
        folder: str | Path,
        store: EmbeddingStore,
        *,
        factory: str = "auto",
        search: str = "auto",
        **settings: Any,
    ) -> Self:
        """Build a cache of all image embeddings in a store; see `VectorIndex.build` and `CacheSettings`."""
        return cls(VectorIndex.build(folder, store, factory=factory, search=search), **settings)

    @classmethod
    def from_images(
        cls,
        images: str | Path | Sequence[str | Path],
        encoder: Encoder,
        folder: str | Path,
        *,
        store: str | Path = STORE,
        factory: str = "auto",
        search: str = "auto",
        **settings: Any,
    ) -> Self:
        """Build a cache of exactly these images.

        Images whose content is already in the store are not embedded again. Unreadable ones are skipped; a warning
        gives their number and the first of them.

        Args:
            images: A folder, including its subfolders, or paths of images.
            encoder: Embeds the images.
            folder: Where the cache is written.
            store: Where the embeddings are kept.
            factory: Kind of index, as for `VectorIndex.build`.
            search: Search settings, as for `VectorIndex.build`.
            **settings: As for `CacheSettings`.

        Raises:
            InputError: None of the images can be read.
            StoreError: As for `VectorIndex.build`.
        """
        from bindllm.cache.build import embed_images

        # Fail before the images are embedded, which may take hours.
        check_factory(factory, search, encoder.embedding_size)
        opened = EmbeddingStore.for_encoder(store, encoder)
        keys = embed_images(images, encoder, opened)
        return cls(VectorIndex.build(folder, opened, factory=factory, search=search, keys=keys), **settings)

    @classmethod
    def open(cls, folder: str | Path, *, search: str | None = None, **settings: Any) -> Self:
        """Open a cache that was built earlier; see `VectorIndex.open` and `CacheSettings`."""
        return cls(VectorIndex.open(folder, search=search), **settings)

    @classmethod
    def open_bare(cls, file: str | Path, fingerprint: str, **settings: Any) -> Self:
        """Open a single Faiss file, such as the published ``knn.index``; see `VectorIndex.open_bare`."""
        return cls(VectorIndex.open_bare(file, fingerprint), **settings)

    def __len__(self) -> int:
        """Return the number of image embeddings."""
        return len(self.index)

    def __repr__(self) -> str:
        return (
            f"VisualCache({self.index.source!r}, {len(self)} images of size {self.index.info.embedding_size})"
        )

    def blend(self, embedding: Tensor, **changes: Any) -> Tensor:
        """Mix the nearest image embeddings into others.

        For a query ``v`` and its neighbors ``x`` with similarities ``s``: ``r = unit(sum of p * x)`` with
        ``p = softmax(temperature * s)``, or ``p = s`` by the paper's formula, and the result is
        ``unit((1 - weight) * v + weight * r)``. Each row depends only on its own query, to the last bit.

        Args:
            embedding: The queries, [N, E], any float dtype and device. They are scaled to unit length first, because
                fusing several media may have shortened them.
            **changes: Settings of this call, as for `CacheSettings`. ``weight=0`` returns the queries bit for bit.

        Returns:
            Unit norm, [N, E], dtype and device of the queries. A query keeps its direction, and a warning is logged,
            if an approximate index finds nothing for it or if its neighbors cancel it out.

        Raises:
            InputError: Queries of another width, zero or not finite; a setting out of its range.
        """
        settings = replace(self.settings, **changes)
        queries = self._unit_queries(embedding)  # [N, E]
        # The queries themselves, not their unit vectors: without retrieval not even rounding may change them.
        if settings.weight == 0 or not len(queries):
            return embedding.clone()
        ids = self._candidates(queries, settings.top_k)  # [N, C]
        blended, kept = np.empty_like(queries), 0
        for rows in self._chunks(ids):
            similarities, vectors = self._compare(queries[rows], ids[rows])  # [n, C], [n, C, E]
            blended[rows], lost = mix(
                queries[rows], retrieve(similarities, vectors, settings), settings.weight
            )
            kept += lost
        if kept:
            logging.getLogger("bindllm").warning(
                "%s: %d of %d queries have no neighbors to mix in and stay unchanged",
                *(self.index.source, kept, len(queries)),
            )
        return torch.from_numpy(blended).to(embedding)

    def neighbors(self, embedding: Tensor, top_k: int | None = None) -> Tensor:
        """Return the ids of the nearest images in the index, best first, -1 if there are no more.

        Args:
            embedding: The queries, as for `blend`.
            top_k: Number of neighbors; None: as in the settings.

        Returns:
            int64, [N, min(top_k, len)].
        """
        # Through the settings, so that ``top_k`` takes their checks.
        top_k = replace(self.settings, **({} if top_k is None else {"top_k": top_k})).top_k
        queries = self._unit_queries(embedding)  # [N, E]
        ids = self._candidates(queries, top_k)  # [N, C]
        # Starts with an empty block: without queries there is still something to concatenate.
        ranked = [ids[:0, :top_k]]
        for rows in self._chunks(ids):
            columns = best(self._compare(queries[rows], ids[rows])[0], top_k)
            ranked.append(np.take_along_axis(ids[rows], columns, axis=1))
        return torch.from_numpy(np.concatenate(ranked))

    def blend_groups(
        self, embeddings: Tensor, groups: Sequence[Sequence[Media]], encoders: Sequence[Encoder]
    ) -> Tensor:
        """Blend the embeddings of media groups, except groups with a modality in ``skip``.

        Args:
            embeddings: One of each group, [N, E].
            groups: The media that each embedding was made of.
            encoders: The encoders of the model.

        Raises:
            StoreError: The cache was not built with one of these encoders.
        """
        self.check_encoders({encoder.fingerprint() for encoder in encoders})
        skip = set(self.settings.skip)
        # A group is skipped as a whole, because its embedding is already the fusion of all its media.
        rows = [n for n, group in enumerate(groups) if not {item.modality for item in group} & skip]
        blended = embeddings.clone()
        if rows:
            blended[rows] = self.blend(embeddings[rows])
        return blended

    def check_encoders(self, fingerprints: Collection[str]) -> None:
        """Raise if the cache was not built with one of the model's encoders.

        Raises:
            StoreError: Names the encoders of both sides.
        """
        own = self.index.info.fingerprint
        if own not in fingerprints:
            raise StoreError(
                f"{self.index.source} was built with the encoder {own[:16]}, the model has "
                f"{', '.join(sorted(name[:16] for name in fingerprints))}: the two embedding spaces differ. Rebuild "
                "the cache with the model's encoder"
            )

    def _unit_queries(self, embedding: Tensor) -> np.ndarray:
        size = self.index.info.embedding_size
        if embedding.dim() != 2 or embedding.shape[1] != size or not embedding.is_floating_point():
            raise InputError(
                f"the cache takes embeddings [N, {size}] of a float dtype, not {list(embedding.shape)} of "
                f"{embedding.dtype}"
            )
        # To float32 first: NumPy has no bfloat16.
        rows = embedding.detach().to("cpu", torch.float32).numpy()
        units = unit_rows(rows)
        # NaN is found here: after the search it would spread into answers without an error.
        broken = np.flatnonzero(~np.isfinite(units).all(axis=1))
        if len(broken):
            kind = "zero" if not rows[broken[0]].any() else "not finite"
            raise InputError(
                f"{len(broken)} of {len(rows)} queries of the cache have no direction; row {broken[0]} is {kind}. "
                "Check the media and the encoder's weights and dtype"
            )
        return units

    def _chunks(self, ids: np.ndarray) -> list[slice]:
        """Cut candidates [N, C] into rows whose vectors fit into the processor's cache."""
        step = max(1, _FLOATS // (ids.shape[1] * self.index.info.embedding_size))
        return [slice(start, start + step) for start in range(0, len(ids), step)]

    def _candidates(self, queries: np.ndarray, top_k: int) -> np.ndarray:
        """Return the ids of candidates for the nearest, [N, C], ascending: of equal neighbors the smaller id wins."""
        return np.sort(self.index.search(queries, top_k + _SPARE), axis=1)

    def _compare(self, queries: np.ndarray, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the exact similarities [N, C] of queries [N, E] to their candidates, and the candidates' vectors."""
        vectors = self.index.vectors(ids)  # [N, C, E]
        return similarities_of(queries, ids, vectors), vectors


CacheChoice = VisualCache | Literal[False] | None
"""The cache of one call: this one; none; the one that the model has."""


def check_cache(cache: CacheChoice) -> CacheChoice:
    """Return the cache of one call.

    Raises:
        InputError: something else than a cache, such as its folder, which only `BindLLM.from_pretrained` opens.
    """
    if isinstance(cache, (bool, str, os.PathLike)) and cache is not False:
        raise InputError(
            f"cache is {cache!r}, expected a VisualCache, False or None; VisualCache.open(FOLDER) reads one"
        )
    return cache


def open_index(place: str) -> Index:
    """Open the index at a place: a folder, the path of an embedded Milvus, or the address of a server.

    Raises:
        StoreError: The index does not exist or cannot be used.
        MissingExtraError: The package that reads it is not installed.
    """
    if not is_milvus(place):
        return VectorIndex.open(place)
    from bindllm.cache.milvus import MilvusIndex

    return MilvusIndex.open(place, token=os.environ.get(MILVUS_TOKEN))


def open_cache(
    place: str,
    fingerprints: Collection[str],
    *,
    checkpoint: str | Path = "CHECKPOINT",
    settings: CacheSettings | None = None,
) -> VisualCache:
    """Open the cache at a place for a model with these encoders.

    Args:
        checkpoint: The model's folder, for the command in an error message.

    Raises:
        StoreError: The cache is missing, damaged, or was built with another encoder; the message gives both fixes.
    """
    try:
        cache = VisualCache(open_index(place), settings)
        cache.check_encoders(fingerprints)
    except StoreError as error:
        # The message has the exact command, and the way to do without.
        raise StoreError(
            f"the visual cache {place} cannot be used: {error}. Build it with "
            f"`{index_command(place, checkpoint)}`, or continue without it: cache=False, on the command line --no_cache"
        ) from error
    return cache


def choose_cache(
    asked: CacheChoice | str | Path,
    named: CacheConfig | None,
    fingerprints: Collection[str],
    *,
    checkpoint: str | Path,
) -> VisualCache | None:
    """Return the cache that a model answers with.

    Args:
        asked: A cache; the place of one, which is mixed in with the checkpoint's settings; False: none; None: the
            one that the checkpoint names.

    Raises:
        StoreError: The cache cannot be opened, or was built with another encoder.
        InputError: ``asked`` is not a cache.
    """
    # How to read this: an open cache, a place, the checkpoint's own, or none.
    if isinstance(asked, VisualCache):
        asked.check_encoders(fingerprints)
        return asked
    if isinstance(asked, str | Path):
        # The place is the caller's; only the settings come from the checkpoint.
        return open_cache(str(asked), fingerprints, checkpoint=checkpoint, settings=named)
    if asked is None and named is not None:
        return open_cache(named.folder, fingerprints, checkpoint=checkpoint, settings=named)
    if asked is None or asked is False:
        return None
    raise InputError(f"cache is {asked!r}, expected a VisualCache, the path of one, False or None")


def nearest_images(cache: VisualCache, embedding: Tensor) -> list[tuple[float, str]]:
    """Return similarity and name of the images that a cache retrieves for one embedding [1, E], nearest first."""
    ids = cache.neighbors(embedding)[0].numpy()
    # An approximate index may find fewer than it was asked for.
    ids = ids[ids >= 0]
    unit = (embedding[0] / embedding[0].norm()).numpy()
    similarities = cache.index.vectors(ids) @ unit
    names = image_names(cache.index, cache.index.keys(ids))
    return list(zip(similarities.tolist(), names, strict=True))


def image_names(index: Index, keys: Sequence[str | None]) -> list[str]:
    """Return the names of images: their paths if the index's store has them, otherwise their content hashes."""
    info, known = index.info, [key for key in keys if key is not None]
    folders = [Path(STORE, info.fingerprint[:16])]
    if isinstance(info, IndexInfo) and info.store is not None:
        folders.insert(0, Path(index.source) / info.store.path)
    found = (EmbeddingStore.existing(folder, info.fingerprint, info.embedding_size) for folder in folders)
    sources: dict[str, str | None] = {}
    # A name is a convenience: without the store the hash identifies the image too.
    with suppress(StoreError):
        if known and (store := next(filter(None, found), None)):
            sources = dict(zip(known, store.sources(known), strict=True))
    return [
        sources.get(key) or f"content hash {key}" if key else "(the index has no content hashes)"
        for key in keys
    ]
