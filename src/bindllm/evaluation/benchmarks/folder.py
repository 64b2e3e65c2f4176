"""The folder of an evaluation: ``items.jsonl``, one line for each question and variant, and ``evaluation.json``.

Lines are appended batch by batch. An interrupted evaluation keeps its whole lines, and a resumed one computes only the
batches that miss a line. At the end the lines are put in the order of the questions, so both give the same file.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bindllm.atomic import atomic_file, locked, read_json, write_json
from bindllm.errors import InputError
from bindllm.evaluation.benchmarks.metrics import METRICS, SCORE, Line, Metric

ITEMS, EVALUATION = "items.jsonl", "evaluation.json"
FORMAT = 1

_RESCORED = ("parser", "unparsed")
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

    def __getitem__(self, name: str) -> float:
        """Return a number of the model."""
        return self.facts["scores"]["model"][name]["value"]


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
    if len(lines.get("model", ())) != facts["counts"]["items"]:
        raise InputError(f"{folder / ITEMS} has lost lines since it was finished; evaluate again")
    return Evaluation(facts, folder, lines)


def find_evaluations(folder: str | Path) -> dict[str, Evaluation]:
    """Return the finished evaluations of a folder by benchmark: its own, or those in its subfolders.

    Raises:
        InputError: it has none.
    """
    folder = Path(folder)
    folders = [file.parent for file in (*folder.glob(EVALUATION), *sorted(folder.glob(f"*/{EVALUATION}")))]
    if not folders:
        raise InputError(f"{folder} has no {EVALUATION}; give a folder that bindllm evaluate wrote")
    return {evaluation.name: evaluation for evaluation in map(read_evaluation, folders)}


def read_lines(path: Path, *, is_finished: bool = False) -> list[Line]:
    """Return the lines of ``items.jsonl``; one that was cut by an interruption is dropped.

    Raises:
        InputError: a line of a finished file cannot be read.
    """
    lines = []
    if path.is_file():
        for text in path.read_text(encoding="utf-8").split("\n"):
            try:
                lines.append(json.loads(text))
            except ValueError as error:
                # Else the end of the file, or the start of a batch that is computed again.
                if is_finished and text:
                    raise InputError(f"{path} has a damaged line; evaluate again") from error
    return lines


class EvaluationFolder:
    """Writes an evaluation.

    Args:
        path: the folder; made if it does not exist.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def locked(self) -> AbstractContextManager[None]:
        """Return a lock: two processes that append to one file would mix their lines."""
        return locked(
            self.path, InputError(f"{self.path} is written by another process; choose another output")
        )

    def start(self, facts: Mapping[str, Any]) -> dict[tuple[str, str], Line]:
        """Write the facts of an evaluation that starts; return the lines that it has already, by variant and id.

        Raises:
            InputError: the folder has another evaluation, or one of another checkpoint or with other settings.
        """
        if (self.path / EVALUATION).exists():
            old = read_json(self.path / EVALUATION, InputError, "choose another output")
            self._check(old, facts)
        elif self.path.exists() and any(self.path.iterdir()):
            raise InputError(f"{self.path} is not empty, and has no {EVALUATION}; choose another output")
        write_json(self.path / EVALUATION, {**facts, "complete": False})
        lines = read_lines(self.path / ITEMS)
        # A cut line stays in the file until the end; a line break separates it from those that are appended.
        with (self.path / ITEMS).open("a", encoding="utf-8") as stream:
            stream.write("\n" if stream.tell() else "")
        return {(line["variant"], line["id"]): line for line in lines}

    def _check(self, old: Any, new: Mapping[str, Any]) -> None:
        # A half of the answers of one model and a half of another would be a score of none.
        for name, words in (
            ("benchmark", "the benchmark"),
            ("checkpoint_fingerprint", "the checkpoint with the fingerprint"),
        ):
            if old.get(name) != new[name]:
                raise InputError(
                    f"{self.path} holds answers of {words} {old.get(name)!r}, and this is {new[name]!r}. Choose "
                    "another output, or delete that folder"
                )
        settings = old.get("settings", {})
        changed = [
            f"{name} {settings.get(name)!r} (now {value!r})"
            for name, value in new["settings"].items()
            if settings.get(name) != value and name not in _RESCORED
        ]
        if changed:
            raise InputError(
                f"{self.path} was started with {', '.join(changed)}. Use the same settings to resume it, or choose "
                "another output"
            )

    def append(self, lines: Iterable[Line]) -> None:
        """Add the lines of a batch."""
        with (self.path / ITEMS).open("a", encoding="utf-8") as stream:
            stream.write("".join(map(_text, lines)))

    def finish(self, facts: Mapping[str, Any], lines: Mapping[str, Sequence[Line]]) -> Evaluation:
        """Write all lines in their order, and the facts with the scores."""
        with atomic_file(self.path / ITEMS) as part, part.open("w", encoding="utf-8") as stream:
            for variant in lines.values():
                stream.writelines(map(_text, variant))
        facts = {**facts, "complete": True}
        write_json(self.path / EVALUATION, facts)
        return Evaluation(facts, self.path, {name: list(part) for name, part in lines.items()})


def _text(line: Line) -> str:
    return json.dumps(line, ensure_ascii=False) + "\n"
