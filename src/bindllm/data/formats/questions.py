"""Formats of one question and its answer: captions, VQA, multiple choice and instructions.

The prompt and the two kinds of answer of ``choice`` are those of ScienceQA (Lu et al. 2022, section 5.1): question,
context and options, then only the answer (QCM-A), or lecture and explanation first and the answer last (QCM-LE-A).
"""

from __future__ import annotations

import json
import unicodedata
from collections import Counter
from collections.abc import Mapping
from string import ascii_uppercase

from bindllm.conversation import INPUT_HEADER
from bindllm.data.formats.columns import Fields, as_text, json_list
from bindllm.data.messages import BETWEEN, RecordMedia, RowError, Verbatim, is_visible
from bindllm.data.rows import Row
from bindllm.errors import did_you_mean

MINIGPT4_IMAGES = "image/{}.jpg"
"""Path of the image of an ``image_id`` in MiniGPT-4, relative to its table."""
QUESTION = "{question}"
"""Stands for the question in a prompt of ``vqa``."""
CONTROL = "a caption with control characters, removed"
"""Remark on a row."""
_BYTE_ORDER_MARK = "\ufeff"


def caption(fields: Fields) -> Row:
    """Read ``{"image": path, "caption": text or list of texts}``; the first caption is learned, all are references.

    `bindllm.data.sources` makes a record of each caption of a table; from a stream, a record may have several.
    """
    value = json_list(fields.require("caption"), (str,))
    captions = value if isinstance(value, list) else [value]
    if not captions:
        raise RowError("no caption")
    # A table may serve sources of several modalities, each with its own column.
    others = [
        column for modality, column in fields.media_columns().items() if modality != fields.config.modality
    ]
    unused = (
        (f"media of other modalities than the source's, not used ({', '.join(others)})",) if others else ()
    )
    return _described(fields, captions, fields.media(required=True, only_own=True), unused)


def minigpt4(fields: Fields) -> Row:
    """Read ``{"image_id": "2", "caption": text}`` of MiniGPT-4's filter_cap.json; its image is ``image/2.jpg``."""
    number = fields.record.get("image_id")
    if not isinstance(number, str | int) or not str(number).strip():
        raise RowError(f"no column 'image_id'. {did_you_mean('image_id', fields.record)}{fields.hint()}")
    media = RecordMedia(fields.resolve, {"image": [MINIGPT4_IMAGES.format(number)]})
    return _described(fields, [fields.require("caption")], media)


def vqa(fields: Fields) -> Row:
    """Read ``{"image": path, "question": text, "answer": text or list, "type": text}``.

    The answers of VQAv2, ``[{"answer": ...}, ...]``, are a list too. The most frequent answer is learned, the first
    of them in a tie; all answers are references, as often as they were given.
    """
    question = fields.require_text("question")
    if QUESTION in fields.config.prompt:
        question = fields.config.prompt.replace(QUESTION, question)
    answers = _answers(fields.require("answer"))
    # The first of equally frequent answers: most_common keeps their order.
    answer, _ = Counter(answers).most_common(1)[0]
    media = fields.media(required=True)
    return fields.row(_exchange(question, answer), media, "answer", references=tuple(answers))


def choice(fields: Fields) -> Row:
    """Read ``{"question": ..., "choices": [...], "answer": index, letter or text, "hint": ..., "lecture": ...}``.

    Media are optional. The reference is the sentence that `answer_of` writes, with or without a rationale.
    """
    options, labels = _options(fields)
    right = answer_of(options, _index(fields.require("answer"), options, labels))
    answer = right
    if fields.config.rationale:
        answer = "\n".join([*filter(None, (fields.text("lecture"), fields.text("solution"))), right])
    # A placeholder counts in the question only: an option may spell one.
    rest = Verbatim(_listing(options, fields.text("hint")))
    question = [f"Question: {fields.require_text('question')}", rest]
    return fields.row(
        _exchange(question, answer), fields.media(), "answer", references=(right,), options=options
    )


def alpaca(fields: Fields) -> Row:
    """Read ``{"instruction": ..., "input": ..., "output": ...}``.

    The input follows the header of the public Alpaca texts, so a decoder with the template ``alpaca`` sees exactly
    those texts.
    """
    return _instructed(fields, INPUT_HEADER)


def instruction(fields: Fields) -> Row:
    """Read ``{"instruction": ..., "input": ..., "response": ...}``; the input follows after a blank line."""
    return _instructed(fields, BETWEEN)


def answer_of(options: tuple[str, ...], index: int) -> str:
    """Return the answer to a multiple choice.

    Examples:
        >>> answer_of(("a rose", "the sea"), 1)
        'The answer is (B).'
    """
    assert 0 <= index < len(options)
    return f"The answer is ({ascii_uppercase[index]})."


def clean_caption(text: str) -> tuple[str, bool]:
    """Return a caption in Unicode form NFC, on one line, without control characters, and whether it had any.

    Joiners stay: emoji sequences and several scripts are spelled with them.

    Examples:
        >>> clean_caption(" a red  square ")
        ('a red square', False)
    """
    kept = text
    # Nearly all captions are printable, and a loop over characters is slow.
    if not text.isprintable():
        kept = "".join(char for char in text if char.isspace() or not _is_control(char))
    # Without line breaks: a caption is one line.
    words = " ".join(unicodedata.normalize("NFC", kept).split())
    return words, len(kept) < len(text)


