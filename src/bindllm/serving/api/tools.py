"""Tools: those of a request, the messages of calls and results, and the calls in an answer."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from bindllm.conversation import Message
from bindllm.model.generation.calls import STRICT_JSON, Call, CallForm
from bindllm.serving.api.errors import ApiError, shown
from bindllm.serving.api.schema import ChatBody, ResponsesBody, check_depth

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_ANY = {"type": "object"}


@dataclass(frozen=True)
class Tools:
    """The tools of a request.

    Args:
        required: names of those of which one must be called; empty: the model decides.
        several: whether an answer may have several calls.
        loose: names of those whose arguments are any JSON object.
    """

    tools: tuple[dict[str, Any], ...]
    required: tuple[str, ...]
    several: bool
    form: CallForm
    loose: Collection[str] = ()

    @property
    def grammar(self) -> str:
        """The grammar of the answer."""
        functions = [tool["function"] for tool in self.tools]
        functions = [one | ({"parameters": _ANY} if one["name"] in self.loose else {}) for one in functions]
        # The prompt lists all tools, as the template was trained, also if only one of them may be called.
        chosen = [function for function in functions if function["name"] in self.required]
        return self.form.grammar(chosen or functions, several=self.several, required=bool(chosen))


def read_tools(
    body: ChatBody | ResponsesBody, tokenizer: PreTrainedTokenizerBase, *, has_format: bool
) -> Tools | None:
    """Return the tools of a request, or None if it has none or must not use them.

    Args:
        tokenizer: its chat template writes the calls.
        has_format: whether the answer follows another format.

    Raises:
        ApiError: a choice that does not fit the tools, or a model that cannot use tools.
    """
    tools, named, choice = tuple(body.functions), body.named, body.tool_choice or "auto"
    names = tuple(tool["function"]["name"] for tool in tools)
    # A call has only the name, so no one could say which of them was called.
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
    # The chat template writes them recursively, and so does the grammar.
    for tool in tools:
        check_depth(tool, "tools")
    # A choice that names a function asks for one call of it.
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
    return Tools(tools, required, several, form, body.loose)


def uses_tools(message: Mapping[str, Any]) -> bool:
    """Whether a message of a request has tool calls, or the result of one."""
    return message.get("role") == "tool" or bool(message.get("tool_calls"))


def tool_message(message: Mapping[str, Any], before: Sequence[Message]) -> Message:
    """Return a message of `uses_tools`, for the chat template.

    Args:
        message: of the request, with content parts that are texts or media.

    Raises:
        ApiError: a message that is not in OpenAI's form.
    """
    content = message.get("content")
    if message.get("role") == "assistant":
        given = message["tool_calls"]
        calls = [_read_call(call) for call in (given if isinstance(given, list) else [given])]
        return Message("assistant", _text(content or ""), {"tool_calls": calls})
    # Templates write the name of the function next to its result, and a request has it only in the call.
    known = {c["id"]: c["function"]["name"] for m in before for c in m.fields.get("tool_calls", ())}
    call = message.get("tool_call_id")
    if not isinstance(call, str) or call not in known:
        raise ApiError(400, f"the result of a tool has the id {shown(call)}, which no call before it has")
    return Message("tool", _text(content), {"tool_call_id": call, "name": known[call]})


def function_of(call: Call) -> dict[str, str]:
    """Return name and arguments of a call; OpenAI's API has the arguments as a text."""
    return {"name": call.name, "arguments": json.dumps(call.arguments, ensure_ascii=False)}


def for_client(call: Call, index: int | None = None) -> dict[str, Any]:
    """Return a call in the form of chat completions, with an index if it is a part of a stream."""
    place = {} if index is None else {"index": index}
    return {**place, "id": call.id, "type": "function", "function": function_of(call)}


class CallReader:
    """Separates the text of an answer from its calls while it arrives."""

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
            # In a form without marks, an answer may be a JSON object and no call of a tool.
            if call is None or call.name not in self._names:
                break
            calls.append(call)
            at = call.stop
        rest = self._held[at:]
        # The grammar lets the model end a call only as a whole.
        if not is_cut and self._form.has_begun(rest, self._names):
            raise ApiError(
                400,
                "a stop string has ended the answer inside of a call; leave stop out, or use one that no call has",
                param="stop",
            )
        return rest.strip() if calls else rest, calls


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
                # Some clients send an empty text for a function without parameters.
                arguments = STRICT_JSON.decode(text or "{}")
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
