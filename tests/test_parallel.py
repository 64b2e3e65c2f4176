"""Processes that share work by content, and threads that compute ahead of their consumer."""

import threading
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from types import SimpleNamespace

import pytest

from bindllm import Media
from bindllm.parallel import Prefetcher, Processes, prefetch


def test_content_is_shared_evenly():
    keys = [Media.text(str(n)).content_hash() for n in range(3000)]
    owned = [sum(Processes(rank, 3).owns(key) for key in keys) for rank in range(3)]
    assert sum(owned) == 3000
    assert max(owned) < 1.1 * min(owned)


def test_the_processes_of_a_trainer_share_the_cores_of_a_machine(monkeypatch):
    monkeypatch.setattr("bindllm.parallel.os.cpu_count", lambda: 8)
    assert Processes.of_trainer(None) == Processes()
    trainer = SimpleNamespace(global_rank=5, world_size=12, num_devices=3)
    processes = Processes.of_trainer(trainer)
    assert (processes.rank, processes.world_size, processes.num_threads) == (5, 12, 2)
    assert not processes.is_first


def test_prefetch_keeps_the_order_and_the_limit():
    started = []

    def work(n):
        started.append(n)
        return -n

    with ThreadPoolExecutor(4) as pool:
        results = prefetch(pool, work, count(), limit=lambda: 3)
        for n in range(20):
            assert next(results) == -n
            assert max(started) < n + 3


def test_prefetch_raises_the_error_of_a_thread():
    with ThreadPoolExecutor(2) as pool, pytest.raises(ZeroDivisionError):
        list(prefetch(pool, lambda n: 1 // n, [1, 0], limit=lambda: 2))


def test_a_prefetcher_passes_items_on_and_ends_its_thread():
    with Prefetcher(lambda stopped: iter(range(50))) as items:
        assert list(items) == list(range(50))
    assert not [thread for thread in threading.enumerate() if thread.name == "stream"]


def test_a_prefetcher_stops_an_endless_iterator():
    seen = []

    def endless(stopped):
        for n in count():
            if stopped():
                return
            seen.append(n)
            yield n

    with Prefetcher(endless) as items:
        assert [next(items) for _ in range(3)] == [0, 1, 2]
    # One in use, one that waits, one that is computed, and one that may start before the stop.
    assert len(seen) <= 6
    assert not [thread for thread in threading.enumerate() if thread.name == "stream"]
