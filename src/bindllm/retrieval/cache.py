"""The visual cache: embeddings of other senses are drawn towards those of real pictures.

The bind network has learnt from pictures alone, and the embedding of a sound or a text lies beside those of pictures
in the joint space. The nearest picture embeddings are mixed in before it sees them: ImageBind-LLM (arXiv
2309.03905) section 3.4, after Tip-Adapter (arXiv 2111.03930). Nothing is trained.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
from torch import Tensor

from bindllm.errors import InputError, StoreError, known_names
from bindllm.retrieval.index import VectorIndex, unit_rows

if TYPE_CHECKING:
    from bindllm.encoders import Encoder
    from bindllm.media import Media
    from bindllm.retrieval.store import EmbeddingStore

FORMULAS = ("released", "paper")

# Faiss rounds otherwise for a batch than for one query: neighbours are looked for a little further and ranked again.
_SPARE = 8
# Numbers of neighbours that are in memory at the same time, about: 24 MiB in single and double precision.
_NUMBERS = 1 << 21
# Unit vectors whose mean is shorter than this point in opposite directions: no direction is left.
_SHORTEST = 1e-4


class VisualCache:
    """Picture embeddings of one encoder, and how they are mixed into others.

    Args:
        index: of picture embeddings.
        top_k: neighbours that are mixed, at least 1; fewer where the cache is smaller.
        temperature: sharpness of the released formula, at least 0 (all neighbours alike).
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
        index: VectorIndex,
        *,
        top_k: int = 10,
        temperature: float = 20.0,
        weight: float = 0.5,
        formula: str = "released",
        skip: Sequence[str] = ("image",),
    ) -> None:
        _check_settings(top_k, temperature, weight, formula)
        if isinstance(skip, str):
            raise InputError(f"skip takes a list of modalities: write [{skip!r}]")
        self.index, self.skip = index, tuple(skip)
        self.top_k, self.temperature, self.weight, self.formula = top_k, temperature, weight, formula

    @classmethod
    def build(
        cls, folder: str | Path, store: EmbeddingStore, *, factory: str = "Flat", **settings: Any
    ) -> Self:
        """Build a cache of all picture embeddings in a store; see `VectorIndex.build` and the class."""
        return cls(VectorIndex.build(folder, store, factory=factory), **settings)

    @classmethod
    def open(cls, folder: str | Path, **settings: Any) -> Self:
        """Open a cache that was built before; see `VectorIndex.open` and the class."""
        return cls(VectorIndex.open(folder), **settings)

    @classmethod
    def open_bare(cls, file: str | Path, fingerprint: str, **settings: Any) -> Self:
        """Open a file of Faiss, such as the published ``knn.index``; see `VectorIndex.open_bare` and the class."""
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
        _check_settings(top_k, temperature, weight, formula)
        queries = self._unit_queries(embedding)
        if weight == 0 or not len(queries):
            return embedding.clone()
        numbers = self.index.search(queries, top_k + _SPARE)
        blended, kept = np.empty_like(queries), 0
        for part in self._parts(numbers):
            retrieved = self._retrieve(queries[part], numbers[part], top_k, temperature, formula)
            blended[part], lost = _mix(queries[part], retrieved, weight)
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
        _check_settings(top_k, self.temperature, self.weight, self.formula)
        queries = self._unit_queries(embedding)
        numbers = self.index.search(queries, top_k + _SPARE)
        ranked = [self._rank(queries[part], numbers[part], top_k)[0] for part in self._parts(numbers)]
        return torch.from_numpy(np.concatenate(ranked) if ranked else numbers[:, :top_k])

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
        known = {encoder.fingerprint() for encoder in encoders}
        if self.index.info.fingerprint not in known:
            raise StoreError(
                f"{self.index.source} was built with the encoder {self.index.info.fingerprint[:16]}, the model has "
                f"{', '.join(sorted(name[:16] for name in known))}: build a cache with the model's own encoder"
            )
        rows = [n for n, group in enumerate(groups) if not {item.modality for item in group} & set(self.skip)]
        blended = embeddings.clone()
        if rows:
            blended[rows] = self.blend(embeddings[rows])
        return blended

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

    def _rank(
        self, queries: np.ndarray, numbers: np.ndarray, top_k: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Rank candidates [N, C] exactly: numbers [N, K], similarities [N, K], float64, and vectors [N, K, E].

        Row by row in double precision, so that the batch does not matter; ties go to the smaller number, and a
        candidate that is -1 comes last with a similarity of minus infinity.
        """
        # Numbers rise within a row, so that a stable sort breaks ties by them.
        numbers = np.sort(numbers, axis=1)
        vectors = self.index.vectors(numbers)
        similarities = (queries[:, None].astype(np.float64) * vectors).sum(axis=-1)
        similarities[numbers < 0] = -np.inf
        order = np.argsort(-similarities, axis=1, kind="stable")[:, :top_k]
        return (
            np.take_along_axis(numbers, order, axis=1),
            np.take_along_axis(similarities, order, axis=1),
            np.take_along_axis(vectors, order[..., None], axis=1),
        )

    def _retrieve(
        self, queries: np.ndarray, numbers: np.ndarray, top_k: int, temperature: float, formula: str
    ) -> np.ndarray:
        """Return the weighted sum of the neighbours of each query, [N, E], float64; zero where there are none."""
        numbers, similarities, vectors = self._rank(queries, numbers, top_k)
        found = numbers >= 0
        safe = np.where(found, similarities, 0.0)
        if formula == "released":
            # The first is the best, and where it is missing all are.
            shares = np.where(found, np.exp(temperature * (safe - safe[:, :1])), 0.0)
            shares /= np.maximum(shares.sum(axis=1, keepdims=True), 1.0)
        else:
            shares = safe
        return (shares[..., None] * vectors).sum(axis=1)


def _mix(queries: np.ndarray, retrieved: np.ndarray, weight: float) -> tuple[np.ndarray, int]:
    """Return ``unit((1 - weight) * query + weight * unit(retrieved))``, and how many rows had to stay as they are."""
    lengths = np.linalg.norm(retrieved, axis=1, keepdims=True)
    mixed = (1 - weight) * queries + weight * retrieved / np.where(lengths > 0, lengths, 1.0)
    norms = np.linalg.norm(mixed, axis=1, keepdims=True)
    lost = (lengths <= _SHORTEST) | (norms <= _SHORTEST)
    return np.where(lost, queries, mixed / np.where(norms > 0, norms, 1.0)), int(lost.sum())


def _check_settings(top_k: int, temperature: float, weight: float, formula: str) -> None:
    if not isinstance(top_k, int) or top_k < 1:
        raise InputError(f"top_k is {top_k!r}, expected a whole number of at least 1")
    if not (math.isfinite(temperature) and temperature >= 0):
        raise InputError(f"temperature is {temperature}, expected a finite number of at least 0")
    if not 0 <= weight <= 1:
        raise InputError(f"weight is {weight}, expected a number from 0 to 1")
    if formula not in FORMULAS:
        raise InputError(f"unknown formula {formula!r}. {known_names(formula, FORMULAS)}")
