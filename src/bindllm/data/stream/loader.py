"""A loader of streamed batches: filled ahead of the training, and resumed at the batch that it has not had yet."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from bindllm.data.collate import Batch, Lookup
from bindllm.data.report import StreamReport
from bindllm.data.stream.chunks import Chunk
from bindllm.data.stream.plan import Bookmark
from bindllm.data.tokenise import Sample
from bindllm.errors import InputError
from bindllm.parallel import Prefetcher, Processes


class StreamLoader:
    """Yields batches without end, from where the trainer stands.

    A thread reads, decodes, embeds and tokenises ahead. What is saved is the place of the next batch that the trainer
    has not had, whatever the thread has made by then; and of the one before, for a step that was cut off.

    Args:
        chunks: yields the chunks from a bookmark on; its second argument tells whether to stop.
        collate: makes a batch of samples.
        start: where a run begins.
        length: batches that the trainer will take; Lightning counts a run as one epoch of so many.
        fingerprint: changes when any batch would.
        position: gives the number of batches that the trainer is done with; None: those that were handed out.
        processes: the processes of the run; each calls `state_dict` when the others do.
        device: where the encoders run.
    """

    def __init__(
        self,
        chunks: Callable[[Bookmark, Callable[[], bool]], Iterator[Chunk]],
        collate: Callable[[list[Sample], Lookup], Batch],
        *,
        start: Bookmark,
        length: int,
        fingerprint: str,
        position: Callable[[], int] | None = None,
        processes: Processes = Processes(),  # noqa: B008 (frozen)
        device: torch.device | str = "cpu",
    ) -> None:
        self._chunks, self._collate = chunks, collate
        self._length, self._fingerprint = length, fingerprint
        self._position, self._processes, self._device = position, processes, device
        # The next batch after so many: of the last two numbers of batches.
        self._bookmarks: dict[int, Bookmark] = {0: start}
        self._ahead: Prefetcher[Chunk] | None = None
        self.report = StreamReport()

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[Batch]:
        # A generator: nothing here runs before the first batch is asked for, when the trainer knows its place.
        self.close()
        done = max(self._bookmarks) if self._position is None else self._position()
        if done not in self._bookmarks:
            raise InputError(
                f"this run cannot go on after batch {done}: its saved state is of batch {max(self._bookmarks)}; start "
                "it afresh with --resume false"
            )
        first = self._bookmarks[done]
        started = time.perf_counter()
        self._ahead = ahead = Prefetcher(lambda stopped: self._chunks(first, stopped), device=self._device)
        try:
            begun: float | None = None
            asked = started
            for chunk in ahead:
                self._note_chunk(chunk, first)
                places = [
                    Bookmark(chunk.start.chunk, n, chunk.start.places) for n in range(len(chunk.batches))
                ]
                places.append(chunk.end)
                for number in range(
                    first.batch if chunk.start.chunk == first.chunk else 0, len(chunk.batches)
                ):
                    rows = [chunk.embedded.samples[n] for n in chunk.batches[number]]
                    batch = self._collate(rows, chunk.embedded.lookup)
                    self._bookmarks = {done: places[number], done + 1: places[number + 1]}
                    done += 1
                    now = time.perf_counter()
                    begun = self._note_batch(rows, now - asked, begun, now)
                    yield batch
                    asked = time.perf_counter()
                    self.report.seconds = asked - begun
        finally:
            self.close(ahead)

    def close(self, ahead: Prefetcher[Chunk] | None = None) -> None:
        """End the thread; a later iteration starts another.

        Args:
            ahead: end this one only; None: whichever there is.
        """
        if self._ahead is not None and ahead in (None, self._ahead):
            self._ahead.close()
            self._ahead = None

    def state_dict(self) -> dict[str, Any]:
        """Return where every process stands, and what must not change until a resume; all of them call this."""
        mine = {str(done): bookmark.as_dict() for done, bookmark in self._bookmarks.items()}
        return {
            "stream": self._fingerprint,
            "processes": self._processes.world_size,
            "bookmarks": self._processes.gather(mine),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a state of `state_dict`.

        Raises:
            InputError: it is of another number of processes, or of other data.
        """
        if state_dict.get("processes") != self._processes.world_size:
            raise InputError(
                f"this run was saved by {state_dict.get('processes')} processes and cannot go on in "
                f"{self._processes.world_size}: each has a share of the shards. Start it with as many devices as "
                "before, or start a new run from the weights (start_from)"
            )
        if state_dict.get("stream") != self._fingerprint:
            raise InputError(
                "this run cannot go on from that checkpoint: its shards or their sizes, formats, weights, chunk, batch "
                "size, max_length or seed differ. Restore them, or start a new run from the weights (start_from)"
            )
        self.close()
        mine = state_dict["bookmarks"][self._processes.rank]
        self._bookmarks = {int(done): Bookmark.from_dict(values) for done, values in mine.items()}

    def _note_chunk(self, chunk: Chunk, first: Bookmark) -> None:
        """Count what was read anew; after a resume, the first batches of the first chunk were trained on before."""
        before = chunk.batches[: first.batch] if chunk.start.chunk == first.chunk else []
        seen = sum(map(len, before))
        self.report.read += chunk.read - seen
        self.report.waiting = len(chunk.embedded.samples) - seen
        self.report.skipped.update(chunk.skipped)

    def _note_batch(self, rows: list[Sample], waited: float, begun: float | None, now: float) -> float:
        """Count a batch that is handed out; return when the first one was."""
        self.report.rows += len(rows)
        self.report.waiting -= len(rows)
        self.report.batches += 1
        if begun is None:
            self.report.seconds_first = waited
            return now
        self.report.seconds_waited += waited
        return begun
