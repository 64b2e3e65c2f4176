"""Reading tables row by row: JSON, JSON Lines, CSV, TSV, Parquet and ``datasets``, each with a name."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

from bindllm.data.arrow_tables import Record, is_dataset, read_dataset, read_parquet
from bindllm.data.json_lists import read_list
from bindllm.data.report import NOT_UTF8, Skipped
from bindllm.errors import InputError, did_you_mean

_LONGEST_FIELD = 1 << 26
"""Letters of a field of CSV at most: room for a picture as a ``data:`` URI, and an end to a quotation that has none."""

__all__ = ["NOT_UTF8", "READERS", "Record", "is_table", "read_table"]


def is_table(path: str | Path) -> bool:
    """Tell whether `read_table` is what reads this: a file by its ending, else a dataset."""
    return Path(path).suffix.lower() in READERS or is_dataset(path)


def read_table(path: str | Path, required: tuple[str, ...], skipped: Skipped) -> Iterator[tuple[str, Record]]:
    """Yield the rows of a table, each with its name; a few of them are in memory at a time.

    CSV follows RFC 4180 with a header line; in TSV a quotation mark is an ordinary character. A byte order
    mark is accepted. A row that cannot be read is counted in ``skipped`` and the next one follows. Bytes that are
    in a table, and pictures and sounds of ``datasets`` (``{"bytes": ..., "path": ...}``), stay as they are.

    Args:
        path: a file ending in .json (a list of objects, or an object that holds one such list), .jsonl, .csv, .tsv
            or .parquet; a folder that ``save_to_disk`` of ``datasets`` wrote; or ``hf://NAME[/CONFIG][@SPLIT]``.
            Rows of a dataset with several splits have a column ``split``.
        required: columns that every row must have.
        skipped: counts what cannot be read.

    Raises:
        InputError: another ending, a table without one of the required columns, or one that is damaged.
        MissingExtraError: a dataset, and the library that reads it is not installed.
    """
    if is_dataset(path):
        yield from read_dataset(path, partial(_check_columns, path, required), skipped)
        return
    path = Path(path)
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise InputError(f"{path}: not a table. {did_you_mean(path.suffix.lower(), READERS)}")
    try:
        yield from reader(path, required, skipped)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error}); check the file") from error


def _read_jsonl(path: Path, required: tuple[str, ...], skipped: Skipped) -> Iterator[tuple[str, Record]]:
    with path.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            name = f"{path.name} line {number}"
            if not line.strip():
                continue
            try:
                record = json.loads(line.decode("utf-8-sig"))
            except UnicodeDecodeError:
                skipped.add(NOT_UTF8, name)
                continue
            except (ValueError, RecursionError):
                skipped.add("not valid JSON", name)
                continue
            yield from _usable(name, record, required, skipped)


def _read_json(path: Path, required: tuple[str, ...], skipped: Skipped) -> Iterator[tuple[str, Record]]:
    for name, record in read_list(path, skipped):
        yield from _usable(name, record, required, skipped)


def _usable(
    name: str, record: object, required: tuple[str, ...], skipped: Skipped
) -> Iterable[tuple[str, Record]]:
    """Return the row of JSON, or nothing where it is no row with these columns."""
    if not isinstance(record, dict):
        skipped.add("not a JSON object", name)
    elif missing := [column for column in required if column not in record]:
        skipped.add(_no_column(missing[0], record), name)
    else:
        return ((name, record),)
    return ()


def _read_csv(path: Path, required: tuple[str, ...], skipped: Skipped) -> Iterator[tuple[str, Record]]:
    return _read_delimited(path, required, skipped, dialect={"delimiter": ",", "quoting": csv.QUOTE_MINIMAL})


def _read_tsv(path: Path, required: tuple[str, ...], skipped: Skipped) -> Iterator[tuple[str, Record]]:
    return _read_delimited(path, required, skipped, dialect={"delimiter": "\t", "quoting": csv.QUOTE_NONE})


def _read_delimited(
    path: Path, required: tuple[str, ...], skipped: Skipped, *, dialect: Mapping
) -> Iterator[tuple[str, Record]]:
    csv.field_size_limit(_LONGEST_FIELD)
    # Bytes that are not UTF-8 become lone surrogates, which no valid text holds: the row is found by them.
    with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as stream:
        reader = csv.reader(stream, **dialect)
        header = [name.strip() for name in next(reader, [])]
        _check_columns(path, required, header)
        while True:
            name = f"{path.name} line {reader.line_num + 1}"
            try:
                fields = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                skipped.add(f"not valid {path.suffix[1:].upper()} ({error})", name)
                continue
            if not fields:
                continue
            if len(fields) != len(header):
                skipped.add(f"not {len(header)} fields as in the header", name)
            elif any("\udc80" <= letter <= "\udcff" for field in fields for letter in field):
                skipped.add(NOT_UTF8, name)
            else:
                yield name, dict(zip(header, fields, strict=True))


def _read_parquet(path: Path, required: tuple[str, ...], skipped: Skipped) -> Iterator[tuple[str, Record]]:
    return read_parquet(path, partial(_check_columns, path, required), skipped)


def _check_columns(path: str | Path, required: tuple[str, ...], known: Sequence[str]) -> None:
    for column in required:
        if column not in known:
            raise InputError(f"{path}: {_no_column(column, known)}")


def _no_column(column: str, known: Mapping | Sequence[str]) -> str:
    return f"no column {column!r}. {did_you_mean(column, known)}"


READERS: Mapping[str, Callable[[Path, tuple[str, ...], Skipped], Iterator[tuple[str, Record]]]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_tsv,
    ".parquet": _read_parquet,
}
