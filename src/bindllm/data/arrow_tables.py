"""Reading Parquet files and Hugging Face ``datasets``: both are Arrow tables, a few rows at a time in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bindllm.data.report import NOT_UTF8, Skipped
from bindllm.data.source_config import split_named
from bindllm.errors import InputError, MissingExtraError

if TYPE_CHECKING:
    import pyarrow as pa

Record = dict[str, object]
CheckColumns = Callable[[Sequence[str]], None]

HUB = "hf://"
ROWS_AT_ONCE = 64
"""Rows in memory: few, since each may hold a picture."""

_DATASET_FILES = ("dataset_dict.json", "state.json")


def is_dataset(path: str | Path) -> bool:
    """Tell whether this is a folder that ``save_to_disk`` of ``datasets`` wrote, or names a dataset of the hub."""
    return str(path).startswith(HUB) or any(Path(path, name).is_file() for name in _DATASET_FILES)


def read_parquet(path: Path, check: CheckColumns, skipped: Skipped) -> Iterator[tuple[str, Record]]:
    """Yield the rows of a Parquet file, each with its name; at most one row group is in memory.

    Args:
        path: the file.
        check: is given the names of the columns before the first row.
        skipped: counts rows that are not UTF-8.

    Raises:
        InputError: the file is damaged.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        # Mapped, since a row group is otherwise copied before it is decoded.
        with pq.ParquetFile(path, memory_map=True) as file:
            check(file.schema_arrow.names)
            yield from _rows(file.iter_batches(ROWS_AT_ONCE), path.name, skipped)
    except pa.ArrowException as error:
        raise InputError(f"{path}: not a Parquet file that can be read ({error})") from error


def read_dataset(path: str | Path, check: CheckColumns, skipped: Skipped) -> Iterator[tuple[str, Record]]:
    """Yield the rows of a dataset of the library ``datasets``, each with its name.

    Nothing is decoded: pictures and sounds stay ``{"bytes": ..., "path": ...}``. Classes become their names. Rows
    of a dataset with several splits have a column ``split``, unless they have one of their own; where all rows
    are for training, or one split was chosen, the path says nothing about them.

    Args:
        path: a folder that ``save_to_disk`` wrote; or ``hf://NAME``, ``hf://NAME/CONFIG`` or either with
            ``@SPLIT``, where NAME is ``organisation/dataset`` on the hub or a folder.
        check: is given the names of the columns before the first row of each split.
        skipped: counts rows that are not UTF-8.

    Raises:
        MissingExtraError: the library is not installed.
        InputError: no such dataset, a damaged one, or a split whose name says nothing to us.
    """
    name = str(path).removeprefix(HUB) if str(path).startswith(HUB) else Path(path).name
    for split, dataset in _open(path).items():
        check(dataset.column_names + ["split"] * bool(split))
        classes = {
            column: feature.names
            for column, feature in dataset.features.items()
            if type(feature).__name__ == "ClassLabel"
        }
        batches = dataset.with_format("arrow").iter(ROWS_AT_ONCE)
        rows = _rows(batches, f"{name} {split}".rstrip(), skipped)
        for row, record in rows:
            for column, names in classes.items():
                number = record[column]
                record[column] = names[number] if number is not None and number >= 0 else None
            yield row, {"split": split, **record} if split else record


def _open(path: str | Path) -> Mapping[str, Any]:
    """Open a dataset without reading it: its parts by split, or the one part under no name."""
    try:
        import datasets
    except ImportError as error:
        raise MissingExtraError("datasets", extra="datasets", purpose=f"read {path}") from error
    named = parse_hub(str(path)) if str(path).startswith(HUB) else None
    try:
        if named is None:
            opened = datasets.load_from_disk(str(path))
        else:
            name, config, split = named
            opened = datasets.load_dataset(name, config, split=split)
    # Whatever a stranger's files or the network make the library raise means that there is no such dataset.
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

    Raises:
        InputError: another form.

    Example:
        >>> parse_hub("hf://HuggingFaceM4/the_cauldron/ai2d@train")
        ('HuggingFaceM4/the_cauldron', 'ai2d', 'train')
    """
    name, _, split = path.removeprefix(HUB).partition("@")
    if name and Path(name).is_dir():
        return name, None, split or None
    parts = name.split("/")
    if not all(parts) or len(parts) > 3:
        raise InputError(
            f"{path}: expected hf://ORGANISATION/DATASET, with /CONFIG, @SPLIT or both where you want one of several"
        )
    return "/".join(parts[:2]), parts[2] if len(parts) > 2 else None, split or None


def _rows(
    batches: Iterable[pa.RecordBatch | pa.Table], name: str, skipped: Skipped
) -> Iterator[tuple[str, Record]]:
    """Yield the rows of batches as Python objects; where one is not UTF-8, its neighbours are kept."""
    number = 0
    for batch in batches:
        try:
            records = batch.to_pylist()
        except UnicodeDecodeError:
            records = [_one(batch, row) for row in range(batch.num_rows)]
        for record in records:
            number += 1
            if record is None:
                skipped.add(NOT_UTF8, f"{name} row {number}")
            else:
                yield f"{name} row {number}", record


def _one(batch: pa.RecordBatch | pa.Table, row: int) -> Record | None:
    try:
        return batch.slice(row, 1).to_pylist()[0]
    except UnicodeDecodeError:
        return None
