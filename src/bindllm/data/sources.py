"""Data sources: reads the rows of one source as conversations in three splits."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from bindllm.data.formats import read_row, skip
from bindllm.data.formats.columns import json_list, looks_like
from bindllm.data.formats.media import FolderResolver, find_file, folder_of, media_key, read_media
from bindllm.data.formats.questions import clean_caption
from bindllm.data.messages import RecordMedia, RowError, answered, is_visible, parse_messages
from bindllm.data.report import Skipped, SourceReport
from bindllm.data.rows import Row
from bindllm.data.source_config import SPLITS, Columns, SourceConfig, Split, split_named
from bindllm.data.tables import HUB, NOT_UTF8, READERS, is_table, read_table
from bindllm.errors import InputError, did_you_mean, fetch_hint
from bindllm.media import SUFFIXES, Media

TABLE_NAME = "captions"


@dataclass
class CaptionedMedia:
    """One image, or media of another modality, with all its captions.

    Args:
        file: path of the image, its content if the table holds it, or the text itself.
        key: path of the image as the source writes it, the hash of its content, or the text; decides its split.
        split: the split that the source gives it, if any.
        captions: each caption once, with the name of its row.
    """

    file: str | bytes
    key: str
    split: Split | None
    captions: dict[str, str] = field(default_factory=dict)


def read_source(config: SourceConfig, number: int = 0) -> tuple[dict[str, list[Row]], SourceReport]:
    """Read a source: its rows as conversations, by split.

    In the format caption, each caption of an image is a row, and all captions of that image are its references.
    In the other formats, each record of the table is a row.

    Args:
        config: the source in the recipe.
        number: index of the source in the recipe, from 0; every row carries it.

    Returns:
        The rows of each split, and a report of the skipped rows.

    Raises:
        InputError: the path is missing, cannot be read, or no row of it can be used.
    """
    path = Path(config.path)
    if not config.path.startswith(HUB) and not path.exists():
        where = "" if path.is_absolute() else f" in {Path.cwd()}, the working directory"
        raise InputError(f"data source {config.path} does not exist{where}.{fetch_hint(path)}")
    report = SourceReport(config.path, modality=config.modality, format=config.format)
    read = _read_captioned if config.format == "caption" else _read_records
    try:
        rows = read(config, number, report)
    except InputError as error:
        # The usual mistakes: a folder of shards, or another format.
        if hint := _shards_hint(path) or _format_hint(config):
            raise InputError(f"{error}{hint}") from error
        raise
    report.count(row for part in rows.values() for row in part)
    if not any(rows.values()):
        reasons = "; ".join(report.skipped.lines()) or "it is empty"
        hint = _format_hint(config)
        raise InputError(f"data source {config.path} has no row that can be used: {reasons}{hint}")
    return rows, report


def hashed_split(key: str, held_out: float) -> Split:
    """Return the split of a key: always the same, whatever else the source holds.

    Args:
        key: the path of an image as its source writes it.
        held_out: share of keys, 0 to 1; half of it goes to validation and half to test.

    Examples:
        >>> hashed_split("images/cat.png", 0.0)
        'train'
    """
    position = _hash_position(key, "split")
    if position < held_out / 2:
        return "test"
    return "validation" if position < held_out else "train"


def _hash_position(key: str, purpose: str) -> float:
    """Return a position from 0 to 1 for a key, independent for each purpose."""
    # With the purpose in the hash, a limit favors no split.
    digest = hashlib.sha256(f"{purpose}\n{key}".encode("utf-8", "surrogatepass")).digest()
    # The first 64 bits as a fraction.
    return int.from_bytes(digest[:8]) / 2**64


def _read_captioned(config: SourceConfig, number: int, report: SourceReport) -> dict[str, list[Row]]:
    """Read a table or a folder of captions."""
    # A source with a split of its own ignores the column.
    columns = config.columns if config.split is None else replace(config.columns, split=None)
    found = read_captions(config.path, report, columns, config.modality, root=config.media)
    # By hash: a larger limit keeps all rows of a smaller one, whatever the order of the file.
    if config.limit is not None:
        found = sorted(found, key=lambda one: _hash_position(one.key, "limit"))[: config.limit]
    rows: dict[str, list[Row]] = {split: [] for split in SPLITS}
    for one in found:
        split = config.split or one.split or hashed_split(one.key, config.held_out)
        question = {"role": "user", "content": [Media(config.modality, one.file), config.prompt]}
        references = tuple(one.captions)
        for caption, name in one.captions.items():
            messages = parse_messages(
                [question, {"role": "assistant", "content": caption}], RecordMedia(Media)
            )
            rows[split].append(Row(answered(messages), references, name, number))
    return rows


def _read_records(config: SourceConfig, number: int, report: SourceReport) -> dict[str, list[Row]]:
    """Read the tables of a source, each record by itself."""
    resolve, found = FolderResolver.of(config), []
    for table, table_split in _tables(config.path):
        for name, record in read_table(table, (), report.skipped):
            try:
                row = read_row(record, config, resolve, name=name, source=number)
            except InputError as error:
                skip(error, name, report.skipped)
            else:
                found.append((row, config.split or row.split or table_split))
    # Keys take a pass over all media, so they are computed only if the limit or a split depends on them.
    is_hashed = config.limit is not None or not all(split for _, split in found)
    keys = _shared_keys([row for row, _ in found], resolve.root) if is_hashed else [""] * len(found)
    chosen = range(len(found))
    if config.limit is not None:
        # The choice is made by hash, then the rows are back in the order of the file.
        chosen = sorted(sorted(chosen, key=lambda n: _hash_position(keys[n], "limit"))[: config.limit])
    rows: dict[str, list[Row]] = {split: [] for split in SPLITS}
    for n in chosen:
        row, split = found[n]
        rows[split or hashed_split(keys[n], config.held_out)].append(row)
    return rows


def _tables(path: str) -> list[tuple[str | Path, Split | None]]:
    """Return the tables at a path, each with the split that its file name gives.

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
    """Return the key that decides the split of each row; rows that share media, also through others, share it.

    A row without media is decided by its questions.
    """
    # Union-find: each key points to a smaller one of its component, the root of the component to itself.
    parents: dict[str, str] = {}

    def first(key: str) -> str:
        while (parent := parents.setdefault(key, key)) != key:
            # Path halving: each step shortens the way to the root, so later look-ups are fast.
            parents[key] = key = parents[parent]
        return key

    keys = []
    for row in rows:
        asked = "\n".join(turn.text for turn in row.conversation.messages if turn.role != "assistant")
        own = [media_key(media, root) for media in row.media] or [asked]
        keys.append(own[0])
        for key in own[1:]:
            # The smaller key becomes the root, whatever the order of the rows.
            one, other = sorted((first(own[0]), first(key)))
            parents[other] = one
    return [first(key) for key in keys]


