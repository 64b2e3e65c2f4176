"""The format ``caption``: pictures, or media of another modality, with captions from a table or text files."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

from bindllm.data.formats.columns import written_list
from bindllm.data.formats.parsed import leave_out
from bindllm.data.formats.place import RowError, find_file, folder_of, media_key, read_media
from bindllm.data.report import SourceReport
from bindllm.data.source_config import SPLITS, Columns, split_named
from bindllm.data.tables import NOT_UTF8, READERS, is_table, read_table
from bindllm.data.texts import clean_caption, is_visible
from bindllm.errors import InputError, did_you_mean

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
            report.skipped.add(f"unknown split {said!r}. {did_you_mean(str(said), SPLITS)}", name)
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
