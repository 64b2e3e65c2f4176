"""The brain of a solver: writes the next calls or the answer. Here it is a bindllm model, whose calls follow a grammar.

A brain reads messages in OpenAI's form. It does not see the media, only their handles.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import LogitsProcessor

from bindllm.conversation import Conversation, Message
from bindllm.errors import InputError
from bindllm.model.bindllm import BindLLM
from bindllm.model.generation import check_options
from bindllm.model.generation.calls import STRICT_JSON, CallForm
from bindllm.model.generation.constraint import Constraint, Grammars
from bindllm.reasoning.flat import FlatMasker, calls_pattern
from bindllm.reasoning.tools import REFERENCE

Dicts = Sequence[Mapping[str, Any]]

OWN_FORM = CallForm(
    start="Call: ",
    between="\nCall: ",
    end="",
    keys=("name", "arguments"),
    pieces=('{"name": "', '", "arguments": ', "}"),
    has_name_first=True,
)
"""Form of calls for decoders whose chat template has none of its own."""

MOST_CALLS = 4
"""Calls of one reply; a small model may repeat a call until its reply is cut."""


@dataclass(frozen=True)
class Reply:
    """One reply of a brain.

    Args:
        text: the text of the brain without its calls; the answer if there are none.
        problem: why the reply cannot be read as calls or an answer; "" if it can.

    Raises:
        InputError: a field of another form, since anyone may write a brain.
    """

    text: str
    calls: tuple[tuple[str, Mapping[str, Any]], ...] = ()
    tokens: int = 0
    problem: str = ""

    def __post_init__(self) -> None:
        match self.text, self.tokens, self.problem:
            case str(), int(), str() if self.tokens >= 0:
                pass
            case found:
                raise InputError(
                    f"a reply has text, tokens and problem {found}, expected text, a count and text"
                )
        for call in self.calls:
            match call:
                case (str(), {}):
                    pass
                case _:
                    raise InputError(f"a reply has the call {call!r}, expected a name and a dictionary")


class Brain(Protocol):
    """Writes the next step of a solver."""

    name: str

    def reply(self, messages: Dicts, tools: Dicts, *, required: bool, seconds: float, tokens: int) -> Reply:
        """Return the next calls, or the answer.

        Args:
            messages: so far, as OpenAI's API has them.
            tools: that may be called, as OpenAI's API has them; none: the reply is the answer.
            required: whether the reply must have a call.
            seconds: that are left.
            tokens: length of the longest reply.

        Raises:
            BindLLMError: no reply.
        """
        ...


class _Constrained(LogitsProcessor):
    """Lets only tokens follow that a grammar allows, in an answer of one row.

    Args:
        is_done: whether an answer [A] should end, if it may.
    """

    def __init__(
        self, constraint: Constraint, width: int, ends: Sequence[int], is_done: Callable[[Tensor], bool]
    ) -> None:
        self._constraint, self._width, self._read = constraint, width, width
        self._ends, self._is_done = list(ends), is_done

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        for token in input_ids[0, self._read :].tolist():
            self._constraint.take(token)
        self._read = input_ids.shape[1]
        allowed = self._constraint.allowed(scores.shape[1])
        if allowed[self._ends].any() and self._is_done(input_ids[0, self._width :]):
            allowed = torch.zeros_like(allowed).index_fill_(0, torch.tensor(self._ends), True) & allowed
        return scores.masked_fill(~allowed.to(scores.device), -torch.inf)


class LocalBrain:
    """A bindllm model as a brain. Its calls are valid by construction, unless they are cut.

    Decoders whose chat template writes calls as JSON objects get tools and results in the template's form, all others
    as text (`OWN_FORM`).

    Args:
        model: any model; its media parts are not used.
        **options: of `BindLLM.generate`, such as ``temperature``.
    """

    def __init__(self, model: BindLLM, **options: Any) -> None:
        self.name = model.config.name
        self._model, self._options, self._grammars = model, options, Grammars(model)
        self._template = CallForm.of(model.tokenizer)
        self._form = self._template or OWN_FORM

    def reply(self, messages: Dicts, tools: Dicts, *, required: bool, seconds: float, tokens: int) -> Reply:
        """Write the next step, see `Brain.reply`."""
        options = check_options({"max_new_tokens": tokens, "max_time": seconds, **self._options})
        if self._template is None:
            conversation = Conversation(tuple(_as_text(messages, tools)))
        else:
            conversation = Conversation(tuple(map(_as_message, messages)), tools=tools)
        batch = self._model.prepare(conversation, None, **options)
        if tools:
            functions = [tool["function"] for tool in tools]
            options["logits_processor"] = [self._mask(functions, required=required, width=batch[0].shape[1])]
        ids = self._model.generate_from(*batch, **options)[0]
        return self._read(ids, has_tools=bool(tools))

    def _mask(self, functions: Dicts, *, required: bool, width: int) -> LogitsProcessor:
        """Return the processor that keeps calls valid: by a grammar, or without llguidance by `FlatMasker`."""
        ends = self._model.settings.eos_token_id
        if find_spec("llguidance") is None:
            pattern = calls_pattern(self._form, functions, required=required, most=MOST_CALLS)
            return FlatMasker(pattern, self._model.tokenizer, width, ends, self._repeats)
        grammar = self._form.grammar(functions, several=True, required=required, most=MOST_CALLS)
        return _Constrained(self._grammars.compile(grammar), width, ends, self._repeats)

    def _read(self, ids: Tensor, *, has_tools: bool) -> Reply:
        (text,) = self._model.decode(ids[None])
        if not set(ids.tolist()) & set(self._model.settings.eos_token_id):
            problem = f"the reply was cut after {len(ids)} tokens; write less"
            return Reply(text, tokens=len(ids), problem=problem)
        before, calls = self._find_calls(text) if has_tools else (text, [])
        return Reply(before, tuple(calls), len(ids))

    def _find_calls(self, text: str) -> tuple[str, list[tuple[str, Mapping[str, Any]]]]:
        """Return the text before the first call, and the calls; the whole text if it has none."""
        calls, mark = [], self._form.start.strip()
        place = at = max(0, text.find(mark))
        while place < len(text) and (call := self._form.read(text, place)) is not None:
            calls.append((call.name, call.arguments))
            place = call.stop
        return (text[:at] if calls else text), calls

    def _repeats(self, ids: Tensor) -> bool:
        """Whether an answer has a call for the second time: a small model would repeat it until the limit."""
        _, calls = self._find_calls(self._model.tokenizer.decode(ids, skip_special_tokens=True))
        return any(call in calls[:number] for number, call in enumerate(calls))


def _as_message(message: Mapping[str, Any]) -> Message:
    """Return a message for a chat template with tools; there, arguments are objects and not their text."""
    fields = {name: value for name, value in message.items() if name not in ("role", "content")}
    if calls := fields.get("tool_calls"):
        fields["tool_calls"] = [
            {
                **call,
                "function": {
                    **call["function"],
                    "arguments": STRICT_JSON.decode(call["function"]["arguments"]),
                },
            }
            for call in calls
        ]
    return Message(message["role"], message["content"], fields)


def _as_text(messages: Dicts, tools: Dicts) -> list[Message]:
    """Return messages for a template without tools: tools, calls and results are text."""
    # Every template has users and assistants; some have no system role, and all want the two in turn.
    found: list[tuple[str, str]] = []
    for message in messages:
        role, text = "user", message["content"]
        if message["role"] == "assistant":
            calls = [call["function"] for call in message.get("tool_calls", ())]
            lines = [
                f'Call: {{"name": {json.dumps(call["name"])}, "arguments": {call["arguments"]}}}'
                for call in calls
            ]
            role, text = "assistant", "\n".join([text, *lines] if text else lines)
        if found and found[-1][0] == role:
            text = f"{found.pop()[1]}\n{text}"
        found.append((role, text))
    if tools:
        lines = [_signature(tool["function"]) for tool in tools]
        form = 'A call is one line: Call: {"name": "...", "arguments": {...}}'
        # The first message holds the instructions, to which the tools belong.
        found[0] = "user", "\n".join(["Tools:", *lines, form, "", found[0][1]])
    return [Message(role, text) for role, text in found]


def _signature(function: Mapping[str, Any]) -> str:
    """Return a function in one line, such as ``- count(image: image1, thing?: string): Count things``."""
    parameters = function["parameters"]
    required = parameters.get("required", ())
    words = []
    for name, schema in parameters.get("properties", {}).items():
        # A schema of an MCP server may have any form, also `true`.
        schema = schema if isinstance(schema, Mapping) else {}
        first = [one for one in schema.get("anyOf", ()) if isinstance(one, Mapping)][:1] or [{}]
        kind = schema.get("enum") or schema.get("type") or first[0].get("type", "any")
        kind = "|".join(map(str, kind)) if isinstance(kind, list) else kind
        # The handles of media are the names in the pattern, before that of results.
        handles, end, _ = schema.get("pattern", "").partition(f"|{REFERENCE})$")
        words.append(f"{name}{'' if name in required else '?'}: {handles[2:] if end else kind}")
    return f"- {function['name']}({', '.join(words)}): {function['description']}"
