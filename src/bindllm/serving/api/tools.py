"""Tools of chat completions: those of a request, the messages of calls and results, and the calls in an answer."""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from bindllm.conversation import Message
from bindllm.model.generation.calls import STRICT_JSON, Call, CallForm
from bindllm.serving.api.errors import ApiError, shown
from bindllm.serving.api.schema import ChatBody, check_depth

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


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
    def grammar(self) -> str | None:
        """The grammar of the answer; None: any text."""
        functions = [tool["function"] for tool in self.tools if tool["function"]["name"] in self.required]
        return self.form.grammar(functions, most=None if self.several else 1) if functions else None


def read_tools(body: ChatBody, tokenizer: PreTrainedTokenizerBase) -> Tools | None:
    """Return the tools of a request, or None if it has none or must not use them.

    Raises:
        ApiError: a choice that does not fit the tools, or a model that cannot use tools.
    """
    tools = tuple(tool.model_dump(exclude_unset=True) for tool in body.tools or ())
    names, choice = tuple(tool["function"]["name"] for tool in tools), body.tool_choice or "auto"
    if len({*names}) < len(names):
        raise ApiError(400, "two tools have one name", param="tools")
    named = None if isinstance(choice, str) else choice.function.name
    required = tuple(name for name in names if choice == "required" or name == named)
    if not required and choice not in ("none", "auto"):
        raise ApiError(
            400,
            f"tool_choice is {shown(named or choice)}, and tools has no such function",
            param="tool_choice",
        )
    if not tools or choice == "none":
        return None
    if body.response_format not in (None, {"type": "text"}):
        raise ApiError(
            400, "tools and response_format would both set the form of the answer; give one", param="tools"
        )
    for tool in tools:
        check_depth(tool, "tools")
    several = body.parallel_tool_calls is not False and named is None
    if (form := CallForm.of(tokenizer)) is None:
        raise ApiError(
            400,
            "this server cannot use tools with this model: the chat template of its decoder does not write calls "
            "as JSON objects with a name and arguments. Leave tools out, or serve a decoder whose template does, "
            "such as Qwen3",
            param="tools",
            code="unsupported_parameter",
        )
    return Tools(tools, required, several, form)


def uses_tools(message: Mapping[str, Any]) -> bool:
    """Whether a message of a request has tool calls, or the result of one."""
    return message.get("role") == "tool" or bool(message.get("tool_calls"))


def tool_messages(messages: Sequence[Mapping[str, Any]], before: Sequence[Message]) -> list[Message]:
    """Return messages of `uses_tools`, for the chat template.

    Args:
        messages: of the request, with content parts that are texts or media.
        before: the messages before them.

    Raises:
        ApiError: a message that is not in OpenAI's form.
    """
    read = list(before)
    for message in messages:
        check_depth(message, "messages")
        text = _text(message.get("content"))
        if message.get("role") == "assistant":
            given = message["tool_calls"]
            calls = [_read_call(call) for call in (given if isinstance(given, list) else [given])]
            read.append(Message("assistant", text, {"tool_calls": calls}))
            continue
        known = {c["id"]: c["function"]["name"] for m in read for c in m.fields.get("tool_calls", ())}
        call = message.get("tool_call_id")
        if not isinstance(call, str) or call not in known:
            raise _fault(f"a tool message has the tool_call_id {shown(call)}, which no call before it has")
        read.append(Message("tool", text, {"tool_call_id": call, "name": known[call]}))
    return read[len(before) :]


def for_client(call: Call, index: int | None = None) -> dict[str, Any]:
    """Return a call in OpenAI's form, with an index if it is a part of a stream."""
    arguments = json.dumps(call.arguments, ensure_ascii=False)
    place = {} if index is None else {"index": index}
    function = {"name": call.name, "arguments": arguments}
    return {**place, "id": f"call_{uuid.uuid4().hex[:24]}", "type": "function", "function": function}


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

    def end(self) -> tuple[str, list[Call]]:
        """Return the rest of the text, and the calls. What only looks like a call is text."""
        calls, at = [], 0
        while self._several or not calls:
            call = self._form.read(self._held, at)
            if call is None or call.name not in self._names:
                break
            calls.append(call)
            at = call.stop
        rest = self._held[at:]
        return rest.strip() if calls else rest, calls


def _length_of_beginning(text: str, mark: str) -> int:
    """Return how many characters at the end of a text may be the beginning of a mark."""
    lengths = range(min(len(mark), len(text)), 0, -1)
    return next((length for length in lengths if text.endswith(mark[:length])), 0)


def _fault(message: str) -> ApiError:
    return ApiError(400, message, param="messages")


def _text(content: Any) -> str:
    """Return the content of a message with tool calls, or of a tool, whose parts are texts and media."""
    parts = content if isinstance(content, list) else [content or ""]
    if not all(isinstance(part, str) for part in parts):
        raise _fault(
            f"the content of a message with tool calls or of a tool is {shown(content)}, expected texts"
        )
    return "".join(parts)


def _read_call(call: Any) -> dict[str, Any]:
    """Return a call of an earlier answer as chat templates read it: its arguments are an object, not a text."""
    match call:
        case {"id": str() as name_of_call, "function": {"name": str() as name, "arguments": str() as text}}:
            try:
                arguments = STRICT_JSON.decode(text or "{}")
            except (ValueError, RecursionError):
                arguments = None
            if isinstance(arguments, dict):
                function = {"name": name, "arguments": arguments}
                return {"id": name_of_call, "type": "function", "function": function}
    raise _fault(
        'a tool call is not in the form {"id": "...", "type": "function", "function": {"name": "...", "arguments": '
        '"{...}"}}, with arguments that are a JSON object in a text'
    )
