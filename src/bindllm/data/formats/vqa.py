"""A question about media with its answers: the format ``vqa``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace

from bindllm.data.formats.columns import as_text, finish, require, require_text, written_list
from bindllm.data.formats.enclosed import Enclosed, with_media
from bindllm.data.formats.parsed import Parsed
from bindllm.data.formats.place import Place, RowError
from bindllm.data.formats.turns import Turn, converse
from bindllm.data.tables import Record

QUESTION = "{question}"
"""Where a prompt that holds this has the question put in."""


def vqa(record: Record, place: Place) -> Parsed:
    """Read ``{"image": path, "question": text, "answer": text or list, "type": text}``.

    The answers of VQAv2, ``[{"answer": ...}, ...]``, are a list too. The most frequent answer is learnt, the first
    of them in a tie; all answers are references, as often as they were given.
    """
    enclosed = Enclosed(record, place)
    question = require_text(record, place, "question")
    if QUESTION in place.config.prompt:
        question = place.config.prompt.replace(QUESTION, question)
    answers = _answers(require(record, place, "answer"))
    answer, _ = Counter(answers).most_common(1)[0]
    parts = with_media(question, enclosed) if enclosed.modalities else [*enclosed.required(), question]
    parsed = finish(record, place, converse([Turn("user", parts), Turn("assistant", [answer])]), "answer")
    return replace(parsed, references=tuple(answers))


def _answers(value: object) -> list[str]:
    answers, value = [], written_list(value)
    for one in value if isinstance(value, list) else [value]:
        one = one.get("answer") if isinstance(one, Mapping) else one
        answers.append(("yes" if one else "no") if isinstance(one, bool) else as_text(one, "answer"))
    answers = [answer for answer in answers if answer]
    if not answers:
        raise RowError("empty answer")
    return answers
