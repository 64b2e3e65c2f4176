"""The columns of a record, read by the names that a recipe gives them; and which format a record looks like."""

from __future__ import annotations

import json
import math
import reprlib
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from bindllm.conversation import REASONING, Message
from bindllm.conversation.messages import (
    FILE_MODALITIES,
    MediaResolver,
    RecordMedia,
    RowError,
    answered,
    parse_messages,
    spells_placeholder,
)
from bindllm.conversation.tools import read_tools
from bindllm.data.rows import Row, Task
from bindllm.data.source_config import SPLITS, Format, SourceConfig, Split, language_named, split_named
from bindllm.data.tables import Record
from bindllm.errors import did_you_mean

# Other common names of columns, tried if a recipe does not rename the column and a record lacks it.
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
# The columns of each format; the first entry that fits a record decides.
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
SPELLED = (
    "a placeholder such as <image> but no media for it, kept as text; check the name of the media column"
)
"""Remark on a row."""
# Earlier turns in the layouts of LLaMA-Factory and ms-swift, a second answer in that of ms-swift.
_UNUSED = ("history", "rejected_response")
_MEDIA_KEYS = ("image", "images", "video", "videos", "audio", "audios")


@dataclass(frozen=True)
class Fields:
    """Reads one record: its columns, its media, and the row that it becomes.

    Args:
        unnamed: returns media, by modality, that belong to the record without being named in it.
    """

    record: Record
    config: SourceConfig
    resolve: MediaResolver
    unnamed: Callable[[], Mapping[str, Sequence[object]]] = dict
    name: str = ""
    source: int = 0

    def column(self, field: str) -> str:
        """Return the name of a column of `bindllm.data.source_config.Columns`."""
        return vars(self.config.columns)[field]

    def value(self, field: str) -> object:
        """Return the value of a column; None if the record lacks the column or leaves it empty."""
        column = self.column(field)
        value = self.record.get(column)
        # A column that the recipe has renamed has no other names: a wrong name must be an error.
        if value is None and column == field:
            others = (self.record.get(name) for name in _OTHER_NAMES.get(field, ()))
            value = next((other for other in others if other is not None), None)
        return value

    def require(self, field: str) -> object:
        """Return the value of a column.

        Raises:
            RowError: the column is missing or empty; the message names the format that the record looks like.
        """
        value = self.value(field)
        if value is None:
            column = self.column(field)
            if column in self.record:
                raise RowError(f"nothing in column {column!r}")
            raise RowError(f"no column {column!r}. {did_you_mean(column, self.record)}{self.hint()}")
        return value

    def text(self, field: str) -> str:
        """Return the text of a column, without white space around it; empty if the column is missing."""
        return as_text(self.value(field), self.column(field))

    def require_text(self, field: str) -> str:
        """Return the text of a column, without white space around it.

        Raises:
            RowError: no column, or no text in it.
        """
        # A cell of white space is empty.
        text = as_text(self.require(field), self.column(field))
        if not text:
            raise RowError(f"nothing in column {self.column(field)!r}")
        return text

    def prompt(self) -> str:
        """Return the prompt of the source, in the language of the record if it has one for each.

        Raises:
            RowError: the record has no language, or one without a prompt.
        """
        if self.config.prompts is None:
            return self.config.prompt
        language = language_named(self.require_text("language"))
        prompts = {language_named(name): text for name, text in self.config.prompts.items()}
        # Never that of a related language: zh-Hant is another script than zh-Hans, and zh may be either.
        if language not in prompts:
            raise RowError(
                f"no prompt for the language {reprlib.repr(language)}. {did_you_mean(language, prompts)}"
            )
        return prompts[language]

    def system(self) -> list[dict[str, str]]:
        """Return the message of the column ``system``, if the record has one."""
        text = self.text("system")
        return [{"role": "system", "content": text}] if text else []

    def media(
        self, *, required: bool = False, needs_placeholders: bool = False, only_own: bool = False
    ) -> RecordMedia:
        """Return the media in the columns of the record: ``image`` or ``images``, and so on for each modality.

        Args:
            required: refuse a record without media.
            needs_placeholders: refuse media without a placeholder.
            only_own: skip columns of other modalities than that of the source.

        Raises:
            RowError: the record has no media, and they are required.
        """
        # How to read this: the column of each modality, the values in it, then values that no column names.
        own = self.config.modality
        modalities = (own,) if only_own else self._modalities()
        columns = {modality: self._media_column(modality) for modality in modalities}
        values = {modality: self._media_values(column) for modality, column in columns.items()}
        # Without a column, None asks the resolver for the media of the record itself.
        if required and not any(values.values()):
            self._check_unnamed(columns[own])
            values[own] = [None]
        return RecordMedia(
            self.resolve,
            values,
            modalities=modalities,
            columns=columns,
            needs_placeholders=needs_placeholders,
            unnamed=self.unnamed,
        )

    def media_columns(self) -> dict[str, str]:
        """Return the columns that hold media, by modality."""
        columns = {modality: self._media_column(modality) for modality in self._modalities()}
        return {modality: column for modality, column in columns.items() if self._media_values(column)}

    def row(self, messages: Sequence[object], media: RecordMedia, task: Task, **facts: Any) -> Row:
        """Return the row of messages that end with an answer.

        Args:
            facts: other fields of `Row`; the only reference is the answer itself by default.

        Raises:
            RowError: messages that cannot be used, or an unknown split.
        """
        return self.row_of(parse_messages(messages, media), task, **facts)

    def row_of(
        self, messages: Sequence[Message], task: Task, *, remarks: tuple[str, ...] = (), **facts: Any
    ) -> Row:
        """Return the row of parsed messages, as `row` does."""
        messages = [self._with_reasoning(message) for message in messages]
        conversation = answered(messages, self.tools())
        facts = {"references": (conversation.messages[-1].text,), **facts}
        return Row(
            conversation,
            name=self.name,
            source=self.source,
            task=task,
            type=self._label("type"),
            subset=self._label("subset"),
            language=language_named(self._label("language")),
            split=self._split(),
            remarks=(*remarks, *self.remarks(messages)),
            **facts,
        )

    def tools(self) -> tuple[dict[str, Any], ...]:
        """Return the tools that the model may call, of the column ``tools``; empty without one.

        Raises:
            RowError: they are in no known form.
        """
        value = self.record.get("tools")
        # Arrow gives rows without tools an empty value.
        if value is None or not value:
            return ()
        if (tools := read_tools(value)) is None:
            raise RowError("the column 'tools' does not hold a list of functions, each with a name")
        return tools

    def _with_reasoning(self, message: Message) -> Message:
        kept = self.config.reasoning
        if kept == "learn" or REASONING not in message.fields:
            return message
        if kept == "mask":
            return replace(message, learned="none" if message.learned == "none" else "answer")
        return replace(
            message, fields={name: value for name, value in message.fields.items() if name != REASONING}
        )

    def remarks(self, messages: Sequence[Message]) -> tuple[str, ...]:
        """Return remarks on a record that is used all the same: a placeholder without media, and unused columns."""
        questions = [message.text for message in messages if message.role == "user"]
        is_spelled = any(map(spells_placeholder, questions))
        return (*[SPELLED] * is_spelled, *self._unused())

    def _label(self, field: str) -> str:
        # In a row without such a label, the column may hold anything else.
        value = self.value(field)
        return as_text(value, self.column(field)) if type(value) in (str, int, float) else ""

    def hint(self) -> str:
        """Return a sentence that names the format which the record looks like, if it is another one."""
        found = looks_like(self.record)
        # A row that looks like its own format has another fault.
        other = found is not None and found != self.config.format
        return f" This row looks like {found}; set format: {found}" if other else ""

    def _unused(self) -> list[str]:
        """Return a remark on columns of a conversation that other tools read and we do not."""
        columns = [
            name
            for name in _UNUSED
            if self.record.get(name) and name not in vars(self.config.columns).values()
        ]
        return [f"a part of the conversation in a column that is not used ({', '.join(columns)})"] * bool(
            columns
        )

    def _modalities(self) -> tuple[str, ...]:
        # The modality of the source may be the user's own word, such as radar.
        return tuple(dict.fromkeys((*FILE_MODALITIES, self.config.modality)))

    def _media_column(self, modality: str) -> str:
        # "image" is the default, so it means that the column was not renamed.
        named = self.config.columns.image
        return named if modality == self.config.modality and named != "image" else modality

    def _media_values(self, column: str) -> list[object]:
        """Return the values of a column and of its plural; a value that both have counts once."""
        named = [self.record[name] for name in (column, f"{column}s") if self.record.get(name) is not None]
        if len(named) < 2:
            return _listed(named[0]) if named else []
        one, several = map(_listed, named)
        # Some data sets write the first image into both columns.
        return several if all(value in several for value in one) else one + several

    def _check_unnamed(self, column: str) -> None:
        """Make sure that a record without media columns has media all the same.

        Raises:
            RowError: it has none; the reason names the missing column.
        """
        try:
            self.resolve(self.config.modality, None)
        except RowError as error:
            # A resolver that looked elsewhere for the media gives a detail of its own.
            is_explained = error.detail or column in self.record or f"{column}s" in self.record
            reason = error.reason if is_explained else f"{error.reason}: no column {column!r}"
            hint = self.hint()
            raise RowError(f"{reason}.{hint}" if hint else reason, error.detail) from error

    def _split(self) -> Split | None:
        column = self.config.columns.split
        return None if column is None or self.config.split is not None else read_split(self.record, column)


