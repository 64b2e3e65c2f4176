"""Three processes that watch each other, played by threads of this one."""

import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from queue import Queue

import pytest

import bindllm.training.watch as watch
from bindllm.errors import TrainingError
from bindllm.training.watch import Watch


@pytest.fixture
def exits(monkeypatch):
    """Exit codes, in place of exits; nobody gets time to finish."""
    codes = Queue()
    monkeypatch.setattr(watch.os, "_exit", codes.put)
    monkeypatch.setattr(watch, "GRACE_SECONDS", 0.01)
    monkeypatch.setattr(watch, "ALIKE_SECONDS", 0.01)
    return codes


@pytest.fixture
def three():
    address, told = Queue(), threading.Event()

    def broadcast(value):
        if value:
            address.put(value)
            told.set()
        told.wait(10)
        return address.queue[0]

    with ThreadPoolExecutor(3) as pool:
        made = [pool.submit(Watch, rank, 3, host="127.0.0.1", broadcast=broadcast) for rank in range(3)]
        return [one.result(10) for one in made]


def die(process: Watch) -> None:
    """What the system does for a process that is killed."""
    for peer in process._peers.values():
        with suppress(OSError):  # closed by the other end already
            peer.shutdown(watch.socket.SHUT_RDWR)


@pytest.mark.parametrize(("dies", "hear"), [(0, [1, 2]), (1, [0, 2]), (2, [0, 1])])
def test_all_others_hear_who_has_died_and_stop(dies, hear, three, exits, capfd):
    three[dies]._ended.set()
    die(three[dies])
    for rank in hear:
        assert three[rank].lost.wait(5)
        assert three[rank].explains(RuntimeError("connection reset"))
        assert not three[rank].explains(ValueError("a mistake of this process"))
    assert [exits.get(timeout=5) for _ in hear] == [1, 1]
    told = capfd.readouterr().err
    assert told.count(f"error: process {dies + 1} of 3 has ended before the run was done") == 2
    assert "run the same command again" in told


def test_a_process_that_fails_says_why_to_all(three, exits, capfd):
    three[2].fail("the disk is full")
    for rank in (0, 1):
        assert three[rank].lost.wait(5)
    assert [exits.get(timeout=5) for _ in range(2)] == [1, 1]
    assert capfd.readouterr().err.count("process 3 of 3 has failed (the disk is full)") == 2


def test_nobody_misses_a_process_that_has_left_in_order(three, exits, capfd, monkeypatch):
    monkeypatch.setattr(watch, "NOTICE_SECONDS", 0.1)
    three[1].stop()
    die(three[1])
    assert not three[0].explains(RuntimeError("of its own"))
    for rank in (0, 2):
        three[rank].stop()
        die(three[rank])
    assert exits.empty()
    assert capfd.readouterr().err == ""


def test_a_process_may_finish_what_it_does_before_it_stops(three, exits, monkeypatch):
    monkeypatch.setattr(watch, "GRACE_SECONDS", 30)
    three[1]._ended.set()
    three[2]._ended.set()
    die(three[1])
    assert three[0].lost.wait(5)
    three[0].stop()
    assert exits.empty()


def test_a_first_process_that_cannot_be_reached_is_named():
    with pytest.raises(TrainingError, match=r"process 2 of 2 cannot reach the first process on 127\.0\.0\.1"):
        Watch(1, 2, host="127.0.0.1", broadcast=lambda _: ["1", "word"])
