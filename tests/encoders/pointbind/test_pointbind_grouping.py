"""Sampling and grouping: published indices, ties, the dead zone, and the same picks everywhere."""

import numpy as np
import pytest
import torch

from bindllm.encoders.pointbind import cloud
from bindllm.encoders.pointbind.cloud import farthest_points, gather, make_level, nearest_points, within
from bindllm.encoders.pointbind.networks import DEAD_ZONE
from goldens import fill_input, golden


def synthetic(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("dead_zone", "name"), [(DEAD_ZONE, "fps_small_skip"), (None, "fps_small_noskip")])
def test_picks_are_the_published_ones(dead_zone, name):
    points = fill_input("fps_small", (1, 300, 3), -0.1, 0.1)
    found = farthest_points(points, 40, dead_zone=dead_zone)
    np.testing.assert_array_equal(found, golden("point_cloud")[name])


@pytest.mark.parametrize("dead_zone", [None, 0.5])
def test_the_loop_for_accelerators_picks_the_same(dead_zone):
    points = synthetic(3, 200, 3)
    axes = points.permute(2, 0, 1).contiguous()
    nearest = torch.full((3, 200), torch.inf)
    if dead_zone is not None:
        nearest[points.square().sum(-1) <= dead_zone] = -1
    assert torch.equal(cloud._pick(axes, nearest, 50), farthest_points(points, 50, dead_zone=dead_zone))


def test_picks_are_those_of_the_definition():
    points = synthetic(1, 60, 3).double()
    chosen = [0]
    for _ in range(19):
        chosen.append(int(torch.cdist(points[0], points[0, chosen]).amin(dim=1).argmax()))
    assert farthest_points(points.float(), 20)[0].tolist() == chosen


def test_picks_depend_on_no_batch_and_no_dtype():
    points = synthetic(4, 100, 3).half().float()
    batch = farthest_points(points, 30)
    assert torch.equal(batch[2:3], farthest_points(points[2:3], 30))
    assert torch.equal(batch, farthest_points(points.half(), 30))


def test_more_picks_than_distinct_points():
    points = torch.tensor([[[1.0, 0, 0], [0, 1, 0], [1, 0, 0], [0, 0, 3]]])
    assert farthest_points(points, 6).tolist() == [[0, 3, 1, 0, 0, 0]]


def test_points_near_the_origin_are_passed_over_even_when_there_are_no_others():
    near = synthetic(1, 50, 3) * 1e-3
    assert farthest_points(near, 8, dead_zone=DEAD_ZONE).tolist() == [[0] * 8]
    one = near.clone()
    one[0, 20] = 1.0
    # Index 0 is the start although it is near; all other picks are the only point outside.
    assert farthest_points(one, 4, dead_zone=DEAD_ZONE).tolist() == [[0, 20, 20, 20]]


def test_neighbors_are_those_of_a_full_sort():
    points, centers = synthetic(2, 300, 3), synthetic(2, 20, 3, seed=1)
    found = nearest_points(points, centers, 9).sort(dim=-1).values
    expected = torch.cdist(centers.double(), points.double()).argsort(dim=-1)[..., :9].sort(dim=-1).values
    assert torch.equal(found, expected)


def test_equally_near_neighbors_are_taken_by_their_index():
    # All eight corners of a cube are equally far from its middle, and the middle is there twice.
    corners = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0])] * 3)
    points = torch.cat([corners, torch.zeros(2, 3)])[None]
    found = nearest_points(points, torch.zeros(1, 1, 3), 5)
    assert sorted(found.flatten().tolist()) == [0, 1, 2, 8, 9]


def test_neighbors_do_not_depend_on_how_the_centers_are_cut(monkeypatch):
    points, centers = synthetic(1, 50, 3), synthetic(1, 21, 3, seed=1)
    whole = nearest_points(points, centers, 7)
    monkeypatch.setattr(cloud, "_CPU_DISTANCES", 170)
    assert torch.equal(whole, nearest_points(points, centers, 7))


def test_a_level_is_made_of_its_parts():
    points = synthetic(2, 40, 3)
    level = make_level(points, 6, 4)
    assert torch.equal(level.centers[1], points[1, level.chosen[1]])
    # Every center is among its own neighbors.
    assert (level.neighbors == level.chosen.unsqueeze(-1)).any(dim=-1).all()
    assert torch.equal(gather(points, level.neighbors)[1, 5, 3], points[1, level.neighbors[1, 5, 3]])


def test_within_a_radius():
    centers = torch.tensor([[[0.0, 0, 0], [0, 0.5, 0], [0.3, 0, 0.4]]])
    # The third is exactly at the radius from the first, which is not within.
    assert within(centers, 0.5).tolist() == [
        [[True, False, False], [False, True, False], [False, False, True]]
    ]
    assert within(centers, 0.51)[0].sum() == 7
