"""Reading tables row by row: JSON Lines, CSV, TSV and Parquet, each row with a name for messages."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from bindllm.data.report import Skipped
from bindllm.errors import InputError, known_names

Record = dict[str, object]

NOT_UTF8 = "not UTF-8 text"


def read_table(path: Path, required: tuple[str, ...], skipped: Skipped) -> Iterator[tuple[str, Record]]:
    """Yield the rows of a table, each with its name.

    CSV follows RFC 4180 with a header line; in TSV a quotation mark is an ordinary character. A byte order
    mark is accepted. A row that cannot be read is counted in ``skipped`` and the next one follows.

    Args:
        path: a file ending in .jsonl, .csv, .tsv or .parquet.
        required: columns that every row must have.
        skipped: counts what cannot be read.

    Raises:
        InputError: another ending, a table without one of the required columns, or one that is damaged.
    """
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise InputError(f"{path}: not a table. {known_names(path.suffix.lower(), READERS)}")
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
            if not isinstance(record, dict):
                skipped.add("not a JSON object", name)
            elif missing := [column for column in required if column not in record]:
                skipped.add(_no_column(missing[0], record), name)
            else:
                yield name, record


def _read_csv(path: Path, required: tuple[str, ...], skipped: Skipped) -> Iterator[tuple[str, Record]]:
    return _read_delimited(path, required, skipped, dialect={"delimiter": ",", "quoting": csv.QUOTE_MINIMAL})


def _read_tsv(path: Path, required: tuple[str, ...], skipped: Skipped) -> Iterator[tuple[str, Record]]:
    return _read_delimited(path, required, skipped, dialect={"delimiter": "\t", "quoting": csv.QUOTE_NONE})


def _read_delimited(
    path: Path, required: tuple[str, ...], skipped: Skipped, *, dialect: Mapping
) -> Iterator[tuple[str, Record]]:
    # Bytes that are not UTF-8 become lone surrogates, which no valid text holds: the row is found by them.
    with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as stream:
        reader = csv.reader(stream, **dialect)
        header = [name.strip() for name in next(reader, [])]
        for column in required:
            if column not in header:
                raise InputError(f"{path}: {_no_column(column, header)}")
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
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            for column in required:
                if column not in file.schema_arrow.names:
                    raise InputError(f"{path}: {_no_column(column, file.schema_arrow.names)}")
            number = 0
            for batch in file.iter_batches():
                for row in range(batch.num_rows):
                    number += 1
                    name = f"{path.name} row {number}"
                    try:
                        yield name, batch.slice(row, 1).to_pylist()[0]
                    except UnicodeDecodeError:
                        skipped.add(NOT_UTF8, name)
    except pa.ArrowException as error:
        raise InputError(f"{path}: not a Parquet file that can be read ({error})") from error


def _no_column(column: str, known: Mapping | list[str]) -> str:
    return f"no column {column!r}. {known_names(column, known)}"


READERS: Mapping[str, Callable[[Path, tuple[str, ...], Skipped], Iterator[tuple[str, Record]]]] = {
    ".jsonl": _read_jsonl,
    ".csv": _read_csv,
    ".tsv": _read_tsv,
    ".parquet": _read_parquet,
}
