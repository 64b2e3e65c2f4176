"""A point cloud as both encoders expect it: centred, scaled to the unit ball, and of a fixed number of points."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from bindllm.encoders.pointbind.grouping import farthest_points

# Farthest-point sampling takes time in proportion to the cloud: of more than this many times the wanted points,
# evenly spaced ones are taken first.
_POOL = 2

_BLOCK = 1 << 20


def fit_cloud(points: np.ndarray, count: int) -> Tensor:
    """Centre and scale a cloud, and bring it to a number of points; the same bits every time.

    - Too few points are repeated in their order, all of them equally often but for a rest.
    - Of too many, farthest-point sampling from point 0 picks, as the published test data were made; where the cloud
      has more than twice the wanted number, twice that number is first taken at even steps through the file. So the
      order of the points decides which ones are kept, though hardly what shape they show.
    - What is left is centred and scaled once more, so that the mean is at the origin and the largest norm 1.

    Coincident points, one point among them, all lie at the origin.

    Args:
        points: [N, 3], float32, finite, N at least 1.
        count: how many points to return.

    Returns:
        [count, 3], float32.
    """
    if len(points) <= count:
        whole = unit_cloud(points)
        return torch.from_numpy(whole[np.arange(count) % len(points)])
    middle, extent = _centre_and_extent(points)
    pool = min(len(points), _POOL * count)
    taken = points[np.arange(pool) * len(points) // pool]
    taken = ((taken.astype(np.float64) - middle) / extent).astype(np.float32)
    chosen = farthest_points(torch.from_numpy(taken)[None], count)[0].numpy()
    return torch.from_numpy(unit_cloud(taken[chosen]))


def unit_cloud(points: np.ndarray) -> np.ndarray:
    """Subtract the mean and divide by the largest distance to it: [N, 3], float32 (Point-Bind's zero-shot test)."""
    middle, extent = _centre_and_extent(points)
    return ((points.astype(np.float64) - middle) / extent).astype(np.float32)


def _centre_and_extent(points: np.ndarray) -> tuple[np.ndarray, float]:
    """Return the mean and the largest distance to it (1 where that is 0), in double precision, block by block.

    Double precision, since single loses the shape of a small thing far from the origin and overflows on a large one.
    """
    blocks = range(0, len(points), _BLOCK)
    # Differences to the first point keep the mean of coincident points exact.
    first = points[0].astype(np.float64)
    total = sum((points[at : at + _BLOCK].astype(np.float64) - first).sum(axis=0) for at in blocks)
    middle = first + total / len(points)
    squares = (
        np.square(points[at : at + _BLOCK].astype(np.float64) - middle).sum(axis=1).max() for at in blocks
    )
    return middle, float(np.sqrt(max(squares))) or 1.0
