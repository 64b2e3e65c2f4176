"""Work on the CPU whose last bits do not depend on how many threads there are.

Kernels choose by the number of threads in which order a sum is taken: the 1x1 convolutions of oneDNN give other last
bits on two threads than on one. An embedding made that way depends on the machine, and on how many processes share
it. Several calls on one thread each keep all cores as busy, and give the same bits anywhere that has the same kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")


def each_on_one_thread(function: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
    """Apply a function to each item, as many at the same time as torch has threads, each call on one thread.

    Args:
        function: runs in threads of its own, so it sets ``no_grad`` itself where it needs it.
        items: such as the media of a batch.

    Example:
        >>> each_on_one_thread(lambda x: (x * 2, torch.get_num_threads()), [1, 2, 3])
        [(2, 1), (4, 1), (6, 1)]
    """
    threads = torch.get_num_threads()
    if threads == 1:
        return [function(item) for item in items]
    pool = ThreadPoolExecutor(threads, "single", initializer=torch.set_num_threads, initargs=(1,))
    try:
        with pool:
            return list(pool.map(function, items))
    finally:
        # What a thread sets holds for itself, and for threads that begin later.
        torch.set_num_threads(threads)
