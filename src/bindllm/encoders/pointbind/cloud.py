"""Point clouds as both encoders expect them: normalized, sampled to a fixed size, and cut into groups of neighbors."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

# Distances that are held at once: on a CPU they should stay in its cache, elsewhere they should fill the machine.
_CPU_DISTANCES = 1 << 17
_DISTANCES = 1 << 24

_LOW_BITS = (1 << 32) - 1

# Farthest-point sampling takes time in proportion to the cloud: of more than this many times the wanted points,
# evenly spaced ones are taken first.
_POOL = 2

_BLOCK = 1 << 20


class Level(NamedTuple):
    """The groups of one level: B clouds, G centers, K neighbors.

    Attributes:
        centers: [B, G, 3], float32.
        chosen: which points of the level below the centers are, [B, G].
        neighbors: the points of the level below nearest to each center, itself included, in no order, [B, G, K].
    """

    centers: Tensor
    chosen: Tensor
    neighbors: Tensor


def make_level(points: Tensor, count: int, neighbors: int, *, dead_zone: float | None = None) -> Level:
    """Return ``count`` groups of points [B, N, 3]; see `farthest_points` and `nearest_points`."""
    # Centers are points of the level below, so indices suffice to follow a group down.
    chosen = farthest_points(points, count, dead_zone=dead_zone)
    centers = gather(points, chosen)
    return Level(centers, chosen, nearest_points(points, centers, neighbors))


def gather(values: Tensor, indices: Tensor) -> Tensor:
    """Return rows of values [B, N, C] at indices [B, ...], as [B, ..., C]."""
    rows = torch.arange(len(values), device=values.device).view(-1, *[1] * (indices.ndim - 1))
    return values[rows, indices]


def farthest_points(points: Tensor, count: int, *, dead_zone: float | None = None) -> Tensor:
    """Pick points one after the other, each the farthest from all that were picked before.

    The first is point 0. Once every distinct point has been picked, point 0 is picked again (or, with a dead zone,
    the first point outside it).

    Args:
        points: [B, N, 3].
        dead_zone: points with a squared distance to the origin up to this are never picked, point 0 excepted; if
            all points are in it, point 0 is picked every time. None: no dead zone.

    Returns:
        Indices, int64, [B, count].
    """
    axes = points.detach().float().permute(2, 0, 1).contiguous()
    nearest = torch.full(axes.shape[1:], torch.inf, device=points.device)
    if dead_zone is not None:
        # Below every distance and never raised by a minimum: such points lose to all others.
        nearest.masked_fill_(_squared(axes) <= dead_zone, -1.0)
    if points.device.type != "cpu":
        return _pick(axes, nearest, count)
    picks = [
        _pick_on_cpu(a.contiguous().numpy(), n.numpy(), count)
        for a, n in zip(axes.unbind(1), nearest, strict=True)
    ]
    return torch.from_numpy(np.stack(picks))


def _squared(difference: Tensor) -> Tensor:
    """Return x * x + y * y + z * z of [3, ...]; written out, since a sum may add in any order."""
    x, y, z = difference
    return x * x + y * y + z * z


def _pick(axes: Tensor, nearest: Tensor, count: int) -> Tensor:
    """The loop of `farthest_points` for all clouds at once; nothing in it waits for the device."""
    rows = torch.arange(axes.shape[1], device=axes.device)
    picks = torch.zeros(axes.shape[1], count, dtype=torch.int64, device=axes.device)
    for step in range(1, count):
        last = axes[:, rows, picks[:, step - 1]]
        torch.minimum(nearest, _squared(axes - last.unsqueeze(-1)), out=nearest)
        picks[:, step] = nearest.argmax(dim=1)
    return picks


def _pick_on_cpu(axes: np.ndarray, nearest: np.ndarray, count: int) -> np.ndarray:
    """The same for one cloud in numpy: its calls cost a third of torch's here."""
    # Buffers are reused, and the sums keep the order of `_squared`, so the picks equal those of an accelerator.
    picks = np.zeros(count, np.int64)
    total, part = np.empty_like(nearest), np.empty_like(nearest)
    x, *others = axes
    last = 0
    for step in range(1, count):
        np.subtract(x, x[last], out=total)
        np.multiply(total, total, out=total)
        for axis in others:
            np.subtract(axis, axis[last], out=part)
            np.multiply(part, part, out=part)
            np.add(total, part, out=total)
        np.minimum(nearest, total, out=nearest)
        picks[step] = last = int(nearest.argmax())
    return picks


def nearest_points(points: Tensor, centers: Tensor, count: int) -> Tensor:
    """Return the indices of the ``count`` points nearest to each center, in no order.

    Args:
        points: [B, N, 3] with N at least ``count``.
        centers: [B, G, 3].

    Returns:
        Indices, int64, [B, G, K].
    """
    # In float32 with any dtype of the network: half precision would choose other neighbors.
    points, centers = points.float(), centers.float()
    held = _CPU_DISTANCES if points.device.type == "cpu" else _DISTANCES
    size = max(1, held // points.shape[1])
    order = torch.arange(points.shape[1], device=points.device)
    groups = []
    for axes, middles in zip(points.transpose(1, 2).contiguous(), centers, strict=True):
        for some in middles.split(size):
            distances = _squared(some.T.unsqueeze(2) - axes.unsqueeze(1))
            # The bits of a float that is not negative are in its order. With the index below them no two are equal.
            keys = distances.view(torch.int32).to(torch.int64) << 32 | order
            groups.append(keys.topk(count, largest=False, sorted=False).values & _LOW_BITS)
    return torch.cat(groups).view(*centers.shape[:2], count)


def within(centers: Tensor, radius: float) -> Tensor:
    """Tell which pairs of centers [B, G, 3] are nearer to each other than a radius: bool, [B, G, G]."""
    axes = centers.float().permute(2, 0, 1)
    return _squared(axes.unsqueeze(3) - axes.unsqueeze(2)) < radius * radius


def fit_cloud(points: np.ndarray, count: int) -> Tensor:
    """Center and scale a cloud, and bring it to a number of points; the same bits every time.

    - Too few points are repeated in their order, all of them equally often but for a rest.
    - Of too many, farthest-point sampling from point 0 picks, as for the published test data; if the cloud
      has more than twice the wanted number, twice that number is first taken at even steps through the file. So the
      order of the points decides which ones are kept; the shape hardly changes.
    - What is left is centered and scaled once more, so that the mean is at the origin and the largest norm 1.

    Coincident points, one point among them, all lie at the origin.

    Args:
        points: [N, 3], float32, finite, N at least 1.

    Returns:
        [count, 3], float32.
    """
    if len(points) <= count:
        whole = unit_cloud(points)
        return torch.from_numpy(whole[np.arange(count) % len(points)])
    middle, extent = _center_and_extent(points)
    pool = min(len(points), _POOL * count)
    taken = points[np.arange(pool) * len(points) // pool]
    taken = ((taken.astype(np.float64) - middle) / extent).astype(np.float32)
    chosen = farthest_points(torch.from_numpy(taken)[None], count)[0].numpy()
    return torch.from_numpy(unit_cloud(taken[chosen]))


def unit_cloud(points: np.ndarray) -> np.ndarray:
    """Subtract the mean and divide by the largest distance to it: [N, 3], float32 (Point-Bind's zero-shot test)."""
    middle, extent = _center_and_extent(points)
    return ((points.astype(np.float64) - middle) / extent).astype(np.float32)


def _center_and_extent(points: np.ndarray) -> tuple[np.ndarray, float]:
    """Return the mean and the largest distance to it (1 if that is 0), in double precision, block by block.

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
