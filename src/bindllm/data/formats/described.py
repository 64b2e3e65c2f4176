"""Media with a caption: the format ``caption`` record by record, and ``minigpt4``."""

from __future__ import annotations

from dataclasses import replace

from bindllm.data.formats.columns import finish, hint, require, written_list
from bindllm.data.formats.enclosed import Enclosed
from bindllm.data.formats.parsed import Parsed
from bindllm.data.formats.place import Place, RowError
from bindllm.data.formats.turns import Turn, converse
from bindllm.data.tables import Record
from bindllm.data.texts import clean_caption, is_visible
from bindllm.errors import did_you_mean
from bindllm.media import Media

MINIGPT4_PICTURES = "image/{}.jpg"
"""Where MiniGPT-4 keeps the picture of an ``image_id``, relative to its table."""


def caption(record: Record, place: Place) -> Parsed:
    """Read ``{"image": path, "caption": text or list of texts}``; the first caption is learnt, all are references.

    A table or a folder of captions is read as a whole by `bindllm.data.captions`, which makes a row of each caption
    of a picture; this is for records that come one by one, from a stream.
    """
    value = written_list(require(record, place, "caption"), (str,))
    captions = [_clean(one) for one in (value if isinstance(value, list) else [value])]
    if not captions:
        raise RowError("no caption")
    return _described(record, place, Enclosed(record, place).required(), captions)


def minigpt4(record: Record, place: Place) -> Parsed:
    """Read ``{"image_id": "2", "caption": text}`` of MiniGPT-4's filter_cap.json; its picture is ``image/2.jpg``."""
    number = record.get("image_id")
    if not isinstance(number, str | int) or not str(number).strip():
        told = hint(record, place.config.format)
        raise RowError(f"no column 'image_id'. {did_you_mean('image_id', record)}{told}")
    picture = place.media("image", MINIGPT4_PICTURES.format(number))
    return _described(record, place, [picture], [_clean(require(record, place, "caption"))])


def _described(record: Record, place: Place, media: list[Media], captions: list[str]) -> Parsed:
    turns = [Turn("user", [*media, place.config.prompt]), Turn("assistant", [captions[0]])]
    parsed = finish(record, place, converse(turns), "caption")
    return replace(parsed, references=tuple(dict.fromkeys(captions)))


def _clean(value: object) -> str:
    if not isinstance(value, str):
        raise RowError("no caption" if value is None else "the caption is not a text")
    text, _ = clean_caption(value)
    if not is_visible(text):
        raise RowError("empty caption")
    return text
