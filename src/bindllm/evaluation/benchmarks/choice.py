"""Multiple choice: ScienceQA, MMBench, SEED, and tables of questions with options."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from string import ascii_uppercase
from typing import Any

from bindllm.atomic import read_json
from bindllm.data.report import Skipped
from bindllm.data.tables import read_delimited
from bindllm.errors import InputError
from bindllm.evaluation.benchmarks import parsers
from bindllm.evaluation.benchmarks.benchmark import Benchmark, Entry
from bindllm.evaluation.benchmarks.metrics import ACCURACY, CIRCULAR
from bindllm.evaluation.benchmarks.vqa import read_questions
from bindllm.evaluation.layouts.dataset import Files, read_entries, require
from bindllm.media.source import from_base64

_SUBJECTS = {"natural science": "NAT", "social science": "SOC", "language science": "LAN"}
_OPTIONS = ("A", "B", "C", "D", "E")
_COPIES = 1_000_000
"""MMBench numbers the copies of a question with other rotations from here on."""
_MMBENCH = (
    "mmbench_dev_en.tsv",
    "MMBench_DEV_EN.tsv",
    "mmbench_dev_20230712.tsv",
    "MMBench_DEV_EN_legacy.tsv",
)


def read_scienceqa(folder: Path) -> Iterator[Entry]:
    """Read ``problems.json`` and ``pid_splits.json``: the split test, and ``images/test/<id>/image.png``."""
    paths = [
        require(folder, (f"data/scienceqa/{name}", name), purpose=purpose)
        for name, purpose in (
            ("problems.json", "the questions"),
            ("pid_splits.json", "the ids of each split"),
        )
    ]
    problems, splits = (read_json(path, InputError, "fetch the file again") for path in paths)
    if not (isinstance(problems, dict) and isinstance(splits, dict) and isinstance(splits.get("test"), list)):
        raise InputError(
            f"{paths[1]}: expected an object with a list of ids under 'test', and {paths[0]} one by id"
        )
    for name in splits["test"]:
        row = problems.get(str(name))
        if row is None:
            yield Entry(str(name), {}, problem="an id of the split that problems.json does not have")
            continue
        record: dict[str, Any] = {key: row.get(key) for key in ("question", "choices", "answer", "hint")}
        image, hint = row.get("image"), str(row.get("hint") or "").strip()
        if image:
            places = [
                folder / base / "test" / str(name) / image for base in ("images", "data/scienceqa/images")
            ]
            places += [folder / base / str(name) / image for base in ("images", "test")]
            record["image"] = next((str(place) for place in places if place.is_file()), None)
        # The columns of the paper. A question may be in both TXT and IMG.
        groups = {
            "subject": _SUBJECTS.get(str(row.get("subject")), str(row.get("subject"))),
            "grade": "G1-6" if int(str(row["grade"]).removeprefix("grade")) <= 6 else "G7-12",
            **({"text": "TXT"} if hint else {}),
            **({"image": "IMG"} if image else {}),
            **({} if hint or image else {"neither": "NO"}),
        }
        yield Entry(str(name), record, groups)


def read_mmbench(folder: Path) -> Iterator[Entry]:
    """Read the TSV of a split with images in base64; a question is asked once for each rotation of its options.

    Rotations are made here, unless the file has copies of its own (``index`` of a million and more).
    """
    table = folder if folder.is_file() else require(folder, _MMBENCH, purpose="the questions")
    rows, images, skipped = [], {}, Skipped()
    columns = ("index", "question", "A", "B", "answer", "image")
    # Written by pandas: a hint of several lines is in quotation marks.
    for _, row in read_delimited(table, columns, skipped, has_quotes=True):
        images[str(row["index"])] = row["image"]
        rows.append(row)
    if skipped.total:
        raise InputError(f"{table}: {'; '.join(skipped.lines())}; fetch the file again")
    has_copies = any(int(str(row["index"])) >= _COPIES for row in rows)
    for row in rows:
        number = int(str(row["index"]))
        unit = str(number % _COPIES)
        options = [str(row.get(letter) or "").strip() for letter in _OPTIONS]
        options = options[: max((n for n, text in enumerate(options) if text), default=-1) + 1]
        letters, answer = list(ascii_uppercase[: len(options)]), str(row["answer"]).strip()
        if answer not in letters:
            problem = "no letter of an option as the answer, as in splits without answers"
            yield Entry(str(number), {}, unit=unit, problem=problem)
            continue
        # A copy names the row that has its image.
        image = images.get(str(row["image"]), row["image"])
        groups = {label: str(row[label]) for label in ("category", "l2-category") if row.get(label)}
        record = {"image": from_base64(str(image)), "question": row["question"], "hint": row.get("hint")}
        for shift in range(1 if has_copies else len(options)):
            right = (letters.index(answer) - shift) % len(options)
            turned = {"choices": options[shift:] + options[:shift], "answer": right}
            name = str(number + shift * _COPIES)
            yield Entry(name, record | turned, groups, unit=unit)


def read_seed(folder: Path) -> Iterator[Entry]:
    """Read ``SEED-Bench.json`` and ``SEED-Bench-image/<data_id>``; questions about videos are counted and skipped."""
    files = Files(folder, "")
    path = require(folder, ("SEED-Bench.json", "SEED-Bench/SEED-Bench.json"), purpose="the questions")
    content = read_json(path, InputError, "fetch the file again")
    kinds = content.get("question_type", {}) if isinstance(content, dict) else {}
    types = {str(number): name for name, number in kinds.items()}
    for row in read_entries(path, "questions")[0]:
        name = str(row["question_id"])
        if row.get("data_type") != "image":
            yield Entry(name, {}, problem=f"a question about {row.get('data_type')}, not an image")
            continue
        record = {
            "image": files.find(str(row["data_id"]), "SEED-Bench-image"),
            "question": row["question"],
            "choices": [row[f"choice_{letter}"] for letter in "abcd"],
            "answer": row["answer"],
        }
        number = str(row.get("question_type_id", ""))
        yield Entry(name, record, {"type": types.get(number, number)})


_LETTER = {"letter": parsers.letter}

BENCHMARKS = (
    Benchmark(
        "scienceqa",
        "ScienceQA, test (https://arxiv.org/abs/2209.09513)",
        read_scienceqa,
        {**_LETTER, "the_answer_is": parsers.the_answer_is},
        ACCURACY,
        format="choice",
        notes=("the data are CC BY-NC-SA 4.0",),
    ),
    Benchmark(
        "mmbench",
        "MMBench, circular (https://arxiv.org/abs/2307.06281)",
        read_mmbench,
        _LETTER,
        CIRCULAR,
        format="choice",
    ),
    Benchmark(
        "seed",
        "SEED-Bench, images (https://arxiv.org/abs/2307.16125)",
        read_seed,
        {**_LETTER, "first_letter": parsers.first_letter},
        ACCURACY,
        format="choice",
    ),
    Benchmark(
        "choices", "a table of questions with options", read_questions, _LETTER, ACCURACY, format="choice"
    ),
)