def _exchange(question: str | list[str], answer: str) -> list[dict[str, object]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _listing(options: tuple[str, ...], hint: str) -> str:
    context = f"\nContext: {hint}" if hint else ""
    # There are 26 letters and usually fewer options; an empty one is not listed, and the others keep their letters.
    lettered = " ".join(
        f"({letter}) {option}" for letter, option in zip(ascii_uppercase, options, strict=False) if option
    )
    return f"{context}\nOptions: {lettered}"


def _described(
    fields: Fields, captions: list[object], media: RecordMedia, remarks: tuple[str, ...] = ()
) -> Row:
    cleaned = [_clean(value) for value in captions]
    references = tuple(dict.fromkeys(text for text, _ in cleaned))
    remarks += (CONTROL,) if any(had_control for _, had_control in cleaned) else ()
    messages = _exchange(fields.config.prompt, references[0])
    return fields.row(messages, media, "caption", references=references, remarks=remarks)


def _instructed(fields: Fields, between: str) -> Row:
    question = fields.require_text("instruction")
    if given := fields.text("input"):
        question += between + given
    messages = [*fields.system(), *_exchange(question, fields.require_text("output"))]
    return fields.row(messages, fields.media(), "chat")


def _clean(value: object) -> tuple[str, bool]:
    if not isinstance(value, str):
        raise RowError("no caption" if value is None else "the caption is not a text")
    text, had_control = clean_caption(value)
    if not is_visible(text):
        raise RowError("empty caption")
    return text, had_control


def _is_control(char: str) -> bool:
    # Cc are control characters, Cs halves of surrogate pairs.
    return char == _BYTE_ORDER_MARK or unicodedata.category(char) in ("Cc", "Cs")


def _answers(value: object) -> list[str]:
    answers, value = [], json_list(value)
    for one in value if isinstance(value, list) else [value]:
        # VQAv2 wraps each answer in an object; a truth value answers a yes-no question.
        one = one.get("answer") if isinstance(one, Mapping) else one
        answers.append(("yes" if one else "no") if isinstance(one, bool) else as_text(one, "answer"))
    answers = [answer for answer in answers if answer]
    if not answers:
        raise RowError("empty answer")
    return answers


def _options(fields: Fields) -> tuple[tuple[str, ...], list[str]]:
    """Return the options, "" for an empty one, and the record's own names of them, as in ARC, if it has any.

    The options are a list, a list as JSON text, or a column for each letter.
    """
    value, record = fields.value("choices"), fields.record
    if value is None and "A" in record and "B" in record:
        value = [record.get(letter) for letter in ascii_uppercase]
    value = fields.require("choices") if value is None else value
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise RowError("the choices are not a list") from error
    labels = None
    # ARC: ``{"text": [...], "label": [...]}``.
    if isinstance(value, Mapping):
        value, labels = value.get("text"), value.get("label")
    if not isinstance(value, list):
        raise RowError("the choices are not a list")
    options = [as_text(option, "choices") for option in value]
    # Empty cells at the end are no options; one in the middle keeps its letter, so that the others keep theirs.
    while options and not options[-1]:
        options.pop()
    if len(list(filter(None, options))) < 2 or len(options) > len(ascii_uppercase):
        raise RowError(f"{len(options)} choices; expected 2 to {len(ascii_uppercase)} that are not empty")
    if not isinstance(labels, list):
        return tuple(options), []
    labels = [as_text(label, "choices") for label in labels[: len(options)]]
    if len(set(labels)) != len(options):
        raise RowError(f"{len(set(labels))} labels for {len(options)} choices")
    return tuple(options), labels


def _index(answer: object, options: tuple[str, ...], labels: list[str]) -> int:
    """Return the index of the right option."""
    # Labels decide first: in ARC, "1" may be the name of the first option instead of an index.
    if labels and not isinstance(answer, bool) and (label := as_text(answer, "answer")) in labels:
        # An empty option has a label too, and is none of the choices.
        answer = labels.index(label)
    # Tables with gaps turn whole numbers into floats.
    if isinstance(answer, float) and answer.is_integer():
        answer = int(answer)
    if isinstance(answer, int) and not isinstance(answer, bool):
        # How to read this: all readings as index, letter or text are collected; exactly one must be left.
        readings = {answer}
    else:
        text = as_text(answer, "answer")
        letter = text.removeprefix("(").removesuffix(".").removesuffix(")").upper()
        readings = {index for index, option in enumerate(options) if option == text}
        if len(letter) == 1 and letter in ascii_uppercase:
            readings.add(ascii_uppercase.index(letter))
        if text.isdecimal():
            readings.add(int(text))
    readings = {index for index in readings if 0 <= index < len(options) and options[index]}
    # "1" may be an index and also the text of an option.
    if len(readings) > 1:
        raise RowError("the answer can be read as more than one of the choices; give its index, from 0")
    if not readings:
        raise RowError("the answer is none of the choices; expected its index from 0, its letter or its text")
    return readings.pop()
