"""Formats of training rows. Each writes a record as OpenAI messages; one parser turns those into a `Row`.

The prompt and the kinds of answer of ``choice`` are those of ScienceQA (Lu et al. 2022, section 5.1): question,
context and options, then only the answer (QCM-A), or lecture and explanation first and the answer last (QCM-LE-A).
Multimodal-CoT (arXiv 2302.00923) does it in two stages: QCM-LE, then QCMG-A with the generated rationale.
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from string import ascii_uppercase
from typing import Any

from bindllm.conversation import INPUT_HEADER, Message, Role
from bindllm.conversation.messages import (
    BETWEEN,
    MediaResolver,
    RecordMedia,
    RowError,
    Verbatim,
    is_visible,
    parse_messages,
    role_of,
)
from bindllm.data.formats.columns import Fields, as_list, as_text, from_json, json_list
from bindllm.data.formats.rationales import read_rationales
from bindllm.data.rows import Row
from bindllm.data.source_config import QUESTION, SourceConfig
from bindllm.data.tables import Record
from bindllm.errors import did_you_mean

__all__ = ["FORMATS", "clean_caption", "read_row"]

MINIGPT4_IMAGES = "image/{}.jpg"
"""Path of the image of an ``image_id`` in MiniGPT-4, relative to its table."""
CONTROL = "a caption with control characters, removed"
"""Remark on a row."""
NO_RATIONALE = "a row without a rationale, used as a question and its answer"
"""Remark on a row."""
_BYTE_ORDER_MARK = "\ufeff"
CALL = "function_call"
SHAREGPT_ROLES: dict[str, Role] = {
    "system": "system",
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "model", "chatgpt", "bing", "bard"), "assistant"),
    # A call, whose value is JSON, and its result, in the layout of LLaMA-Factory.
    CALL: "assistant",
    **dict.fromkeys(("tool", "observation", "function_response", "ipython"), "tool"),
}
# CSV writes truth values as words or digits.
_TRUTHS: Mapping[str, bool] = {"true": True, "false": False, "1": True, "0": False}


def read_row(
    record: Record,
    config: SourceConfig,
    resolve: MediaResolver,
    *,
    unnamed: Callable[[], Mapping[str, Sequence[object]]] = dict,
    name: str = "",
    source: int = 0,
) -> Row:
    """Return the row of a record.

    Args:
        record: a row of a table, or the JSON of a streamed sample; not changed.
        unnamed: returns media, by modality, that belong to the record without being named in it.

    Raises:
        InputError: the record cannot be used.
    """
    return FORMATS[config.format](Fields(record, config, resolve, unnamed, name, source))


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
    """Read ``{"image": path, "question": text, "answer": text or list, "type": text, "rationale": text}``.

    The answers of VQAv2, ``[{"answer": ...}, ...]``, are a list too. The most frequent answer is learned, the first
    of them in a tie; all answers are references, as often as they were given.
    """
    question = fields.require_text("question")
    if QUESTION in (frame := fields.prompt()):
        question = frame.replace(QUESTION, question)
    answers = _answers(fields)
    # The first of equally frequent answers: most_common keeps their order.
    answer, _ = Counter(answers).most_common(1)[0]
    sentence = f"The answer is {answer}." if fields.config.rationale is True else answer
    return _reasoned(fields, [question], sentence, fields.media(required=True), references=tuple(answers))


def choice(fields: Fields) -> Row:
    """Read ``{"question": ..., "choices": [...], "answer": index, letter or text, "hint": ..., "lecture": ...}``.

    Media are optional. The reference is the sentence that `answer_of` writes, with or without a rationale.
    """
    options, labels = options_of(fields)
    right = answer_of(options, _index(fields, options, labels))
    # A placeholder counts in the question only: an option may spell one.
    rest = Verbatim(listing(options, fields.text("hint")))
    question = [f"Question: {fields.require_text('question')}", rest]
    return _reasoned(fields, question, right, fields.media(), references=(right,), options=options)


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


def messages(fields: Fields) -> Row:
    """Read ``{"messages": [{"role": ..., "content": text or parts}, ...]}``.

    The columns ``image`` or ``images`` hold the media of placeholders and of parts such as ``{"type": "image"}``.
    """
    # The column system comes first: a system message inside the turns is joined with it.
    turns = as_list(fields.require("messages"), fields.column("messages"))
    return fields.row([*fields.system(), *turns], fields.media(), "chat")


def llava(fields: Fields) -> Row:
    """Read LLaVA: ``{"image": path or list, "conversations": [{"from": "human", "value": "<image> ..."}, ...]}``.

    Other media are in columns called like their modality and have placeholders such as ``<video>``.

    Raises:
        RowError: media without a placeholder.
    """
    return fields.row(sharegpt_turns(fields), fields.media(needs_placeholders=True), "chat")


def sharegpt(fields: Fields) -> Row:
    """Read ShareGPT: ``{"conversations": [{"from": "human", "value": ...}, ...]}``, without media.

    Raises:
        RowError: the record has media.
    """
    turns = sharegpt_turns(fields)
    if fields.media_columns() or fields.unnamed():
        raise RowError(f"sharegpt has no media.{fields.hint()}")
    return fields.row(turns, RecordMedia(fields.resolve), "chat")


def preference(fields: Fields) -> Row:
    """Read a pair, ``{"prompt": ..., "chosen": ..., "rejected": ...}``, or ``{"prompt", "completion", "label"}``.

    Each is a text or a list of messages, as in TRL. If chosen and rejected are whole conversations, they must be equal
    up to their last message. Their common part follows the prompt, or contains it.

    Raises:
        RowError: two equal answers, or answers to different prompts.
    """
    # TRL's unpaired form: one answer, and whether it is wanted.
    if fields.value("completion") is not None and fields.value("chosen") is None:
        desirable = _TRUTHS.get(str(fields.require("label")).strip().lower())
        if desirable is None:
            raise RowError("the label is neither true nor false")
        answer, before = _answer(fields, "completion")
        return fields.row_of([*_prompt(fields, before), answer], "chat", desirable=desirable)
    (better, before), (worse, other) = _answer(fields, "chosen"), _answer(fields, "rejected")
    if before != other:
        raise RowError("chosen and rejected differ before their last message")
    prompt = _prompt(fields, before)
    # After parsing, so that white space does not make two answers different.
    if better == worse:
        raise RowError("chosen and rejected are the same")
    row = fields.row_of([*prompt, better], "chat")
    return replace(row, rejected=replace(row.conversation, messages=(*prompt, worse)))


def _exchange(question: str | list[str], answer: str) -> list[dict[str, object]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _reasoned(fields: Fields, question: list[str], answer: str, media: RecordMedia, **facts: Any) -> Row:
    """Return the row of a question, with lecture and explanation where the source wants them."""
    kind = fields.config.rationale
    if fields.config.rationales is None:
        rationale = "\n".join(filter(None, (fields.text("lecture"), fields.text("solution"))))
    elif (rationale := read_rationales(fields.config.rationales).get(str(fields.record.get("id")))) is None:
        raise RowError("no rationale has the id of the row")
    if kind == "only":
        if not rationale:
            raise RowError("no rationale to learn: the row has neither a lecture nor an explanation")
        # Exact answers do not measure a rationale, so held-out ones are measured by their loss.
        return fields.row(_exchange(question, rationale), media, "chat")
    if kind == "given" and rationale:
        question = [*question, Verbatim(f"\nRationale: {rationale}")]
    elif kind and rationale:
        answer = f"{rationale}\n{answer}"
    elif kind:
        facts["remarks"] = (NO_RATIONALE,)
    return fields.row(_exchange(question, answer), media, "answer", **facts)


def listing(options: tuple[str, ...], hint: str) -> str:
    """Return the options of a multiple choice with their letters, after its context."""
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
    messages = _exchange(fields.prompt(), references[0])
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


def _answers(fields: Fields) -> list[str]:
    answers, value = [], json_list(fields.require("answer"))
    for one in value if isinstance(value, list) else [value]:
        # VQAv2 wraps each answer in an object; a truth value answers a yes-no question.
        one = one.get("answer") if isinstance(one, Mapping) else one
        is_truth = isinstance(one, bool)
        answers.append(("yes" if one else "no") if is_truth else as_text(one, fields.column("answer")))
    answers = [answer for answer in answers if answer]
    if not answers:
        raise RowError("empty answer")
    return answers


def has_options(fields: Fields) -> bool:
    """Tell whether a record has options, in one of the forms of `options_of`; empty columns of letters are none."""
    if fields.value("choices") is not None:
        return True
    texts = [as_text(fields.record.get(letter), letter) for letter in ascii_uppercase]
    return "A" in fields.record and "B" in fields.record and any(texts)


def options_of(fields: Fields) -> tuple[tuple[str, ...], list[str]]:
    """Return the options, "" for an empty one, and the record's own names of them, as in ARC, if it has any.

    The options are a list, a list as JSON text, or a column for each letter.
    """
    value, record, column = fields.value("choices"), fields.record, fields.column("choices")
    if value is None and "A" in record and "B" in record:
        value = [record.get(letter) for letter in ascii_uppercase]
    value, labels = from_json(fields.require("choices") if value is None else value), None
    # ARC: ``{"text": [...], "label": [...]}``.
    if isinstance(value, Mapping):
        value, labels = value.get("text"), value.get("label")
    options = [as_text(option, column) for option in as_list(value, column)]
    # Empty cells at the end are no options; one in the middle keeps its letter, so that the others keep theirs.
    while options and not options[-1]:
        options.pop()
    filled = len(list(filter(None, options)))
    if filled < 2 or len(options) > len(ascii_uppercase):
        raise RowError(f"{filled} choices that are not empty; expected 2 to {len(ascii_uppercase)}")
    if not isinstance(labels, list):
        return tuple(options), []
    labels = [as_text(label, column) for label in labels[: len(options)]]
    if len(set(labels)) != len(options):
        raise RowError(f"{len(set(labels))} labels for {len(options)} choices")
    return tuple(options), labels


def _index(fields: Fields, options: tuple[str, ...], labels: list[str]) -> int:
    """Return the index of the right option."""
    answer, column = fields.require("answer"), fields.column("answer")
    # Labels decide first: in ARC, "1" may be the name of the first option instead of an index.
    if labels and not isinstance(answer, bool) and (label := as_text(answer, column)) in labels:
        # An empty option has a label too, and is none of the choices.
        answer = labels.index(label)
    # Tables with gaps turn whole numbers into floats.
    if isinstance(answer, float) and answer.is_integer():
        answer = int(answer)
    if isinstance(answer, int) and not isinstance(answer, bool):
        # How to read this: all readings as index, letter or text are collected; exactly one must be left.
        readings = {answer}
    else:
        text = as_text(answer, column)
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


def sharegpt_turns(fields: Fields) -> list[object]:
    """Write the turns of a record as OpenAI messages."""
    turns: list[object] = [*fields.system()]
    for turn in as_list(fields.require("conversations"), fields.column("conversations")):
        if not isinstance(turn, Mapping):
            raise RowError("a turn that is not an object with 'from' and 'value'")
        # Some data sets use OpenAI's keys in a list of ShareGPT.
        text = turn.get("value", turn.get("content"))
        if not isinstance(text, str):
            raise RowError("a turn whose value is not a text")
        # With the other keys, such as a weight, which the parser checks.
        role = role_of(name := turn.get("from", turn.get("role")), SHAREGPT_ROLES)
        if name == CALL:
            turn, text = {**turn, "tool_calls": text}, ""
        turns.append({**turn, "role": role, "content": text})
    return turns


def _prompt(fields: Fields, turns: list) -> list[Message]:
    """Parse the messages before the answer: the column prompt, then those of a whole conversation."""
    column = fields.column("prompt")
    # JSON text in CSV.
    given = json_list(fields.value("prompt") if turns else fields.require("prompt"), (Mapping,))
    if isinstance(given, list):
        # Some data sets repeat the prompt in the conversation.
        turns = turns if turns[: len(given)] == given else [*given, *turns]
    elif isinstance(given, str) and not turns:
        turns = [{"role": "user", "content": given}]
    elif isinstance(given, str) and not any(given.strip() in text for text in _texts(turns)):
        raise RowError(
            f"the text in column {column!r} is not in the conversation; write it into the conversation, or give "
            "columns.prompt a name that no column has"
        )
    elif not isinstance(given, str | None):
        raise RowError("the prompt is neither a text nor a list of messages")
    prompt = parse_messages([*fields.system(), *turns], fields.media())
    # The answer follows separately, so the prompt must end before it.
    if not any(message.role == "user" for message in prompt) or prompt[-1].role == "assistant":
        raise RowError("the prompt does not end with a question")
    return prompt


def _texts(turns: list) -> Iterator[str]:
    """Yield the texts of messages that are not parsed yet."""
    for turn in turns:
        content = turn.get("content") if isinstance(turn, Mapping) else None
        for part in content if isinstance(content, list) else [content]:
            text = part.get("text") if isinstance(part, Mapping) else part
            if isinstance(text, str):
                yield text


def _answer(fields: Fields, field: str) -> tuple[Message, list]:
    """Parse an answer, a text or the last of a list of messages; return it and the messages before it."""
    # JSON text in CSV.
    value = json_list(fields.require(field), (Mapping,))
    if isinstance(value, str):
        value = [{"role": "assistant", "content": value}]
    if not isinstance(value, list) or not value:
        raise RowError("an answer that is neither a text nor a list of messages")
    # Only the last message is the answer; the earlier ones are the prompt.
    answer = parse_messages(value[-1:], RecordMedia(fields.resolve))
    if not answer or answer[0].role != "assistant":
        raise RowError("an answer whose last message is not the assistant's")
    return answer[0], value[:-1]


FORMATS: Mapping[str, Callable[[Fields], Row]] = {
    read.__name__: read
    for read in (caption, messages, llava, sharegpt, alpaca, instruction, minigpt4, vqa, choice, preference)
}
"""The reader of each format, by the name that recipes use. It raises `InputError` if a record cannot be used."""
