"""Data sources: reads the rows of one source as conversations in three splits."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from bindllm.data.episodes.draw import keep_classes
from bindllm.data.episodes.layouts import read_layout
from bindllm.data.formats import read_row
from bindllm.data.formats.columns import json_list, looks_like
from bindllm.data.formats.media import FolderResolver
from bindllm.data.report import NOT_UTF8, Skipped, SourceReport
from bindllm.data.rows import Row
from bindllm.data.source_config import SPLITS, SourceConfig, Split, split_named
from bindllm.data.tables import HUB, READERS, Record, is_table, read_table
from bindllm.errors import InputError, did_you_mean, fetch_hint
from bindllm.media import SUFFIXES

TABLE_NAME = "captions"

MANY_ROWS = 10
"""Rows that may share a split through common media before a report says so."""

FEW_HELD_OUT = 3
"""Rows that a hash should hold out: of so many, hardly ever none is held out by chance."""

_Found = list[tuple[Row, Split | None]]
"""Rows, each with the split that the recipe, the row or its table gives it."""


def read_source(config: SourceConfig, number: int = 0) -> tuple[dict[str, list[Row]], SourceReport]:
    """Read a source: its rows as conversations, by split.

    In the format caption, each caption of an image is a row, and all captions of that image are its references.
    In the other formats, each record of the table is a row. With ``episodes``, each image is a row with its label;
    `bindllm.data.episodes.draw` makes episodes of them.

    Args:
        number: index of the source in the recipe, from 0; every row carries it.

    Returns:
        The rows of each split, and a report of the skipped rows.

    Raises:
        InputError: the path is missing, cannot be read, or no row of it can be used.
    """
    path = Path(config.path)
    if not config.path.startswith(HUB):
        _require_path(path)
    format = config.format if config.episodes is None else "episodes"
    report = SourceReport(config.path, modality=config.modality, format=format)
    resolve = FolderResolver.of(config)
    try:
        found = _read_rows(config, number, resolve, report)
    except InputError as error:
        # The usual mistakes: a folder of shards, or another format.
        if hint := _shards_hint(path) or _format_hint(config):
            raise InputError(f"{error}{hint}") from error
        raise
    rows = _split(found, config, resolve, report)
    if config.episodes is not None:
        rows = keep_classes(rows, config, report)
    report.count(row for part in rows.values() for row in part)
    if not any(rows.values()):
        reasons = "; ".join(report.skipped.lines()) or "it is empty"
        hint = _format_hint(config)
        raise InputError(f"data source {config.path} has no row that can be used: {reasons}{hint}")
    return rows, report


def hashed_split(key: str, held_out: float) -> Split:
    """Return the split of a key: always the same, whatever else the source holds.

    Args:
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


def _read_rows(config: SourceConfig, number: int, resolve: FolderResolver, report: SourceReport) -> _Found:
    """Read all records of a source, those of captions one by one."""
    found: _Found = []
    if config.episodes is not None and config.episodes.layout != "table":
        return list(read_layout(config, number, resolve, report.skipped))
    is_caption = config.format == "caption"
    for name, record, table_split in (_caption_records if is_caption else _records)(config, report):
        try:
            row = read_row(record, config, resolve, name=name, source=number)
        except InputError as error:
            report.skipped.add_error(error, name)
        else:
            found.append((row, config.split or row.split or table_split))
    found = _join_captions(found, resolve, report) if is_caption else found
    return found if config.episodes is None else list(_one_spelling(found, report))


def _one_spelling(found: _Found, report: SourceReport) -> Iterator[tuple[Row, Split | None]]:
    """Yield labeled images; labels that differ in upper and lower case only are one class, as they are one answer."""
    spelled: dict[str, str] = {}
    for row, split in found:
        label, *others = row.references
        first = spelled.setdefault(label.casefold(), label)
        if first != label:
            report.remarks.add("a label that an earlier row has in another case, read as that one", row.name)
        yield replace(row, references=(first, *others)), split


def _records(config: SourceConfig, report: SourceReport) -> Iterator[tuple[str, Record, Split | None]]:
    for table, split in _tables(config.path, report.skipped):
        for name, record in read_table(table, (), report.skipped):
            yield name, record, split


