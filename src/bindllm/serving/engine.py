"""Continuous batching: one thread decodes all running requests together, a token of each in every step.

Newcomers are read between two steps, chunk by chunk, and a finished row leaves at once. The tokens of an answer depend
on its own request only: each row has its own media, cache and generator, and no two requests share the cache of a
prefix, since it depends on the media too. The choices of one request share its prompt, which is read once.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import groupby
from typing import Self

import torch
from torch import Tensor

from bindllm.cache.visual_cache import CacheChoice
from bindllm.embeddings.embedder import RecentEmbeddings
from bindllm.errors import DecoderError, EngineBusy, EngineClosed, InputError
from bindllm.media import Media
from bindllm.media.limits import MediaLimits, limited
from bindllm.model.bindllm import BindLLM
from bindllm.model.generation.constraint import Constraint, Grammars
from bindllm.serving.batch import Batch, ReadPrompts
from bindllm.serving.config import PREFILL_TOKENS, QUEUE, SLOTS, TOKENS
from bindllm.serving.request import (
    Piece,
    Prompt,
    Request,
    Row,
    SettingError,
    Ticket,
    TokenLogprob,
    make_input,
)
from bindllm.serving.sampling import choose_tokens

PREPARE_THREADS = 4
"""Requests whose media are read and encoded at the same time."""

logger = logging.getLogger(__name__)


@dataclass
class Counters:
    """Totals since the start.

    Attributes:
        finished: requests by their end: ``stop``, ``length``, ``timeout``, ``cancelled``, ``error``.
        steps: decoding steps; ``answer_tokens`` over this is the average batch.
    """

    finished: Counter[str] = field(default_factory=Counter)
    prompt_tokens: int = 0
    answer_tokens: int = 0
    steps: int = 0


class Engine:
    """Answers many requests at the same time.

    Memory: the key/value cache holds at most ``tokens`` tokens, and while newcomers are read, their prompts once more.
    A request waits until its prompt and its longest answer fit.

    Args:
        model: in eval mode. Other threads must not change it.
        slots: requests that are decoded together.
        queue: requests that wait for a slot.
        tokens: tokens in the key/value cache. A prompt with its answer is never longer.
        prefill: tokens of newcomers that are read between two steps: running answers wait no longer for a long prompt.
        limits: decoded sizes of the media of one request; None: the defaults of `MediaLimits`.

    Raises:
        DecoderError: the engine cannot serve this family of decoders.

    Attributes:
        limits: decoded sizes of the media of one request.
        recent: embeddings of the media that were used last.

    Example:
        ```python
        with Engine(model) as engine:
            engine.submit(Request(Conversation((Message("user", ["Hello"]),))), print)
        ```
    """

    def __init__(
        self,
        model: BindLLM,
        *,
        slots: int = SLOTS,
        queue: int = QUEUE,
        tokens: int = TOKENS,
        prefill: int = PREFILL_TOKENS,
        limits: MediaLimits | None = None,
    ) -> None:
        sizes = {"slots": slots, "queue": queue, "tokens": tokens, "prefill": prefill}
        for name, value in sizes.items():
            if value < 1:
                raise InputError(f"{name} is {value}, expected at least 1")
        self.model, self.counters, self.recent = model.eval(), Counters(), RecentEmbeddings()
        self.limits = limits or MediaLimits()
        self._num_slots, self._queue, self._tokens, self._prefill = slots, queue, tokens, prefill
        self._batch, self._grammars = Batch(model, chunk=prefill), Grammars(model)
        # The waiting requests are shared with other threads, under the lock of `_changed`; rows belong to the engine's.
        self._changed = threading.Condition()
        self._waiting: list[Ticket] = []
        self._rows: list[Row] = []
        # Choices that have a slot and no row yet, and the prompts of theirs that are being read.
        self._newcomers: list[Ticket] = []
        self._reading: list[Prompt] = []
        self._reader: Iterator[ReadPrompts | None] = iter(())
        self._is_closing = self._is_stopping = False
        self._pool = ThreadPoolExecutor(PREPARE_THREADS, thread_name_prefix="bindllm-prepare")
        self._thread = threading.Thread(target=self._run, name="bindllm-engine", daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def waiting(self) -> int:
        """Requests that have no slot yet."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Requests that have a slot."""
        return len(self._rows) + len(self._newcomers)

    def submit(self, request: Request, listener: Callable[[Piece], None]) -> Ticket:
        """Queue a request.

        Args:
            listener: called with each piece, in the engine's thread, so it must not block. One that raises ends its
                request.

        Raises:
            EngineBusy: the queue is full.
            EngineClosed: the engine is shutting down.
        """
        return self.submit_choices(request, [listener])[0]

    def submit_choices(self, request: Request, listeners: Sequence[Callable[[Piece], None]]) -> list[Ticket]:
        """Queue several answers to one request, whose prompt is encoded and read once: all of them, or none.

        Args:
            request: the request. Choice ``n`` is the answer to it with the seed ``seed + n``.

        Raises:
            EngineBusy: the queue cannot take all of them.
            EngineClosed: the engine is shutting down.
        """
        prompt = Prompt(request)
        choices = [
            Ticket(request.choice(number), prompt, listener) for number, listener in enumerate(listeners)
        ]
        with self._changed:
            if self._is_closing:
                raise EngineClosed(
                    "the engine is shutting down and takes no further request; try another one"
                )
            if len(self._waiting) + len(choices) > self._queue:
                raise EngineBusy(
                    f"{len(self._waiting)} requests are waiting already, at most {self._queue}; try again later"
                )
            self._waiting += choices
            # Without the tickets: the pool would hold the media of requests that have left the queue.
            self._pool.submit(self._prepare)
        return choices

    def encode(
        self, groups: Sequence[Sequence[Media]], *, cache: CacheChoice = None
    ) -> tuple[Tensor, tuple[str, ...]]:
        """Embed media as `BindLLM.encode` does, under the limits of a request and with the recent embeddings.

        In the thread of the caller.

        Returns:
            the embeddings, and the warnings about the media.
        """
        with limited(self.limits) as budget:
            rows = self.model.encode(groups, cache=cache, recent=self.recent)
        return rows, budget.warnings

    def close(self, *, drain: float | None = None) -> None:
        """Take no further request, finish those that were accepted, and end the threads.

        Args:
            drain: seconds to finish them; None: as long as it takes. The others end with an `EngineClosed` error.
        """
        with self._changed:
            self._is_closing = True
            self._changed.notify_all()
        self._thread.join(drain)
        with self._changed:
            self._is_stopping = True
            self._changed.notify_all()
        # No longer than the step that is running.
        self._thread.join()
        # A media that is being decoded cannot be stopped; its thread ends by itself, within the limits.
        self._pool.shutdown(wait=False, cancel_futures=True)

    # In the threads of the pool.

    def _prepare(self) -> None:
        """Render the prompt and encode the media of the first waiting request that no other thread has taken."""
        with self._changed:
            ready = (t.prompt for t in self._waiting if not (t.is_cancelled or t.prompt.is_taken))
            prompt = next(ready, None)
            # It holds the requests that wait now, and some of them will have left before this one is prepared.
            del ready
            if prompt:
                prompt.is_taken = True
        if prompt:
            try:
                prompt.constraint = self._compile(prompt.request.grammar)
                with limited(self.limits) as budget:
                    found = make_input(self.model, prompt.request, self.recent, self._tokens)
                # The input last, since the engine's thread takes a prompt as soon as it has one.
                prompt.warnings, prompt.input = budget.warnings, found
            except Exception as error:
                prompt.error = error
        # Also without an input: the engine's thread takes failed and cancelled requests out of the queue.
        with self._changed:
            self._changed.notify_all()

    def _compile(self, grammar: str | None) -> Constraint | None:
        try:
            return None if grammar is None else self._grammars.compile(grammar)
        except InputError as error:
            raise SettingError("grammar", str(error)) from error

    # In the engine's thread.

    def _run(self) -> None:
        with torch.inference_mode():
            while self._wait():
                try:
                    self._drop_ended()
                    self._read()
                    if self._rows:
                        self.counters.steps += 1
                        self._emit(self._batch.step([row.last_token for row in self._rows]), 0)
                except Exception as error:
                    # Nothing is known about the cache after a failed step, so all of its rows end.
                    self._fail_rows(error)
        self._fail_rows(EngineClosed("the engine has shut down before the answer was complete"))
        with self._changed:
            rest, self._waiting = self._waiting, []
        for ticket in rest:
            self._send(ticket, Piece("", 0, error=EngineClosed("the engine has shut down")))

    def _wait(self) -> bool:
        """Wait for work, and end waiting requests that need no slot; return False if the engine shall stop."""
        while True:
            with self._changed:
                over = [t for t in self._waiting if t.prompt.error or t.has_ended]
                self._waiting = [t for t in self._waiting if t not in over]
                is_ready = self.running > 0 or any(t.prompt.input for t in self._waiting)
                if self._is_stopping:
                    self._waiting += over
                    return False
                if not over:
                    if is_ready:
                        return True
                    if self._is_closing and not self._waiting:
                        return False
                    deadlines = [t.deadline for t in self._waiting if t.deadline is not None]
                    self._changed.wait(max(0.0, min(deadlines) - time.monotonic()) if deadlines else None)
            # Without the lock: a listener may submit the next request.
            for ticket in over:
                if ticket.prompt.error:
                    self._fail(ticket, ticket.prompt.error)
                else:
                    self._send(ticket, Piece("", 0, finish="timeout"))

    def _admit(self) -> list[Ticket]:
        """Take the next choices that fit into the batch out of the queue, in the order of their arrival."""
        admitted: list[Ticket] = []
        with self._changed:
            # Media of some are still being encoded; they do not delay the others.
            for ticket in [t for t in self._waiting if t.prompt.input is not None]:
                rows = [t.prompt for t in (*admitted, ticket)]
                unread = {prompt for prompt in rows if prompt.read is None}
                # With the padding.
                prefill = len(unread) * max((len(prompt.input.ids) for prompt in unread), default=0)
                is_crowded = prefill > self._prefill or any(prompt.is_alone for prompt in unread)
                if (
                    len(self._rows) + len(rows) > self._num_slots
                    or self._batch.needs([prompt.input for prompt in rows]) > self._tokens
                    or (len(unread) > 1 and is_crowded)
                ):
                    # Those after it do not pass by: else a large request might never have its turn.
                    break
                admitted.append(ticket)
            self._waiting = [t for t in self._waiting if t not in admitted]
        return admitted

    def _read(self) -> None:
        """Read a chunk of the newcomers' prompts; after the last one, emit the first token of each."""
        if not self._newcomers:
            self._newcomers = self._admit()
            prompts = dict.fromkeys(ticket.prompt for ticket in self._newcomers)
            self._reading = [prompt for prompt in prompts if prompt.read is None]
            self._reader = self._batch.read([prompt.input for prompt in self._reading])
        if self._reading:
            try:
                found = next(self._reader)
            except Exception as error:
                self._reading_failed(error)
                return
            if found is None:
                return
            for number, prompt in enumerate(self._reading):
                prompt.read = found, number
            self.counters.prompt_tokens += sum(found.lengths)
        # Together with choices of an earlier prompt that had no slot until now.
        for _, group in groupby(self._newcomers, key=lambda ticket: id(ticket.prompt.read[0])):
            self._start(list(group))
        with self._changed:
            kept = {ticket.prompt for ticket in self._waiting}
        for prompt in {ticket.prompt for ticket in self._newcomers} - kept:
            prompt.read = None
        self._newcomers, self._reading = [], []

    def _reading_failed(self, error: Exception) -> None:
        """End the newcomers whose prompt has failed; of several prompts, read each alone to find the one."""
        if len(self._reading) == 1:
            self._reading[0].error = error
        for prompt in self._reading:
            prompt.is_alone = True
        with self._changed:
            self._waiting[:0] = self._newcomers
        self._newcomers, self._reading = [], []

    def _start(self, tickets: Sequence[Ticket]) -> None:
        """Add the rows of tickets whose prompts were read together, and emit the first token of each."""
        prompts, first = tickets[0].prompt.read[0], len(self._rows)
        chosen = [ticket.prompt.read[1] for ticket in tickets]
        self._batch.join(prompts, chosen)
        self._rows += [Row(ticket, self.model) for ticket in tickets]
        self._emit(prompts.logits[chosen], first)

    def _emit(self, logits: Tensor, first: int) -> None:
        """Choose the next token of rows ``first ..``, [R, V], and pass on the text that is certain."""
        rows = self._rows[first:]
        tokens, values = choose_tokens(logits, [row.sampling for row in rows])
        self.counters.answer_tokens += len(rows)
        ended = []
        for n, (row, token) in enumerate(zip(rows, tokens, strict=True)):
            error = SettingError("grammar", reason) if (reason := row.sampling.error) else None
            if not math.isfinite(values[n]):
                error = DecoderError(
                    "the decoder's output is not finite; a larger dtype may help (bfloat16, float32)"
                )
            if error is not None:
                self._fail(row.ticket, error)
                ended.append(first + n)
                continue
            piece = self._advance(row, token, logits[n])
            if piece is not None and self._send(row.ticket, piece):
                ended.append(first + n)
        self._remove(ended)

    def _advance(self, row: Row, token: int, logits: Tensor) -> Piece | None:
        """Add a token to a row; return the piece of its text, or None if no text is certain yet."""
        row.last_token = token
        row.sampling.take(token)
        row.num_tokens += 1
        row.num_left -= 1
        is_end, count = token in self.model.settings.eos_token_id, row.ticket.request.logprobs
        # An end token is not a part of the answer.
        if count is not None and not is_end:
            row.logprobs.append(self._logprobs(logits, token, count))
        text, finish = row.text.add([token]), None
        # An answer that follows a schema is often complete before its end token.
        is_end = is_end or row.sampling.is_complete
        if is_end or row.text.stopped:
            finish = "stop"
        elif not row.num_left:
            finish = "length"
        if finish:
            text += row.text.end(whole=is_end)
        return row.take(text, finish=finish) if text or finish else None

    def _logprobs(self, logits: Tensor, token: int, count: int) -> TokenLogprob:
        values = logits.log_softmax(-1)
        decode = self.model.tokenizer.decode
        best = values.topk(min(count, len(values)))
        top = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        return TokenLogprob(
            decode([token]),
            values[token].item(),
            tuple(TokenLogprob(decode([other]), value) for other, value in top),
        )

    def _drop_ended(self) -> None:
        """End the rows and newcomers that were cancelled or are late."""
        over = [n for n, row in enumerate(self._rows) if row.ticket.has_ended]
        for row in (self._rows[n] for n in over):
            self._send(row.ticket, row.take(row.text.end(whole=False), finish="timeout"))
        self._remove(over)
        for ticket in [ticket for ticket in self._newcomers if ticket.has_ended]:
            self._send(ticket, Piece("", 0, finish="timeout"))
            self._newcomers.remove(ticket)

    def _remove(self, rows: Sequence[int]) -> None:
        if rows:
            self._rows = [self._rows[row] for row in self._batch.remove(rows)]

    def _fail_rows(self, error: Exception) -> None:
        tickets = [*(row.ticket for row in self._rows), *self._newcomers]
        self._rows, self._newcomers, self._reading = [], [], []
        self._batch.clear()
        for ticket in tickets:
            self._fail(ticket, error)

    def _fail(self, ticket: Ticket, error: Exception) -> None:
        # Of newcomers that fail together, some may have a row already, or have ended with their first token.
        if ticket.is_over:
            return
        # Not logged here: whoever answers the request does, under its id.
        self._send(ticket, Piece("", 0, error=error))

    def _send(self, ticket: Ticket, piece: Piece) -> bool:
        """Pass a piece on, unless the request was cancelled; return whether the request is over."""
        if not ticket.is_cancelled:
            try:
                ticket.listener(piece)
            except Exception as error:
                logger.error("the listener of a request has failed; the request ends", exc_info=error)
                ticket.is_cancelled = True
        if ticket.is_cancelled or piece.is_last:
            end = "cancelled" if ticket.is_cancelled else "error" if piece.error else piece.finish
            self.counters.finished[end] += 1
            ticket.is_over = True
        return ticket.is_over
