"""Many clients at once, a part of which leaves, sends nonsense, or sends bombs: nothing is lost or mixed up."""

import gc
import resource
import threading

import pytest

from crowd_parts import LiveServer, check_crowd, draw_crowd


@pytest.fixture(scope="module")
def server(decoder):
    with LiveServer(decoder) as server:
        yield server


def test_every_answer_of_a_crowd_is_its_offline_answer(server):
    kinds = check_crowd(server, draw_crowd(seed=1, size=30))
    assert kinds == {"good": 18, "leaves": 6, "malformed": 3, "bomb": 3}


def resident() -> int:
    """Return the memory of this process in MB."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize() >> 20


@pytest.mark.slow
@pytest.mark.parametrize("seed", [2, 3])
def test_a_large_crowd(decoder, seed):
    """200 requests at the same time, again and again: memory and threads return to their start."""
    with LiveServer(decoder, slots=16, queue=200) as server:
        check_crowd(server, draw_crowd(seed=seed, size=200))
        gc.collect()
        memory, threads = resident(), threading.active_count()
        for round in range(3):
            check_crowd(server, draw_crowd(seed=10 * seed + round, size=200))
        gc.collect()
        assert resident() - memory < 150
        assert threading.active_count() <= threads + 4
