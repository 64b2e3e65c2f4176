"""Average precision against its plain definition, and chance against all orders."""

import itertools

import numpy as np
import pytest
import torch

from bindllm.evaluation.measures import average_precisions, chance_of_precision


def precision_by_hand(scores: np.ndarray, targets: np.ndarray) -> float:
    """Sum over thresholds of the gain in recall times the precision there."""
    total, earlier = 0.0, 0.0
    for threshold in sorted(set(scores), reverse=True):
        above = scores >= threshold
        recall = targets[above].sum() / targets.sum()
        total += (recall - earlier) * targets[above].mean()
        earlier = recall
    return total


@pytest.mark.parametrize("decimals", [1, 6])
def test_average_precision_is_the_plain_definition_also_with_ties(decimals):
    random = np.random.default_rng(3)
    scores = random.uniform(-1, 1, (40, 70)).round(decimals)
    targets = random.random((40, 70)) < 0.2
    targets[0] = True
    found = average_precisions(torch.from_numpy(scores), torch.from_numpy(targets))
    expected = [precision_by_hand(scores[:, n], targets[:, n]) for n in range(70)]
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-6)


@pytest.mark.parametrize(("num_right", "num_items"), [(1, 1), (1, 2), (2, 5), (3, 6), (6, 6)])
def test_chance_of_precision_is_the_mean_over_all_orders(num_right, num_items):
    found = []
    for positions in itertools.combinations(range(num_items), num_right):
        found.append(np.mean([(n + 1) / (position + 1) for n, position in enumerate(positions)]))
    by_chance = chance_of_precision(torch.tensor([num_right]), num_items)
    assert float(by_chance) == pytest.approx(np.mean(found))
