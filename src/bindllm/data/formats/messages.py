"""The messages of the OpenAI interface, with content parts for every modality: the format ``messages``."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping, Sequence

from bindllm.conversation import Role
from bindllm.data.formats.columns import as_list, finish, require, system_turn
from bindllm.data.formats.enclosed import Enclosed, kinds
from bindllm.data.formats.parsed import Parsed
from bindllm.data.formats.place import Place, RowError, from_base64
from bindllm.data.formats.turns import Turn, converse, role_of
from bindllm.data.tables import Record
from bindllm.errors import did_you_mean
from bindllm.media import Media

ROLES: dict[str, Role] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
}

_TEXTS = ("text", "input_text", "output_text")


def messages(record: Record, place: Place) -> Parsed:
    """Read ``{"messages": [{"role": ..., "content": text or parts}, ...]}``.

    A part is ``{"type": "text", "text": ...}`` or media: ``{"type": "image_url", "image_url": {"url": ...}}``,
    ``{"type": "input_audio", "input_audio": {"data": ..., "format": ...}}``, or for any modality
    ``{"type": "point", "point": ...}``. A part without the media itself, ``{"type": "image"}``, stands for the next
    of the column ``image`` or ``images``; where there are such media and no such part, they go ahead of the first
    question.

    Raises:
        RowError: parts without media that are more or fewer than the media of the columns.
    """
    enclosed = Enclosed(record, place)
    turns = read_turns(as_list(require(record, place, "messages"), "messages"), place, enclosed)
    turns = [system_turn(record, place), *with_enclosed(turns, enclosed)]
    return finish(record, place, converse(turns), "chat")


def read_turns(messages: Sequence[object], place: Place, enclosed: Enclosed) -> list[Turn]:
    """Read OpenAI messages.

    Args:
        messages: as the record has them.
        place: finds the media of the parts.
        enclosed: media for the parts that have none themselves.
    """
    turns = []
    for message in messages:
        if not isinstance(message, Mapping):
            raise RowError("a message that is no object with 'role' and 'content'")
        role, content = role_of(message.get("role"), ROLES), message.get("content")
        if message.get("tool_calls") or message.get("function_call"):
            raise RowError("a message that calls a tool: tool calls are not supported")
        if message.get("weight") == 0:
            raise RowError(
                "a message of weight 0; every answer is learnt, so leave the row out or take the answer away"
            )
        if isinstance(content, str):
            content = [content]
        if not isinstance(content, list):
            raise RowError("a message whose content is neither a text nor a list of parts")
        turns.append(Turn(role, _apart([_read_part(part, place, enclosed) for part in content])))
    return turns


def with_enclosed(turns: list[Turn], enclosed: Enclosed) -> list[Turn]:
    """Put media that no part stands for ahead of the first question, if there are none but such.

    Raises:
        RowError: some have a part that stands for them, others none.
    """
    users = [number for number, turn in enumerate(turns) if turn.role == "user"]
    if users and not enclosed.any_taken:
        first = users[0]
        turns = [*turns[:first], Turn("user", [*enclosed.rest(), *turns[first].parts]), *turns[first + 1 :]]
    enclosed.check()
    return turns


def _read_part(part: object, place: Place, enclosed: Enclosed) -> str | Media:
    if isinstance(part, str):
        return part
    if not isinstance(part, Mapping):
        raise RowError("a content part that is no object with a 'type'")
    known = kinds(place)
    kind = part.get("type") or next((key for key in (*_TEXTS, *known) if part.get(key) is not None), None)
    if kind in _TEXTS:
        if not isinstance(text := part.get("text", part.get(kind)), str):
            raise RowError("a text part without a text")
        return text
    modality = str(kind).removeprefix("input_").removesuffix("_url")
    if modality not in known:
        parts = (*_TEXTS[:1], *known, "image_url", "input_audio")
        raise RowError(f"unknown content part {reprlib.repr(kind)}. {did_you_mean(str(kind), parts)}")
    value = next((part[key] for key in (kind, modality, "url", "path") if part.get(key) is not None), None)
    if value is None:
        # What is missing is counted by `Enclosed.check`.
        return enclosed.take(modality) or ""
    return place.media(modality, _payload(value, modality))


def _payload(value: object, modality: str) -> object:
    """Take the media out of what OpenAI wraps around it."""
    if not isinstance(value, Mapping):
        return value
    if isinstance(data := value.get("data"), str):
        # OpenAI has base64 here; a path is taken as well.
        content = from_base64(data)
        return data if content is None else content
    return value["url"] if value.get("url") is not None else value


def _apart(parts: list[str | Media]) -> list[str | Media]:
    """Keep texts that are parts of their own from running into each other."""
    apart: list[str | Media] = []
    ends_open = False
    for part in parts:
        if isinstance(part, str) and part:
            if ends_open and not part[0].isspace():
                part = "\n" + part
            ends_open = not part[-1].isspace()
        apart.append(part)
    return apart
