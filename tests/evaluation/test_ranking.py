"""Where the right answer stands: against all orders of tied answers written out, and against plain definitions."""

import itertools

import numpy as np
import pytest
import torch
from torchmetrics.functional.classification import multiclass_accuracy
from torchmetrics.functional.retrieval import retrieval_hit_rate

from bindllm.evaluation.ranking import (
    average_precisions,
    chance,
    chance_of_precision,
    cosines,
    hit_rate,
    rank,
)


def hits_by_hand(scores: list[float], right: set[int], k: int) -> float:
    """Mean over every order of the answers, of which a stable sort keeps that of equal ones."""
    found = []
    for order in itertools.permutations(range(len(scores))):
        first = sorted(order, key=lambda n: -scores[n])[:k]
        found.append(bool(right & set(first)))
    return sum(found) / len(found)


@pytest.mark.parametrize("k", [1, 2, 3, 6])
@pytest.mark.parametrize("right", [{0}, {3}, {1, 4}, {0, 1, 2}])
@pytest.mark.parametrize(
    "scores", [[3, 2, 1, 5, 4, 0], [1, 1, 1, 1, 1, 1], [2, 2, 1, 1, 0, 2], [0, 3, 3, 0, 3, 0]]
)
def test_ties_are_taken_in_all_orders(scores, right, k):
    rate = hit_rate(rank(torch.tensor([scores], dtype=torch.float64), [sorted(right)]), k)
    assert float(rate) == pytest.approx(hits_by_hand(scores, right, k), abs=1e-12)


def test_without_ties_it_is_what_torchmetrics_counts():
    scores = torch.randn(200, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    labels = torch.arange(200) % 12
    ranks = rank(scores, [[int(label)] for label in labels])
    for k in (1, 5):
        expected = multiclass_accuracy(scores, labels, num_classes=12, average="micro", top_k=k)
        assert float(hit_rate(ranks, k).mean()) == pytest.approx(float(expected), abs=1e-6)
    several = torch.rand(200, 12, generator=torch.Generator().manual_seed(1)) < 0.3
    several[:, 0] |= ~several.any(dim=1)
    ranks = rank(scores, [row.nonzero().flatten().tolist() for row in several])
    for k in (1, 5, 10):
        expected = torch.stack(
            [retrieval_hit_rate(*row, top_k=k) for row in zip(scores, several, strict=True)]
        )
        assert torch.equal(hit_rate(ranks, k).float(), expected)


def test_chance_is_what_an_encoder_reaches_that_gives_one_embedding_for_all():
    right = [[0], [1, 2], [3, 4, 5]]
    ranks = rank(torch.ones(3, 8, dtype=torch.float64), right)
    counts = torch.tensor([1, 2, 3])
    for k in (1, 5, 8, 10):
        assert chance(counts, 8, k) == pytest.approx(float(hit_rate(ranks, k).mean()))
    assert chance(torch.tensor([1]), 50, 1) == pytest.approx(0.02)
    assert chance(counts, 8, 8) == 1


def test_cosines_of_equal_embeddings_are_equal():
    rows = torch.nn.functional.normalize(
        torch.randn(64, 1024, generator=torch.Generator().manual_seed(2)), dim=1
    )
    candidates = rows[[5] * 33 + [6] * 4]
    found = cosines(rows, candidates)
    assert torch.equal(found[:, :33], found[:, :1].expand(-1, 33))
    assert found.dtype == torch.float64
    np.testing.assert_allclose(found[5, 0], 1, atol=1e-6)


def test_embeddings_that_differ_by_rounding_alone_are_tied():
    """As one text gives in two batches, or one picture in two processes."""
    row = torch.nn.functional.normalize(torch.randn(1, 64, generator=torch.Generator().manual_seed(4)), dim=1)
    noise = torch.randn(4, 64, generator=torch.Generator().manual_seed(5))
    ranks = rank(
        cosines(row, row + 1e-9 * torch.sign(noise) + torch.tensor([[0.0], [6e-8], [0.0], [-6e-8]])), [[1]]
    )
    assert [int(part) for part in ranks] == [0, 3, 1]


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
    for places in itertools.combinations(range(num_items), num_right):
        found.append(np.mean([(n + 1) / (place + 1) for n, place in enumerate(places)]))
    by_chance = chance_of_precision(torch.tensor([num_right]), num_items)
    assert float(by_chance) == pytest.approx(np.mean(found))
