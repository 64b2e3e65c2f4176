"""The solver: asks a brain for calls, runs them, shows it the results, and ends with an answer or a typed failure.

One round is a single plan (HuggingGPT, https://arxiv.org/abs/2303.17580); with several, the brain decides after each
whether the results suffice (IdealGPT, https://arxiv.org/abs/2305.14985). Nothing that a brain writes is evaluated.
"""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from bindllm.errors import BindLLMError, InputError
from bindllm.media import Media, check_media
from bindllm.model.bindllm import BindLLM
from bindllm.reasoning.brain import Brain, Dicts, LocalBrain, Reply
from bindllm.reasoning.eyes import model_tools
from bindllm.reasoning.measure import MEDIA_TOOLS
from bindllm.reasoning.schedule import Call, Outcome, Scheduler, TimeOut, run_within
from bindllm.reasoning.tools import Tool, check_tools
from bindllm.reasoning.trace import Event, Trace, show_arguments, shown_image

# A call that was written as text, in the marks of common chat templates: it is a failed call, not an answer.
_CALL = re.compile(
    r"<\|?(tool|function|python_tag|invoke)|\[TOOL_CALLS\]|Call:\s*\{|^\s*Action:|"
    r"^\s*(```\w*\s*)?[{\[][^}]*\"(name|tool|function|action)\""
)

Reason = Literal["unusable", "rounds", "seconds", "tokens", "brain"]

INSTRUCTIONS = (
    "Answer the question with tools. You cannot see the media; tools look at them. Name media by their handles. The "
    "result of call number N is resultN: use it as an argument of a later call, or inside a text as {resultN}. Calls "
    "of one reply run together. If the results suffice, answer the question in one short sentence."
)
DECIDE = "Answer the question in one short sentence, from these results of tools that looked at the media."


@dataclass(frozen=True)
class Budget:
    """Limits of a run.

    Raises:
        InputError: a limit that is not above 0 and finite, or not a whole number, except for seconds.
    """

    rounds: int = 4
    """replies with calls; 1: a single plan. After the last, the brain must answer"""
    calls: int = 16
    """calls of all rounds together. After the last, the brain must answer"""
    seconds: float = 300.0
    """seconds of the whole run"""
    tokens: int = 4096
    """tokens that the brain writes, in all replies together"""
    call_seconds: float = 60.0
    """seconds of one call"""
    reply_tokens: int = 512
    """tokens of one reply"""

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            whole = name not in ("seconds", "call_seconds")
            # No lock waits longer than TIMEOUT_MAX.
            if not isinstance(value, int if whole else int | float) or not 0 < value <= threading.TIMEOUT_MAX:
                raise InputError(
                    f"the budget of {name} is {value}, expected more than 0 and at most "
                    f"{threading.TIMEOUT_MAX:,.0f}{', a whole number' if whole else ''}"
                )


@dataclass(frozen=True)
class Solution:
    """The end of a run.

    Args:
        answer: the answer; None after a failure.
        failure: why the run ended without an answer: a reply that is unusable for the second time, an exhausted budget,
            or a brain that does not reply. None: it has an answer.
        message: explains the failure.
        trace: all events of the run.
        calls: number of calls.
        tokens: number of tokens that the brain wrote.
        seconds: wall time.
    """

    answer: str | None
    failure: Reason | None
    message: str
    trace: Trace
    calls: int
    tokens: int
    seconds: float


class _Stop(Exception):
    """Ends a run without an answer."""

    def __init__(self, reason: Reason, message: str) -> None:
        super().__init__(message)
        self.reason: Reason = reason


class ScriptedBrain:
    """A brain that gives prepared replies, such as those of a trace.

    Args:
        replies: in order.
    """

    name = "script"

    def __init__(self, replies: Iterable[Reply]) -> None:
        self._replies = iter(replies)

    def reply(self, messages: Dicts, tools: Dicts, **_: Any) -> Reply:
        """Return the next reply."""
        for reply in self._replies:
            return reply
        raise InputError("the script has no further reply")


class Solver:
    """Answers questions in several steps.

    Args:
        brain: a bindllm model, an `Endpoint`, or anything else with the methods of `Brain`.
        tools: `Tool` objects or typed functions; None: those of the model and of `MEDIA_TOOLS`.
        budget: limits of each run.
        listener: a function that is called with each event of the trace.

    Raises:
        InputError: two tools of one name, a function that cannot be a tool, or no tools for a brain that is not a
            bindllm model.

    Example:
        ```python
        model = BindLLM.from_pretrained("checkpoints/openmoji")
        solution = Solver(model).run("Which animal is in the image?", [Media.image("cat.png")])
        print(solution.answer or solution.message)
        solution.trace.save("trace.html")
        ```
    """

    def __init__(
        self,
        brain: BindLLM | Brain,
        tools: Sequence[Tool | Callable[..., Any]] | None = None,
        *,
        budget: Budget | None = None,
        listener: Callable[[Event], None] | None = None,
    ) -> None:
        if tools is None:
            if not isinstance(brain, BindLLM):
                raise InputError(
                    "a brain that is not a bindllm model has no tools of its own: give tools=[...]"
                )
            tools = [*model_tools(brain), *MEDIA_TOOLS]
        self._brain = LocalBrain(brain) if isinstance(brain, BindLLM) else brain
        self._tools, self._budget, self._listener = check_tools(tools), budget or Budget(), listener

    def run(self, question: str, media: Sequence[Media] = ()) -> Solution:
        """Answer a question.

        Args:
            question: may name the media by their handles: image1, image2, audio1, ...
            media: media of the question. The brain gets their handles only.

        Raises:
            InputError: no question, media that are no list of `Media`, or media that no tool takes.
        """
        if not question.strip():
            raise InputError("the question is empty")
        return _Run(self._brain, self._tools, self._budget, self._listener).solve(
            question, name_media(check_media(media))
        )


