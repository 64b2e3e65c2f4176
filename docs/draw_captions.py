"""Draw the image of the README: held-out images with the true caption and the model's.

    python docs/draw_captions.py [--checkpoint checkpoints/scenes] [--output docs/captions.png]

The rows are evenly spread over all held-out captions, not chosen by hand. Captions that equal the reference are green.
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
    parser.add_argument("--checkpoint", type=Path, default=Path("checkpoints/scenes"))
    parser.add_argument("--output", type=Path, default=Path("docs/captions.png"))
    options = parser.parse_args()
    lines = (options.checkpoint / "report/captions.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    count = ROWS * COLUMNS
    rows = [rows[n * len(rows) // count] for n in range(count)]
    figure = new_figure(3 * ROWS)
    for axes, row in zip(figure.subplots(ROWS, COLUMNS).flat, rows, strict=True):
        show(axes, np.asarray(open_image(row["media"]).resize((160, 160))), "")
        color = RIGHT if row["exact"] else SECOND
        axes.set_title(textwrap.fill(row["model"], 22), fontsize=7, color=color, fontweight="bold")
        axes.set_xlabel(textwrap.fill(row["references"][0], 22), fontsize=7, color=INK)
    figure.suptitle(
        "Held-out images: the model's caption above, the true caption below", fontsize=10, color=INK
    )
    save(figure, options.output)


if __name__ == "__main__":
    main()
