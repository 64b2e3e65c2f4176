"""Labeled images for link-context learning: several views of each drawing of OpenMoji, in the split of the drawing.

The views of a drawing differ in size, turn, place and background, so that shots and query of an episode never share
their pixels. A view is a function of the name of its drawing and its number.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

from PIL import Image

from bindllm.quickstart import openmoji
from bindllm.quickstart.drawings import Sprite, make_sprite
from bindllm.quickstart.scenes import BACKGROUNDS, SHADE, SIDE, between
from bindllm.quickstart.tables import write_rows

PACKAGES = openmoji.PACKAGES

VIEWS: Mapping[str, int] = {"train": 9, "validation": 9, "test": 17}
"""Views of a drawing of each split: eight shots in training and sixteen in the test, and the query."""

LENGTHS = (80, 150)
"""Smallest and largest longer side of a drawing, in pixels, before it is turned."""

TURN = 30
"""Largest turn to either side, in degrees."""

_EDGE = 2

_README = """# Views of OpenMoji drawings, for learning new names from a few images

All emojis designed by OpenMoji - the open-source emoji and icon project. License: CC BY-SA 4.0 (see LICENSE). The
drawings were scaled, turned and put on a colored background by `bindllm fetch links`; the images have the same license.

`labels.jsonl` has one row for each of {count:,} images of 224 x 224 pixels: `image`; `label`, the name of the drawing;
`split`, that of the drawing in `openmoji`. No drawing is in two splits.

| split | drawings | views of each |
|---|---|---|
{table}
"""


def build(
    wheels: Sequence[Path], folder: Path, *, views: Mapping[str, int] = VIEWS, threads: int | None = None
) -> dict[str, Any]:
    """Write the images and the table of their labels; a `bindllm.quickstart.Builder`.

    Raises:
        MissingExtraError: resvg_py is not installed.
    """
    content = openmoji.read_wheels(wheels)
    # Without flags: some differ only in a shade, or in a detail that is too small here.
    drawings = [row for row in openmoji.rows_of(content) if row["group"] == "plain"]
    with ThreadPoolExecutor(threads or os.cpu_count()) as pool:
        make = partial(_make, content=content, views=views, folder=folder)
        # In the order of the drawings, whichever thread makes them.
        rows = [row for made in pool.map(make, drawings) for row in made]
    write_rows(folder / "labels.jsonl", rows)
    counts = Counter(row["split"] for row in drawings)
    table = "\n".join(f"| {split} | {counts[split]:,} | {number} |" for split, number in views.items())
    (folder / "README.md").write_text(_README.format(count=len(rows), table=table), encoding="utf-8")
    (folder / "LICENSE").write_bytes(content.license)
    return {
        "made": "drawings scaled, turned and put on a background",
        "drawings": {split: counts[split] for split in views},
        "images": len(rows),
    }


def _make(
    row: Mapping[str, Any], *, content: openmoji.Wheels, views: Mapping[str, int], folder: Path
) -> list[dict[str, str]]:
    """Write the views of a drawing; return their rows."""
    sprite, code = make_sprite(row, content), Path(row["image"]).stem
    (folder / "images" / code).mkdir(parents=True)
    rows = []
    for number in range(views[row["split"]]):
        image = f"images/{code}/{number:02}.png"
        # The fastest level: backgrounds of one color are small at any level.
        draw_view(sprite, number).save(folder / image, compress_level=1)
        rows.append({"image": image, "label": sprite.name, "split": row["split"]})
    return rows


def draw_view(sprite: Sprite, number: int) -> Image.Image:
    """Return a view of a drawing."""
    # Only `random()` of a generator is the same in every version of Python.
    rng = Random(f"{sprite.name}/{number}")
    color = list(BACKGROUNDS.values())[between((0, len(BACKGROUNDS) - 1), rng)]
    shade = between((-SHADE, SHADE), rng)
    size = round(between(LENGTHS, rng) / max(sprite.sides))
    drawing = sprite.draw(size, between((-TURN, TURN), rng))
    image = Image.new("RGB", (SIDE, SIDE), tuple(value + shade for value in color))
    corner = tuple(between((_EDGE, SIDE - _EDGE - side), rng) for side in drawing.size)
    image.paste(drawing, corner, drawing)
    return image
