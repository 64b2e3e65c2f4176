"""Reads tables row by row, each row with a name: JSON, JSON Lines, CSV, TSV, Parquet and Hugging Face ``datasets``.

A few rows are in memory at a time, however large the file is.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from bindllm.data.report import NOT_UTF8, Skipped
from bindllm.data.source_config import split_named
from bindllm.errors import InputError, did_you_mean, needs_extra

if TYPE_CHECKING:
    import pyarrow as pa

Record = dict[str, object]

HUB = "hf://"
ROWS_AT_ONCE = 64
"""Rows of an Arrow table in memory: few, since each may hold an image."""

_MAX_FIELD = 1 << 26
"""Characters of a CSV field: room for an image as a ``data:`` URI, and a limit for a quotation that never ends."""
# Files that mark a folder of ``save_to_disk``.
_DATASET_FILES = ("dataset_dict.json", "state.json")
# Classes of `datasets` for the feature of a list.
_LISTS = ("List", "LargeList", "Sequence")
_CHUNK = 1 << 20
_SPACE = re.compile(r"[ \t\n\r]*")
# Bytes that are not UTF-8 are read as lone surrogates in this range, which no valid text holds.
_NOT_UTF8 = re.compile("[\udc80-\udcff]")
# A value cut by the end of the buffer fails at most this many characters before that end (an escape, a literal).
_NEAR_END = 16


def is_table(path: str | Path) -> bool:
    """Tell whether `read_table` reads this: a file by its ending, or a dataset."""
    return Path(path).suffix.lower() in READERS or is_dataset(path)


def read_table(path: str | Path, required: tuple[str, ...], skipped: Skipped) -> Iterator[tuple[str, Record]]:
    """Yield the rows of a table, each with its name; a few of them are in memory at a time.

    CSV follows RFC 4180 with a header line; in TSV a quotation mark is an ordinary character. A byte order mark is
    accepted. A row that cannot be read is counted in ``skipped``, and reading continues with the next one. Bytes in a
    table, and images and audio of ``datasets`` (``{"bytes": ..., "path": ...}``), stay as they are.

    Args:
        path: a file ending in .json (a list of objects, or an object that holds one such list), .jsonl, .csv, .tsv
            or .parquet; a folder that ``save_to_disk`` of ``datasets`` wrote; or ``hf://NAME[/CONFIG][@SPLIT]``.
            Rows of a dataset with several splits have a column ``split``.

    Raises:
        InputError: another ending, a table without one of the required columns, or a damaged file.
        MissingExtraError: a dataset, and the library that reads it is not installed.
    """
    if is_dataset(path):
        yield from _read_dataset(path, required, skipped)
        return
    path = Path(path)
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise InputError(f"{path}: not a table. {did_you_mean(path.suffix.lower(), READERS)}")
    # A pipe or a device may block, or never end.
    if path.exists() and not path.is_file():
        raise InputError(f"{path}: not a regular file")
    try:
        yield from reader(path, required, skipped)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error}); check the file") from error


def read_json_lines(path: Path, required: tuple[str, ...], skipped: Skipped) -> Iterator[tuple[str, Record]]:
    """Yield the rows of a file with one JSON object per line, whatever its ending; see `read_table`."""
    with path.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            name = f"{path.name} line {number}"
            if not line.strip():
                continue
            try:
                # Only the first line can start with a byte order mark; elsewhere utf-8-sig is plain UTF-8.
                record = json.loads(line.decode("utf-8-sig"))
            except UnicodeDecodeError:
                skipped.add(NOT_UTF8, name)
                continue
            except (ValueError, RecursionError):
                skipped.add("not valid JSON", name)
                continue
            yield from _usable(name, record, required, skipped)


def _read_json(path: Path, required: tuple[str, ...], skipped: Skipped) -> Iterator[tuple[str, Record]]:
    """Yield the rows of a list, or of an object such as ``{"info": {...}, "annotations": [...]}``.

    Raises:
        InputError: damaged JSON, JSON Lines, an object without a list of objects, or one with several.
    """
    # A byte that is not UTF-8 costs its row, not the file.
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as stream:
        text = _JsonText(path, stream)
        start = text.peek()
        if start not in ("[", "{"):
            raise InputError(f"{path}: neither a JSON list of rows nor an object that holds one")
        items = _items(text, skipped) if start == "[" else _list_of_object(text, skipped)
        for name, record in items:
            yield from _usable(name, record, required, skipped)
        text.end()


def _usable(
    name: str, record: object, required: tuple[str, ...], skipped: Skipped
) -> Iterable[tuple[str, Record]]:
    """Return the row of a JSON value, or nothing if it is not a row with these columns."""
    if not isinstance(record, dict):
        skipped.add("not a JSON object", name)
    elif missing := [column for column in required if column not in record]:
        skipped.add(_no_column(missing[0], record), name)
    else:
        return ((name, record),)
    return ()


def _items(text: _JsonText, skipped: Skipped) -> Iterator[tuple[str, object]]:
    text.take("[")
    number = 0
    while text.peek() != "]":
        if number:
            text.take(",")
        number += 1
        row = f"{text.path.name} row {number}"
        item, is_utf8 = text.value(row)
        if is_utf8:
            yield row, item
        else:
            skipped.add(NOT_UTF8, row)
    text.take("]")


def _list_of_object(text: _JsonText, skipped: Skipped) -> Iterator[tuple[str, object]]:
    """Yield the items of the one list of objects among the values of an object."""
    text.take("{")
    lists, is_first = [], True
    while text.peek() != "}":
        if not is_first:
            text.take(",")
        is_first = False
        if text.peek() != '"':
            raise InputError(
                f"{text.path}: not valid JSON ({text.peek()!r} instead of a key in quotation marks)"
            )
        key, _ = text.value("a key")
        text.take(":")
        if text.peek() != "[":
            text.value(f"the value of {key!r}")
            continue
        # A list of other things, such as the names of the classes, does not hold rows.
        holds_rows = False
        for number, (row, item) in enumerate(_items(text, skipped)):
            holds_rows = holds_rows or (number == 0 and isinstance(item, dict))
            # A second list of rows is only counted: it is an error at the end.
            if holds_rows and not lists:
                yield row, item
        lists += [str(key)] * holds_rows
    text.take("}")
    text.end()
    if len(lists) != 1:
        found = f"the lists {', '.join(lists)}" if lists else "no list of objects"
        raise InputError(
            f"{text.path}: the object holds {found}; expected one list of rows. Write the rows as a list of their own"
        )


class _JsonText:
    """The characters of a JSON file from a position on; as many as needed are in memory."""

    def __init__(self, path: Path, stream: TextIO) -> None:
        self.path = path
        self._stream, self._buffer, self._position = stream, "", 0
        self._decoder = json.JSONDecoder()

    def peek(self) -> str:
        """Skip white space; return the next character, or an empty text at the end."""
        while True:
            self._position = _SPACE.match(self._buffer, self._position).end()
            if self._position < len(self._buffer):
                return self._buffer[self._position]
            if not self._read_more(_CHUNK):
                return ""

    def take(self, wanted: str) -> None:
        """Skip one character, which must be the next."""
        found = self.peek()
        if found != wanted:
            problem = f"{found!r} instead of {wanted!r}" if found else f"the file ends before {wanted!r}"
            raise InputError(f"{self.path}: not valid JSON ({problem})")
        self._position += 1

    def end(self) -> None:
        """Make sure that nothing follows."""
        if self.peek():
            raise InputError(
                f"{self.path}: more than one JSON value; if each line is a row, call the file .jsonl"
            )

    def value(self, name: str) -> tuple[object, bool]:
        """Return the next value, and whether all of it is UTF-8."""
        self.peek()
        size = _CHUNK
        while True:
            try:
                found, end = self._decoder.raw_decode(self._buffer, self._position)
            except json.JSONDecodeError as error:
                # A string that the end of the buffer cuts is reported at its start.
                near_end = error.pos + _NEAR_END >= len(self._buffer) or "Unterminated" in error.msg
                if not (near_end and self._read_more(size)):
                    problem = "the file ends in the middle of it" if near_end else error.msg
                    raise InputError(f"{self.path}: {name} is not valid JSON ({problem})") from error
            except (ValueError, RecursionError) as error:
                raise InputError(f"{self.path}: {name} is not valid JSON ({error})") from error
            else:
                # A number may continue after the end of the buffer.
                if end < len(self._buffer) or not self._read_more(size):
                    is_utf8 = not _NOT_UTF8.search(self._buffer, self._position, end)
                    self._position = end
                    return found, is_utf8
            # Doubled, so that decoding a large value again and again takes linear time in all.
            size *= 2

    def _read_more(self, size: int) -> bool:
        read = self._stream.read(size)
        # Only the unread part is kept.
        self._buffer = self._buffer[self._position :] + read
        self._position = 0
        return bool(read)


def read_delimited(
    path: Path, required: tuple[str, ...], skipped: Skipped, *, has_quotes: bool | None = None
) -> Iterator[tuple[str, Record]]:
    """Yield the rows of CSV or TSV, see `read_table`.

    With ``has_quotes`` a field may be in quotation marks; by default in CSV only.
    """
    is_csv = path.suffix.lower() == ".csv"
    # Strict, since the text of a faulty quotation is a guess.
    dialect = (
        {"quoting": csv.QUOTE_MINIMAL, "strict": True}
        if (is_csv if has_quotes is None else has_quotes)
        else {"quoting": csv.QUOTE_NONE}
    )
    # The default is too small for an image; csv has one limit for the whole process.
    csv.field_size_limit(_MAX_FIELD)
    with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as stream:
        reader = csv.reader(stream, delimiter="," if is_csv else "\t", **dialect)
        try:
            header = [name.strip() for name in next(reader, [])]
        except csv.Error as error:
            raise InputError(
                f"{path}: its header is not valid {path.suffix[1:].upper()} ({error})"
            ) from error
        if any(map(_NOT_UTF8.search, header)):
            raise InputError(f"{path}: {NOT_UTF8}; save it as UTF-8")
        _check_columns(path, required, header)
        # Not a for loop, which an error would end.
        while True:
            # The line on which the row starts: a quoted field may span several.
            name = f"{path.name} line {reader.line_num + 1}"
            try:
                fields = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                # A quotation that is never closed takes all lines up to the end of the file.
                skipped.add(f"not valid {path.suffix[1:].upper()} ({error})", f"{name} to {reader.line_num}")
                continue
            # A blank line.
            if not fields:
                continue
            if len(fields) != len(header):
                skipped.add(f"not {len(header)} fields as in the header", name)
            elif any(map(_NOT_UTF8.search, fields)):
                skipped.add(NOT_UTF8, name)
            else:
                yield name, dict(zip(header, fields, strict=True))


def _read_parquet(path: Path, required: tuple[str, ...], skipped: Skipped) -> Iterator[tuple[str, Record]]:
    """Yield the rows of a Parquet file; at most one row group is in memory."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        # Memory-mapped, since a row group is otherwise copied before it is decoded.
        with pq.ParquetFile(path, memory_map=True) as file:
            _check_columns(path, required, file.schema_arrow.names)
            yield from _arrow_rows(file.iter_batches(ROWS_AT_ONCE), path.name, skipped)
    except pa.ArrowException as error:
        raise InputError(f"{path}: not a Parquet file that can be read ({error})") from error


