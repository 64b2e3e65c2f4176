"""Turns of ``{"from": ..., "value": ...}``: the formats ``llava``, with placeholders for media, and ``sharegpt``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from bindllm.conversation import Role
from bindllm.data.formats.columns import as_list, finish, hint, require, system_turn
from bindllm.data.formats.enclosed import Enclosed, kinds, split_at_placeholders
from bindllm.data.formats.parsed import Parsed
from bindllm.data.formats.place import Place, RowError
from bindllm.data.formats.turns import Turn, converse, role_of
from bindllm.data.tables import Record
from bindllm.media import Media

ROLES: dict[str, Role] = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
}


def llava(record: Record, place: Place) -> Parsed:
    """Read LLaVA: ``{"image": path or list, "conversations": [{"from": "human", "value": "<image> ..."}, ...]}``.

    Other media are in columns called like their modality and have placeholders such as ``<video>``. Each media goes
    to the turn of its placeholder. An answer is taken as it is, whatever it spells.

    Raises:
        RowError: placeholders of a modality in the questions are more or fewer than its media.
    """
    enclosed, modalities = Enclosed(record, place), kinds(place)
    turns = _turns(record, place, lambda text: split_at_placeholders(text, enclosed, modalities))
    enclosed.check()
    return finish(record, place, converse(turns), "chat")


def sharegpt(record: Record, place: Place) -> Parsed:
    """Read ShareGPT: ``{"conversations": [{"from": "human", "value": ...}, ...]}``, texts alone.

    Raises:
        RowError: the record has media.
    """
    turns = _turns(record, place, lambda text: [text])
    if Enclosed(record, place).modalities:
        raise RowError(f"sharegpt has no media.{hint(record, 'sharegpt')}")
    return finish(record, place, converse(turns), "chat")


def _turns(record: Record, place: Place, split: Callable[[str], Sequence[str | Media]]) -> list[Turn]:
    """Read the turns; those of the user are split into parts."""
    turns = [system_turn(record, place)]
    for turn in as_list(require(record, place, "conversations"), place.config.columns.conversations):
        if not isinstance(turn, Mapping):
            raise RowError("a turn that is no object with 'from' and 'value'")
        role = role_of(turn.get("from", turn.get("role")), ROLES)
        text = turn.get("value", turn.get("content"))
        if not isinstance(text, str):
            raise RowError("a turn whose value is no text")
        turns.append(Turn(role, split(text) if role == "user" else [text]))
    return turns
