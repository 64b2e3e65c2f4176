"""How the visual cache mixes image embeddings in: its settings, and the formulas on arrays.

After ImageBind-LLM (https://arxiv.org/abs/2309.03905), section 3.4, and its released code. The formulas are computed in
double precision, each row on its own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Literal

import numpy as np

from bindllm.embeddings.shards import as_hex
from bindllm.errors import InputError, StoreError, check_choice

if TYPE_CHECKING:
    from pathlib import Path

    from bindllm.embeddings.store import EmbeddingStore

FORMULAS = ("released", "paper")

# If the mean of unit vectors is shorter than this, they cancel out and no direction is left.
_SHORTEST = 1e-4

MILVUS_SUFFIX = ".db"
"""Ending of the path of an embedded Milvus."""

MILVUS_TOKEN = "MILVUS_TOKEN"
"""Environment variable with the token of a Milvus server that asks for one."""


@dataclass(frozen=True, kw_only=True)
class CacheSettings:
    """How the nearest image embeddings are mixed into an embedding.

    Raises:
        InputError: A setting is out of its range.
    """

    top_k: int = 10
    """Neighbors that are mixed in, at least 1; fewer if the cache is smaller."""

    temperature: float = 100.0
    """Sharpness of the formula `released`, at least 0: 0 weighs all neighbors alike. The released code has 20; the
    default did better in every measurement (docs/results.md)."""

    weight: float = 0.5
    """Share of the neighbors, from 0 (as without a cache) to 1."""

    formula: Literal["released", "paper"] = "released"
    """Weights of the neighbors: softmax over ``temperature * similarity`` as in the `released` code of ImageBind-LLM,
    or the similarities themselves as in its `paper`."""

    skip: list[str] = field(default_factory=lambda: ["image"])
    """Modalities that stay unchanged. Images need no cache; the published demo uses it for them too, which is `[]`."""

    def __post_init__(self) -> None:
        if not isinstance(self.top_k, int) or self.top_k < 1:
            raise InputError(f"top_k is {self.top_k!r}, expected a whole number of at least 1")
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise InputError(f"temperature is {self.temperature}, expected a finite number of at least 0")
        if not 0 <= self.weight <= 1:
            raise InputError(f"weight is {self.weight}, expected a number from 0 to 1")
        check_choice("formula", self.formula, FORMULAS)
        # A text is iterable too, and would count as a list of its characters.
        if isinstance(self.skip, str):
            raise InputError(f"skip takes a list of modalities: write [{self.skip!r}]")


@dataclass(frozen=True)
class CacheConfig(CacheSettings):
    """The visual cache of a model and how it is mixed in: the recipe key `model.cache`, the checkpoint's entry `cache`.

    Raises:
        InputError: The folder is not a local path, or a setting is out of its range.
    """

    folder: str
    """A folder that `bindllm index` wrote, or the path of an embedded Milvus (.db)."""

    def __post_init__(self) -> None:
        # jsonargparse hands over a mapping with a misspelled key as text.
        if not isinstance(self.folder, str) or not self.folder or self.folder.startswith("{"):
            raise InputError(
                f"cache.folder is {self.folder!r}, expected the path of a folder, or a mapping with the keys "
                f"{', '.join(sorted(one.name for one in fields(self)))}"
            )
        if is_address(self.folder):
            # Loading an untrusted checkpoint would send every query to that server.
            raise InputError(
                f"cache.folder {self.folder!r} is the address of a server, which a recipe or a checkpoint must not "
                "name: pass it when you use the model, as cache= or --cache"
            )
        super().__post_init__()


def is_address(place: str) -> bool:
    """Return whether a cache is on a server rather than in a local file or folder."""
    return "://" in place


def is_milvus(place: str) -> bool:
    """Return whether a cache is in Milvus: on a server, or in an embedded database."""
    return is_address(place) or place.endswith(MILVUS_SUFFIX)


def index_command(place: str, checkpoint: str | Path) -> str:
    """Return the command that builds the cache at a place for a checkpoint."""
    return f"bindllm index {'--milvus ' if is_milvus(place) else ''}{place} --checkpoint {checkpoint}"


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
