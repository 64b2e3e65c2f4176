"""What an alignment measures: recall in one direction, counts and chance, against counting by hand."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import normalize

from bindllm.training.align import module as metrics
from bindllm.training.align.module import retrieval_metrics


def test_recall_and_counts():
    gallery = torch.eye(12)
    queries = gallery[[0, 1, 2, 3]].clone()
    answers = [[0], [5], [2, 7], [3]]
    found = retrieval_metrics(queries, gallery, answers)
    # Query 1 is nearest to a wrong one, and all others tie: its answer is the first of eleven by chance.
    assert found["recall@1"] == 0.75
    assert found["recall@5"] == pytest.approx((3 + 4 / 11) / 4, abs=1e-4)
    assert (found["queries"], found["gallery"], found["median_rank"]) == (4, 12, 1)
    assert found["chance@1"] == pytest.approx((3 / 12 + 2 / 12) / 4, abs=1e-4)


def test_embeddings_that_are_all_alike_get_chance():
    same = normalize(torch.ones(30, 4), dim=-1)
    found = retrieval_metrics(same, same, [[n] for n in range(30)])
    for k in (1, 5, 10):
        assert found[f"recall@{k}"] == found[f"chance@{k}"] == pytest.approx(k / 30, abs=1e-4)
    assert found["median_rank"] == 15.5


def test_many_queries_are_ranked_in_parts(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    gallery = normalize(torch.randn(40, 8, generator=generator), dim=-1)
    queries = normalize(torch.randn(250, 8, generator=generator), dim=-1)
    answers = [[n % 40, (n * 7) % 40] for n in range(250)]
    ranks = []
    for n in range(250):
        scores = (queries[n] @ gallery.T).tolist()
        best = max(scores[a] for a in answers[n])
        ranks.append(1 + sum(s > best for g, s in enumerate(scores) if g not in answers[n]))
    monkeypatch.setattr(metrics, "_SCORES_AT_ONCE", 40 * 64)
    found = retrieval_metrics(queries, gallery, answers)
    for k in (1, 5, 10):
        assert found[f"recall@{k}"] == pytest.approx(sum(rank <= k for rank in ranks) / 250, abs=1e-4)
    assert found["median_rank"] == sorted(ranks)[124]
