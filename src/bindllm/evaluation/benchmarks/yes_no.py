"""Questions with the answers yes and no: POPE and MME."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from pathlib import Path

from bindllm.data.report import Skipped
from bindllm.data.tables import read_json_lines
from bindllm.errors import InputError
from bindllm.evaluation.benchmarks import parsers
from bindllm.evaluation.benchmarks.benchmark import SHORT, Benchmark, Entry
from bindllm.evaluation.benchmarks.metrics import COGNITION, MME, PERCEPTION, YES_NO
from bindllm.evaluation.layouts.dataset import Files, list_files, read_lines, require

POPE_SPLITS = ("random", "popular", "adversarial")
_MME_FOLDERS = (
    "MME_Benchmark_release_version/MME_Benchmark",
    "MME_Benchmark_release_version",
    "MME_Benchmark",
)


def read_pope(folder: Path) -> Iterator[Entry]:
    """Read ``output/coco/coco_pope_{random,popular,adversarial}.json``, JSON Lines, and the images of COCO val2014."""
    files = Files(folder, "image")
    for split in POPE_SPLITS:
        name = f"coco_pope_{split}.json"
        table = require(folder, (f"output/coco/{name}", f"coco/{name}", name), purpose="questions of a split")
        skipped, count = Skipped(), 0
        for name, record in read_json_lines(table, ("question_id", "image", "text", "label"), skipped):
            count += 1
            image = files.find(str(record["image"]), "val2014", "images/val2014", "coco/val2014")
            asked = {"image": image, "question": record["text"], "answer": _yes_or_no(record["label"], name)}
            yield Entry(f"{split}/{record['question_id']}", asked, {"split": split})
        # A file of questions without any would be a score of the other splits.
        if skipped.total or not count:
            reasons = "; ".join(skipped.lines()) or "it has no question"
            raise InputError(f"{table}: {reasons}; fetch the file again")


def _yes_or_no(label: object, row: str) -> str:
    """Return a true answer; no answer of a model would equal another one."""
    text = str(label).strip().lower()
    if text not in ("yes", "no"):
        raise InputError(f"{row}: the true answer is {label!r}, expected yes or no; fetch the file again")
    return text


def read_mme(folder: Path) -> Iterator[Entry]:
    """Read a folder for each task: its images, and a text for each with two lines ``question<tab>Yes|No``.

    Texts and images are in the folder itself, or in ``questions_answers_YN`` and ``images``.
    """
    root = next((folder / name for name in _MME_FOLDERS if (folder / name).is_dir()), folder)
    tasks = [task for task in (*PERCEPTION, *COGNITION) if (root / task).is_dir()]
    if not tasks:
        raise InputError(
            f"{root} has no folder of a task of MME, such as {root / 'existence'}; give the folder "
            "MME_Benchmark_release_version"
        )
    for task in tasks:
        texts = root / task / "questions_answers_YN"
        texts = texts if texts.is_dir() else root / task
        images = root / task / "images"
        found = {
            Path(file).stem: file
            for file in chain(
                *(list_files(one, "image") for one in (root / task, images) if one.is_dir()),
            )
        }
        known = {file.stem: [*read_lines(file)] for file in sorted(texts.glob("*.txt"))}
        if missing := found.keys() - known.keys():
            raise InputError(
                f"{texts / min(missing)}.txt does not exist ({len(missing)} such); unpack MME again"
            )
        for stem, lines in known.items():
            unit = f"{task}/{stem}"
            # The score of an image counts both of its questions.
            if len(lines) != 2:
                raise InputError(
                    f"{texts / stem}.txt has {len(lines)} questions, expected 2; unpack MME again"
                )
            for number, (row, line) in enumerate(lines):
                question, tab, answer = line.strip().partition("\t")
                if not tab:
                    raise InputError(f"{row}: expected a question, a tab, and Yes or No, not {line[:60]!r}")
                asked = {
                    "image": found.get(stem),
                    "question": question,
                    "answer": _yes_or_no(answer, row),
                }
                yield Entry(f"{unit}/{number}", asked, {"task": task}, unit=unit)
        if not known:
            raise InputError(f"{texts} has no texts with questions; unpack MME again, or remove the folder")


BENCHMARKS = (
    Benchmark(
        "pope",
        "POPE, object hallucination (https://arxiv.org/abs/2305.10355)",
        read_pope,
        {"yes_no": parsers.yes_no, "pope": parsers.pope},
        YES_NO,
        prompt=SHORT,
    ),
    Benchmark(
        "mme",
        "MME (https://arxiv.org/abs/2306.13394)",
        read_mme,
        {"mme": parsers.mme, "yes_no": parsers.yes_no},
        MME,
    ),
)
