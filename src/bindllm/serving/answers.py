"""Answers of the engine in the event loop: one asynchronous iterator over the choices of a request."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from functools import partial
from typing import Self

from bindllm.serving.api.errors import NO_RETRY, ApiError
from bindllm.serving.api.sampling import Question
from bindllm.serving.engine import Engine
from bindllm.serving.metrics import Metrics
from bindllm.serving.request import Piece


class Answers:
    """The answers to a request; leaving the block cancels those that are not finished.

    Raises:
        EngineBusy: the queue cannot take all choices; none of them stays in it.
        EngineClosed: the server is about to end.

    Attributes:
        completion_tokens: generated so far, in all choices.
    """

    def __init__(self, engine: Engine, question: Question, metrics: Metrics) -> None:
        self.completion_tokens, self._question = 0, question
        self._loop, self._metrics = asyncio.get_running_loop(), metrics
        # Choices end at different times; a stream is over with the last of them.
        self._finished: set[int] = set()
        # Without a limit, as the engine must not wait; an answer has at most `max_tokens` pieces.
        self._pieces: asyncio.Queue[tuple[int, Piece] | None] = asyncio.Queue()
        self._started = self._last = self._reminded = time.perf_counter()
        self._timer: asyncio.TimerHandle | None = None
        listeners = [partial(self._put, choice) for choice in range(question.choices)]
        self._tickets = engine.submit_choices(question.request, listeners)

    @property
    def prompt_tokens(self) -> int:
        """Tokens of the prompt, known once the first piece is there."""
        # All choices have the same prompt.
        return self._tickets[0].prompt_tokens or 0

    @property
    def warnings(self) -> Sequence[str]:
        """Warnings about the media of the prompt, known once the first piece is there."""
        return self._tickets[0].prompt.warnings

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.cancel()

    def cancel(self) -> None:
        """Free the slots of the choices that are not finished."""
        if self._timer is not None:
            self._timer.cancel()
        # A finished ticket has no slot any more, and may not be counted as canceled.
        for choice, ticket in enumerate(self._tickets):
            if choice not in self._finished:
                ticket.cancel()

    @property
    def is_finished(self) -> bool:
        """Whether all choices are complete."""
        return len(self._finished) == len(self._tickets)

    async def next(self, seconds: float | None = None) -> tuple[int, Piece] | None:
        """Return the next piece and its choice, or None if none came within some seconds.

        Raises:
            Exception: the error that ended a choice.
            ApiError: a choice did not finish in time.
        """
        try:
            async with asyncio.timeout(seconds):
                found = await self._pieces.get()
        # Not a fault: the caller sends a comment to keep the connection open, and asks again.
        except TimeoutError:
            return None
        return self._checked(*found)

    def _checked(self, choice: int, piece: Piece) -> tuple[int, Piece]:
        """Return a piece; errors as for `next`."""
        # Before anything is raised: a choice that failed needs no canceling.
        if piece.is_last:
            self._finished.add(choice)
        if piece.error is not None:
            raise self._question.named(piece.error)
        if piece.finish == "timeout":
            # Not retried by clients: the same request would need the same time again.
            raise ApiError(
                504,
                "the answer was not finished within the deadline of this server; ask for fewer tokens, or try again "
                "when it has less to do",
                headers=NO_RETRY,
            )
        self._observe(piece)
        return choice, piece

    async def pieces(
        self, first: tuple[int, Piece] | None = None, *, seconds: float | None = None
    ) -> AsyncIterator[tuple[int, Piece] | None]:
        """Yield all pieces with their choices, and None after each time of some seconds without one.

        Raises:
            Exception: as for `next`.
        """
        if first is not None:
            yield first
        if seconds is not None and not self.is_finished:
            self._remind(seconds)
        while not self.is_finished:
            found = await self._pieces.get()
            yield None if found is None else self._checked(*found)

    def _remind(self, seconds: float) -> None:
        """Put None among the pieces after each time of some seconds without one, until `cancel`."""
        # One timer that looks back: one for each piece would cost more than the piece itself.
        now = time.perf_counter()
        if now >= max(self._last, self._reminded) + seconds:
            self._pieces.put_nowait(None)
            self._reminded = now
        left = max(self._last, self._reminded) + seconds - now
        self._timer = self._loop.call_later(left, self._remind, seconds)

    def _put(self, choice: int, piece: Piece) -> None:
        """Take a piece in the engine's thread."""
        # The loop is closed only if the server was stopped by force.
        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._pieces.put_nowait, (choice, piece))

    def _observe(self, piece: Piece) -> None:
        now = time.perf_counter()
        # A piece may hold several tokens, or none: text waits until it is certain, such as half of a character.
        if piece.tokens and not self.completion_tokens:
            self._metrics.first_token.observe(now - self._started)
            self._metrics.tokens.labels("prompt").inc(self.prompt_tokens)
        elif piece.tokens:
            self._metrics.token_interval.observe((now - self._last) / piece.tokens)
        self.completion_tokens += piece.tokens
        self._metrics.answer_tokens.inc(piece.tokens)
        self._last = now
