"""Recall across two sides: right answers, ties and chance, against counting by hand."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from torch.nn.functional import normalize

from bindllm.training.align_metrics import best_ranks, chance, retrieval_metrics


def test_the_best_of_several_right_answers_counts():
    gallery = torch.eye(4)
    queries = normalize(torch.tensor([[4.0, 3, 2, 1], [1.0, 2, 3, 4]]), dim=-1)
    assert best_ranks(queries, gallery, [[0], [0]]).tolist() == [1, 4]
    # Other right answers ahead of the best wrong one do not push it down.
    assert best_ranks(queries, gallery, [[1, 3], [1, 2]]).tolist() == [2, 2]
    assert best_ranks(queries, gallery, [[0, 1, 2, 3], [3, 2]]).tolist() == [1, 1]


def test_embeddings_that_are_all_alike_get_nothing():
    same = normalize(torch.ones(30, 4), dim=-1)
    found = retrieval_metrics(same, same, [[n] for n in range(30)])
    assert (found["recall@1"], found["recall@10"], found["median_rank"]) == (0.0, 0.0, 30)


def test_recall_and_counts():
    gallery = torch.eye(12)
    queries = gallery[[0, 1, 2, 3]].clone()
    answers = [[0], [5], [2, 7], [3]]
    found = retrieval_metrics(queries, gallery, answers)
    assert found["recall@1"] == 0.75
    assert (found["queries"], found["gallery"], found["median_rank"]) == (4, 12, 1)
    assert found["chance@1"] == pytest.approx((3 / 12 + 2 / 12) / 4, abs=1e-4)


@pytest.mark.parametrize(("right", "gallery", "k"), [(1, 5, 2), (2, 6, 3), (3, 7, 1), (4, 6, 5), (2, 3, 10)])
def test_chance_is_the_share_of_all_draws(right, gallery, k):
    draws = list(combinations(range(gallery), min(k, gallery)))
    share = sum(any(n < right for n in draw) for draw in draws) / len(draws)
    assert chance(right, gallery, k) == pytest.approx(share)


def test_many_queries_are_ranked_in_chunks():
    generator = torch.Generator().manual_seed(0)
    gallery = normalize(torch.randn(40, 8, generator=generator), dim=-1)
    queries = normalize(torch.randn(2500, 8, generator=generator), dim=-1)
    answers = [[n % 40, (n * 7) % 40] for n in range(2500)]
    found = best_ranks(queries, gallery, answers)
    for n in (0, 1023, 1024, 2499):
        scores = (queries[n] @ gallery.T).tolist()
        best = max(scores[a] for a in answers[n])
        assert found[n] == 1 + sum(s >= best for g, s in enumerate(scores) if g not in answers[n])
