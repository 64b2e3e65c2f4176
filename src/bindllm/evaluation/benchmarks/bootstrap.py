"""Bootstrap intervals (Efron 1979) of every number of a benchmark, and the comparison of two evaluations.

Questions about the same media are not independent, so media are resampled, each with all its questions. Both sides of a
difference use the same resamples (a paired test).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from bindllm.errors import InputError
from bindllm.evaluation.benchmarks.folder import Evaluation, find_evaluations
from bindllm.evaluation.benchmarks.metrics import Line, Metric, Sums
from bindllm.evaluation.task import MODEL

RESAMPLES = 1000
LEVEL = 95
"""Percent of the resamples inside an interval."""

_SCORING = (
    *(
        "parser",
        "unparsed",
        "tokenizer",
        "prompt",
        "prompts",
        "choose",
        "max_new_tokens",
        "samples",
        "temperature",
    ),
    "rationales",
)
"""Settings that change scores; a difference may come from them, and not from the models."""

Number = dict[str, Any]
"""``value``, ``low`` and ``high`` of the interval, None if not defined, and ``n``, the number of questions."""


class Table(NamedTuple):
    """Sums of clusters: [C, S].

    Args:
        clusters: names, [C].
        names: names of the sums, [S].
        sums: the sums.
    """

    clusters: list[str]
    names: list[str]
    sums: np.ndarray


def cluster_of(line: Line) -> str:
    """Return the name that questions about the same media share; without named media, that of the unit."""
    return "\n".join(line["media"]) or line["unit"]


def table_of(lines: Sequence[Line], metric: Metric) -> Table:
    """Return the sums of each cluster; lines of a unit count together."""
    units: dict[str, list[Line]] = {}
    for line in lines:
        units.setdefault(line["unit"], []).append(line)
    clusters: dict[str, dict[str, float]] = {}
    for unit in units.values():
        own = clusters.setdefault(cluster_of(unit[0]), {})
        for name, value in metric.sums(unit).items():
            own[name] = own.get(name, 0.0) + value
    names = list(dict.fromkeys(name for own in clusters.values() for name in own))
    sums = np.array([[own.get(name, 0.0) for name in names] for own in clusters.values()], dtype=float)
    return Table(list(clusters), names, sums)


def intervals(lines: Sequence[Line], metric: Metric) -> dict[str, Number]:
    """Return every number of a metric with its interval; empty without lines."""
    if not lines:
        return {}
    table = table_of(lines, metric)
    values, resampled = _values(metric, table)
    return {name: _number(values[name], resampled[name], len(lines)) for name in values}


def by_group(lines: Sequence[Line], metric: Metric) -> dict[str, dict[str, dict[str, Number]]]:
    """Return the numbers of each value of each label."""
    parts: dict[str, dict[str, list[Line]]] = {}
    for line in lines:
        for label, value in line["groups"].items():
            parts.setdefault(label, {}).setdefault(str(value), []).append(line)
    return {
        label: {value: intervals(part, metric) for value, part in sorted(values.items())}
        for label, values in parts.items()
    }


def differences(a: Sequence[Line], b: Sequence[Line], metric: Metric) -> dict[str, Number]:
    """Return the numbers of B minus those of A, with intervals and ``p``, for lines of the same questions.

    ``p`` is two-sided: twice the share of resamples on the less frequent side of 0, at least 1 / `RESAMPLES`.
    """
    tables = [table_of(lines, metric) for lines in (a, b)]
    assert tables[0].clusters == tables[1].clusters
    # The same seed draws the same clusters on both sides.
    (before, drawn_before), (after, drawn_after) = (_values(metric, table) for table in tables)
    found = {}
    # METEOR may be on one side only.
    for name in (name for name in before if name in after):
        drawn = drawn_after[name] - drawn_before[name]
        number = _number(after[name] - before[name], drawn, len(a))
        drawn = drawn[np.isfinite(drawn)]
        sides = min((drawn <= 0).mean(), (drawn >= 0).mean()) if len(drawn) else 0.5
        found[name] = {**number, "p": min(1.0, max(2 * float(sides), 1 / RESAMPLES))}
    return found


def _values(metric: Metric, table: Table) -> tuple[Mapping[str, float], Sums]:
    """Return the numbers of all clusters, and those of each resample, [R]."""

    def numbers(sums: np.ndarray) -> Sums:
        return metric.values(dict(zip(table.names, sums.T, strict=True)))

    whole = {name: float(value[0]) for name, value in numbers(table.sums.sum(0, keepdims=True)).items()}
    return whole, numbers(np.array(list(_resample(table.sums))))


def _resample(sums: np.ndarray) -> Iterator[np.ndarray]:
    """Yield the total of as many clusters, drawn with replacement, for each resample: [S]."""
    rng, count = np.random.default_rng(0), len(sums)
    for _ in range(RESAMPLES):
        yield np.bincount(rng.integers(count, size=count), minlength=count) @ sums


def _number(value: float, drawn: np.ndarray, count: int) -> Number:
    drawn, tail = drawn[np.isfinite(drawn)], (100 - LEVEL) / 2
    low, high = np.percentile(drawn, [tail, 100 - tail]) if len(drawn) else (np.nan, np.nan)
    # JSON has no NaN.
    numbers = {"value": value, "low": float(low), "high": float(high)}
    return {**{name: one if np.isfinite(one) else None for name, one in numbers.items()}, "n": count}


def interval_text(number: Number | None) -> str:
    """Return a number with its interval.

    Examples:
        >>> interval_text({"value": 0.5, "low": 0.4, "high": 0.6, "n": 9})
        '0.500 [0.400, 0.600]'
    """
    if number is None or number["value"] is None:
        return "-"
    digits = 1 if abs(number["value"]) >= 100 else 3
    ends = [number[key] for key in ("low", "high")]
    interval = "" if None in ends else f" [{ends[0]:.{digits}f}, {ends[1]:.{digits}f}]"
    return f"{number['value']:.{digits}f}{interval}"


def media_sentence(lines: Mapping[str, Sequence[Line]], metric: Metric) -> str:
    """Return one sentence that tells whether the score needs the media.

    Args:
        lines: lines of each variant; controls may have a part of the questions.
        metric: its main number is compared.
    """
    differ = {}
    for variant, words in (("no_media", "without them"), ("shuffled_media", "with those of other questions")):
        if not (control := lines.get(variant)):
            continue
        known = {line["id"]: line for line in control}
        own = [line for line in lines["model"] if line["id"] in known]
        number = differences([known[line["id"]] for line in own], own, metric)[metric.main]
        scores = [
            intervals(part, metric)[metric.main]["value"] for part in (own, [known[x["id"]] for x in own])
        ]
        if number["low"] is not None and None not in scores:
            differ[f"{scores[0]:.3f} with the media and {scores[1]:.3f} {words}"] = number
    if not differ:
        return "It was not measured whether the score needs the media."
    facts = "; ".join(
        f"{words} (difference {number['value']:.3f}, {LEVEL} % {number['low']:.3f} to {number['high']:.3f}, "
        f"{number['n']:,} questions)"
        for words, number in differ.items()
    )
    needed = all(number["low"] > 0 for number in differ.values())
    start = "The score needs the media" if needed else "It is not shown that the score needs the media"
    return f"{start}: {metric.main} is {facts}."


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
        for name in _SCORING
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