READERS: Mapping[str, Callable[[Path, tuple[str, ...], Skipped], Iterator[tuple[str, Record]]]] = {
    ".jsonl": read_json_lines,
    ".json": _read_json,
    ".csv": read_delimited,
    ".tsv": read_delimited,
    ".parquet": _read_parquet,
}


def is_dataset(path: str | Path) -> bool:
    """Tell whether this is a folder that ``save_to_disk`` of ``datasets`` wrote, or names a dataset of the hub."""
    return str(path).startswith(HUB) or any(Path(path, name).is_file() for name in _DATASET_FILES)


def _read_dataset(
    path: str | Path, required: tuple[str, ...], skipped: Skipped
) -> Iterator[tuple[str, Record]]:
    """Yield the rows of a dataset of the library ``datasets``, each with its name.

    Nothing is decoded: images and audio stay ``{"bytes": ..., "path": ...}``. Classes become their names. Rows of a
    dataset with several splits have a column ``split``, unless they have one of their own. If all rows are for
    training, or one split was chosen, the column is not added.
    """
    name = str(path).removeprefix(HUB) if str(path).startswith(HUB) else Path(path).name
    for split, dataset in _open_dataset(path).items():
        _check_columns(path, required, dataset.column_names + ["split"] * bool(split))
        # Classes are stored as numbers, and the model needs their names. A list has the feature of its items.
        features = {
            column: each.feature if type(each).__name__ in _LISTS else each
            for column, each in dataset.features.items()
        }
        classes = {
            column: feature.names
            for column, feature in features.items()
            if type(feature).__name__ == "ClassLabel"
        }
        batches = dataset.with_format("arrow").iter(ROWS_AT_ONCE)
        for row, record in _arrow_rows(batches, f"{name} {split}".rstrip(), skipped):
            for column, names in classes.items():
                record[column] = _named_classes(record[column], names)
            yield row, {"split": split, **record} if split else record


