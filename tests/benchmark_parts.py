"""Tiny benchmarks in the layouts of their authors."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path

import numpy as np
from PIL import Image

from tiny import COLORS


def image(file: Path, color: str = "red") -> Path:
    """Write a plain image, and the folders above it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((8, 8, 3), COLORS[color], dtype=np.uint8)).save(file)
    return file


def image_base64(color: str) -> str:
    stream = io.BytesIO()
    Image.fromarray(np.full((8, 8, 3), COLORS[color], dtype=np.uint8)).save(stream, "png")
    return base64.b64encode(stream.getvalue()).decode()


def write(file: Path, content: object) -> Path:
    """Write a text, or JSON, or a list of objects as JSON Lines."""
    file.parent.mkdir(parents=True, exist_ok=True)
    if not isinstance(content, str):
        content = json.dumps(content)
    file.write_text(content, encoding="utf-8")
    return file


def pope(folder: Path) -> Path:
    for split in ("random", "popular", "adversarial"):
        rows = []
        for n, color in enumerate(COLORS):
            name = f"COCO_val2014_{n:012d}.jpg"
            image(folder / "val2014" / name, color)
            rows += [
                {
                    "question_id": 2 * n + k,
                    "image": name,
                    "image_id": n,
                    "text": f"Is there a {color} dog?",
                    "label": label,
                }
                for k, label in enumerate(("yes", "no"), start=1)
            ]
        write(folder / f"output/coco/coco_pope_{split}.json", "".join(json.dumps(row) + "\n" for row in rows))
    return folder


def mme(folder: Path) -> Path:
    root = folder / "MME_Benchmark_release_version"
    for task in ("existence", "celebrity", "code_reasoning"):
        for color in ("red", "blue"):
            with_folders = task == "celebrity"
            image(root / task / ("images" if with_folders else "") / f"{color}.png", color)
            texts = root / task / ("questions_answers_YN" if with_folders else "")
            ask = "Is it {}? Please answer yes or no.\t{}\n"
            write(texts / f"{color}.txt", ask.format("red", "Yes") + ask.format("a dog", "No"))
    return folder


BUILDERS = {"pope": pope, "mme": mme}
"""Makes a tiny folder of each benchmark."""
