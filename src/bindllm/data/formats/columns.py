"""Reading the columns of a record, and telling which format a record looks like."""

from __future__ import annotations

import json
import math
import reprlib
from collections.abc import Mapping

from bindllm.conversation import Conversation
from bindllm.data.formats.parsed import Parsed
from bindllm.data.formats.place import Place, RowError
from bindllm.data.formats.turns import Turn
from bindllm.data.rows import Task
from bindllm.data.source_config import SPLITS, Format, Split, split_named
from bindllm.data.tables import Record
from bindllm.errors import did_you_mean

# Other common names, tried where a recipe leaves the name of a column as it is and a record lacks it.
_OTHER_NAMES: Mapping[str, tuple[str, ...]] = {
    "conversations": ("conversation",),
    "instruction": ("prompt", "question"),
    "input": ("context",),
    "output": ("response", "completion"),
    "answer": ("answers",),
    "choices": ("options",),
    "hint": ("context",),
    "solution": ("explanation", "rationale"),
    "prompt": ("question", "instruction"),
}
# What a record of a format has, the first that fits decides.
_MARKS: tuple[tuple[Format, tuple[str, ...]], ...] = (
    ("preference", ("chosen", "rejected")),
    ("preference", ("prompt", "completion", "label")),
    ("messages", ("messages",)),
    ("choice", ("question", "choices")),
    ("vqa", ("question", "answer")),
    ("vqa", ("question", "answers")),
    ("instruction", ("instruction", "response")),
    ("alpaca", ("instruction", "output")),
    ("instruction", ("prompt", "completion")),
    ("minigpt4", ("image_id", "caption")),
    ("caption", ("caption",)),
)
_MEDIA_KEYS = ("image", "images", "video", "videos", "audio", "audios")


def value_of(record: Record, place: Place, field: str) -> object:
    """Return what a record has in a column; None where it lacks the column or leaves it empty.

    Args:
        record: the row.
        place: knows the names of the columns.
        field: of `bindllm.data.source_config.Columns`.
    """
    column = _column(place, field)
    value = record.get(column)
    if value is None and column == field:
        value = next(
            (record[name] for name in _OTHER_NAMES.get(field, ()) if record.get(name) is not None), None
        )
    return value


def require(record: Record, place: Place, field: str) -> object:
    """Return what a record has in a column.

    Raises:
        RowError: it lacks the column, or has nothing there; the message says which format the record looks like.
    """
    value = value_of(record, place, field)
    if value is None:
        column = _column(place, field)
        if column in record:
            raise RowError(f"nothing in column {column!r}")
        raise RowError(
            f"no column {column!r}. {did_you_mean(column, record)}{hint(record, place.config.format)}"
        )
    return value


def text_of(record: Record, place: Place, field: str) -> str:
    """Return the text in a column, without white space around it; empty where there is none.

    Raises:
        RowError: something else than a text or a number.
    """
    return as_text(value_of(record, place, field), _column(place, field))


def require_text(record: Record, place: Place, field: str) -> str:
    """Return the text in a column, without white space around it.

    Raises:
        RowError: no column, or no text in it.
    """
    column = _column(place, field)
    text = as_text(require(record, place, field), column)
    if not text:
        raise RowError(f"nothing in column {column!r}")
    return text


def as_text(value: object, column: str) -> str:
    """Return a value as text, without white space around it: a number as its digits, and None or NaN as nothing.

    Raises:
        RowError: neither of these.
    """
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str):
        raise RowError(f"column {column!r} holds no text")
    return value.strip()


def as_list(value: object, column: str) -> list:
    """Return a value as a list; a text, as CSV has it, is read as JSON.

    Raises:
        RowError: it is none.
    """
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            value = None
    if not isinstance(value, list):
        raise RowError(f"column {column!r} holds no list")
    return value


def written_list(value: object, of: tuple[type, ...] = (str, Mapping)) -> object:
    """Return the list that a text is in JSON, as CSV has it; every other value, and every other text, as it is.

    Args:
        value: of a column that may hold a text or a list.
        of: what all items of such a list are; a text such as ``[1, 2]`` may be an answer.

    Example:
        >>> written_list('["a.png", "b.png"]'), written_list("[1, 2]")
        (['a.png', 'b.png'], '[1, 2]')
    """
    if not isinstance(value, str) or not value.lstrip().startswith("["):
        return value
    try:
        items = as_list(value, "")
    except RowError:
        return value
    return items if items and all(isinstance(item, of) for item in items) else value


def system_turn(record: Record, place: Place) -> Turn:
    """Return the system prompt that a record has in a column of its own; a turn without text where it has none.

    Raises:
        RowError: the column holds no text.
    """
    return Turn("system", [text_of(record, place, "system")])


def finish(record: Record, place: Place, conversation: Conversation, task: Task) -> Parsed:
    """Return a conversation with what every format reads alike: references, type and split.

    Raises:
        RowError: an unknown split.
    """
    kind = value_of(record, place, "type")
    return Parsed(
        conversation,
        references=(conversation.messages[-1].text,),
        task=task,
        type=kind.strip() if isinstance(kind, str) else "",
        split=_split(record, place),
    )


def hint(record: Record, format: Format) -> str:
    """Return a sentence that names the format which a record looks like, or nothing where it is this one.

    Example:
        >>> hint({"messages": []}, "llava")
        ' This row looks like messages; set format: messages'
    """
    found = looks_like(record)
    return f" This row looks like {found}; set format: {found}" if found and found != format else ""


def looks_like(record: Record) -> Format | None:
    """Return the format that a record looks like, by the names that its columns usually have; None: like no format.

    Example:
        >>> looks_like({"conversations": [{"from": "human", "value": "<image> What?"}]})
        'llava'
    """
    turns = record.get("conversations", record.get("conversation"))
    if turns is not None:
        return (
            "llava" if any(record.get(key) for key in _MEDIA_KEYS) or "<image>" in str(turns) else "sharegpt"
        )
    return next((format for format, names in _MARKS if all(name in record for name in names)), None)


def _column(place: Place, field: str) -> str:
    return vars(place.config.columns)[field]


def _split(record: Record, place: Place) -> Split | None:
    column = place.config.columns.split
    value = (record.get(column) if column and place.config.split is None else None) or None
    split = split_named(value)
    if value is not None and split is None:
        raise RowError(f"unknown split {reprlib.repr(value)}. {did_you_mean(str(value), SPLITS)}")
    return split
