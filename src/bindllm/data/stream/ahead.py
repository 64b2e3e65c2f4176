"""A thread that works ahead of the training, by a bounded number of items."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from queue import Empty, Full, Queue
from threading import Event, Thread
from typing import Generic, Self, TypeVar

import torch

Item = TypeVar("Item")

LOOK_SECONDS = 0.1
"""How often a thread that waits looks whether it is to end."""

END_SECONDS = 10.0
"""How long `Ahead.close` waits for the thread; one that hangs on a server ends by itself, or with the process."""


class Ahead(Generic[Item]):
    """Iterates in a thread of its own: while one item is worked with, the next is made and one more waits.

    An error in the thread is raised where the items are taken.

    Args:
        make: given a function that tells whether to stop, returns the iterator; called in the thread.
        device: on an accelerator the thread has a stream of its own, and need not wait for the training's kernels.

    Example:
        >>> with Ahead(lambda stopped: iter("ab")) as items:
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
        self._queue: Queue[tuple[Item | None, BaseException | None]] = Queue(maxsize=1)
        self._stop = Event()
        # A daemon: should it hang, the process can end all the same.
        self._thread = Thread(target=self._work, name="stream", daemon=True)
        self._thread.start()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Item:
        while not self._stop.is_set():
            try:
                item, error = self._queue.get(timeout=LOOK_SECONDS)
            except Empty:
                continue
            if error is None:
                return item
            self.close()
            raise error
        raise StopIteration

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the thread, and forget what it has made."""
        self._stop.set()
        self._thread.join(END_SECONDS)

    def _work(self) -> None:
        try:
            if self._device.type == "cuda":
                with torch.cuda.device(self._device), torch.cuda.stream(torch.cuda.Stream(self._device)):
                    self._make_all()
            else:
                self._make_all()
        except BaseException as error:  # whatever it is, it belongs to whoever takes the items
            self._put(None, error)
        else:
            self._put(None, StopIteration())

    def _make_all(self) -> None:
        for item in self._make(self._stop.is_set):
            if not self._put(item, None):
                return

    def _put(self, item: Item | None, error: BaseException | None) -> bool:
        """Wait for room; return whether the item is wanted."""
        while not self._stop.is_set():
            try:
                self._queue.put((item, error), timeout=LOOK_SECONDS)
            except Full:
                continue
            return True
        return False
