"""Names of classes: how a data set's own tables spell them, and tables that a user brings."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path

from bindllm.errors import InputError, did_you_mean
from bindllm.evaluation.layouts.files import read_json, read_lines

_WNID = re.compile(r"n\d{8}")


def spell(name: str) -> str:
    """Return a class name in words.

    Example:
        >>> spell("night_stand")
        'night stand'
    """
    return " ".join(name.replace("_", " ").split())


def read_classes(path: Path) -> dict[str, tuple[str, ...]]:
    """Return the names of each class, by its key (a WordNet id, the name of a folder, ...), in the order of the file.

    - ``.json``: ``{"key": "name"}``, or a list of names that mean the same: their prompts are averaged. Keras'
      ``imagenet_class_index.json`` (``{"0": ["n01440764", "tench"]}``) is known too.
    - ``.tsv``: key, tab, name; further names behind further tabs.
    - ``.txt``: as ``LOC_synset_mapping.txt`` of ImageNet: key, space, names with commas between them, of which the
      first one counts.

    Raises:
        InputError: another ending, a table that cannot be read, a class without a name, or one named twice; names file
            and line.
    """
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise InputError(f"{path}: not a table of class names. {did_you_mean(path.suffix.lower(), READERS)}")
    classes: dict[str, tuple[str, ...]] = {}
    for row, key, names in reader(path):
        if not key or not names or not all(names):
            raise InputError(f"{row}: expected the key of a class and at least one name")
        if key in classes:
            raise InputError(f"{row}: the class {key!r} stands twice in this table")
        classes[key] = tuple(names)
    if not classes:
        raise InputError(f"{path}: no class in it")
    return classes


def number_of(key: str, numbers: Mapping[str, int], *, row: str, table: Path | str) -> int:
    """Return the number of a class.

    Raises:
        InputError: the table does not have it; names the row that does.
    """
    if key not in numbers:
        closest = (
            did_you_mean(key, numbers).partition(" Known:")[0]
            if len(numbers) > 50
            else did_you_mean(key, numbers)
        )
        raise InputError(f"{row}: the class {key!r} is not in {table}. {closest}".rstrip())
    return numbers[key]


def _read_json(path: Path) -> list[tuple[str, str, list[str]]]:
    content = read_json(path)
    if not isinstance(content, dict):
        raise InputError(f"{path}: expected an object of class names, not {type(content).__name__}")
    rows = []
    for key, names in content.items():
        names = [names] if isinstance(names, str) else names
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise InputError(f"{path}: the class {key!r} must have a name or a list of names, not {names!r}")
        if key.isdecimal() and len(names) == 2 and _WNID.fullmatch(names[0]):
            key, names = names[0], [spell(names[1])]
        rows.append((f"{path}, class {key!r}", key, [name.strip() for name in names]))
    return rows


def _read_tsv(path: Path) -> list[tuple[str, str, list[str]]]:
    rows = [(row, [cell.strip() for cell in line.split("\t")]) for row, line in read_lines(path)]
    return [(row, cells[0], cells[1:]) for row, cells in rows]


def _read_txt(path: Path) -> list[tuple[str, str, list[str]]]:
    rows = [(row, *line.strip().partition(" ")) for row, line in read_lines(path)]
    return [(row, key, [names.split(",")[0].strip()]) for row, key, _, names in rows]


READERS: Mapping[str, Callable[[Path], list[tuple[str, str, list[str]]]]] = {
    ".json": _read_json,
    ".tsv": _read_tsv,
    ".txt": _read_txt,
}