def _shards_hint(path: Path) -> str:
    """Return how to name the tar shards in a folder, if it holds any."""
    if not path.is_dir() or not any(path.glob("*.tar")):
        return ""
    return f". It holds tar shards, which are streamed: give them as {path / '*.tar'}"


def _format_hint(config: SourceConfig) -> str:
    """Return the format that the first row of a source of captions looks like, if it is another one."""
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


def read_captions(
    path: str | Path,
    report: SourceReport,
    columns: Columns,
    modality: str = "image",
    *,
    root: str | None = None,
) -> list[CaptionedMedia]:
    """Read a folder or a table of media with captions; rows of the same image are joined.

    Args:
        path: a table; a folder with a table ``captions.*``; or a folder of images, at any depth, each with a text
            file of the same name that has one caption per line. For other modalities, any file with such a text file
            counts.
        report: counts skipped rows.
        columns: names of the columns of a table.
        modality: of the files.
        root: folder that the paths in a table are relative to; by default that of the table.

    Raises:
        InputError: neither of these, or a table without these columns.
    """
    table = path if is_table(path) else find_table(Path(path))
    found: dict[str, CaptionedMedia] = {}
    # A column that was not renamed is called like the modality.
    if table and modality != "image" and columns.image == Columns.image:
        columns = replace(columns, image=modality)
    if table:
        rows = _table_rows(table, report, columns, modality, folder_of(table) if root is None else root)
    else:
        rows = _folder_rows(Path(path), report, modality)
    for one, captions, name in rows:
        # Rows of one image become one entry, so its captions share a split.
        first = found.setdefault(one.key, one)
        if one.split != first.split:
            report.skipped.add(f"this {modality} is in another split already", name)
        else:
            _add_captions(first, captions, name, report)
    return [one for one in found.values() if one.captions]


