"""Preparation of clouds: centring, scaling, resampling, and degenerate ones."""

import numpy as np
import pytest
import torch

from bindllm.encoders.pointbind.cloud import fit_cloud, unit_cloud
from goldens import fill_input, golden
from pointbind_parts import bumpy


def test_centring_and_scaling_are_the_published_ones():
    raw = fill_input("pc_raw", (2048, 3), -0.7, 2.3).numpy()
    np.testing.assert_allclose(unit_cloud(raw), golden("prep_point")["pc_norm"], atol=2e-6, rtol=0)
    np.testing.assert_array_equal(fit_cloud(raw, 2048), unit_cloud(raw))


@pytest.mark.parametrize("count", [1, 3, 199, 200, 201, 10_000, 100_000])
def test_any_number_of_points_becomes_the_wanted_number(count):
    cloud = fit_cloud(bumpy(1, count), 200)
    assert cloud.shape == (200, 3)
    assert cloud.dtype == torch.float32
    assert torch.isfinite(cloud).all()
    if count >= 200:
        assert cloud.mean(dim=0).abs().max() < 1e-6
    assert float(cloud.norm(dim=1).max()) == pytest.approx(float(count > 1), abs=1e-6)


def test_too_few_points_are_repeated_evenly():
    points = bumpy(2, 30)
    rows, counts = np.unique(fit_cloud(points, 100).numpy(), axis=0, return_counts=True)
    np.testing.assert_array_equal(rows, np.unique(unit_cloud(points), axis=0))
    assert set(counts) == {3, 4}


def test_too_many_points_are_thinned_evenly():
    # Two cubes a whole unit apart, three times as many points in one as in the other: about as many are left of each.
    random = np.random.default_rng(0)
    points = random.uniform(size=(400, 3)).astype(np.float32)
    points[:100, 0] += 2
    cloud = fit_cloud(points, 200)[:, 0].sort().values
    left_of_gap = int((cloud[1:] - cloud[:-1]).argmax()) + 1
    assert 100 < left_of_gap < 130


def test_of_a_huge_cloud_the_work_is_bounded(monkeypatch):
    seen = []
    monkeypatch.setattr(
        "bindllm.encoders.pointbind.cloud.farthest_points",
        lambda points, count: seen.append(points.shape[1]) or torch.arange(count)[None],
    )
    fit_cloud(np.zeros((2_000_000, 3), np.float32), 64)
    assert seen == [128]


def test_position_and_size_do_not_matter():
    points = bumpy(0)
    prepared = fit_cloud(points, 96)
    moved = fit_cloud((points * 7 + (100, -50, 3)).astype(np.float32), 96)
    assert (prepared - moved).abs().max() < 1e-5
    for scale in (1e-30, 1e30):
        assert (prepared - fit_cloud((points * scale).astype(np.float32), 96)).abs().max() < 1e-5


def test_the_rest_of_the_order_does_not_matter_if_the_first_point_stays():
    points = bumpy(3, 150)
    turned = np.concatenate([points[:1], points[:0:-1]])
    np.testing.assert_allclose(fit_cloud(points, 96), fit_cloud(turned, 96), atol=1e-6)


@pytest.mark.parametrize("count", [1, 2, 50, 500])
@pytest.mark.parametrize("place", [(0, 0, 0), (0.1, -1e30, 3e38)])
def test_coincident_points_lie_at_the_origin(count, place):
    cloud = np.tile(np.array(place, np.float32), (count, 1))
    assert (fit_cloud(cloud, 100) == 0).all()


def test_the_given_array_is_left_alone():
    points = bumpy(1, 500)
    before = points.copy()
    fit_cloud(points, 96)
    np.testing.assert_array_equal(points, before)
