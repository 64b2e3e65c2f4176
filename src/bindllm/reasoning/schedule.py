"""The scheduler: runs the calls of a plan as a graph, each as soon as the results that its arguments name are there.

Dependencies are read from the arguments and never taken from the planner, since models name them wrongly
(HuggingGPT, https://arxiv.org/abs/2303.17580).
"""

from __future__ import annotations

import json
import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

import numpy as np

from bindllm.errors import BindLLMError, InputError, did_you_mean, listed
from bindllm.media import Media
from bindllm.reasoning.tools import Tool, as_text, references

Value = TypeVar("Value")

MOST_CHARACTERS = 20_000
"""Longest result of a call, as text; a longer one is an error, since the planner could not read it."""

MOST_BYTES = 1 << 28
"""Largest array or file that a call may return as media."""

_MOST_SHOWN = 500
_THREAD = "bindllm-tool"


@dataclass(frozen=True)
class Call:
    """A call of a plan.

    Args:
        number: number of the call in the run; its result is ``result`` with this number.
        problem: why it cannot be run; "" if it can.
        same_as: the number of an earlier call with the same tool and arguments, or None.
    """

    number: int
    name: str
    arguments: Mapping[str, Any]
    problem: str = ""
    same_as: int | None = None

    @property
    def needs(self) -> frozenset[int]:
        """The calls that must end before it: those whose results its arguments name, and an equal one."""
        return frozenset([*references(self.arguments), *([] if self.same_as is None else [self.same_as])])


@dataclass(frozen=True)
class Outcome:
    """The end of a call.

    Args:
        note: a note for the planner, after the result.
    """

    value: Any = None
    error: str = ""
    seconds: float = 0.0
    note: str = ""

    @property
    def text(self) -> str:
        """The outcome as the planner reads it."""
        value = self.value
        if self.error:
            text = f"error: {self.error}"
        elif isinstance(value, Media):
            text = f"{value.modality} {value.name}"
        else:
            text = as_text(value)
        return f"{text} ({self.note})" if self.note else text


class TimeOut(BindLLMError):
    """Work that has not ended in its time."""


def run_within(seconds: float, work: Callable[[], Value]) -> Value:
    """Return the result of work in another thread, or give it up.

    Python cannot end a thread: work that hangs keeps its thread, which does not keep the process from ending.

    Raises:
        TimeOut: the work has not ended in time.
    """
    done: SimpleQueue[tuple[Value | None, BaseException | None]] = SimpleQueue()
    _start(work, done.put)
    try:
        value, error = done.get(timeout=max(0.0, seconds))
    except Empty:
        raise TimeOut(f"no answer in {seconds:.1f} seconds") from None
    if error is not None:
        raise error
    return value


def _start(work: Callable[[], Any], report: Callable[[tuple[Any, BaseException | None]], None]) -> None:
    def run() -> None:
        try:
            report((work(), None))
        # Also SystemExit, which would end the thread without a word.
        except BaseException as error:
            report((None, error))

    # A daemon: the threads of a pool would be joined at exit, also one that hangs.
    threading.Thread(target=run, name=_THREAD, daemon=True).start()


def has_running_work() -> bool:
    """Return whether work that was given up still runs."""
    return any(thread.name == _THREAD for thread in threading.enumerate())