def find_table(path: Path) -> Path | None:
    """Return the table at a path: the file itself, or ``captions.*`` in a folder; None if the folder has none.

    Raises:
        InputError: a folder has several.
    """
    if not path.is_dir():
        return path
    tables = [file for suffix in READERS if (file := path / f"{TABLE_NAME}{suffix}").is_file()]
    if len(tables) > 1:
        raise InputError(
            f"{path} holds {' and '.join(table.name for table in tables)}; give the path of the one to use"
        )
    return tables[0] if tables else None


def require_table(path: Path) -> Path:
    """Return the table at a path.

    Raises:
        InputError: a folder has none, or several.
    """
    table = find_table(path)
    if table is None:
        raise InputError(
            f"{path} holds no table {TABLE_NAME}.* ({', '.join(READERS)}); give the path of the table to use"
        )
    return table


_CaptionRow = tuple[CaptionedMedia, list, str]
"""Media still without captions, the values of its captions as the source has them, and the name of the row."""


def _table_rows(
    table: str | Path, report: SourceReport, columns: Columns, modality: str, root: str
) -> Iterator[_CaptionRow]:
    """Yield the rows of a table whose media exist."""
    for name, record in read_table(table, (columns.image, columns.caption), report.skipped):
        captions = json_list(record[columns.caption], (str,))
        # An empty list becomes one missing caption, which is counted as skipped.
        captions = captions or [None] if isinstance(captions, list) else [captions]
        value = (record.get(columns.split) if columns.split else None) or None
        split = split_named(value)
        try:
            media = read_media(modality, record[columns.image], lambda path: find_file(root, modality, path))
        except RowError as error:
            skip(error, name, report.skipped)
            continue
        if value is not None and split is None:
            report.skipped.add(f"unknown split {value!r}. {did_you_mean(str(value), SPLITS)}", name)
            continue
        yield CaptionedMedia(media.source, media_key(media, root), split), captions, name


def _folder_rows(folder: Path, report: SourceReport, modality: str) -> Iterator[_CaptionRow]:
    """Yield one row per image file, with the lines of its text file."""
    files = sorted(file for file in folder.rglob("*") if _is_media_file(file, modality) and file.is_file())
    if not files:
        endings = ", ".join(sorted(suffix[1:] for suffix in SUFFIXES["image"]))
        wanted = (
            f"images ({endings})"
            if modality == "image"
            else f"{modality} files with a .txt file of the same name"
        )
        raise InputError(
            f"{folder} holds no table {TABLE_NAME}.* ({', '.join(READERS)}) and no {wanted}; expected one or the other"
        )
    for file in files:
        key = file.relative_to(folder).as_posix()
        text_file = file.with_suffix(".txt")
        try:
            text = text_file.read_text(encoding="utf-8-sig")
        except FileNotFoundError:
            report.skipped.add("no text file of the same name", key)
        except OSError as error:
            report.skipped.add(f"the text file cannot be read ({error.strerror})", key)
        except UnicodeDecodeError:
            report.skipped.add(NOT_UTF8, text_file.name)
        else:
            lines = [line for line in text.splitlines() if line.strip()]
            # An empty file is one empty caption, which is counted as skipped.
            yield CaptionedMedia(str(file), key, None), lines or [text], key


def _is_media_file(file: Path, modality: str) -> bool:
    """Images are recognized by their ending; other modalities have any ending, so they need a text file."""
    if modality == "image":
        return file.suffix.lower() in SUFFIXES["image"]
    return file.suffix.lower() != ".txt" and file.with_suffix(".txt").is_file()


def _add_captions(media: CaptionedMedia, captions: list, name: str, report: SourceReport) -> None:
    for caption in captions:
        if not isinstance(caption, str):
            report.skipped.add("no caption" if caption is None else "the caption is not a text", name)
            continue
        caption, had_control = clean_caption(caption)
        report.control_characters += had_control
        if not is_visible(caption):
            report.skipped.add("empty caption", name)
        elif caption in media.captions:
            report.skipped.add(f"same {report.modality} and caption as an earlier row", name)
        else:
            media.captions[caption] = name