def _caption_records(config: SourceConfig, report: SourceReport) -> Iterator[tuple[str, Record, None]]:
    """Yield a record for each caption of a table or of a folder of images, so that a bad one costs no other."""
    table = find_table(config.path)
    column, label = config.columns.caption, config.columns.label
    # The label of an image is in a column of its own, or it is the caption.
    required = (column,) if config.episodes is None else ()
    rows = read_table(table, required, report.skipped) if table else _folder_rows(config, report)
    for name, record in rows:
        if config.episodes is not None:
            if column not in record and label not in record:
                report.skipped.add(f"no column {label!r} or {column!r}. {did_you_mean(label, record)}", name)
                continue
            name_of_class = record.get(label, record.get(column))
            # Classes may have numbers for names.
            if isinstance(name_of_class, int) and not isinstance(name_of_class, bool):
                name_of_class = str(name_of_class)
            record = {**record, column: name_of_class}
        captions = json_list(record[column], (str,))
        # An empty list becomes one missing caption, which is counted as skipped.
        for caption in (captions or [None]) if isinstance(captions, list) else [captions]:
            yield name, {**record, column: caption}, None


def _join_captions(found: _Found, resolve: FolderResolver, report: SourceReport) -> _Found:
    """Give all captions of an image in one language to each of these rows, and put the rows of an image together."""
    images: dict[tuple[str, ...], dict[str, dict[str, tuple[Row, Split | None]]]] = {}
    splits: dict[tuple[str, ...], Split | None] = {}
    for row, split in found:
        # By key, so that two spellings of a path are one image.
        key = tuple(map(resolve.key, row.media))
        if split != splits.setdefault(key, split):
            report.skipped.add(f"this {report.modality} is in another split already", row.name)
            continue
        # A name may be the same in two languages, and is asked for by two prompts.
        captions = images.setdefault(key, {}).setdefault(row.language, {})
        if captions.setdefault(row.references[0], (row, split))[0] is not row:
            report.skipped.add(f"same {report.modality} and caption as an earlier row", row.name)
    return [
        (replace(row, references=tuple(captions)), split)
        for languages in images.values()
        for captions in languages.values()
        for row, split in captions.values()
    ]


def _split(
    found: _Found, config: SourceConfig, resolve: FolderResolver, report: SourceReport
) -> dict[str, list[Row]]:
    """Choose the rows of a limit, and put rows without a split into that of their hash."""
    # Keys take a pass over all media, so they are computed only if the limit or a split depends on them.
    is_hashed = config.limit is not None or not all(split for _, split in found)
    keys = _split_keys([row for row, _ in found], config, resolve, report) if is_hashed else [""] * len(found)
    chosen: Iterable[int] = range(len(found))
    if config.limit is not None:
        # By hash: a larger limit keeps all rows of a smaller one. The chosen rows stay in the order of the file.
        order = sorted(chosen, key=lambda n: _hash_position(keys[n], "limit"))
        if config.format == "caption":
            # A limit of captions counts images, each with all its captions.
            kept = set(list(dict.fromkeys(keys[n] for n in order))[: config.limit])
            chosen = [n for n in chosen if keys[n] in kept]
        else:
            chosen = sorted(order[: config.limit])
    rows: dict[str, list[Row]] = {split: [] for split in SPLITS}
    for n in chosen:
        row, split = found[n]
        rows[split or hashed_split(keys[n], config.held_out)].append(row)
    # A run would only say at its end that nothing is measured. Rows about one image are held out together, or not.
    count = sum(found[n][1] is None for n in chosen)
    if not (rows["validation"] or rows["test"] or report.warning) and config.held_out * count >= FEW_HELD_OUT:
        report.warning = (
            f"held_out is {config.held_out:g}, and the hash holds out none of {count:,} rows, which show "
            f"{len({keys[n] for n in chosen}):,} different media or questions. Give the rows a column split, raise "
            "held_out, or set split_by: row, which allows the same media in training and in held-out rows"
        )
    return rows


