"""Data sources: how the rows of one become conversations in three splits."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from bindllm.conversation import Conversation, Message
from bindllm.data.arrow_tables import HUB
from bindllm.data.captions import CaptionedPicture, find_table, read_captions
from bindllm.data.formats import FORMATS, FolderPlace, leave_out
from bindllm.data.formats.columns import looks_like
from bindllm.data.formats.place import media_key
from bindllm.data.report import Skipped, SourceReport
from bindllm.data.rows import Row
from bindllm.data.source_config import SPLITS, SourceConfig, Split, split_named
from bindllm.data.tables import READERS, is_table, read_table
from bindllm.errors import InputError, fetch_hint
from bindllm.media import Media

__all__ = ["Row", "SourceConfig", "hashed_split", "read_source"]


def read_source(config: SourceConfig, number: int = 0) -> tuple[dict[str, list[Row]], SourceReport]:
    """Read a source: its rows as conversations, by split.

    Of the format caption each caption of a picture is a row, and all captions of that picture are its references.
    Of the other formats each record of the table is a row.

    Args:
        config: what the recipe says about it.
        number: its place among the sources of the recipe, from 0; every row notes it.

    Returns:
        The rows of each split, and a report of what was left out.

    Raises:
        InputError: the path is missing, is nothing that can be read, or no row of it can be used.
    """
    path = Path(config.path)
    if not config.path.startswith(HUB) and not path.exists():
        place = "" if path.is_absolute() else f" in {Path.cwd()}, from where the recipe's paths are looked up"
        raise InputError(f"data source {config.path} does not exist{place}.{fetch_hint(path)}")
    report = SourceReport(config.path, modality=config.modality, format=config.format)
    read = _read_pictures if config.format == "caption" else _read_records
    try:
        rows = read(config, number, report)
    except InputError as error:
        if hint := _shards(path) or _other_format(config):
            raise InputError(f"{error}{hint}") from error
        raise
    report.count(row for part in rows.values() for row in part)
    if not any(rows.values()):
        reasons = "; ".join(report.skipped.lines()) or "it is empty"
        raise InputError(
            f"data source {config.path} has no row that can be used: {reasons}{_other_format(config)}"
        )
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


def _read_pictures(config: SourceConfig, number: int, report: SourceReport) -> dict[str, list[Row]]:
    """Read a table or a folder of captions."""
    columns = config.columns if config.split is None else replace(config.columns, split=None)
    pictures = read_captions(config.path, report, columns, config.modality, root=config.media)
    if config.limit is not None:
        pictures = sorted(pictures, key=lambda picture: _place(picture.key, "limit"))[: config.limit]
    rows: dict[str, list[Row]] = {split: [] for split in SPLITS}
    for picture in pictures:
        split = config.split or picture.split or hashed_split(picture.key, config.held_out)
        rows[split] += _rows(picture, config, number)
    return rows


def _rows(picture: CaptionedPicture, config: SourceConfig, number: int) -> Iterable[Row]:
    question = Message("user", (Media(config.modality, picture.file), config.prompt))
    references = tuple(picture.captions)
    for caption, name in picture.captions.items():
        yield Row(Conversation((question, Message("assistant", caption))), references, name, number)


def _read_records(config: SourceConfig, number: int, report: SourceReport) -> dict[str, list[Row]]:
    """Read the tables of a source, each record by itself."""
    place, found = FolderPlace(config), []
    for table, split in _tables(config.path):
        for name, record in read_table(table, (), report.skipped):
            try:
                parsed = FORMATS[config.format](record, place)
            except InputError as error:
                leave_out(error, name, report.skipped)
            else:
                split_said = config.split or parsed.split or split
                found.append((parsed.row(name, number), split_said))
    is_hashed = config.limit is not None or not all(split for _, split in found)
    keys = _shared_keys([row for row, _ in found], place.root) if is_hashed else [""] * len(found)
    chosen = range(len(found))
    if config.limit is not None:
        chosen = sorted(sorted(chosen, key=lambda n: _place(keys[n], "limit"))[: config.limit])
    rows: dict[str, list[Row]] = {split: [] for split in SPLITS}
    for n in chosen:
        row, split = found[n]
        rows[split or hashed_split(keys[n], config.held_out)].append(row)
    return rows


def _tables(path: str) -> list[tuple[str | Path, Split | None]]:
    """The tables that a path names, each with the split that its name says.

    Raises:
        InputError: a folder without a table, or with several that are not called like splits.
    """
    folder = Path(path)
    if is_table(path) or not folder.is_dir():
        return [(path, None)]
    tables = sorted(file for file in folder.iterdir() if file.suffix.lower() in READERS and file.is_file())
    named: list[tuple[str | Path, Split | None]] = [
        (file, split) for split in SPLITS for file in tables if split_named(file.stem) == split
    ]
    if named and len({split for _, split in named}) == len(named):
        return named
    if len(tables) == 1:
        return [(tables[0], None)]
    found = f"the tables {', '.join(file.name for file in tables)}" if tables else "no table"
    raise InputError(
        f"{path} holds {found} ({', '.join(READERS)}); expected one, or one for each of train, validation and test. "
        "Give the path of the one to use"
    )


def _shared_keys(rows: Sequence[Row], root: str) -> list[str]:
    """What decides on the split of each row, the same for rows that share media with one another.

    A row without media goes by what is asked in it.
    """
    parents: dict[str, str] = {}

    def first(key: str) -> str:
        while (parent := parents.setdefault(key, key)) != key:
            parents[key] = key = parents[parent]
        return key

    keys = []
    for row in rows:
        asked = "\n".join(turn.text for turn in row.conversation.messages if turn.role != "assistant")
        own = [media_key(media, root) for media in row.media] or [asked]
        keys.append(own[0])
        for key in own[1:]:
            one, other = sorted((first(own[0]), first(key)))
            parents[other] = one
    return [first(key) for key in keys]


def _shards(path: Path) -> str:
    """A sentence that says how tar shards in a folder are given, if it holds any."""
    if not path.is_dir() or not any(path.glob("*.tar")):
        return ""
    return f". It holds tar shards, which are streamed: give them as {path / '*.tar'}"


def _other_format(config: SourceConfig) -> str:
    """A sentence that names the format which the first row of a source of captions looks like, if it is another."""
    if config.format != "caption":
        return ""
    try:
        table = config.path if is_table(config.path) else find_table(Path(config.path))
        tables = [(table, None)] if table else _tables(config.path)
        _, record = next(iter(read_table(tables[0][0], (), Skipped())), ("", {}))
    except InputError:
        return ""
    found = looks_like(record)
    return (
        f". Its first row looks like {found}; set format: {found}" if found not in (None, "caption") else ""
    )
