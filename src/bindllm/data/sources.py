"""Data sources: what a recipe says about one, and how its rows become conversations in three splits."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, get_args

from bindllm.assets import fetch_hint
from bindllm.conversation import Conversation, Message
from bindllm.data.captions import SPLITS, CaptionedPicture, Columns, read_captions
from bindllm.data.report import SourceReport
from bindllm.errors import InputError, known_names
from bindllm.media import MODALITIES, Media, is_modality

Format = Literal["caption"]
Split = Literal["train", "validation", "test"]


@dataclass
class SourceConfig:
    """One source of training data.

    Args:
        path: a table (.jsonl, .csv, .tsv, .parquet); a folder with a table named captions.*; or a folder of
            pictures, each with a .txt file of the same name that has one caption a line. Paths of pictures are
            relative to the folder of their table.
        format: how the rows are to be read.
        modality: what the files are: image, another modality of `bindllm.media.MODALITIES`, or any lower-case word
            that an encoder of the recipe serves. In a table their column is then called like the modality.
        prompt: what the user asks about each picture (or other media).
        weight: how often each row is drawn in an epoch: 2 is twice, 0.5 every second epoch.
        split: put the whole source into one split. Otherwise the column split of the table decides, and where
            there is none, the hash of the picture's path; all captions of a picture are in one split.
        held_out: share of pictures, 0 to 1, that the hash holds out: half of them for validation, half for test.
        limit: use only this many pictures, chosen by hash.
        columns: what the columns of the table are called.
    """

    path: str
    format: Format = "caption"
    modality: str = "image"
    prompt: str = "Describe this image."
    weight: float = 1.0
    split: Split | None = None
    held_out: float = 0.1
    limit: int | None = None
    columns: Columns = field(default_factory=Columns)

    def __post_init__(self) -> None:
        if self.format not in get_args(Format):
            raise InputError(
                f"{self.path}: unknown format {self.format!r}. {known_names(self.format, get_args(Format))}"
            )
        if not is_modality(self.modality):
            raise InputError(
                f"{self.path}: a modality is a lower-case word, not {self.modality!r}. "
                f"{known_names(str(self.modality).lower(), MODALITIES)}"
            )
        if self.split is not None and self.split not in SPLITS:
            raise InputError(f"{self.path}: unknown split {self.split!r}. {known_names(self.split, SPLITS)}")
        if not (math.isfinite(self.weight) and self.weight > 0):
            raise InputError(f"{self.path}: weight must be finite and above 0, not {self.weight}")
        if not 0 <= self.held_out < 1:
            raise InputError(f"{self.path}: held_out must be from 0 to below 1, not {self.held_out}")
        if self.limit is not None and self.limit < 1:
            raise InputError(f"{self.path}: limit must be at least 1, not {self.limit}")


@dataclass(frozen=True)
class Row:
    """One conversation of a source.

    Args:
        conversation: with the answer to learn as last message.
        references: all true answers.
        name: where the row comes from, for messages.
        source: number of the source in the recipe, from 0.
    """

    conversation: Conversation
    references: tuple[str, ...]
    name: str
    source: int = 0

    @property
    def media(self) -> tuple[Media, ...]:
        """All media of the conversation."""
        return tuple(item for group in self.conversation.media_groups for item in group)


def read_source(config: SourceConfig, number: int = 0) -> tuple[dict[str, list[Row]], SourceReport]:
    """Read a source: each caption of a picture is a row, and all captions of that picture are its references.

    Args:
        config: what the recipe says about it.
        number: its place among the sources of the recipe, from 0; every row notes it.

    Returns:
        The rows of each split, and a report of what was left out.

    Raises:
        InputError: the path is missing, is nothing that can be read, or no row of it can be used.
    """
    path = Path(config.path)
    if not path.exists():
        place = "" if path.is_absolute() else f" in {Path.cwd()}, from where the recipe's paths are looked up"
        raise InputError(f"data source {config.path} does not exist{place}.{fetch_hint(path)}")
    report = SourceReport(config.path, modality=config.modality)
    columns = config.columns if config.split is None else replace(config.columns, split=None)
    pictures = read_captions(path, report, columns, config.modality)
    if not pictures:
        reasons = "; ".join(report.skipped.lines()) or "it is empty"
        raise InputError(f"data source {config.path} has no row that can be used: {reasons}")
    if config.limit is not None:
        pictures = sorted(pictures, key=lambda picture: _place(picture.key, "limit"))[: config.limit]
    report.pictures = len(pictures)
    report.captions = sum(len(picture.captions) for picture in pictures)
    rows: dict[str, list[Row]] = {split: [] for split in SPLITS}
    for picture in pictures:
        split = config.split or picture.split or hashed_split(picture.key, config.held_out)
        rows[split] += _rows(picture, config, number)
    return rows, report


def hashed_split(key: str, held_out: float) -> Split:
    """Return the split of a key: always the same, whatever else the source holds.

    Args:
        key: the path of a picture as its source writes it.
        held_out: share of keys, 0 to 1, of which half go to validation and half to test.

    Example:
        >>> hashed_split("images/cat.png", 0.0)
        'train'
    """
    place = _place(key, "split")
    if place < held_out / 2:
        return "test"
    return "validation" if place < held_out else "train"


def _place(key: str, purpose: str) -> float:
    """Place of a key on a line from 0 to 1; another line for each purpose."""
    digest = hashlib.sha256(f"{purpose}\n{key}".encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8]) / 2**64


def _rows(picture: CaptionedPicture, config: SourceConfig, number: int) -> Iterable[Row]:
    question = Message("user", (Media(config.modality, picture.file), config.prompt))
    references = tuple(picture.captions)
    for caption, name in picture.captions.items():
        yield Row(Conversation((question, Message("assistant", caption))), references, name, number)