def read_split(record: Record, column: str) -> Split | None:
    """Return the split that a row names; None: the cell is empty or missing.

    Raises:
        RowError: it is not a split.
    """
    value = as_text(record.get(column), column)
    split = split_named(value)
    if value and split is None:
        raise RowError(f"unknown split {reprlib.repr(value)}. {did_you_mean(value, SPLITS)}")
    return split


def as_text(value: object, column: str) -> str:
    """Return a value as text, without white space around it: a number as its digits, None and NaN as no text.

    The text is in Unicode form NFC, so that equal texts have equal tokens.

    Raises:
        RowError: neither of these.
    """
    # A missing text arrives as NaN from tables that were written with pandas.
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    # bool is a subclass of int, but a truth value is not a number here.
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str):
        raise RowError(f"column {column!r} does not hold a text")
    return unicodedata.normalize("NFC", value).strip()


def as_list(value: object, column: str) -> list:
    """Return a value as a list; a text is read as JSON, since CSV has no lists.

    Raises:
        RowError: it is not a list.
    """
    value = from_json(value)
    if not isinstance(value, list):
        raise RowError(f"column {column!r} does not hold a list")
    return value


def from_json(value: object) -> object:
    """Return the value of a text in JSON, None if it is not JSON; all other values as they are."""
    try:
        return json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        return None


