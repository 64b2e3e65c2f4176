"""Tools: how the chat template writes a call, grammars of answers that may call, and the calls in an answer.

Nothing is run. A call is a text of the model, in the form that clients read.
"""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from bindllm.conversation import Message, control_tokens
from bindllm.serving.api.errors import ApiError, shown
from bindllm.serving.api.schema import ChatBody, ResponsesBody, check_depth
from bindllm.serving.constraint import json_rule

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# A call that no client asks for, to see how a template writes one.
_NAME, _ARGUMENTS = "bindllm_tool", {"bindllm_argument": "value"}


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


_DECODER = json.JSONDecoder(parse_constant=_no_constant)


@dataclass(frozen=True)
class Call:
    """A call in an answer.

    Args:
        name: of the tool.
        arguments: a JSON object.
        stop: the character of the text after the call.
        id: by which a client names the call when it sends the result.
    """

    name: str
    arguments: dict[str, Any]
    stop: int
    id: str = field(default_factory=lambda: f"call_{uuid.uuid4().hex[:24]}")

    @property
    def function(self) -> dict[str, str]:
        """Name and arguments; OpenAI's API has the arguments as a text."""
        return {"name": self.name, "arguments": json.dumps(self.arguments, ensure_ascii=False)}

    def for_client(self, index: int | None = None) -> dict[str, Any]:
        """Return the call in the form of chat completions, with an index if it is a part of a stream."""
        place = {} if index is None else {"index": index}
        return {**place, "id": self.id, "type": "function", "function": self.function}


@dataclass(frozen=True)
class CallForm:
    """How a chat template writes a call: ``start {"name": ..., "arguments": ...} end``.

    Args:
        start: before the object of a call.
        between: between two of them; empty: an answer has one call only.
        end: after the last one.
        keys: of the object, for the name and for the arguments.
        pieces: of the object: before, between, and after name and arguments.
        has_name_first: whether the arguments follow the name.
    """

    start: str
    between: str
    end: str
    keys: tuple[str, str]
    pieces: tuple[str, str, str]
    has_name_first: bool

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> CallForm:
        """Return the form of a tokenizer, read from a call that its chat template writes.

        Raises:
            ApiError: the template takes no tools, or it writes calls in another form.
        """
        text, pair = (_written(tokenizer, count) for count in (1, 2))
        found, values = [*_objects(text)], [_NAME + "0", _ARGUMENTS]
        if len(found) != 1 or [*found[0][2].values()] not in (values, values[::-1]):
            raise ApiError(
                400,
                "this server cannot use tools with this model: the chat template of its decoder does not write calls "
                "as JSON objects with a name and arguments. Leave tools out, or serve a decoder whose template does, "
                "such as Qwen3",
                param="tools",
                code="unsupported_parameter",
            )
        ((first, stop, value),) = found
        has_name_first = [*value.values()] == values
        # The two values inside the object, in their order.
        name = text.index(values[0], first), text.index(values[0], first) + len(values[0])
        inner = text.index("{", first + 1)
        marks = sorted((name, (inner, _DECODER.raw_decode(text, inner)[1])))
        pieces = text[first : marks[0][0]], text[marks[0][1] : marks[1][0]], text[marks[1][1] : stop]
        spans = [(start, end) for start, end, _ in _objects(pair)]
        between = pair[spans[0][1] : spans[1][0]] if len(spans) == 2 else ""
        # A list of calls, or another mark between them, would need a form of its own.
        repeats = "".join(between.split()) == "".join((text[stop:] + text[:first]).split())
        keys = tuple(value) if has_name_first else tuple(value)[::-1]
        return cls(text[:first], between if repeats else "", text[stop:], keys, pieces, has_name_first)

    def grammar(self, functions: Sequence[Mapping[str, Any]], *, several: bool, required: bool) -> str:
        """Return the grammar of an answer that may or must call some functions.

        Args:
            functions: those that may be called.
            several: whether it may have several calls, if the template can write them.
            required: whether it is a call; else it is any text, up to the mark of a call, if there is one.
        """
        mark, rules, heads = self.start.strip(), [], []
        # Without a mark, only the first keys of the object show that an answer will be a call.
        has_heads = not required and not mark
        for number, function in enumerate(functions):
            schema = {"type": "object", **(function.get("parameters") or {"additionalProperties": False})}
            (before, middle, end), name = self.pieces, function["name"]
            start, end = (
                (before + name + middle, end) if self.has_name_first else (before, middle + name + end)
            )
            heads.append(_spaced(start))
            start = f"/{heads[-1]}/" if has_heads else _literal(start)
            rules.append(f"call{number}: {start} {json_rule(schema)} {_literal(end)}")
        again = f"({_literal(self.between)} call)*" if several and self.between else ""
        calls = f"call {again} {_literal(self.end.rstrip())}"
        names = " | ".join(f"call{number}" for number in range(len(functions)))
        if required:
            start = [f"start: {_literal(self.start.lstrip())} {calls}"]
        elif mark:
            # A lazy text ends with its first mark, so all that follows has to be a call.
            rest = _literal(self.start.lstrip().removeprefix(mark))
            start = [
                f"start: ANY | marked {rest} {calls}",
                f"marked[lazy]: ANY {_literal(mark)}",
                "ANY: /(?s:.*)/",
            ]
        else:
            start = [f"start: OTHER | {calls}", f"OTHER: /(?s:.*)/ & ~/({'|'.join(heads)})(?s:.*)/"]
        return "\n".join((*start, f"call: {names}", *rules))

    def read(self, text: str, at: int) -> Call | None:
        """Return the call that starts at a character of a text, after white space, or None."""
        start, end = self.start.strip(), self.end.strip()
        at = _skip(text, at)
        if not text.startswith(start, at):
            return None
        try:
            value, at = _DECODER.raw_decode(text, _skip(text, at + len(start)))
        except (ValueError, RecursionError):
            return None
        stop = _skip(text, at)
        # The end is missing if the model has ended the answer right after the object.
        if (
            not isinstance(value, dict)
            # In the order of the template, which the grammar waits for.
            or tuple(value) != self.keys[:: 1 if self.has_name_first else -1]
            or (text[stop:] and not text.startswith(end, stop))
        ):
            return None
        name, arguments = (value[key] for key in self.keys)
        if not isinstance(name, str) or not isinstance(arguments, dict):
            return None
        return Call(name, arguments, min(stop + len(end), len(text)))


