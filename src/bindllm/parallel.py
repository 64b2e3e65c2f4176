"""Working in parallel: the processes of a run, and threads that compute ahead of their consumer."""

from __future__ import annotations

import os
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from queue import Empty, Full, Queue
from threading import Event, Thread
from typing import TYPE_CHECKING, Any, Generic, Self, TypeVar

import torch

from bindllm.errors import BindLLMError, InputError

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

Item = TypeVar("Item")
Result = TypeVar("Result")

POLL_SECONDS = 0.1
"""How often a waiting thread checks whether it should end."""

JOIN_SECONDS = 10.0
"""How long `Prefetcher.close` waits for its thread; a thread that hangs on a server ends with the process."""

# Hex digits of a hash that assign it to a process: 32 bits spread evenly over any number of processes.
_SHARE_DIGITS = 8


def _gather_one(value: Any) -> list[Any]:
    return [value]


def _gather_objects(value: Any) -> list[Any]:
    # A collective call: it returns after all processes have made it.
    values: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return values


@dataclass(frozen=True)
class Processes:
    """The processes of a run, as one of them sees them; without arguments, a single process.

    Args:
        gather: takes a JSON-compatible value, waits for all processes, and returns their values in order of rank.
            It raises if a process has ended.
        threads: number of reader threads for this process; None: one for each CPU core.
    """

    rank: int = 0
    world_size: int = 1
    gather: Callable[[Any], list[Any]] = _gather_one
    threads: int | None = None

    @classmethod
    def of_trainer(cls, trainer: Trainer | None) -> Processes:
        """Return the processes of a Lightning run; None: a single process."""
        if trainer is None or trainer.world_size == 1:
            return cls()
        # The processes of one machine share its CPU cores.
        threads = max(1, (os.cpu_count() or 1) // trainer.num_devices)
        return cls(trainer.global_rank, trainer.world_size, gather=_gather_objects, threads=threads)

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, which does the work that only one process may do."""
        return self.rank == 0

    @property
    def num_threads(self) -> int:
        """Number of reader threads, at least 1."""
        return max(1, self.threads or os.cpu_count() or 1)

    def barrier(self) -> None:
        """Wait until every process has called this."""
        self.gather(None)

    def from_first(self, work: Callable[[], Item]) -> Item:
        """Run ``work`` in rank 0, and return its JSON-compatible result, or raise its error, in every process."""
        failure: BindLLMError | None = None
        value: Any = None
        if self.is_first:
            try:
                value = work()
            except BindLLMError as error:
                failure = error
        reason, value = self.gather([failure and str(failure), value])[0]
        # In all of them, so that each takes the same next step.
        if reason is not None:
            raise failure or InputError(reason)
        return value

    def owns(self, key: str) -> bool:
        """Return whether this process embeds the content with this sha256.

        Equal content meets in one process, whatever the order and the names of the files. The assignment needs
        no state, so the next run may have another number of processes.

        Examples:
            >>> [Processes(rank, 2).owns("0000000b" + 56 * "0") for rank in range(2)]
            [False, True]
        """
        return int(key[:_SHARE_DIGITS], 16) % self.world_size == self.rank


SINGLE_PROCESS = Processes()


@dataclass(frozen=True)
class RunContext:
    """Where a run works; without arguments, a single process on the CPU.

    Args:
        folder: folder of the run's own files.
        resumed: whether training continues from a saved state.
    """

    processes: Processes = SINGLE_PROCESS
    device: torch.device | str = "cpu"
    folder: Path = Path()
    progress: bool = False
    resumed: bool = False

    @classmethod
    def of_trainer(cls, trainer: Trainer | None) -> RunContext:
        """Return the context of a Lightning run; None: a single process on the CPU."""
        processes = Processes.of_trainer(trainer)
        # One process draws the bars, and only if someone can see them.
        progress = processes.is_first and sys.stderr.isatty()
        if trainer is None:
            return cls(processes, progress=progress)
        return cls(
            processes,
            trainer.strategy.root_device,
            Path(trainer.default_root_dir),
            progress=progress,
            resumed=trainer.ckpt_path is not None,
        )


def chunks(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """Yield lists of ``size`` items; the last one may be shorter.

    Examples:
        >>> list(chunks("abcde", 2))
        [['a', 'b'], ['c', 'd'], ['e']]
    """
    iterator = iter(items)
    while chunk := list(islice(iterator, size)):
        yield chunk


def prefetch(
    pool: ThreadPoolExecutor,
    function: Callable[[Item], Result],
    items: Iterable[Item],
    *,
    limit: Callable[[], int],
) -> Iterator[Result]:
    """Yield ``function(item)`` for each item, in order, computed in a thread pool.

    Args:
        pool: runs ``function``; ``items`` is iterated in the consumer's thread.
        function: an exception in it is raised to the consumer.
        items: may be endless.
        limit: how many results may be in work or waiting; asked again for each item.
    """
    waiting: deque[Future[Result]] = deque()
    for item in items:
        # Results keep the order of the items: a slow one delays the next ones but does not change it.
        waiting.append(pool.submit(function, item))
        while len(waiting) >= limit():
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


class Prefetcher(Generic[Item]):
    """Iterates in one background thread: while an item is in use, one waits and the next is computed.

    In contrast to `prefetch`, the iterator itself runs in the thread. An exception there is raised to the consumer.

    Args:
        make: returns the iterator; called in the thread with a function that returns whether to stop.
        device: on a GPU the thread has its own stream, so it does not wait for the kernels of training.

    Examples:
        >>> with Prefetcher(lambda stopped: iter("ab")) as items:
        ...     list(items)
        ['a', 'b']
    """

    def __init__(
        self,
        make: Callable[[Callable[[], bool]], Iterator[Item]],
        *,
        device: torch.device | str = "cpu",
    ) -> None:
        self._make, self._device = make, torch.device(device)
        # One item waits while the thread computes the next.
        self._queue: Queue[tuple[Item | None, BaseException | None]] = Queue(maxsize=1)
        self._stop = Event()
        # A daemon thread: the process can end even if the thread hangs.
        self._thread = Thread(target=self._run, name="stream", daemon=True)
        self._thread.start()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Item:
        while not self._stop.is_set():
            # With a timeout, so that closing ends the wait.
            try:
                item, error = self._queue.get(timeout=POLL_SECONDS)
            except Empty:
                continue
            if error is None:
                return item
            # The end of the iterator arrives as StopIteration, like any other error.
            self.close()
            raise error
        raise StopIteration

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the thread and discard its results."""
        self._stop.set()
        self._thread.join(JOIN_SECONDS)

    def _run(self) -> None:
        try:
            if self._device.type == "cuda":
                with torch.cuda.device(self._device), torch.cuda.stream(torch.cuda.Stream(self._device)):
                    self._put_all()
            else:
                self._put_all()
        except BaseException as error:  # of any kind: it belongs to the consumer
            self._put(None, error)
        else:
            self._put(None, StopIteration())

    def _put_all(self) -> None:
        for item in self._make(self._stop.is_set):
            # Closed: the rest is not computed.
            if not self._put(item, None):
                return

    def _put(self, item: Item | None, error: BaseException | None) -> bool:
        """Wait for room in the queue; return False if the consumer has closed it."""
        while not self._stop.is_set():
            # With a timeout, because a consumer that has ended takes no more items.
            try:
                self._queue.put((item, error), timeout=POLL_SECONDS)
            except Full:
                continue
            return True
        return False
