"""A wheel in the shape of the published easy-VQA, with plain pictures."""

import io
import json
import zipfile
from pathlib import Path

from PIL import Image

from tiny import COLOURS


def published(folder: Path, *, train: int = 60) -> Path:
    """Write a wheel with three questions about each picture, and return it."""
    wheel = folder / "easy.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("easy_vqa-1.0.dist-info/LICENSE", "MIT License")
        for split, count in (("train", train), ("test", 8)):
            rows = []
            for n in range(count):
                colour = list(COLOURS)[n % 3]
                picture = io.BytesIO()
                Image.new("RGB", (8, 8), (*COLOURS[colour][:2], n)).save(picture, "PNG")
                archive.writestr(f"easy_vqa/data/{split}/images/{n}.png", picture.getvalue())
                rows.append(["what color is the shape?", colour, n])
                rows.append(["is there a red shape?", "yes" if colour == "red" else "no", n])
                rows.append(["is no red shape present?", "no" if colour == "red" else "yes", n])
            archive.writestr(f"easy_vqa/data/{split}/questions.json", json.dumps(rows))
    return wheel
