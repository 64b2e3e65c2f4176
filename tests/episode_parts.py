"""A small table of labeled images, for tests of episodes."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

SPLITS = {"train": 6, "validation": 2, "test": 3}


def label_table(folder: Path, *, per_class: int = 5, splits=SPLITS, column: str = "label") -> Path:
    """Write plain images of classes and the table of their labels; neighbors in number are near in color."""
    (folder / "images").mkdir(parents=True)
    rows, rng, number = [], np.random.default_rng(0), 0
    for split, count in splits.items():
        for _ in range(count):
            for n in range(per_class):
                file = f"images/{number}-{n}.png"
                pixels = rng.normal((20 * number, 120, 250 - 20 * number), 4, (6, 6, 3)).clip(0, 255)
                Image.fromarray(pixels.astype(np.uint8)).save(folder / file)
                rows.append({"image": file, column: f"class {number}", "split": split})
            number += 1
    (folder / "labels.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "labels.jsonl"
