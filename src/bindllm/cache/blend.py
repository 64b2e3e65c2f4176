"""The formulas of the visual cache on arrays, in double precision, each row on its own.

After ImageBind-LLM (https://arxiv.org/abs/2309.03905), section 3.4, and its released code.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from bindllm.cache.settings import CacheSettings
from bindllm.embeddings.shards import as_hex
from bindllm.errors import InputError, StoreError

if TYPE_CHECKING:
    from bindllm.embeddings.store import EmbeddingStore

# If the mean of unit vectors is shorter than this, they cancel out and no direction is left.
_SHORTEST = 1e-4


def unit_rows(rows: np.ndarray) -> np.ndarray:
    """Return rows [..., E] at unit length, float32; a row without direction becomes NaN.

    Examples:
        >>> unit_rows(np.array([[3.0, 4.0]], np.float32))
        array([[0.6, 0.8]], dtype=float32)
    """
    rows = np.asarray(rows, np.float32)
    # In double precision the square of a float32 neither overflows nor underflows to zero.
    norms = np.sqrt(np.square(rows, dtype=np.float64).sum(axis=-1, keepdims=True))
    with np.errstate(invalid="ignore", divide="ignore"):
        return (rows / norms).astype(np.float32)


def read_units(store: EmbeddingStore, keys: np.ndarray) -> np.ndarray:
    """Return the embeddings of keys [N] at unit length, float32 [N, E].

    Raises:
        StoreError: A key that is not stored, or an embedding without direction; names the key.
    """
    names = as_hex(keys)
    rows = unit_rows(store.get(names).numpy())
    broken = np.flatnonzero(~np.isfinite(rows).all(axis=1))
    if len(broken):
        raise StoreError(
            f"{store.folder}: the embedding with key {names[broken[0]]} is zero or not finite, so it has no direction"
        )
    return rows


def check_queries(queries: np.ndarray, embedding_size: int, source: str) -> None:
    """Raise an InputError if queries of an index are not [N, E]."""
    if queries.ndim != 2 or queries.shape[1] != embedding_size:
        raise InputError(f"{source} takes queries [N, {embedding_size}], not {list(queries.shape)}")


def similarities_of(queries: np.ndarray, ids: np.ndarray, vectors: np.ndarray) -> np.ndarray:
    """Return the cosine of each query and each of its candidates, float64 [N, C]; minus infinity for a missing one.

    Computed in double precision and row by row, so the result does not depend on the batch.

    Args:
        queries: Unit norm, [N, E].
        ids: Ids of the candidates, -1 for a missing one, [N, C].
        vectors: Vectors of the candidates, unit norm, [N, C, E].
    """
    products = queries[:, None].astype(np.float64) * vectors  # [N, C, E]
    return np.where(ids < 0, -np.inf, products.sum(axis=-1))


def best(similarities: np.ndarray, top_k: int) -> np.ndarray:
    """Return the columns of the K most similar candidates, best first, [N, K]; the first of equal ones wins."""
    return np.argsort(-similarities, axis=1, kind="stable")[:, :top_k]


def retrieve(similarities: np.ndarray, vectors: np.ndarray, settings: CacheSettings) -> np.ndarray:
    """Return the weighted sum of the neighbors of each query, float64 [N, E]; zero if it has none.

    Args:
        similarities: Of the candidates in any order, minus infinity for a missing one, [N, C].
        vectors: Of the candidates, [N, C, E].
        settings: Number of neighbors, temperature and formula.
    """
    columns = best(similarities, settings.top_k)  # [N, K]
    near = np.take_along_axis(similarities, columns, axis=1)  # [N, K]
    found = near > -np.inf
    safe = np.where(found, near, 0.0)
    if settings.formula == "released":
        # Softmax. The first column is the largest; if it is missing, all are.
        shares = np.where(found, np.exp(settings.temperature * (safe - safe[:, :1])), 0.0)
        shares /= np.maximum(shares.sum(axis=1, keepdims=True), 1.0)
    else:
        # The paper weights by the similarity itself; `mix` makes the sum unit length.
        shares = safe
    # Scatter the few shares instead of gathering many vectors; all other candidates get a share of 0.
    placed = np.zeros_like(similarities)
    np.put_along_axis(placed, columns, shares, axis=1)
    return (placed[..., None] * vectors).sum(axis=1)


def mix(queries: np.ndarray, retrieved: np.ndarray, weight: float) -> tuple[np.ndarray, int]:
    """Return ``unit((1 - weight) * query + weight * unit(retrieved))`` and the number of rows left unchanged."""
    lengths = np.linalg.norm(retrieved, axis=1, keepdims=True)
    # The 1.0 only prevents a division by zero: such rows are lost, and replaced below.
    mixed = (1 - weight) * queries + weight * retrieved / np.where(lengths > 0, lengths, 1.0)
    norms = np.linalg.norm(mixed, axis=1, keepdims=True)
    lost = (lengths <= _SHORTEST) | (norms <= _SHORTEST)
    return np.where(lost, queries, mixed / np.where(norms > 0, norms, 1.0)), int(lost.sum())
