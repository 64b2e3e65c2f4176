"""The folder of an evaluation: ``items.jsonl``, one line for each question and variant, and ``evaluation.json``.

An interrupted evaluation resumes; see `bindllm.evaluation.answering.log`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

from bindllm.atomic import read_json
from bindllm.errors import InputError
from bindllm.evaluation.answering.log import AnswerLog, read_lines
from bindllm.evaluation.benchmarks.metrics import METRICS, SCORE, Line, Metric

ITEMS, EVALUATION = "items.jsonl", "evaluation.json"
FORMAT = 1

_RESCORED = ("parser", "unparsed", "tokenizer", "spice")
"""Settings that only change how raw answers are read: with others, finished answers are scored again."""


@dataclass
class Evaluation:
    """An evaluation of a benchmark.

    Attributes:
        facts: content of ``evaluation.json``: benchmark, checkpoint, settings, counts, scores and so on.
        folder: its folder.
        lines: lines of each variant, in the order of the questions.
    """

    facts: dict[str, Any]
    folder: Path
    lines: dict[str, list[Line]] = field(default_factory=dict)

    @property
    def metric(self) -> Metric:
        """The metric of the benchmark; the mean score if it is not one of bindllm."""
        return METRICS.get(self.facts["metric"], SCORE)

    @property
    def name(self) -> str:
        """Name of the benchmark."""
        return self.facts["benchmark"]

    @property
    def home(self) -> Path:
        """The folder that the media of the lines are named from."""
        return home_of(Path(self.facts["data"]))

    def __getitem__(self, name: str) -> float:
        """Return a number of the model."""
        return self.facts["scores"]["model"][name]["value"]


def home_of(data: Path) -> Path:
    """Return the folder of the files of a benchmark, which may be given as a single table."""
    return data if data.is_dir() else data.parent


def read_evaluation(folder: str | Path) -> Evaluation:
    """Read a finished evaluation.

    Raises:
        InputError: the folder has none, or it was interrupted.
    """
    folder = Path(folder)
    facts = read_json(
        folder / EVALUATION, InputError, "give the folder of one benchmark that bindllm evaluate wrote"
    )
    if not isinstance(facts, dict) or facts.get("format") != FORMAT:
        raise InputError(f"{folder / EVALUATION} is not an evaluation of format {FORMAT}; evaluate again")
    if not facts["complete"]:
        raise InputError(f"{folder} was interrupted; resume it with the same command, bindllm evaluate")
    lines: dict[str, list[Line]] = {}
    for line in read_lines(folder / ITEMS, is_finished=True):
        lines.setdefault(line["variant"], []).append(line)
    # A comparison of fewer lines would be one of other questions.
    if len(lines.get("model", ())) != facts.get("counts", {}).get("items"):
        raise InputError(f"{folder / ITEMS} has lost lines since it was finished; evaluate again")
    return Evaluation(facts, folder, lines)


def find_evaluations(folder: str | Path) -> dict[str, Evaluation]:
    """Return the finished evaluations of a folder by benchmark: its own, or those in its subfolders.

    Raises:
        InputError: it has none, or several of one benchmark.
    """
    folder = Path(folder)
    folders = [file.parent for file in (*folder.glob(EVALUATION), *sorted(folder.glob(f"*/{EVALUATION}")))]
    if not folders:
        raise InputError(f"{folder} has no {EVALUATION}; give a folder that bindllm evaluate wrote")
    found: dict[str, Evaluation] = {}
    for one in map(read_evaluation, folders):
        if one.name in found:
            raise InputError(
                f"{found[one.name].folder} and {one.folder} are both evaluations of {one.name}; give one of them"
            )
        found[one.name] = one
    return found


class EvaluationFolder(AnswerLog):
    """Writes an evaluation."""

    def __init__(self, path: Path) -> None:
        subject = "benchmark", "the benchmark"
        super().__init__(path / ITEMS, path / EVALUATION, path, subject, free=_RESCORED)

    def resume(self, facts: Mapping[str, Any]) -> list[Line]:
        """Write the facts of an evaluation that starts; return the lines that it has already.

        Raises:
            InputError: the folder has another evaluation, or one of another checkpoint or with other settings.
        """
        if not self.facts.exists() and self.place.exists() and any(self.place.iterdir()):
            raise InputError(f"{self.place} is not empty, and has no {EVALUATION}; choose another output")
        self.start(facts)
        return self.known()

    def close(self, facts: Mapping[str, Any], lines: Mapping[str, Sequence[Line]]) -> Evaluation:
        """Write all lines in their order, and the facts with the scores; return the finished evaluation."""
        self.finish(facts, chain(*lines.values()))
        parts = {name: list(part) for name, part in lines.items()}
        return Evaluation({**facts, "complete": True}, self.place, parts)
