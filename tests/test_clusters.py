"""The synthetic vectors of the cache benchmarks: independent rows, distributed like image embeddings."""

import numpy as np
import pytest

from benchmarks.clusters import CHUNK, ClusteredVectors, statistics_of

SIZE = 256


@pytest.fixture(scope="module")
def space() -> ClusteredVectors:
    return ClusteredVectors(SIZE)


def test_a_row_does_not_depend_on_the_range(space):
    across = space.rows(CHUNK - 3, CHUNK + 2)
    assert np.array_equal(across[:3], space.rows(0, CHUNK)[-3:])
    assert np.array_equal(across[3:], ClusteredVectors(SIZE).rows(CHUNK, CHUNK + 2))
    assert not np.allclose(across, ClusteredVectors(SIZE, seed=1).rows(CHUNK - 3, CHUNK + 2), atol=0.1)
    assert [len(part) for part in space.chunks(CHUNK + 5)] == [CHUNK, 5]
    assert space.rows(7, 7).shape == (0, SIZE)


def test_rows_lie_in_a_cone_and_in_clusters(space):
    rows = space.rows(0, 1000)
    assert np.linalg.norm(rows, axis=1) == pytest.approx(np.ones(1000), abs=1e-5)
    found = statistics_of(rows)
    assert found["random pairs"] == pytest.approx(0.42, abs=0.06)
    assert found["neighbor 1, 50 %"] > found["neighbor 10, 50 %"] > found["random pairs"] + 0.15
    assert 15 < found["participation ratio"] < 60


def test_queries_of_another_modality_have_an_offset(space):
    rows = space.rows(0, 1000)
    nearest = {
        foreign: (space.queries(200, foreign=foreign) @ rows.T).max(axis=1) for foreign in (True, False)
    }
    assert nearest[False].mean() > nearest[True].mean() + 0.1
    gap = np.linalg.norm(space.queries(200).mean(axis=0) - rows.mean(axis=0))
    assert gap == pytest.approx(0.8, abs=0.1)
