"""A wheel like the published easy-VQA, with plain images."""

import io
import json
import zipfile
from pathlib import Path

from PIL import Image

from tiny import COLORS


def published(folder: Path, *, train: int = 60) -> Path:
    """Write a wheel with three questions about each image, and return it."""
    wheel = folder / "easy.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("easy_vqa-1.0.dist-info/LICENSE", "MIT License")
        for split, count in (("train", train), ("test", 8)):
            rows = []
            for n in range(count):
                color = list(COLORS)[n % 3]
                image = io.BytesIO()
                Image.new("RGB", (8, 8), (*COLORS[color][:2], n)).save(image, "PNG")
                archive.writestr(f"easy_vqa/data/{split}/images/{n}.png", image.getvalue())
                rows.append(["what color is the shape?", color, n])
                rows.append(["is there a red shape?", "yes" if color == "red" else "no", n])
                rows.append(["is no red shape present?", "no" if color == "red" else "yes", n])
            archive.writestr(f"easy_vqa/data/{split}/questions.json", json.dumps(rows))
    return wheel