@dataclass(frozen=True)
class Tools:
    """The tools of a request.

    Args:
        tools: as the client describes them.
        required: names of those of which one must be called; empty: the model decides.
        several: whether an answer may have several calls.
        form: of the calls.
    """

    tools: tuple[dict[str, Any], ...]
    required: tuple[str, ...]
    several: bool
    form: CallForm

    @property
    def grammar(self) -> str:
        """The grammar of the answer."""
        functions = [tool["function"] for tool in self.tools]
        chosen = [function for function in functions if function["name"] in self.required]
        return self.form.grammar(chosen or functions, several=self.several, required=bool(chosen))


def read_tools(
    body: ChatBody | ResponsesBody, tokenizer: PreTrainedTokenizerBase, *, has_format: bool
) -> Tools | None:
    """Return the tools of a request, or None if it has none or must not use them.

    Args:
        body: the request.
        tokenizer: its chat template writes the calls.
        has_format: whether the answer follows another format.

    Raises:
        ApiError: a choice that does not fit the tools, or a model that cannot use tools.
    """
    tools, named, choice = tuple(body.functions), body.named, body.tool_choice or "auto"
    names = tuple(tool["function"]["name"] for tool in tools)
    if len({*names}) < len(names):
        raise ApiError(400, "two tools have one name", param="tools")
    required = tuple(name for name in names if choice == "required" or name == named)
    if not required and choice not in ("none", "auto"):
        raise ApiError(
            400,
            f"tool_choice is {shown(named or choice)}, and tools has no such function",
            param="tool_choice",
        )
    if not tools or choice == "none":
        return None
    if has_format:
        raise ApiError(
            400,
            "tools and response_format (text.format) would both set the form of the answer; give one",
            param="tools",
        )
    for tool in tools:
        check_depth(tool, "tools")
    several = body.parallel_tool_calls is not False and named is None
    return Tools(tools, required, several, CallForm.of(tokenizer))


def uses_tools(message: Mapping[str, Any]) -> bool:
    """Whether a message of a request has tool calls, or the result of one."""
    return message.get("role") == "tool" or bool(message.get("tool_calls"))


def tool_message(message: Mapping[str, Any], before: Sequence[Message]) -> Message:
    """Return a message of `uses_tools`, for the chat template.

    Args:
        message: of the request, with content parts that are texts or media.
        before: the messages before it.

    Raises:
        ApiError: a message that is not in OpenAI's form.
    """
    content = message.get("content")
    if message.get("role") == "assistant":
        given = message["tool_calls"]
        calls = [_read_call(call) for call in (given if isinstance(given, list) else [given])]
        return Message("assistant", _text(content or ""), {"tool_calls": calls})
    known = {c["id"]: c["function"]["name"] for m in before for c in m.fields.get("tool_calls", ())}
    call = message.get("tool_call_id")
    if not isinstance(call, str) or call not in known:
        raise ApiError(400, f"the result of a tool has the id {shown(call)}, which no call before it has")
    return Message("tool", _text(content), {"tool_call_id": call, "name": known[call]})