def name_media(media: Sequence[Media]) -> dict[str, Media]:
    """Return media by their handles.

    Examples:
        >>> [*name_media([Media.image("a.png"), Media.audio("a.wav"), Media.image("b.png")])]
        ['image1', 'audio1', 'image2']
    """
    found: dict[str, Media] = {}
    for item in media:
        number = 1 + sum(other.modality == item.modality for other in found.values())
        found[f"{item.modality}{number}"] = item
    return found


class _Run:
    """One question: its messages, its scheduler, and how much of the budget is left."""

    def __init__(
        self,
        brain: Brain,
        tools: Mapping[str, Tool],
        budget: Budget,
        listener: Callable[[Event], None] | None,
    ) -> None:
        self._brain, self._all, self._budget = brain, tools, budget
        self._trace, self._started, self._tokens = Trace(listener), time.monotonic(), 0
        self._messages: list[dict[str, Any]] = []
        self._calls: list[Call] = []
        names = "|".join(map(re.escape, tools))
        self._python_call = re.compile(rf"\W*(\w+ ?= ?|functions\.)?({names})\(")

    @property
    def _at(self) -> float:
        return time.monotonic() - self._started

    @property
    def _has_looked(self) -> bool:
        # The call of an unknown tool is an error.
        ended = ((call, self._scheduler.outcomes[call.number]) for call in self._calls)
        # Of media that a tool returns, the brain sees a name only.
        return any(
            not outcome.error
            and not isinstance(outcome.value, Media)
            and not self._all[call.name].media.keys().isdisjoint(call.arguments)
            for call, outcome in ended
        )

    def solve(self, question: str, handles: Mapping[str, Media]) -> Solution:
        """Return the answer or the failure; see `Solver.run`."""
        modalities = {item.modality for item in handles.values()}
        modalities |= {
            name for tool in self._all.values() for name in tool.returns if tool.can_use([*modalities])
        }
        tools = {name: tool for name, tool in self._all.items() if tool.can_use([*modalities])}
        for item in handles.values():
            if not any(tool.takes(item.modality) for tool in tools.values()):
                raise InputError(f"no tool takes {item.modality}: add one, or leave {item.name} out")
        self._scheduler = Scheduler(tools, handles, seconds=self._budget.call_seconds, report=self._report)
        self._offered = [tool.for_openai(handles) for tool in tools.values()]
        lines = [f"{handle}: {item.modality}" for handle, item in handles.items()]
        self._say("system", INSTRUCTIONS)
        self._say("user", "\n".join([*(["Media:", *lines] if lines else []), f"Question: {question}"]))
        named = [
            {"handle": handle, "modality": item.modality, "name": item.name, "thumbnail": shown_image(item)}
            for handle, item in handles.items()
        ]
        self._trace.add(
            "question", self._at, text=question, media=named, tools=[*tools], brain=self._brain.name,
            budget=asdict(self._budget),
        )  # fmt: skip
        answer, failure, message = None, None, ""
        try:
            answer = self._rounds(question, must_look=bool(handles))
            self._trace.add("answer", self._at, text=answer)
        except _Stop as stop:
            failure, message = stop.reason, str(stop)
            self._trace.add("failure", self._at, reason=failure, text=message)
        calls = len(self._scheduler.outcomes)
        return Solution(answer, failure, message, self._trace, calls, self._tokens, self._at)

    def _rounds(self, question: str, *, must_look: bool) -> str:
        """Ask and run until the brain answers."""
        for number in range(1, self._budget.rounds + 1):
            # Without a look at the media, an answer would be a guess.
            required = must_look and not self._has_looked
            calls, text = self._usable(number, required=required)
            if not calls:
                return text
            self._calls += calls
            self._scheduler.run(calls, self._started + self._budget.seconds)
            for call in calls:
                outcome = self._scheduler.outcomes[call.number].text
                self._say("tool", f"result{call.number}: {outcome}", tool_call_id=f"call_{call.number}")
            if len(self._calls) >= self._budget.calls:
                break
        if must_look and not self._has_looked:
            raise _Stop("rounds", f"no call of {number} rounds that looks at the media has a result")
        # A prompt of its own: small models continue a list of calls, and some endpoints refuse calls without tools.
        self._messages, self._offered = [], []
        results = [
            f"{call.name}({show_arguments(call.arguments)}): {self._scheduler.outcomes[call.number].text}"
            for call in self._calls
            if call.same_as is None
        ]
        self._say("user", "\n".join([DECIDE, *results, f"Question: {question}"]))
        calls, text = self._usable(number + 1, required=False)
        if calls:
            raise _Stop("rounds", f"the brain still calls tools after {number} rounds, when it must answer")
        return text

    def _usable(self, number: int, *, required: bool) -> tuple[list[Call], str]:
        """Return the calls and the text of a reply; one that cannot be used is asked for again, once."""
        for attempt in (1, 2):
            reply, seconds = self._ask(required=required)
            problem = reply.problem
            calls = [] if problem else self._scheduler.check(reply.calls)
            text = reply.text or (json.dumps(reply.calls, ensure_ascii=False) if problem else "")
            if calls and all(call.problem for call in calls):
                problem = "; ".join(dict.fromkeys(call.problem for call in calls))
            if not calls and not problem:
                if not reply.text.strip():
                    problem = "the reply is empty"
                elif _CALL.search(reply.text) or self._python_call.match(reply.text):
                    problem = "the reply is the text of a call, and neither a call nor an answer"
                elif required:
                    problem = "the reply has no call, and no tool has looked at the media yet; call one"
            self._trace.add(
                "reply", self._at, round=number, text=text, tokens=reply.tokens, seconds=round(seconds, 3),
                problem=problem, calls=[_planned(call) for call in calls],
            )  # fmt: skip
            if not problem:
                return self._afford(calls, reply), reply.text.strip()
            if attempt == 1:
                self._say("assistant", text or json.dumps(reply.calls, ensure_ascii=False))
                self._say("user", f"This reply cannot be used: {problem}. Write it again.")
        raise _Stop("unusable", f"two replies in a row cannot be used; the last: {problem}")

    def _ask(self, *, required: bool) -> tuple[Reply, float]:
        """Return a reply and its seconds, within the budget."""
        seconds = self._budget.seconds - self._at
        tokens = min(self._budget.reply_tokens, self._budget.tokens - self._tokens)
        if seconds <= 0:
            raise _Stop("seconds", f"the {self._budget.seconds:g} seconds of the run are used up")
        if tokens <= 0:
            raise _Stop("tokens", f"the brain has written {self._tokens:,} tokens, all of its budget")
        started = self._at
        try:
            # The brain has the limit too; in a thread, one that ignores it cannot hold the run.
            reply = run_within(
                seconds,
                lambda: self._brain.reply(
                    list(self._messages), self._offered, required=required, seconds=seconds, tokens=tokens
                ),
            )
            if not isinstance(reply, Reply):
                raise InputError(f"the brain returned {type(reply).__name__}, expected a Reply")
        except TimeOut as error:
            raise _Stop("seconds", f"the brain gave {error}, which is all that was left") from error
        # A brain may be anyone's code: whatever it raises is the end of this run, and no answer.
        except Exception as error:
            own = isinstance(error, BindLLMError)
            raise _Stop("brain", str(error) if own else f"{type(error).__name__}: {error}") from error
        self._tokens += reply.tokens
        return reply, self._at - started

    def _afford(self, calls: list[Call], reply: Reply) -> list[Call]:
        """Return calls within the budget, and add them to the messages."""
        if calls:
            written = [
                {
                    "id": f"call_{call.number}",
                    "type": "function",
                    "function": {
                        "name": _readable(call.name),
                        "arguments": _readable(json.dumps(call.arguments, ensure_ascii=False)),
                    },
                }
                for call in calls
            ]
            self._say("assistant", reply.text, tool_calls=written)
        beyond = f"not run: the budget of {self._budget.calls} calls is used up"
        return [
            call
            if call.number <= self._budget.calls
            else Call(call.number, call.name, call.arguments, beyond)
            for call in calls
        ]

    def _say(self, role: str, text: str, **fields: Any) -> None:
        self._messages.append({"role": role, "content": _readable(text), **fields})

    def _report(self, call: Call, outcome: Outcome) -> None:
        seen = shown_image(outcome.value) if isinstance(outcome.value, Media) else ""
        self._trace.add(
            "result", self._at, number=call.number, name=call.name, ok=not outcome.error, text=outcome.text,
            seconds=round(outcome.seconds, 3), thumbnail=seen,
        )  # fmt: skip


def _readable(text: str) -> str:
    """Return a text without halves of surrogate pairs, which JSON can spell, and no brain can read."""
    return text.encode("utf-8", "replace").decode()


def _planned(call: Call) -> dict[str, Any]:
    return {
        "number": call.number,
        "name": call.name,
        "arguments": dict(call.arguments),
        "needs": sorted(call.needs),
    }
