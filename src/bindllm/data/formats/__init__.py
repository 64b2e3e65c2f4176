"""Formats of training rows. Each writes a record as OpenAI messages; one parser turns those into a `Row`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from bindllm.data.formats.columns import Fields
from bindllm.data.formats.dialogs import llava, messages, preference, sharegpt
from bindllm.data.formats.questions import alpaca, caption, choice, instruction, minigpt4, vqa
from bindllm.data.messages import MediaResolver
from bindllm.data.rows import Row
from bindllm.data.source_config import SourceConfig
from bindllm.data.tables import Record

__all__ = ["FORMATS", "read_row"]

FORMATS: Mapping[str, Callable[[Fields], Row]] = {
    "caption": caption,
    "messages": messages,
    "llava": llava,
    "sharegpt": sharegpt,
    "alpaca": alpaca,
    "instruction": instruction,
    "minigpt4": minigpt4,
    "vqa": vqa,
    "choice": choice,
    "preference": preference,
}
"""The reader of each format, by the name that recipes use. It raises `InputError` if a record cannot be used."""


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
        record: of a table, or the JSON of a streamed sample; not changed.
        config: of the source; names the format.
        resolve: finds the media that the record refers to.
        unnamed: returns media, by modality, that belong to the record without being named in it.
        name: of the record, for messages.
        source: index of the source in the recipe, from 0.

    Raises:
        InputError: the record cannot be used.
    """
    return FORMATS[config.format](Fields(record, config, resolve, unnamed, name, source))
