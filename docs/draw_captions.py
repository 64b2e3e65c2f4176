"""Draw the image of the README: held-out images with the true caption and the model's, right and wrong ones.

    python docs/draw_captions.py [--checkpoint checkpoints/quickstart] [--output docs/captions.png]

The images are evenly spread over the held-out rows, not chosen by hand. A caption is green
if it equals the reference word by word.
"""

from __future__ import annotations

import argparse
import json
import textwrap
from pathlib import Path

import numpy as np
from drawing import INK, SECOND, new_figure, save, show

from bindllm.media.images import open_image

ROWS, COLUMNS, RIGHT = 2, 6, "#0b7a43"


def main() -> None:
    """Read the rows of the report and draw them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", type=Path, default=Path("checkpoints/quickstart"))
    parser.add_argument("--output", type=Path, default=Path("docs/captions.png"))
    options = parser.parse_args()
    lines = (options.checkpoint / "report/captions.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    rows = [rows[n * len(rows) // (ROWS * COLUMNS)] for n in range(ROWS * COLUMNS)]
    figure = new_figure(2.25 * ROWS)
    for axes, row in zip(figure.subplots(ROWS, COLUMNS).flat, rows, strict=True):
        show(axes, np.asarray(open_image(row["media"]).resize((160, 160))), "")
        color = RIGHT if row["exact"] else SECOND
        for height, text, ink in ((-0.04, row["references"][0], INK), (-0.26, row["model"], color)):
            axes.text(
                0.5, height, textwrap.fill(text, 20), transform=axes.transAxes, ha="center", va="top",
                fontsize=8.5, color=ink, fontweight="bold" if ink is color else "normal",
            )  # fmt: skip
    figure.suptitle("held-out images: true caption, then the model's", fontsize=10, color=INK)
    save(figure, options.output)


if __name__ == "__main__":
    main()
