"""Caption tables of the fetched pictures: one row a picture, each with its fixed split."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

SPLITS = (("train", 0.84), ("validation", 0.92), ("test", 1.0))
"""Name and upper edge of each split on a line from 0 to 1: 84, 8 and 8 of a hundred pictures."""


def split_of(content: bytes) -> str:
    """Return the split of a picture, by the hash of what it shows: the same on every machine, for ever.

    Example:
        >>> split_of(b"a picture") == split_of(b"a picture")
        True
    """
    place = place_of(content)
    return next(name for name, edge in SPLITS if place < edge)


def place_of(content: bytes) -> float:
    """Return the place of a content on a line from 0 to 1, by its hash.

    Example:
        >>> round(place_of(b"a picture"), 3)
        0.573
    """
    return int.from_bytes(hashlib.sha256(content).digest()[:8]) / 2**64


def write_table(path: Path, rows: Iterable[dict[str, Any]]) -> dict[str, int]:
    """Write rows as JSON lines.

    Args:
        path: the file.
        rows: each with ``image``, ``caption`` (a list, written as a string where it has one member), ``split``
            and whatever else is known about the picture.

    Returns:
        How many rows each split has.
    """
    counts = {name: 0 for name, _ in SPLITS}
    with path.open("w", encoding="utf-8") as file:
        for row in rows:
            counts[row["split"]] += 1
            caption = row["caption"][0] if len(row["caption"]) == 1 else row["caption"]
            file.write(json.dumps({**row, "caption": caption}, ensure_ascii=False) + "\n")
    return counts
