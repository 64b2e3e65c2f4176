"""Recall, ranks, precision and chance, compared with all orders of tied answers, with torchmetrics and by hand."""

import itertools

import numpy as np
import pytest
import torch
from torchmetrics.functional.classification import multiclass_accuracy
from torchmetrics.functional.retrieval import retrieval_hit_rate

from bindllm.evaluation.measures import (
    average_precisions,
    chance,
    chance_of_precision,
    cosines,
    find_positions,
    hit_rate,
    join_positions,
    mean_ranks,
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
    rate = hit_rate(find_positions(torch.tensor([scores], dtype=torch.float64), [sorted(right)]), k)
    assert float(rate) == pytest.approx(hits_by_hand(scores, right, k), abs=1e-12)


def test_without_ties_it_agrees_with_torchmetrics():
    scores = torch.randn(200, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    labels = torch.arange(200) % 12
    places = find_positions(scores, [[int(label)] for label in labels])
    for k in (1, 5):
        expected = multiclass_accuracy(scores, labels, num_classes=12, average="micro", top_k=k)
        assert float(hit_rate(places, k).mean()) == pytest.approx(float(expected), abs=1e-6)
    several = torch.rand(200, 12, generator=torch.Generator().manual_seed(1)) < 0.3
    several[:, 0] |= ~several.any(dim=1)
    places = find_positions(scores, [row.nonzero().flatten().tolist() for row in several])
    for k in (1, 5, 10):
        expected = torch.stack(
            [retrieval_hit_rate(*row, top_k=k) for row in zip(scores, several, strict=True)]
        )
        assert torch.equal(hit_rate(places, k).float(), expected)


def test_chance_is_what_an_encoder_reaches_that_gives_one_embedding_for_all():
    right = [[0], [1, 2], [3, 4, 5]]
    places = find_positions(torch.ones(3, 8, dtype=torch.float64), right)
    counts = torch.tensor([1, 2, 3])
    for k in (1, 5, 8, 10):
        assert chance(counts, 8, k) == pytest.approx(float(hit_rate(places, k).mean()))
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
    """As for one text in two batches, or one image in two processes."""
    row = torch.nn.functional.normalize(torch.randn(1, 64, generator=torch.Generator().manual_seed(4)), dim=1)
    noise = torch.randn(4, 64, generator=torch.Generator().manual_seed(5))
    places = find_positions(
        cosines(row, row + 1e-9 * torch.sign(noise) + torch.tensor([[0.0], [6e-8], [0.0], [-6e-8]])), [[1]]
    )
    assert [int(part) for part in places] == [0, 3, 1]


@pytest.mark.parametrize("right", [[0], [3], [1, 4], [0, 1, 2]])
@pytest.mark.parametrize("scores", [[3, 2, 1, 5, 4], [1, 1, 1, 1, 1], [2, 2, 1, 0, 2]])
def test_the_mean_rank_is_that_over_all_orders_of_ties(scores, right):
    """The rank of the best right answer among itself and the wrong ones."""
    found = []
    best = max(scores[n] for n in right)
    for order in itertools.permutations(range(len(scores))):
        ranked = sorted(order, key=lambda n: -scores[n])
        first = min(place for place, n in enumerate(ranked) if n in right and scores[n] == best)
        found.append(1 + first)
    places = find_positions(torch.tensor([scores], dtype=torch.float64), [right])
    assert float(mean_ranks(places)) == pytest.approx(np.mean(found))


def test_a_score_that_is_nan_is_not_a_hit():
    scores = torch.tensor(
        [[0.5, torch.nan, 0.1], [torch.nan] * 3, [torch.nan, 0.2, 0.1]], dtype=torch.float64
    )
    places = find_positions(scores, [[0], [1], [0]])
    assert hit_rate(places, 1).tolist() == [0, 0, 0]
    assert hit_rate(places, 2).tolist() == [1, 0, 0]


def test_queries_may_be_ranked_in_parts():
    scores = torch.randn(9, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    right = [[n % 5, (n + 2) % 5] for n in range(9)]
    whole = find_positions(scores, right)
    parts = [find_positions(scores[n : n + 4], right[n : n + 4]) for n in (0, 4, 8)]
    assert all(torch.equal(a, b) for a, b in zip(whole, join_positions(parts), strict=True))


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
