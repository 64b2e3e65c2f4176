"""An instruction, perhaps an input and media, and the answer: the formats ``alpaca`` and ``instruction``."""

from __future__ import annotations

from bindllm.conversation import INPUT_HEADER
from bindllm.data.formats.columns import finish, require_text, system_turn, text_of
from bindllm.data.formats.enclosed import Enclosed, with_media
from bindllm.data.formats.parsed import Parsed
from bindllm.data.formats.place import Place
from bindllm.data.formats.turns import BETWEEN, Turn, converse
from bindllm.data.tables import Record


def alpaca(record: Record, place: Place) -> Parsed:
    """Read ``{"instruction": ..., "input": ..., "output": ...}``.

    The input follows the header of the public Alpaca texts, so that a decoder with the template ``alpaca`` sees them
    letter by letter.
    """
    return _instructed(record, place, INPUT_HEADER)


def instruction(record: Record, place: Place) -> Parsed:
    """Read ``{"instruction": ..., "input": ..., "response": ...}``; the input follows after a blank line."""
    return _instructed(record, place, BETWEEN)


def _instructed(record: Record, place: Place, between: str) -> Parsed:
    asked = require_text(record, place, "instruction")
    if given := text_of(record, place, "input"):
        asked += between + given
    turns = [
        system_turn(record, place),
        Turn("user", with_media(asked, Enclosed(record, place))),
        Turn("assistant", [require_text(record, place, "output")]),
    ]
    return finish(record, place, converse(turns), "chat")
