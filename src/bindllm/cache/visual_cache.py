"""The visual cache: embeddings of other senses are drawn towards those of real pictures.

The bind network has learnt from pictures alone, and the embedding of a sound or a text lies beside those of pictures
in the joint space. The nearest picture embeddings are mixed in before it sees them: ImageBind-LLM (arXiv
2309.03905) section 3.4, after Tip-Adapter (arXiv 2111.03930). Nothing is trained.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, Self

import numpy as np
import torch
from torch import Tensor

from bindllm.cache.blend import best, check_settings, mix, retrieve, similarities_of, unit_rows
from bindllm.cache.factories import check_factory
from bindllm.cache.index import VectorIndex
from bindllm.errors import InputError, StoreError

if TYPE_CHECKING:
    from bindllm.embeddings.store import EmbeddingStore
    from bindllm.encoders import Encoder
    from bindllm.media import Media

# Faiss rounds otherwise for a batch than for one query: neighbours are looked for a little further and ranked again.
_SPARE = 8
# Numbers of candidates that are compared at the same time, about: what a processor's cache holds in double precision.
_NUMBERS = 1 << 18


class Info(Protocol):
    """What a cache asks of an index about itself."""

    @property
    def fingerprint(self) -> str:
        """Of the encoder that made the vectors."""

    @property
    def count(self) -> int:
        """Number of vectors."""

    @property
    def embedding_size(self) -> int:
        """E."""


class Index(Protocol):
    """Unit vectors that are found by inner product: a `VectorIndex`, or one on a server."""

    source: str

    @property
    def info(self) -> Info:
        """What it is made of."""

    def __len__(self) -> int:
        """Return the number of vectors."""

    def search(self, queries: np.ndarray, count: int) -> np.ndarray:
        """Return the numbers of the nearest, int64 [N, min(count, len)], best first, -1 where none."""

    def vectors(self, numbers: np.ndarray) -> np.ndarray:
        """Return the vectors with these numbers [...], float32 [..., E]; zeros for -1."""

    def keys(self, numbers: np.ndarray) -> list[str | None]:
        """Return the content hashes of the media with these numbers; None for -1 or where not known."""


class VisualCache:
    """Picture embeddings of one encoder, and how they are mixed into others.

    Args:
        index: of picture embeddings.
        top_k: neighbours that are mixed, at least 1; fewer where the cache is smaller.
        temperature: sharpness of the released formula, at least 0 (all neighbours alike). The released code has 20; the
            default did better wherever it was measured (docs/results.md).
        weight: share of the neighbours, 0 (no cache) to 1.
        formula: "released", the code of ImageBind-LLM: softmax over ``temperature`` times similarity; or "paper": the
            similarities themselves.
        skip: media groups with any of these modalities are left as they are by a model. Pictures need no cache;
            the published demo asks it for every group, which is ``()``.

    Raises:
        InputError: a setting out of its range.

    Example:
        cache = VisualCache.build("runs/cache", EmbeddingStore.for_encoder("data/store", encoder))
        cache = VisualCache.open("runs/cache", weight=0.3)
        model.generate("What do you hear?", media=[Media.audio("bark.wav")], cache=cache)
    """

    def __init__(
        self,
        index: Index,
        *,
        top_k: int = 10,
        temperature: float = 100.0,
        weight: float = 0.5,
        formula: str = "released",
        skip: Sequence[str] = ("image",),
    ) -> None:
        check_settings(top_k, temperature, weight, formula)
        if isinstance(skip, str):
            raise InputError(f"skip takes a list of modalities: write [{skip!r}]")
        self.index, self.skip = index, tuple(skip)
        self.top_k, self.temperature, self.weight, self.formula = top_k, temperature, weight, formula

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
        """Build a cache of all picture embeddings in a store; see `VectorIndex.build` and the class."""
        return cls(VectorIndex.build(folder, store, factory=factory, search=search), **settings)

    @classmethod
    def from_pictures(
        cls,
        pictures: str | Path | Sequence[str | Path],
        encoder: Encoder,
        folder: str | Path,
        *,
        store: str | Path = "data/store",
        factory: str = "auto",
        search: str = "auto",
        **settings: Any,
    ) -> Self:
        """Build a cache of these pictures alone.

        Those whose content is in the store already are not embedded again; those that cannot be read are counted,
        and the first is named, in a warning.

        Args:
            pictures: a folder, with all its sub-folders, or paths of pictures.
            encoder: embeds them.
            folder: where the cache goes.
            store: keeps the embeddings.
            factory: as for `VectorIndex.build`.
            search: likewise.
            **settings: of the class.

        Raises:
            InputError: no picture there that can be read.
            StoreError: as for `VectorIndex.build`.
        """
        from bindllm.cache.pictures import embed_pictures
        from bindllm.embeddings.store import EmbeddingStore

        # Ahead of the pictures, which may take hours to embed.
        check_factory(factory, search, encoder.embedding_size)
        opened = EmbeddingStore.for_encoder(store, encoder)
        keys = embed_pictures(pictures, encoder, opened)
        return cls(VectorIndex.build(folder, opened, factory=factory, search=search, keys=keys), **settings)

    @classmethod
    def open(cls, folder: str | Path, *, search: str | None = None, **settings: Any) -> Self:
        """Open a cache that was built before; see `VectorIndex.open` and the class."""
        return cls(VectorIndex.open(folder, search=search), **settings)

    @classmethod
    def open_bare(cls, file: str | Path, fingerprint: str, **settings: Any) -> Self:
        """Open a file of Faiss, such as the published ``knn.index``; see `VectorIndex.open_bare`."""
        return cls(VectorIndex.open_bare(file, fingerprint), **settings)

    def __len__(self) -> int:
        """Return the number of picture embeddings."""
        return len(self.index)

    def __repr__(self) -> str:
        return f"VisualCache({self.index.source!r}, {len(self)} pictures of size {self.index.info.embedding_size})"

    def blend(
        self,
        embedding: Tensor,
        top_k: int | None = None,
        temperature: float | None = None,
        weight: float | None = None,
        formula: str | None = None,
    ) -> Tensor:
        """Mix the nearest picture embeddings into others.

        For a query ``v`` and its neighbours ``x`` with similarities ``s``: ``r = unit(sum of p * x)`` with
        ``p = softmax(temperature * s)``, or ``p = s`` by the paper's formula, and the result is
        ``unit((1 - weight) * v + weight * r)``. Each row depends on its own query alone, to the last bit.

        Args:
            embedding: the queries, [N, E], any float dtype and device; those of another length than 1 are scaled
                to it first (fusing may have shortened them).
            top_k: as for the class, like the others; None: what the cache was made with.
            temperature: likewise.
            weight: likewise; 0 returns the queries bit for bit, unscaled.
            formula: likewise.

        Returns:
            unit norm, [N, E], dtype and device of the queries. A query for which an approximate index finds nothing,
            or that its neighbours cancel out, stays itself at unit length, and a warning is logged.

        Raises:
            InputError: queries of another width, zero or not finite; a setting out of its range.
        """
        top_k = self.top_k if top_k is None else top_k
        temperature = self.temperature if temperature is None else temperature
        weight = self.weight if weight is None else weight
        formula = self.formula if formula is None else formula
        check_settings(top_k, temperature, weight, formula)
        queries = self._unit_queries(embedding)
        if weight == 0 or not len(queries):
            return embedding.clone()
        numbers = self._candidates(queries, top_k)
        blended, kept = np.empty_like(queries), 0
        for part in self._parts(numbers):
            similarities, vectors = self._compare(queries[part], numbers[part])
            retrieved = retrieve(similarities, vectors, top_k, temperature, formula)
            blended[part], lost = mix(queries[part], retrieved, weight)
            kept += lost
        if kept:
            logging.getLogger("bindllm").warning(
                "%s: %d of %d queries found no neighbours to mix in and stay as they are",
                self.index.source,
                kept,
                len(queries),
            )
        return torch.from_numpy(blended).to(embedding)

    def neighbours(self, embedding: Tensor, top_k: int | None = None) -> Tensor:
        """Return the numbers of the nearest pictures in the index, best first, -1 where there are no more.

        Args:
            embedding: the queries, as for `blend`.
            top_k: as for `blend`.

        Returns:
            int64, [N, min(top_k, len)].
        """
        top_k = self.top_k if top_k is None else top_k
        check_settings(top_k, self.temperature, self.weight, self.formula)
        queries = self._unit_queries(embedding)
        numbers = self._candidates(queries, top_k)
        ranked = [numbers[:0, :top_k]]
        for part in self._parts(numbers):
            places = best(self._compare(queries[part], numbers[part])[0], top_k)
            ranked.append(np.take_along_axis(numbers[part], places, axis=1))
        return torch.from_numpy(np.concatenate(ranked))

    def blend_groups(
        self, embeddings: Tensor, groups: Sequence[Sequence[Media]], encoders: Sequence[Encoder]
    ) -> Tensor:
        """Blend the embeddings of media groups, leaving those with a modality in ``skip`` as they are.

        Args:
            embeddings: one of each group, [N, E].
            groups: the media that each was made of.
            encoders: those of the model.

        Raises:
            StoreError: the cache was built with none of these encoders.
        """
        self.check_encoders({encoder.fingerprint() for encoder in encoders})
        rows = [n for n, group in enumerate(groups) if not {item.modality for item in group} & set(self.skip)]
        blended = embeddings.clone()
        if rows:
            blended[rows] = self.blend(embeddings[rows])
        return blended

    def check_encoders(self, fingerprints: Collection[str]) -> None:
        """Refuse a model with none of whose encoders the cache was built.

        Raises:
            StoreError: names both sides.
        """
        own = self.index.info.fingerprint
        if own not in fingerprints:
            raise StoreError(
                f"{self.index.source} was built with the encoder {own[:16]}, the model has "
                f"{', '.join(sorted(name[:16] for name in fingerprints))}: to it these pictures mean nothing. Build a "
                "cache with the model's own encoder"
            )

    def _unit_queries(self, embedding: Tensor) -> np.ndarray:
        size = self.index.info.embedding_size
        if embedding.dim() != 2 or embedding.shape[1] != size or not embedding.is_floating_point():
            raise InputError(
                f"the cache takes embeddings [N, {size}] of a float dtype, not {list(embedding.shape)} of "
                f"{embedding.dtype}"
            )
        rows = embedding.detach().to("cpu", torch.float32).numpy()
        units = unit_rows(rows)
        broken = np.flatnonzero(~np.isfinite(units).all(axis=1))
        if len(broken):
            kind = "zero" if not rows[broken[0]].any() else "not finite"
            raise InputError(
                f"{len(broken)} of {len(rows)} queries of the cache have no direction; row {broken[0]} is {kind}. "
                "Check the media and the encoder's weights and dtype"
            )
        return units

    def _parts(self, numbers: np.ndarray) -> list[slice]:
        """Cut candidates [N, C] into rows whose vectors fit into memory."""
        step = max(1, _NUMBERS // (numbers.shape[1] * self.index.info.embedding_size))
        return [slice(start, start + step) for start in range(0, len(numbers), step)]

    def _candidates(self, queries: np.ndarray, top_k: int) -> np.ndarray:
        """Return the numbers of what may be nearest, [N, C], rising: ties go to the smaller number."""
        return np.sort(self.index.search(queries, top_k + _SPARE), axis=1)

    def _compare(self, queries: np.ndarray, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the exact similarities [N, C] of queries [N, E] to candidates, and the candidates' vectors."""
        vectors = self.index.vectors(numbers)
        return similarities_of(queries, numbers, vectors), vectors