def _tables(path: str, skipped: Skipped) -> list[tuple[str | Path, Split | None]]:
    """Return the tables at a path, each with the split that its file name gives, and count others next to them.

    Raises:
        InputError: a folder without a table, or with several that are not called like splits.
    """
    folder = Path(path)
    if is_table(path) or not folder.is_dir():
        return [(path, None)]
    tables = sorted(file for file in folder.iterdir() if file.suffix.lower() in READERS and file.is_file())
    # One table for each split is the layout of most sets; names such as val.jsonl count too.
    named: list[tuple[str | Path, Split | None]] = [
        (file, split) for split in SPLITS for file in tables if split_named(file.stem) == split
    ]
    if named and len({split for _, split in named}) == len(named):
        for file in (file for file in tables if split_named(file.stem) is None):
            skipped.add("a table next to those of the splits", file.name)
        return named
    if len(tables) == 1:
        return [(tables[0], None)]
    found = f"the tables {', '.join(file.name for file in tables)}" if tables else "no table"
    raise InputError(
        f"{path} holds {found} ({', '.join(READERS)}); expected one, or one for each of train, validation and test. "
        "Give the path of the one to use"
    )


def _split_keys(
    rows: Sequence[Row], config: SourceConfig, resolve: FolderResolver, report: SourceReport
) -> list[str]:
    """Return the key that decides the split of each row; rows that share media, also through others, share it.

    A row without media is decided by its questions, a labeled image of episodes by its class.
    """
    if config.episodes is not None:
        return [row.references[0] for row in rows]
    # Union-find: each key points to a smaller one of its component, the root of the component to itself.
    parents: dict[str, str] = {}

    def first(key: str) -> str:
        while (parent := parents.setdefault(key, key)) != key:
            # Path halving: each step shortens the way to the root, so later look-ups are fast.
            parents[key] = key = parents[parent]
        return key

    # How to read this: own keys of each row, joined through its media, then the root of each component.
    keys = []
    for row in rows:
        turns = [turn for turn in row.conversation.messages if turn.role != "assistant"]
        own = [resolve.key(media) for media in row.media]
        if config.split_by == "row":
            own = ["\n".join([*own, *(turn.text for turn in row.conversation.messages)])]
        own = own or ["\n".join(turn.text for turn in turns)]
        keys.append(own[0])
        for key in own[1:]:
            # The smaller key becomes the root, whatever the order of the rows.
            one, other = sorted((first(own[0]), first(key)))
            parents[other] = one
    keys = [first(key) for key in keys]
    # A key other than its root is in a component that others joined: rows over a pool of media.
    joined = {root for key in list(parents) if (root := first(key)) != key}
    key, count = Counter(keys).most_common(1)[0] if keys else ("", 0)
    if key in joined and count > max(MANY_ROWS, config.held_out * len(rows)) and config.held_out:
        report.warning = (
            f"{count:,} of {len(rows):,} rows share media, also through others, so all of them are in one split "
            f"({hashed_split(key, config.held_out)}). Give the rows a column split, or set split_by: row, which allows "
            "the same media in training and in held-out rows"
        )
    return keys


def _shards_hint(path: Path) -> str:
    """Return how to name the tar shards in a folder, if it holds any, or how to unpack one."""
    if path.name.endswith((".tar.gz", ".tgz", ".tar.zst", ".tar.bz2", ".tar.xz")):
        return " Shards are uncompressed tar files: unpack it to .tar"
    # A folder could mean other files in it as well, so shards must be named.
    if not path.is_dir() or not any(path.glob("*.tar")):
        return ""
    return f". It holds tar shards, which are streamed: give them as {path / '*.tar'}"


def _format_hint(config: SourceConfig) -> str:
    """Return how a source of captions should be named: by the table in its folder, or with another format."""
    if config.format != "caption":
        return ""
    try:
        table = find_table(config.path) or _tables(config.path, Skipped())[0][0]
        _, record = next(iter(read_table(table, (), Skipped())), ("", {}))
    except InputError:
        return ""
    # One row is enough for a hint.
    found = looks_like(record)
    if found not in (None, "caption"):
        return f". Its first row looks like {found}; set format: {found}"
    # Such as metadata.jsonl of Hugging Face's folders of images.
    return (
        f". It holds the table {Path(table).name}; give its path to use it"
        if Path(table) != Path(config.path) and Path(table).stem != TABLE_NAME
        else ""
    )


