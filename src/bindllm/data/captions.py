"""The format ``caption``: pictures, or media of another modality, with captions from a table or text files."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

from bindllm.data.report import SourceReport
from bindllm.data.tables import NOT_UTF8, READERS, read_table
from bindllm.errors import InputError, known_names

SPLITS = ("train", "validation", "test")
PICTURE_SUFFIXES = frozenset((".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".svg"))
TABLE_NAME = "captions"

_BYTE_ORDER_MARK = "\ufeff"


@dataclass(frozen=True)
class Columns:
    """Names of the columns of a table.

    Args:
        image: path of the picture, relative to the folder of the table. In a source of another modality the column
            is called like the modality, unless this says otherwise; for ``text`` it holds the text itself.
        caption: a text or, in JSON Lines and Parquet, a list of texts.
        split: train, validation or test; a table may lack this column. None: it is not looked at.
    """

    image: str = "image"
    caption: str = "caption"
    split: str | None = "split"


@dataclass
class CaptionedPicture:
    """One picture, or media of another modality, and all that is said about it.

    Args:
        file: path of the picture, or the text itself.
        key: path of the picture as the source writes it, or the text, which decides on its split.
        split: the split that the source gives it, if any.
        captions: what is said about it, each caption once, with the name of its row.
    """

    file: str
    key: str
    split: str | None
    captions: dict[str, str] = field(default_factory=dict)


class _Row(NamedTuple):
    """One row of a source as it is written there; parts that are not texts are found out later."""

    file: str
    key: str
    split: str | None
    name: str
    captions: list


def read_captions(
    path: Path, report: SourceReport, columns: Columns, modality: str = "image"
) -> list[CaptionedPicture]:
    """Read a folder or a table of captioned pictures; rows of the same picture are joined.

    Args:
        path: a table; a folder with a table ``captions.jsonl``, ``.csv``, ``.tsv`` or ``.parquet``; or a folder
            of pictures, at any depth, each with a text file of the same name that has one caption a line. For other
            modalities any file with such a text file beside it counts.
        report: counts what is left out.
        columns: what the columns of a table are called.
        modality: what the files are.

    Raises:
        InputError: neither of these, or a table without these columns.
    """
    table = find_table(path)
    pictures: dict[str, CaptionedPicture] = {}
    if table and modality != "image" and columns.image == Columns.image:
        columns = replace(columns, image=modality)
    rows = _table_rows(table, report, columns, modality) if table else _folder_rows(path, report, modality)
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


def clean_caption(text: str) -> tuple[str, bool]:
    """Return a caption in Unicode form NFC, on one line, without control characters, and whether it had any.

    Joiners stay: emoji sequences and several scripts are spelled with them.

    Example:
        >>> clean_caption(" a red  square ")
        ('a red square', False)
    """
    kept = "".join(letter for letter in text if letter.isspace() or not _is_control(letter))
    words = " ".join(unicodedata.normalize("NFC", kept).split())
    return words, len(kept) < len(text)


def _is_control(letter: str) -> bool:
    return letter == _BYTE_ORDER_MARK or unicodedata.category(letter) in ("Cc", "Cs")


def _is_visible(text: str) -> bool:
    return any(unicodedata.category(letter) not in ("Cf", "Zs") for letter in text)


def _table_rows(table: Path, report: SourceReport, columns: Columns, modality: str) -> Iterator[_Row]:
    """Yield the rows of a table whose picture is there."""
    thing = "picture" if modality == "image" else f"{modality} file"
    for name, record in read_table(table, (columns.image, columns.caption), report.skipped):
        image, captions = record[columns.image], record[columns.caption]
        split = (record.get(columns.split) if columns.split else None) or None
        if not isinstance(image, str) or not image.strip():
            report.skipped.add("no text" if modality == "text" else f"no path of a {thing}", name)
            continue
        captions = captions or [None] if isinstance(captions, list) else [captions]
        if split is not None and split not in SPLITS:
            report.skipped.add(f"unknown split {split!r}. {known_names(str(split), SPLITS)}", name)
            continue
        if modality == "text":
            yield _Row(image, image, split, name, captions)
            continue
        file = os.path.join(table.parent, image)
        if not os.path.isfile(file):
            report.skipped.add(f"no such {thing}", f"{name}: {image}")
            continue
        yield _Row(file, os.path.normpath(image), split, name, captions)


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
        if not _is_visible(caption):
            report.skipped.add("empty caption", row.name)
        elif caption in picture.captions:
            report.skipped.add("same picture and caption as an earlier row", row.name)
        else:
            picture.captions[caption] = row.name
