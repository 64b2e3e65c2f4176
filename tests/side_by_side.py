"""Several processes in one process: threads that wait for each other as processes do."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from bindllm.parallel import Processes

SECONDS = 60


def together(count: int, part: Callable[[Processes], Any]) -> list[Any]:
    """Call ``part(processes)`` for each rank at the same time; a rank that fails breaks the barrier of the others."""
    barrier = threading.Barrier(count, timeout=SECONDS)
    values = [None] * count

    def one(number):
        def gather(value):
            values[number] = value
            barrier.wait()
            gathered = list(values)
            barrier.wait()
            return gathered

        try:
            return part(Processes(number, count, gather))
        except BaseException as error:
            barrier.abort()
            return error

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(one, range(count)))