def find_table(path: str | Path) -> str | Path | None:
    """Return the table at a path: the file itself, or ``captions.*`` in a folder; None if the folder has none.

    Raises:
        InputError: a folder has several.
    """
    if is_table(path) or not Path(path).is_dir():
        return path
    tables = [file for suffix in READERS if (file := Path(path, f"{TABLE_NAME}{suffix}")).is_file()]
    if len(tables) > 1:
        raise InputError(
            f"{path} holds {' and '.join(table.name for table in tables)}; give the path of the one to use"
        )
    return tables[0] if tables else None


def _require_path(path: Path) -> None:
    if not path.exists():
        where = "" if path.is_absolute() else f" in {Path.cwd()}, the working directory"
        raise InputError(f"data source {path} does not exist{where}.{fetch_hint(path)}")


def require_table(path: Path) -> Path:
    """Return the table at a path.

    Raises:
        InputError: the path does not exist, or a folder has no table, or several.
    """
    _require_path(path)
    table = find_table(path)
    if table is None:
        raise InputError(
            f"{path} holds no table {TABLE_NAME}.* ({', '.join(READERS)}); give the path of the table to use"
        )
    return Path(table)


def _folder_rows(config: SourceConfig, report: SourceReport) -> Iterator[tuple[str, Record]]:
    """Yield a record for each image of a folder, at any depth, with the lines of its text file as captions.

    For other modalities, every file with such a text file counts. Images without any text file may be in a folder for
    each class.
    """
    folder, modality = Path(config.path), config.modality
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
    column = modality if config.columns.image == "image" else config.columns.image
    if modality == "image" and not any(file.with_suffix(".txt").exists() for file in files):
        for key, name, split in _class_files([file.relative_to(folder) for file in files], report):
            own = {config.columns.split: split} if split and config.columns.split else {}
            yield key, {column: key, config.columns.caption: name, **own}
        return
    for file in files:
        key, text_file = file.relative_to(folder).as_posix(), file.with_suffix(".txt")
        # A pipe would block, and a device never end.
        if not text_file.is_file():
            report.skipped.add("no text file of the same name", key)
            continue
        try:
            text = text_file.read_text(encoding="utf-8-sig")
        except OSError as error:
            report.skipped.add(f"the text file cannot be read ({error.strerror})", key)
        except UnicodeDecodeError:
            report.skipped.add(NOT_UTF8, text_file.name)
        else:
            lines = [line for line in text.splitlines() if line.strip()]
            # An empty file is one empty caption, which is counted as skipped.
            yield key, {column: key, config.columns.caption: lines or [text]}
    # Such as those next to HEIC files, which are not images here.
    described = {file.with_suffix(".txt") for file in files}
    for text_file in sorted(folder.rglob("*.txt")):
        if modality == "image" and text_file not in described:
            report.skipped.add("a text file without an image of the same name", text_file.name)


def _class_files(files: Sequence[Path], report: SourceReport) -> Iterator[tuple[str, str, str | None]]:
    """Yield each image below the folder of a class: its path, the name of the class, and its split, if folders name it.

    The folders are those of the classes, or train, validation and test with these folders inside.
    """
    tops = {file.parts[0] for file in files if len(file.parts) > 1}
    depth = int(bool(tops) and all(map(split_named, tops)))
    for file in files:
        if len(file.parts) < depth + 2:
            report.skipped.add(
                "no text file of the same name, and not in the folder of a class", file.as_posix()
            )
            continue
        name = " ".join(file.parts[depth].replace("_", " ").split())
        yield file.as_posix(), name, file.parts[0] if depth else None


def _is_media_file(file: Path, modality: str) -> bool:
    """Images are recognized by their ending; other modalities have any ending, so they need a text file."""
    if modality == "image":
        return file.suffix.lower() in SUFFIXES["image"]
    return file.suffix.lower() != ".txt" and file.with_suffix(".txt").is_file()
