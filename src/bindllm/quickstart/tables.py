"""Tables of the fetched data sets, and the fixed split of each image."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

SPLITS = (("train", 0.84), ("validation", 0.92), ("test", 1.0))
"""Name and upper edge of each split on a line from 0 to 1: 84, 8 and 8 % of the images."""


def split_of(content: bytes) -> str:
    """Return the split of an image by the hash of its content: the same on every machine, forever.

    Examples:
        >>> split_of(b"an image") == split_of(b"an image")
        True
    """
    # A hash instead of a random number: adding or removing an image moves no other image to another split.
    position = position_of(content)
    return next(name for name, edge in SPLITS if position < edge)


def position_of(content: bytes) -> float:
    """Return the position of a content on a line from 0 to 1, by its hash.

    Examples:
        >>> round(position_of(b"a picture"), 3)
        0.573
    """
    # 8 bytes are more than the 53 bits of a float.
    return int.from_bytes(hashlib.sha256(content).digest()[:8]) / 2**64


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write rows as JSON lines."""
    # Not escaped, so that names in other scripts stay readable.
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def write_captions(path: Path, rows: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """Write a caption table, and return the number of rows of each split.

    Args:
        rows: rows with ``image``, ``caption`` (a list, written as a string if it has one member), ``split`` and
            further columns.
    """
    captions = (row["caption"][0] if len(row["caption"]) == 1 else row["caption"] for row in rows)
    write_rows(path, ({**row, "caption": caption} for row, caption in zip(rows, captions, strict=True)))
    return {name: sum(row["split"] == name for row in rows) for name, _ in SPLITS}
