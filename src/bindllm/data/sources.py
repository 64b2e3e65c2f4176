"""Data sources: how the rows of one become conversations in three splits."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

from bindllm.conversation import Conversation, Message
from bindllm.data.formats import FORMATS, FolderPlace, leave_out
from bindllm.data.formats.columns import looks_like, written_list
from bindllm.data.formats.place import RowError, find_file, folder_of, media_key, read_media
from bindllm.data.report import Skipped, SourceReport
from bindllm.data.rows import Row
from bindllm.data.source_config import SPLITS, Columns, SourceConfig, Split, split_named
from bindllm.data.tables import HUB, NOT_UTF8, READERS, is_table, read_table
from bindllm.data.texts import clean_caption, is_visible
from bindllm.errors import InputError, known_names
from bindllm.media import Media
from bindllm.quickstart import fetch_hint

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


PICTURE_SUFFIXES = frozenset((".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".svg"))
TABLE_NAME = "captions"


@dataclass
class CaptionedPicture:
    """One picture, or media of another modality, and all that is said about it.

    Args:
        file: path of the picture, its content where the table holds it, or the text itself.
        key: path of the picture as the source writes it, the hash of its content, or the text; it decides on its
            split.
        split: the split that the source gives it, if any.
        captions: what is said about it, each caption once, with the name of its row.
    """

    file: str | bytes
    key: str
    split: str | None
    captions: dict[str, str] = field(default_factory=dict)


class _Row(NamedTuple):
    """One row of a source as it is written there; parts that are not texts are found out later."""

    file: str | bytes
    key: str
    split: str | None
    name: str
    captions: list


def read_captions(
    path: str | Path,
    report: SourceReport,
    columns: Columns,
    modality: str = "image",
    *,
    root: str | None = None,
) -> list[CaptionedPicture]:
    """Read a folder or a table of captioned pictures; rows of the same picture are joined.

    Args:
        path: a table; a folder with a table ``captions.*``; or a folder of pictures, at any depth, each with a text
            file of the same name that has one caption a line. For other modalities any file with such a text file
            beside it counts.
        report: counts what is left out.
        columns: what the columns of a table are called.
        modality: what the files are.
        root: folder that the paths in a table are relative to; that of the table where this is not given.

    Raises:
        InputError: neither of these, or a table without these columns.
    """
    table = path if is_table(path) else find_table(Path(path))
    pictures: dict[str, CaptionedPicture] = {}
    if table and modality != "image" and columns.image == Columns.image:
        columns = replace(columns, image=modality)
    if table:
        rows = _table_rows(table, report, columns, modality, folder_of(table) if root is None else root)
    else:
        rows = _folder_rows(Path(path), report, modality)
    for row in rows:
        picture = pictures.setdefault(row.key, CaptionedPicture(row.file, row.key, row.split))
        _join(picture, row, report)
    return [picture for picture in pictures.values() if picture.captions]


def find_table(path: Path) -> Path | None:
    """Return the table that a path names: itself, or ``captions.*`` in a folder; None where a folder has none.

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
    """Return the table that a path names.

    Raises:
        InputError: a folder has none, or several.
    """
    table = find_table(path)
    if table is None:
        raise InputError(
            f"{path} holds no table {TABLE_NAME}.* ({', '.join(READERS)}); give the path of the table to use"
        )
    return table


def _table_rows(
    table: str | Path, report: SourceReport, columns: Columns, modality: str, root: str
) -> Iterator[_Row]:
    """Yield the rows of a table whose picture is there."""
    for name, record in read_table(table, (columns.image, columns.caption), report.skipped):
        image, captions = record[columns.image], written_list(record[columns.caption], (str,))
        said = (record.get(columns.split) if columns.split else None) or None
        split = split_named(said)
        captions = captions or [None] if isinstance(captions, list) else [captions]
        try:
            media = read_media(modality, image, lambda path: find_file(root, modality, path))
        except RowError as error:
            leave_out(error, name, report.skipped)
            continue
        if said is not None and split is None:
            report.skipped.add(f"unknown split {said!r}. {known_names(str(said), SPLITS)}", name)
            continue
        yield _Row(media.source, media_key(media, root), split, name, captions)


def _folder_rows(folder: Path, report: SourceReport, modality: str) -> Iterator[_Row]:
    """Yield one row per picture file, with the lines of the text file beside it."""
    files = sorted(file for file in folder.rglob("*") if _is_wanted(file, modality) and file.is_file())
    if not files and modality != "image":
        raise InputError(
            f"{folder} holds no table {TABLE_NAME}.* ({', '.join(READERS)}) and no {modality} files with a .txt file "
            "of the same name beside them; expected one or the other"
        )
    if not files:
        endings = ", ".join(sorted(suffix[1:] for suffix in PICTURE_SUFFIXES))
        raise InputError(
            f"{folder} holds no table {TABLE_NAME}.* ({', '.join(READERS)}) and no pictures ({endings}); "
            "expected one or the other"
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
            yield _Row(str(file), key, None, key, lines or [text])


def _is_wanted(file: Path, modality: str) -> bool:
    """Pictures are known by their ending; nobody knows the endings of all else, so a text file must be beside it."""
    if modality == "image":
        return file.suffix.lower() in PICTURE_SUFFIXES
    return file.suffix.lower() != ".txt" and file.with_suffix(".txt").is_file()


def _join(picture: CaptionedPicture, row: _Row, report: SourceReport) -> None:
    """Add the captions of a row to the picture that it is about."""
    if row.split != picture.split:
        report.skipped.add("this picture is in another split already", row.name)
        return
    for caption in row.captions:
        if not isinstance(caption, str):
            report.skipped.add("no caption" if caption is None else "the caption is not a text", row.name)
            continue
        caption, had_control = clean_caption(caption)
        report.control_characters += had_control
        if not is_visible(caption):
            report.skipped.add("empty caption", row.name)
        elif caption in picture.captions:
            report.skipped.add("same picture and caption as an earlier row", row.name)
        else:
            picture.captions[caption] = row.name
