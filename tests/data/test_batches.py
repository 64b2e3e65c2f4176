from collections import Counter

import numpy as np
import pytest

from bindllm.data.batches import CHUNK_BATCHES, LengthGroupedBatches, ResumableLoader, share, sorted_batches
from bindllm.errors import InputError

LENGTHS = np.random.default_rng(0).integers(5, 60, 1003).tolist()


def rows(batches: list[list[int]]) -> Counter:
    return Counter(row for batch in batches for row in batch)


@pytest.mark.parametrize("epoch", [0, 1, 7])
def test_every_row_once_an_epoch_and_no_row_dropped(epoch):
    plan = LengthGroupedBatches(LENGTHS, batch_size=8)
    batches = plan.epoch(epoch)
    assert rows(batches) == Counter(range(1003))
    # 125 full batches and one of 3.
    assert sorted(map(len, batches)) == [3] + [8] * 125
    assert len(plan) == len(batches) == 126


def test_order_is_a_function_of_seed_and_epoch():
    plan = LengthGroupedBatches(LENGTHS, batch_size=8, seed=3)
    assert plan.epoch(2) == LengthGroupedBatches(LENGTHS, batch_size=8, seed=3).epoch(2)
    assert plan.epoch(2) != plan.epoch(1)
    assert plan.epoch(2) != LengthGroupedBatches(LENGTHS, batch_size=8, seed=4).epoch(2)


def test_rows_of_like_length_meet_and_little_is_padded():
    batches = LengthGroupedBatches(LENGTHS, batch_size=8).epoch(0)
    padded = sum(len(batch) * max(LENGTHS[row] for row in batch) for batch in batches)
    assert padded / sum(LENGTHS) < 1.05
    # Shuffled batches of shuffled rows would need about 1.6 times the tokens.
    assert len(LENGTHS) > 8 * CHUNK_BATCHES, "more than one chunk, so that rows of a batch change"
    first = [set(batch) for batch in batches]
    second = [set(batch) for batch in LengthGroupedBatches(LENGTHS, batch_size=8).epoch(1)]
    assert sum(batch in second for batch in first) < 5


def test_batches_come_in_no_order_of_length():
    batches = LengthGroupedBatches(LENGTHS, batch_size=8).epoch(0)
    longest = [max(LENGTHS[row] for row in batch) for batch in batches]
    assert abs(np.corrcoef(longest, range(len(longest)))[0, 1]) < 0.3


def test_weights_are_draws_per_row_and_epoch():
    # Three sources of 10, 10 and 5 rows with weights 1, 0.5 and 2.
    sources = [0] * 10 + [1] * 10 + [2] * 5
    plan = LengthGroupedBatches([7] * 25, batch_size=4, sources=sources, weights=[1.0, 0.5, 2.0])
    epochs = [rows(plan.epoch(number)) for number in range(4)]
    for drawn in epochs:
        assert [drawn[row] for row in range(10)] == [1] * 10
        assert sum(drawn[row] for row in range(10, 20)) == 5
        assert [drawn[row] for row in range(20, 25)] == [2] * 5
    # Half of the second source in one epoch, the other half in the next.
    assert (epochs[0] + epochs[1])[10] == 1
    assert [(epochs[2] + epochs[3])[row] for row in range(10, 20)] == [1] * 10
    assert len(plan) == len(plan.epoch(0)) == 7


def test_fractions_even_out_over_epochs():
    plan = LengthGroupedBatches([7] * 7, batch_size=4, weights=[1.3])
    total = Counter()
    for number in range(7):
        drawn = rows(plan.epoch(number))
        assert sum(drawn.values()) == 9
        total += drawn
        assert max(total.values()) - min(total[row] for row in range(7)) <= 1
    assert set(total.values()) == {9}


def test_a_small_weight_draws_at_least_one_row():
    assert sum(rows(LengthGroupedBatches([7] * 3, batch_size=2, weights=[0.01]).epoch(0)).values()) == 1


def test_source_without_rows_draws_nothing():
    plan = LengthGroupedBatches([7, 7], batch_size=2, sources=[1, 1], weights=[1.0, 1.0])
    assert rows(plan.epoch(0)) == Counter([0, 1])


def test_processes_share_an_epoch():
    plans = [LengthGroupedBatches(LENGTHS, batch_size=8, world_size=4, rank=rank) for rank in range(4)]
    parts = [plan.epoch(1) for plan in plans]
    assert {len(part) for part in parts} == {len(plans[0])} == {32}
    drawn = rows([batch for part in parts for batch in part])
    # 126 batches do not come out even for 4: the first two are repeated.
    assert set(drawn) == set(range(1003))
    assert sum(drawn.values()) - 1003 == sum(
        len(b) for b in LengthGroupedBatches(LENGTHS, batch_size=8).epoch(1)[:2]
    )


def test_share_of_few_batches():
    assert [share([[1]], world_size=3, rank=rank) for rank in range(3)] == [[[1]]] * 3
    assert share([], world_size=3, rank=1) == []


def test_sorted_batches():
    assert sorted_batches([3, 9, 4, 1, 9], batch_size=2) == [[3, 0], [2, 1], [4]]
    assert sorted_batches([], batch_size=2) == []


def test_batch_size_below_one_is_refused():
    with pytest.raises(InputError, match="at least 1, not 0"):
        LengthGroupedBatches(LENGTHS, batch_size=0)


def test_loader_starts_at_the_position_known_at_the_first_batch():
    plan = LengthGroupedBatches(LENGTHS, batch_size=100)
    place = [(0, 0)]
    loader = ResumableLoader(plan, lambda rows: rows, position=lambda: place[0])
    iterator = iter(loader)
    place[0] = (1, 9)
    assert list(iterator) == plan.epoch(1)[9:]
    assert len(loader) == 11


def test_loader_state_is_refused_by_other_data():
    state = ResumableLoader(LengthGroupedBatches(LENGTHS, batch_size=8), list).state_dict()
    ResumableLoader(LengthGroupedBatches(LENGTHS, batch_size=8), list).load_state_dict(state)
    for other in (
        LengthGroupedBatches(LENGTHS, batch_size=9),
        LengthGroupedBatches(LENGTHS, batch_size=8, seed=1),
        LengthGroupedBatches(LENGTHS[::-1], batch_size=8),
        LengthGroupedBatches(LENGTHS, batch_size=8, weights=[2.0]),
        LengthGroupedBatches(LENGTHS, batch_size=8, world_size=2),
    ):
        with pytest.raises(InputError, match="batch size, seed"):
            ResumableLoader(other, list).load_state_dict(state)
