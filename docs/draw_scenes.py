"""Draw a sheet of example scenes, each with its caption and one of its questions.

    python docs/draw_scenes.py [--scenes data/scenes] [--output docs/scenes.png]

First come training scenes, then two scenes of each subset of the test split, all at fixed distances in their tables.
"""

from __future__ import annotations

import argparse
import json
import textwrap
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
from drawing import FIRST, INK, new_figure, save, show

from bindllm.media.images import open_image

COLUMNS, TRAINING, OF_SUBSET = 5, 12, 2
# Steps in which number of things and color change.
STEP, FIRST_OF_SUBSET, SUBSET_STEP = 46, 8, 51


def read(file: Path) -> list[dict[str, Any]]:
    """Return the rows of a table."""
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def main() -> None:
    """Read the tables and draw some of their scenes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scenes", type=Path, default=Path("data/scenes"))
    parser.add_argument("--output", type=Path, default=Path("docs/scenes.png"))
    options = parser.parse_args()
    questions = defaultdict(list)
    for row in read(options.scenes / "train.jsonl") + read(options.scenes / "test.jsonl"):
        questions[row["image"]].append(f"{row['question']} {row['answer']}")
    parts = defaultdict(list)
    for row in read(options.scenes / "captions.jsonl"):
        parts[row.get("subset", row["split"])].append(row)
    rows = parts["train"][: STEP * TRAINING : STEP]
    subsets = [part for part in parts if part not in ("train", "validation")]
    rows += [row for part in subsets for row in parts[part][FIRST_OF_SUBSET::SUBSET_STEP][:OF_SUBSET]]
    figure = new_figure(2.75 * len(rows) / COLUMNS)
    panels = figure.subplots(len(rows) // COLUMNS, COLUMNS).flat
    for number, (axes, row) in enumerate(zip(panels, rows, strict=True)):
        show(axes, np.asarray(open_image(options.scenes / row["image"])), "")
        # Another question of each scene, so that the sheet has all types.
        asked = questions[row["image"]][:-1] or questions[row["image"]]
        axes.set_title(textwrap.fill(row.get("subset", row["caption"]), 30), fontsize=7.5, color=INK)
        axes.set_xlabel(textwrap.fill(asked[number % len(asked)], 29), fontsize=7.5, color=FIRST)
    save(figure, options.output)


if __name__ == "__main__":
    main()
