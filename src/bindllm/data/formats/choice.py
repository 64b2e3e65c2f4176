"""Multiple choice with and without a rationale: the format ``choice``.

The prompt and the two kinds of answer are those of ScienceQA (Lu et al. 2022, section 5.1): question, context and
options, then the answer alone (QCM-A), or lecture and explanation first and the answer last (QCM-LE-A).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from string import ascii_uppercase

from bindllm.data.formats.columns import as_text, finish, require, require_text, text_of, value_of
from bindllm.data.formats.enclosed import Enclosed, with_media
from bindllm.data.formats.parsed import Parsed
from bindllm.data.formats.place import Place, RowError
from bindllm.data.formats.turns import Turn, converse
from bindllm.data.tables import Record


def choice(record: Record, place: Place) -> Parsed:
    """Read ``{"question": ..., "choices": [...], "answer": number, letter or text, "hint": ..., "lecture": ...}``.

    Media are optional. The reference is the sentence that `answer_of` writes, with or without a rationale.
    """
    options = _options(record, place)
    answer = require(record, place, "answer")
    right = answer_of(options, _number(answer, options, _labels(record, place, options)))
    answer = right
    if place.config.rationale:
        parts = [text_of(record, place, field) for field in ("lecture", "solution")]
        answer = "\n".join([*filter(None, parts), right])
    question = ask(require_text(record, place, "question"), options, text_of(record, place, "hint"))
    turns = [Turn("user", with_media(question, Enclosed(record, place))), Turn("assistant", [answer])]
    parsed = finish(record, place, converse(turns), "answer")
    return replace(parsed, references=(right,), options=options)


def ask(question: str, options: tuple[str, ...], hint: str = "") -> str:
    r"""Return the prompt of a multiple choice.

    Example:
        >>> ask("Which is red?", ("a rose", "the sea"))
        'Question: Which is red?\nOptions: (A) a rose (B) the sea'
    """
    context = f"Context: {hint}\n" if hint else ""
    lettered = " ".join(
        f"({letter}) {option}" for letter, option in zip(ascii_uppercase, options, strict=False)
    )
    return f"Question: {question}\n{context}Options: {lettered}"


def answer_of(options: tuple[str, ...], number: int) -> str:
    """Return the answer to a multiple choice.

    Example:
        >>> answer_of(("a rose", "the sea"), 1)
        'The answer is (B).'
    """
    assert 0 <= number < len(options)
    return f"The answer is ({ascii_uppercase[number]})."


def _options(record: Record, place: Place) -> tuple[str, ...]:
    """The options: a list, one as JSON text, or a column for each letter."""
    value = value_of(record, place, "choices")
    if value is None and "A" in record and "B" in record:
        lettered = [as_text(record.get(letter), letter) for letter in ascii_uppercase]
        value = lettered[: lettered.index("")] if "" in lettered else lettered
    value = require(record, place, "choices") if value is None else value
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise RowError("the choices are no list") from error
    if isinstance(value, Mapping):
        value = value.get("text")
    if not isinstance(value, list):
        raise RowError("the choices are no list")
    options = tuple(as_text(option, "choices") for option in value)
    if not 2 <= len(options) <= len(ascii_uppercase):
        raise RowError(f"{len(options)} choices; expected 2 to {len(ascii_uppercase)}")
    if "" in options:
        raise RowError("an empty choice")
    return options


def _labels(record: Record, place: Place, options: tuple[str, ...]) -> list[str]:
    """What the record itself calls its options, as ARC does: ``{"text": [...], "label": [...]}``; empty: nothing."""
    value = value_of(record, place, "choices")
    labels = value.get("label") if isinstance(value, Mapping) else None
    if not isinstance(labels, list):
        return []
    labels = [as_text(label, "choices") for label in labels]
    if len(set(labels)) != len(options):
        raise RowError(f"{len(set(labels))} labels for {len(options)} choices")
    return labels


def _number(answer: object, options: tuple[str, ...], labels: list[str]) -> int:
    """The place of the right option, from 0."""
    if labels and not isinstance(answer, bool) and (label := as_text(answer, "answer")) in labels:
        return labels.index(label)
    if isinstance(answer, float) and answer.is_integer():
        answer = int(answer)
    if isinstance(answer, int) and not isinstance(answer, bool):
        readings = {answer}
    else:
        text = as_text(answer, "answer")
        letter = text.removeprefix("(").removesuffix(".").removesuffix(")").upper()
        readings = {number for number, option in enumerate(options) if option == text}
        if len(letter) == 1 and letter in ascii_uppercase:
            readings.add(ascii_uppercase.index(letter))
        if text.isdecimal():
            readings.add(int(text))
    readings = {number for number in readings if 0 <= number < len(options)}
    if len(readings) > 1:
        raise RowError("the answer can be read as more than one of the choices; give its number, from 0")
    if not readings:
        raise RowError(
            "the answer is none of the choices; expected its number from 0, its letter or its text"
        )
    return readings.pop()