def _named_classes(value: int | list[int] | None, names: Sequence[str]) -> object:
    if isinstance(value, list):
        return [_named_classes(one, names) for one in value]
    # -1 marks a missing label.
    return names[value] if value is not None and value >= 0 else None


def _open_dataset(path: str | Path) -> Mapping[str, Any]:
    """Open a dataset without reading it: its parts by split, or the only part with an empty name."""
    with needs_extra("datasets", extra="datasets", purpose=f"read {path}"):
        import datasets
    named = parse_hub(str(path)) if str(path).startswith(HUB) else None
    try:
        if named is None:
            opened = datasets.load_from_disk(str(path))
        else:
            name, config, split = named
            opened = datasets.load_dataset(name, config, split=split)
    # Untrusted files and the network make the library raise anything; each error means that it cannot be opened.
    except Exception as error:
        raise InputError(
            f"{path} cannot be opened by the library datasets ({type(error).__name__}: {error})"
        ) from error
    return {"": opened} if isinstance(opened, datasets.Dataset) else _named_splits(path, opened)


def _named_splits(path: str | Path, parts: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the parts of a dataset by our names of their splits."""
    named = {split_named(split) or split: part for split, part in parts.items()}
    if list(named) == ["train"]:
        return {"": named["train"]}
    unknown = [split for split in named if split not in ("train", "validation", "test")]
    if unknown:
        one = f"{path}@{unknown[0]}" if str(path).startswith(HUB) else Path(path, unknown[0])
        raise InputError(
            f"{path} has the splits {', '.join(parts)}, and {unknown[0]!r} is none of train, validation, test. Make "
            f"each split that you want a source of its own, such as {{path: {one}, split: train}}"
        )
    return named


def parse_hub(path: str) -> tuple[str, str | None, str | None]:
    """Return name, configuration and split of ``hf://NAME[/CONFIG][@SPLIT]``.

    NAME is ``organization/dataset`` on the hub or a folder.

    Raises:
        InputError: another form.

    Examples:
        >>> parse_hub("hf://HuggingFaceM4/the_cauldron/ai2d@train")
        ('HuggingFaceM4/the_cauldron', 'ai2d', 'train')
    """
    name, _, split = path.removeprefix(HUB).partition("@")
    if name and Path(name).is_dir():
        return name, None, split or None
    parts = name.split("/")
    if not all(parts) or len(parts) > 3:
        raise InputError(
            f"{path}: expected hf://ORGANIZATION/DATASET, with /CONFIG, @SPLIT or both to choose one of several"
        )
    return "/".join(parts[:2]), parts[2] if len(parts) > 2 else None, split or None


def _arrow_rows(
    batches: Iterable[pa.RecordBatch | pa.Table], name: str, skipped: Skipped
) -> Iterator[tuple[str, Record]]:
    """Yield the rows of batches as Python objects; one that is not UTF-8 is counted, and its neighbors are kept."""
    number = 0
    for batch in batches:
        try:
            records = batch.to_pylist()
        except UnicodeDecodeError:
            # Row by row only if the batch fails, so that one bad row costs no others.
            records = [_arrow_row(batch, row) for row in range(batch.num_rows)]
        for record in records:
            number += 1
            if record is None:
                skipped.add(NOT_UTF8, f"{name} row {number}")
            else:
                yield f"{name} row {number}", record


def _arrow_row(batch: pa.RecordBatch | pa.Table, row: int) -> Record | None:
    try:
        return batch.slice(row, 1).to_pylist()[0]
    except UnicodeDecodeError:
        return None


def _check_columns(path: str | Path, required: tuple[str, ...], known: Sequence[str]) -> None:
    for column in required:
        if column not in known:
            raise InputError(f"{path}: {_no_column(column, known)}")
    # Of two columns of one name, a record would keep only the last. Empty names are those of spare separators.
    if twice := [name for name in known if name and known.count(name) > 1]:
        raise InputError(f"{path}: several columns are called {twice[0]!r}; rename all but one")


def _no_column(column: str, known: Mapping | Sequence[str]) -> str:
    return f"no column {column!r}. {did_you_mean(column, known)}"
