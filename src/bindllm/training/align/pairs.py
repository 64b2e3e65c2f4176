"""Training pairs: rows of tables, each with a target (such as an image) and the media that belong to it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple, get_args

from bindllm.data.formats import clean_caption
from bindllm.data.formats.media import FolderResolver
from bindllm.data.report import Skipped
from bindllm.data.source_config import SPLITS
from bindllm.data.sources import hashed_split, require_table
from bindllm.data.tables import Record, read_table
from bindllm.errors import InputError, did_you_mean, fetch_hint
from bindllm.media import MODALITIES, Media, is_modality

Split = Literal["train", "validation", "test"]


@dataclass
class PairSource:
    """One table of pairs."""

    path: str
    """A table (.jsonl, .csv, .tsv, .parquet) or a folder with one named captions.*; paths in it start at its folder."""

    modality: str = "text"
    """The modality to align; the same for all sources of a recipe."""

    columns: list[str] = field(default_factory=list)
    """Columns of that modality, each with a path, a text, or a list of them; by default `caption` for text, else the
    column with the name of the modality. All media of a row belong to its target."""

    target: str = "image"
    """Modality of the frozen side."""

    target_column: str | None = None
    """Column of the frozen side; by default the name of `target`."""

    split: Split | None = None
    """Split of the whole source. Without it, the column `split_column` decides, or else a hash of the target."""

    split_column: str = "split"
    """Optional column with train, validation or test."""

    held_out: float = 0.1
    """Share of targets, 0 to below 1, that the hash holds out: half for validation, half for test."""

    def __post_init__(self) -> None:
        for name in (self.modality, self.target):
            if not is_modality(name):
                raise InputError(
                    f"{self.path}: a modality is a lower-case word, not {name!r}. "
                    f"{did_you_mean(str(name).lower(), MODALITIES)}"
                )
        if self.split is not None and self.split not in get_args(Split):
            raise InputError(f"{self.path}: unknown split {self.split!r}. {did_you_mean(self.split, SPLITS)}")
        if not 0 <= self.held_out < 1:
            raise InputError(f"{self.path}: held_out must be from 0 to below 1, not {self.held_out}")
        self.columns = self.columns or ["caption" if self.modality == "text" else self.modality]
        self.target_column = self.target_column or self.target


class Pair(NamedTuple):
    """A target and one media that belongs to it; None: the target is only a further candidate in the gallery."""

    target: Media
    media: Media | None
    split: str
    name: str


@dataclass
class PairReport:
    """Counts of pairs, and of skipped rows with their reasons.

    Args:
        pairs: pairs per split.
        targets: different targets per split, including targets without media.
        media: different media per split.
        without_media: targets without media, which only enlarge the gallery.
        skipped: skipped pairs and rows.
    """

    pairs: dict[str, int] = field(default_factory=dict)
    targets: dict[str, int] = field(default_factory=dict)
    media: dict[str, int] = field(default_factory=dict)
    without_media: int = 0
    skipped: Skipped = field(default_factory=Skipped)

    def lines(self) -> Iterator[str]:
        """Yield the lines of the report."""
        for split in SPLITS:
            yield (
                f"{split}: {self.pairs.get(split, 0):,} pairs of {self.media.get(split, 0):,} media and "
                f"{self.targets.get(split, 0):,} targets"
            )
        if self.without_media:
            yield f"{self.without_media:,} targets have no media; the held-out ones are in the gallery"
        yield from (f"skipped: {line}" for line in self.skipped.lines())


def read_pairs(source: PairSource, skipped: Skipped) -> list[Pair]:
    """Return the pairs of a source, in its order.

    Args:
        source: the source in the recipe.
        skipped: counts skipped rows.

    Raises:
        InputError: the source is missing, is not a table, or has none of the columns.
    """
    path = Path(source.path)
    if not path.exists():
        place = "" if path.is_absolute() else f" in {Path.cwd()}, the folder that the recipe's paths start at"
        raise InputError(f"data source {source.path} does not exist{place}.{fetch_hint(path)}")
    table, pairs = require_table(path), []
    seen: set[str] = set()
    splits: dict[str, str] = {}
    # A column counts as present if any row has it: rows of JSON lines may leave empty columns out.
    for name, record in read_table(table, (source.target_column,), skipped):
        seen |= record.keys()
        pairs += _row_pairs(name, record, source, table.parent, splits, skipped)
    missing = [column for column in source.columns if column not in seen]
    if missing and seen:
        raise InputError(f"{table}: no column {missing[0]!r}. {did_you_mean(missing[0], seen)}")
    return pairs


def _row_pairs(
    name: str, record: Record, source: PairSource, folder: Path, splits: dict[str, str], skipped: Skipped
) -> Iterator[Pair]:
    """Yield the pairs of one row; a row whose columns are all empty is a target without media."""
    value = record[source.target_column]
    target = _media(source.target, value, folder, f"{name}: {source.target_column}", skipped)
    if target is None:
        return
    # The key of evaluation too: a target that the hash holds out here is held out there.
    key = value if source.target == "text" else FolderResolver(str(folder)).key(target)
    split = source.split or record.get(source.split_column) or hashed_split(key, source.held_out)
    if split not in SPLITS:
        skipped.add(f"unknown split {split!r}. {did_you_mean(str(split), SPLITS)}", name)
        return
    # Two rows of one target share its split, or the target would be in training and in the gallery.
    if splits.setdefault(key, split) != split:
        skipped.add(f"this {source.target} is in another split already", name)
        return
    found = False
    # Every media of every column is a pair of its own with the target.
    for column in source.columns:
        values = record.get(column)
        for each in values if isinstance(values, list) else [values]:
            if each is None or each == "":
                continue
            found = True
            media = _media(source.modality, each, folder, f"{name}: {column}", skipped)
            if media is not None:
                yield Pair(target, media, split, name)
    if not found:
        yield Pair(target, None, split, name)


def _media(modality: str, value: object, folder: Path, name: str, skipped: Skipped) -> Media | None:
    """Return the media of one cell; a cell without media is counted as skipped."""
    if not isinstance(value, str) or not value.strip():
        skipped.add(f"no {'text' if modality == 'text' else f'path of {modality} media'}", name)
        return None
    if modality == "text":
        # As captions of training rows: control characters removed, white space on one line.
        words, _ = clean_caption(value)
        if not words:
            skipped.add("empty text", name)
            return None
        return Media.text(words)
    # An absolute path stays as it is.
    file = os.path.join(folder, value)
    if not os.path.isfile(file):
        skipped.add(f"no such {modality} file", f"{name}: {value}")
        return None
    return Media(modality, file)
