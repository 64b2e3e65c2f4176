"""The formulas of the visual cache, on arrays: in double precision, each row by itself.

After ImageBind-LLM (arXiv 2309.03905) section 3.4 and its released code.
"""

from __future__ import annotations

import math

import numpy as np

from bindllm.errors import InputError, did_you_mean

FORMULAS = ("released", "paper")

# Unit vectors whose mean is shorter than this point in opposite directions: no direction is left.
_SHORTEST = 1e-4


def unit_rows(rows: np.ndarray) -> np.ndarray:
    """Return rows [..., E] at unit length, float32; a row without direction becomes NaN.

    Example:
        >>> unit_rows(np.array([[3.0, 4.0]], np.float32))
        array([[0.6, 0.8]], dtype=float32)
    """
    rows = np.asarray(rows, np.float32)
    # In double precision no square of a float32 overflows, or becomes zero.
    norms = np.sqrt(np.square(rows, dtype=np.float64).sum(axis=-1, keepdims=True))
    with np.errstate(invalid="ignore", divide="ignore"):
        return (rows / norms).astype(np.float32)


def similarities_of(queries: np.ndarray, numbers: np.ndarray, vectors: np.ndarray) -> np.ndarray:
    """Return the cosine of each query and each of its candidates, [N, C], float64; minus infinity for a missing one.

    In double precision and row by row, so that the batch does not matter.

    Args:
        queries: unit norm, [N, E].
        numbers: of the candidates, -1 for a missing one, [N, C].
        vectors: theirs, unit norm, [N, C, E].
    """
    products = queries[:, None].astype(np.float64) * vectors
    return np.where(numbers < 0, -np.inf, products.sum(axis=-1))


def best(similarities: np.ndarray, top_k: int) -> np.ndarray:
    """Return the places of the K most alike candidates, best first, [N, K]; of equal ones the first wins."""
    return np.argsort(-similarities, axis=1, kind="stable")[:, :top_k]


def retrieve(
    similarities: np.ndarray, vectors: np.ndarray, top_k: int, temperature: float, formula: str
) -> np.ndarray:
    """Return the weighted sum of the neighbours of each query, [N, E], float64; zero where there are none.

    Args:
        similarities: of the candidates, in any order, minus infinity for a missing one, [N, C].
        vectors: of the candidates, [N, C, E].
        top_k: how many of them are neighbours.
        temperature: sharpness of the released formula.
        formula: one of `FORMULAS`.
    """
    places = best(similarities, top_k)
    near = np.take_along_axis(similarities, places, axis=1)
    found = near > -np.inf
    safe = np.where(found, near, 0.0)
    if formula == "released":
        # The first is the best, and where it is missing all are.
        shares = np.where(found, np.exp(temperature * (safe - safe[:, :1])), 0.0)
        shares /= np.maximum(shares.sum(axis=1, keepdims=True), 1.0)
    else:
        shares = safe
    # A few shares are moved instead of many vectors; candidates that are no neighbours have a share of 0.
    placed = np.zeros_like(similarities)
    np.put_along_axis(placed, places, shares, axis=1)
    return (placed[..., None] * vectors).sum(axis=1)


def mix(queries: np.ndarray, retrieved: np.ndarray, weight: float) -> tuple[np.ndarray, int]:
    """Return ``unit((1 - weight) * query + weight * unit(retrieved))``, and how many rows had to stay as they are."""
    lengths = np.linalg.norm(retrieved, axis=1, keepdims=True)
    mixed = (1 - weight) * queries + weight * retrieved / np.where(lengths > 0, lengths, 1.0)
    norms = np.linalg.norm(mixed, axis=1, keepdims=True)
    lost = (lengths <= _SHORTEST) | (norms <= _SHORTEST)
    return np.where(lost, queries, mixed / np.where(norms > 0, norms, 1.0)), int(lost.sum())


def check_settings(top_k: int, temperature: float, weight: float, formula: str) -> None:
    """Refuse settings out of their range.

    Raises:
        InputError: names the setting.
    """
    if not isinstance(top_k, int) or top_k < 1:
        raise InputError(f"top_k is {top_k!r}, expected a whole number of at least 1")
    if not (math.isfinite(temperature) and temperature >= 0):
        raise InputError(f"temperature is {temperature}, expected a finite number of at least 0")
    if not 0 <= weight <= 1:
        raise InputError(f"weight is {weight}, expected a number from 0 to 1")
    if formula not in FORMULAS:
        raise InputError(f"unknown formula {formula!r}. {did_you_mean(formula, FORMULAS)}")
