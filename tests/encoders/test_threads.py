import time

import pytest
import torch

from bindllm.encoders.efficientnet import each_on_one_thread


@pytest.fixture(autouse=True)
def _two_threads():
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


def test_calls_run_at_the_same_time_and_on_one_thread_each():
    started: list[float] = []

    def work(item):
        started.append(time.monotonic())
        time.sleep(0.2)
        return item, torch.get_num_threads()

    assert each_on_one_thread(work, [1, 2, 3]) == [(1, 1), (2, 1), (3, 1)]
    assert started[1] - started[0] < 0.2 <= started[2] - started[0]
    assert torch.get_num_threads() == 2


def test_an_error_is_passed_on_and_the_threads_are_as_before():
    with pytest.raises(ZeroDivisionError):
        each_on_one_thread(lambda item: 1 // item, [1, 0])
    assert torch.get_num_threads() == 2
