"""Tool calls and reasoning in messages, in the forms of data sets, as chat templates read them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

# Keys of a message, and types of a content part, for the thoughts before an answer.
_REASONING = ("reasoning_content", "reasoning", "thinking")


def read_calls(value: object) -> list[dict[str, Any]] | None:
    """Return tool calls, or None if they are in no known form.

    Args:
        value: a call or a list of them, maybe as JSON text: OpenAI's ``{"id": ..., "function": {"name": ...,
            "arguments": ...}}``, or only ``{"name": ..., "arguments": ...}``; arguments are an object or its JSON text.
    """
    value = _from_json(value)
    calls = [
        _read_call(call, number) for number, call in enumerate(value if isinstance(value, list) else [value])
    ]
    found = [call for call in calls if call is not None]
    return found if found and len(found) == len(calls) else None


def _read_call(call: object, number: int) -> dict[str, Any] | None:
    if not isinstance(call, Mapping):
        return None
    function = call.get("function", call)
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        return None
    # A function without parameters may have an empty text here.
    arguments = _from_json(function.get("arguments") or {})
    if not isinstance(arguments, Mapping):
        return None
    name = call.get("id") if isinstance(call.get("id"), str) else f"call_{number}"
    return {
        "id": name,
        "type": "function",
        "function": {"name": function["name"], "arguments": dict(arguments)},
    }


def read_tools(value: object) -> tuple[dict[str, Any], ...] | None:
    """Return tool descriptions in OpenAI's form, or None if they are in no known form.

    Args:
        value: a list of them, maybe as JSON text; each an OpenAI tool, or only its function.
    """
    value = _from_json(value)
    if not isinstance(value, list):
        return None
    tools = []
    for tool in value:
        function = tool.get("function", tool) if isinstance(tool, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            return None
        tools.append({"type": "function", "function": dict(function)})
    return tuple(tools)


def read_reasoning(message: Mapping[str, Any], content: Sequence[object]) -> tuple[str, list[object]]:
    """Return the thoughts of a message, and its content parts without them.

    Args:
        message: they may be in a key such as ``reasoning_content``.
        content: its parts; those of the type ``thinking`` or ``reasoning`` are thoughts.
    """
    thoughts = [
        message[key] for key in _REASONING if isinstance(message.get(key), str) and message[key].strip()
    ]
    rest: list[object] = []
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind not in _REASONING:
            rest.append(part)
            continue
        text = part.get(kind, part.get("text"))
        # Mistral's thoughts are a list of parts themselves.
        inner = text if isinstance(text, list) else [text]
        thoughts += [one.get("text") if isinstance(one, Mapping) else one for one in inner]
    return "\n".join(text.strip() for text in thoughts[:1] + thoughts[1:] if isinstance(text, str)), rest


def _from_json(value: object) -> object:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return None
