"""Choosing and grouping points: farthest-point sampling and nearest neighbours, exact on every device.

Farthest-point sampling is that of PointNet++ (https://arxiv.org/abs/1706.02413, section 3.2), here always from point
0. All distances are float32, summed coordinate by coordinate with nothing but subtraction, multiplication and
addition, and equal ones are decided by the lower index: so indices depend on no batch, dtype or device.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

# Distances that are held at once: on a CPU they should stay in its cache, elsewhere they should fill the machine.
_CPU_DISTANCES = 1 << 17
_DISTANCES = 1 << 24

_LOW_BITS = (1 << 32) - 1


class Level(NamedTuple):
    """The groups of one level: B clouds, G centres, K neighbours.

    Attributes:
        centres: [B, G, 3], float32.
        chosen: which points of the level below the centres are, [B, G].
        neighbours: the points of the level below nearest to each centre, itself included, in no order, [B, G, K].
    """

    centres: Tensor
    chosen: Tensor
    neighbours: Tensor


def make_level(points: Tensor, count: int, neighbours: int, *, dead_zone: float | None = None) -> Level:
    """Return ``count`` groups of points [B, N, 3]; see `farthest_points` and `nearest_points`."""
    chosen = farthest_points(points, count, dead_zone=dead_zone)
    centres = gather(points, chosen)
    return Level(centres, chosen, nearest_points(points, centres, neighbours))


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
        count: how many to pick.
        dead_zone: points with a squared distance to the origin up to this are never picked, point 0 excepted; where
            all points are such, point 0 is picked every time. None: there is no such zone.

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
    """The same for one cloud in numpy, whose calls cost a third of torch's here."""
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


def nearest_points(points: Tensor, centres: Tensor, count: int) -> Tensor:
    """Return the indices of the ``count`` points nearest to each centre, in no order.

    Args:
        points: [B, N, 3] with N at least ``count``.
        centres: [B, G, 3].
        count: K.

    Returns:
        Indices, int64, [B, G, K].
    """
    points, centres = points.float(), centres.float()
    held = _CPU_DISTANCES if points.device.type == "cpu" else _DISTANCES
    size = max(1, held // points.shape[1])
    order = torch.arange(points.shape[1], device=points.device)
    groups = []
    for axes, middles in zip(points.transpose(1, 2).contiguous(), centres, strict=True):
        for some in middles.split(size):
            distances = _squared(some.T.unsqueeze(2) - axes.unsqueeze(1))
            # The bits of a float that is not negative are in its order. With the index below them no two are equal.
            keys = distances.view(torch.int32).to(torch.int64) << 32 | order
            groups.append(keys.topk(count, largest=False, sorted=False).values & _LOW_BITS)
    return torch.cat(groups).view(*centres.shape[:2], count)


def within(centres: Tensor, radius: float) -> Tensor:
    """Tell which pairs of centres [B, G, 3] are nearer to each other than a radius: bool, [B, G, G]."""
    axes = centres.float().permute(2, 0, 1)
    return _squared(axes.unsqueeze(3) - axes.unsqueeze(2)) < radius * radius