class CallReader:
    """Separates the text of an answer from its calls while it arrives.

    Args:
        tools: of the request.
    """

    def __init__(self, tools: Tools) -> None:
        self._form, self._several = tools.form, tools.several
        self._names = {tool["function"]["name"] for tool in tools.tools}
        self._held, self._has_text, self._has_call = "", False, False

    def add(self, text: str) -> str:
        """Return the text that is certainly no part of a call."""
        self._held += text
        mark = self._form.start.strip()
        # Without a mark, only an answer that is a JSON object as a whole is a call.
        if self._has_call or (not mark and not self._has_text and self._held.lstrip()[:1] in ("", "{")):
            return ""
        at = self._held.find(mark) if mark else -1
        if at < 0:
            at = len(self._held) - _length_of_beginning(self._held, mark)
        else:
            self._has_call = True
        # White space before a call is none of the text.
        given = self._held[:at].rstrip()
        self._held = self._held[len(given) :]
        self._has_text = self._has_text or bool(given)
        return given

    def end(self, *, is_cut: bool) -> tuple[str, list[Call]]:
        """Return the rest of the text, and the calls. The beginning of a call is text if the answer was cut.

        Args:
            is_cut: whether the answer has reached its limit on tokens, which its client is told.

        Raises:
            ApiError: a stop string has ended the answer inside of a call.
        """
        calls, at = [], 0
        while self._several or not calls:
            call = self._form.read(self._held, at)
            if call is None or call.name not in self._names:
                break
            calls.append(call)
            at = call.stop
        rest = self._held[at:]
        # The grammar lets the model end a call only as a whole.
        if self._has_call and not is_cut and self._form.start.strip() in rest:
            raise ApiError(
                400,
                "a stop string has ended the answer inside of a call; leave stop out, or use one that no call has",
                param="stop",
            )
        return rest.strip() if calls else rest, calls


def _written(tokenizer: PreTrainedTokenizerBase, count: int) -> str:
    """Return how a chat template writes an answer of some calls, up to its first control token; empty: it does not."""
    # jinja2 comes with every tokenizer that has a template.
    from jinja2 import TemplateError

    calls = [
        {
            "id": f"call{n:05}",
            "type": "function",
            "function": {"name": f"{_NAME}{n}", "arguments": _ARGUMENTS},
        }
        for n in range(count)
    ]
    question = {"role": "user", "content": "?"}
    answer = {"role": "assistant", "content": "", "tool_calls": calls}
    function = {"name": "other", "description": "none", "parameters": {"type": "object", "properties": {}}}
    apply = partial(
        tokenizer.apply_chat_template, tools=[{"type": "function", "function": function}], tokenize=False
    )
    try:
        text = apply([question, answer])
        # A header may end in an empty thought.
        headers = [
            apply([question], add_generation_prompt=True, enable_thinking=thinks) for thinks in (False, True)
        ]
    except (TemplateError, TypeError):
        return ""
    text = next((text[len(header) :] for header in headers if text.startswith(header)), "")
    ends = [at for token in control_tokens(tokenizer) if (at := text.find(token)) >= 0]
    return text[: min(ends, default=len(text))].strip()


def _objects(text: str) -> Iterator[tuple[int, int, dict[str, Any]]]:
    """Yield first character, end, and value of each JSON object in a text."""
    at = text.find("{")
    while at >= 0:
        try:
            value, stop = _DECODER.raw_decode(text, at)
            yield at, stop, value
        except ValueError:
            stop = at + 1
        at = text.find("{", stop)


def _spaced(text: str) -> str:
    """Return a regular expression of the beginning of a JSON object, with any white space between its signs."""
    return r"\s*".join(("", *map(re.escape, re.findall(r'[{}:,]|"[^"]*"', text)), ""))


def _literal(text: str) -> str:
    return json.dumps(text, ensure_ascii=False) if text else ""


def _skip(text: str, at: int) -> int:
    """Return the position after white space."""
    return len(text) - len(text[at:].lstrip())


def _length_of_beginning(text: str, mark: str) -> int:
    """Return how many characters at the end of a text may be the beginning of a mark."""
    lengths = range(min(len(mark), len(text)), 0, -1)
    return next((length for length in lengths if text.endswith(mark[:length])), 0)


def _text(content: Any) -> str:
    """Return the content of a message with tool calls, or of a tool, whose parts are texts and media."""
    parts = content if isinstance(content, list) else [content]
    if not all(isinstance(part, str) for part in parts):
        raise ApiError(
            400, f"the content of a message with tool calls or of a tool is {shown(content)}, expected texts"
        )
    return "".join(parts)


def _read_call(call: Any) -> dict[str, Any]:
    """Return a call of an earlier answer as chat templates read it: its arguments are an object, not a text."""
    match call:
        case {"id": str() as name_of_call, "function": {"name": str() as name, "arguments": str() as text}}:
            try:
                arguments = _DECODER.decode(text or "{}")
            except (ValueError, RecursionError):
                arguments = None
            if isinstance(arguments, dict):
                function = {"name": name, "arguments": arguments}
                return {"id": name_of_call, "type": "function", "function": function}
    raise ApiError(
        400,
        "a tool call needs an id (call_id in /v1/responses), the name of its function, and arguments that are a JSON "
        'object in a text, such as "{\\"city\\": \\"Paris\\"}"',
    )
