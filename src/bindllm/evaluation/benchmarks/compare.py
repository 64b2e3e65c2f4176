"""Two evaluations of one benchmark: a paired test of every number, and the questions that were won and lost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bindllm.errors import InputError
from bindllm.evaluation.benchmarks.bootstrap import Number, differences, intervals
from bindllm.evaluation.benchmarks.folder import Evaluation, find_evaluations
from bindllm.evaluation.benchmarks.metrics import Line
from bindllm.evaluation.task import MODEL

_SETTINGS = ("parser", "unparsed", "prompt", "choose", "max_new_tokens")
"""Settings that change scores; a difference may come from them, and not from the models."""


@dataclass
class Comparison:
    """A comparison of two evaluations.

    Attributes:
        benchmark: name of the benchmark.
        a, b: numbers of each evaluation, on the questions of both.
        difference: B minus A with interval and ``p``, see `differences`.
        won: lines of A and of B in which B scores higher, the largest difference first.
        lost: the same in which B scores lower.
        count: questions of both.
        notes: settings that differ, and questions of one side only.
    """

    benchmark: str
    a: dict[str, Number]
    b: dict[str, Number]
    difference: dict[str, Number]
    won: list[tuple[Line, Line]]
    lost: list[tuple[Line, Line]]
    count: int
    notes: list[str]

    def facts(self) -> dict[str, Any]:
        """Return everything as JSON-able values; of the questions only the changed ones, with both answers."""
        changed = {
            name: [
                {**x, "answer": {"a": x["answer"], "b": y["answer"]}, "score": _scores(x, y)}
                for x, y in pairs
            ]
            for name, pairs in (("won", self.won), ("lost", self.lost))
        }
        return {**vars(self), **changed}


def compare_folders(a: str | Path, b: str | Path) -> list[Comparison]:
    """Compare the evaluations of two folders, benchmark by benchmark.

    Raises:
        InputError: a folder without evaluations, no common benchmark, or see `compare`.
    """
    first, second = find_evaluations(a), find_evaluations(b)
    common = [name for name in first if name in second]
    if not common:
        raise InputError(
            f"{a} has {', '.join(first)}, and {b} has {', '.join(second)}; evaluate the same benchmark"
        )
    return [compare(first[name], second[name]) for name in common]


def compare(a: Evaluation, b: Evaluation) -> Comparison:
    """Compare two evaluations on the questions that both have.

    Raises:
        InputError: they have no question in common, or a question has another answer in the other one.
    """
    metric = a.metric
    known = {line["id"]: line for line in b.lines[MODEL]}
    pairs = [(line, known[line["id"]]) for line in a.lines[MODEL] if line["id"] in known]
    if changed := [(x, y) for x, y in pairs if x["target"] != y["target"]]:
        x, y = changed[0]
        raise InputError(
            f"{a.folder} and {b.folder} are of different data: the answer to {x['id']} is {x['target']!r} and "
            f"{y['target']!r}"
        )
    # A unit with a part of its questions would be scored as if it were whole.
    cut = {line["unit"] for evaluation in (a, b) for line in _others(evaluation, pairs)}
    pairs = [(x, y) for x, y in pairs if x["unit"] not in cut]
    if not pairs:
        raise InputError(f"{a.folder} and {b.folder} have no question in common; use the same limit")
    ours, theirs = [x for x, _ in pairs], [y for _, y in pairs]
    # Stable, so that equal differences stay in the order of the questions.
    gains = sorted(pairs, key=lambda pair: pair[0]["score"] - pair[1]["score"])
    losses = sorted(pairs, key=lambda pair: pair[1]["score"] - pair[0]["score"])
    settings = [evaluation.facts["settings"] for evaluation in (a, b)]
    notes = [
        f"{name} differs: {settings[0].get(name)!r} and {settings[1].get(name)!r}"
        for name in _SETTINGS
        if settings[0].get(name) != settings[1].get(name)
    ]
    notes += [
        f"{len(evaluation.lines[MODEL]) - len(pairs):,} questions of {evaluation.folder} are not compared"
        for evaluation in (a, b)
        if len(evaluation.lines[MODEL]) > len(pairs)
    ]
    return Comparison(
        a.name,
        intervals(ours, metric),
        intervals(theirs, metric),
        differences(ours, theirs, metric),
        [(x, y) for x, y in gains if y["score"] > x["score"]],
        [(x, y) for x, y in losses if y["score"] < x["score"]],
        len(pairs),
        notes,
    )


def _others(evaluation: Evaluation, pairs: Sequence[tuple[Line, Line]]) -> list[Line]:
    """Return the lines of an evaluation that are in no pair."""
    paired = {x["id"] for x, _ in pairs}
    return [line for line in evaluation.lines[MODEL] if line["id"] not in paired]


def _scores(a: Line, b: Line) -> dict[str, float]:
    return {"a": a["score"], "b": b["score"]}