def json_list(value: object, of: tuple[type, ...] = (str, Mapping)) -> object:
    """Return the list that a text holds in JSON; every other value, and every other text, as it is.

    Args:
        of: types of the items of such a list; a text such as ``[1, 2]`` may be an answer.

    Examples:
        >>> json_list('["a.png", "b.png"]'), json_list("[1, 2]")
        (['a.png', 'b.png'], '[1, 2]')
    """
    if not isinstance(value, str) or not value.lstrip().startswith("["):
        return value
    items = from_json(value)
    return items if items and all(isinstance(item, of) for item in items) else value


def looks_like(record: Record) -> Format | None:
    """Return the format that a record looks like by its column names; None if it looks like no format.

    Examples:
        >>> looks_like({"conversations": [{"from": "human", "value": "<image> What?"}]})
        'llava'
    """
    turns = record.get("conversations", record.get("conversation"))
    if turns is not None:
        # Both have the same columns; only LLaVA has media.
        has_media = any(record.get(key) for key in _MEDIA_KEYS) or "<image>" in str(turns)
        return "llava" if has_media else "sharegpt"
    return next((format for format, names in _MARKS if all(name in record for name in names)), None)


def _listed(value: object) -> list[object]:
    """Return the media values of a column; Arrow writes missing media as a struct of empty values, pandas as NaN."""
    value = json_list(value)
    values = value if isinstance(value, list) else [value]
    # NaN is the only value that differs from itself.
    return [one for one in values if (any(one.values()) if isinstance(one, Mapping) else one and one == one)]