class Scheduler:
    """Runs the calls of one run.

    Args:
        report: called with each call that has ended, and its outcome.

    Attributes:
        outcomes: outcomes of the calls that have ended, by number.
    """

    def __init__(
        self,
        tools: Mapping[str, Tool],
        handles: Mapping[str, Media],
        *,
        seconds: float,
        report: Callable[[Call, Outcome], None],
    ) -> None:
        self.outcomes: dict[int, Outcome] = {}
        self._tools, self._handles, self._seconds, self._report = tools, handles, seconds, report
        self._seen: dict[str, int] = {}

    def check(self, planned: Sequence[tuple[str, Mapping[str, Any]]]) -> list[Call]:
        """Number the calls of a reply, and find the problem of each one that cannot be run."""
        first = len(self.outcomes) + 1
        last = first + len(planned) - 1
        calls = []
        for number, (name, arguments) in enumerate(planned, first):
            if name not in self._tools:
                problem = f"unknown tool {name[:_MOST_SHOWN]!r}. {did_you_mean(name, self._tools)}"
            else:
                problem = self._tools[name].problem(arguments, self._handles)
            missing = [n for n in references(arguments) if n > last]
            if not problem and missing:
                problem = f"result{missing[0]} does not exist; results are numbered in the order of the calls"
            key = json.dumps([name, arguments], sort_keys=True)
            earlier = number if problem else self._seen.setdefault(key, number)
            calls.append(Call(number, name, arguments, problem, None if earlier == number else earlier))
        return calls

    def run(self, calls: Sequence[Call], deadline: float) -> None:
        """Run calls, those that do not depend on each other at the same time.

        Args:
            deadline: time of ``time.monotonic`` at which the run ends.
        """
        # How to read this: a call starts when all results that it needs are there, and ends by a message in the queue
        # or at its limit. A message of a call that has been given up finds no entry and is dropped.
        waiting = {call.number: call for call in calls}

        def ready() -> list[Call]:
            return [call for call in waiting.values() if call.problem or call.needs <= self.outcomes.keys()]

        running: dict[int, tuple[Call, float]] = {}
        ended: SimpleQueue[tuple[int, Any, BaseException | None]] = SimpleQueue()
        while waiting or running:
            for call in ready():
                work = self._begin(waiting.pop(call.number))
                if work is not None:
                    running[call.number] = call, time.monotonic()
                    _start(work, lambda found, number=call.number: ended.put((number, *found)))
            if running:
                self._wait(running, ended, deadline)
            # Without a running call, all that is left waits for each other.
            elif not ready():
                names = listed([f"result{number}" for number in waiting])
                for call in waiting.values():
                    self._end(call, Outcome(error=f"not run: {names} wait for each other"))
                waiting = {}

    def _begin(self, call: Call) -> Callable[[], Any] | None:
        """Return the work of a call whose needs are met, or end it."""
        if call.problem:
            self._end(call, Outcome(error=call.problem))
            return None
        if call.same_as is not None:
            self._end(
                call,
                replace(
                    self.outcomes[call.same_as], seconds=0.0, note=f"the same call as result{call.same_as}"
                ),
            )
            return None
        if failed := sorted(n for n in call.needs if self.outcomes[n].error):
            self._end(call, Outcome(error=f"not run: result{failed[0]} is an error"))
            return None
        tool = self._tools[call.name]
        try:
            results = {number: self.outcomes[number].value for number in call.needs}
            arguments = tool.resolve(call.arguments, self._handles, results)
        except InputError as error:
            self._end(call, Outcome(error=str(error)))
            return None
        return lambda: check_result(tool.run(**arguments))

    def _wait(
        self,
        running: dict[int, tuple[Call, float]],
        ended: SimpleQueue[tuple[int, Any, BaseException | None]],
        deadline: float,
    ) -> None:
        """Wait for the next end of a call, or give up those that have reached their limit."""
        limits = {number: min(started + self._seconds, deadline) for number, (_, started) in running.items()}
        try:
            number, value, error = ended.get(timeout=max(0.0, min(limits.values()) - time.monotonic()))
        except Empty:
            now = time.monotonic()
            for number in [number for number, limit in limits.items() if limit <= now]:
                call, started = running.pop(number)
                self._end(
                    call, Outcome(error=f"no result in {now - started:.1f} seconds", seconds=now - started)
                )
            return
        if number in running:
            call, started = running.pop(number)
            self._end(
                call, Outcome(value, "" if error is None else _reason(error), time.monotonic() - started)
            )

    def _end(self, call: Call, outcome: Outcome) -> None:
        self.outcomes[call.number] = outcome
        self._report(call, outcome)


def check_result(value: Any) -> Any:
    """Return the result of a tool if a planner can read it.

    Raises:
        InputError: a value of another type than media or JSON, a number that is not finite, or too large a result.
    """
    if isinstance(value, Media):
        source = value.source
        size = source.nbytes if isinstance(source, np.ndarray) else 0
        size = len(source) if isinstance(source, bytes | str) else size
        if size > MOST_BYTES:
            raise InputError(f"the result has {size:,} bytes, at most {MOST_BYTES:,} are kept")
    elif _left(value, MOST_CHARACTERS) < 0:
        raise InputError(f"the result is longer than {MOST_CHARACTERS:,} characters; ask for less")
    return value


def _left(value: Any, left: int) -> int:
    """Return how many of some characters remain after a value is written; below 0, the rest has not been looked at."""
    if isinstance(value, str):
        return left - len(value) - 2
    if value is None or isinstance(value, bool | int):
        return left - (1 if value is None else value.bit_length()) // 3 - 1
    if isinstance(value, float) and math.isfinite(value):
        return left - 8
    if isinstance(value, list | tuple):
        parts = value
    elif isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        parts = (part for pair in value.items() for part in pair)
    else:
        found = value if isinstance(value, float) else type(value).__name__
        raise InputError(
            f"the tool returned {found}, expected media, or text, finite Python numbers and lists of them"
        )
    for part in parts:
        if left < 0:
            break
        left = _left(part, left - 1)
    return left


def _reason(error: BaseException) -> str:
    """Return the message of an error; errors of ours explain themselves."""
    text = str(error) if isinstance(error, BindLLMError) else f"{type(error).__name__}: {error}"
    return text[:_MOST_SHOWN]
