"""The forms that rows of training data come in, and what each becomes: a conversation that ends with an answer."""

from __future__ import annotations

from collections.abc import Mapping

from bindllm.data.formats.choice import choice
from bindllm.data.formats.described import caption, minigpt4
from bindllm.data.formats.instruction import alpaca, instruction
from bindllm.data.formats.llava import llava, sharegpt
from bindllm.data.formats.messages import messages
from bindllm.data.formats.parsed import Parsed, RowFormat, leave_out
from bindllm.data.formats.place import FolderPlace, Place, RowError, read_media
from bindllm.data.formats.preference import preference
from bindllm.data.formats.vqa import vqa

__all__ = ["FORMATS", "FolderPlace", "Parsed", "Place", "RowError", "RowFormat", "leave_out", "read_media"]

FORMATS: Mapping[str, RowFormat] = {
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
"""What reads a record, by the name that recipes give as the ``format`` of a source."""
