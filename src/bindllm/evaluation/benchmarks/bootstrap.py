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
from bindllm.evaluation.benchmarks.captions import score_again
from bindllm.evaluation.benchmarks.folder import Evaluation, find_evaluations
from bindllm.evaluation.benchmarks.metrics import CAPTIONS, Line, Metric, Sums
from bindllm.evaluation.task import MODEL

RESAMPLES = 1000
LEVEL = 95
"""Percent of the resamples inside an interval."""

_SCORING = (
    *("parser", "unparsed", "tokenizer", "prompt", "prompts", "choose"),
    *("max_new_tokens", "samples", "temperature", "seed", "rationales"),
)
"""Settings that change scores; a difference may come from them, and not from the models."""

Number = dict[str, Any]
"""``value``, ``low`` and ``high`` of the interval, None if not defined, and ``n``, the number of questions.

Questions about a single image have no interval: it would be one of a single observation.
"""


class Table(NamedTuple):
    """Sums of clusters: [C, S].

    Args:
        names: names of the sums, [S].
        sums: the sums.
    """

    names: list[str]
    sums: np.ndarray


def clusters_of(lines: Sequence[Line]) -> list[int]:
    """Return the number of the cluster of each line: units about the same media share one.

    Media are the same if they have the same names or the same content: the folders of MME have copies of an image, and
    images inside a table have no name. Of a unit with several media the first one counts, as pairs of images would
    connect all others.
    """
    units: dict[str, int] = {}
    numbers: dict[object, int] = {}
    for line in lines:
        if line["unit"] in units:
            continue
        keys = [key for key in (tuple(line["media"]), line.get("media_sha256")) if key]
        number = next((numbers[key] for key in keys if key in numbers), len(units))
        units[line["unit"]] = number
        for key in keys:
            numbers.setdefault(key, number)
    return [units[line["unit"]] for line in lines]


def table_of(lines: Sequence[Line], clusters: Sequence[int], metric: Metric) -> Table:
    """Return the sums of each cluster, in the order of their first lines; lines of a unit count together."""
    units: dict[str, list[Line]] = {}
    for line in lines:
        units.setdefault(line["unit"], []).append(line)
    cluster = {line["unit"]: number for line, number in zip(lines, clusters, strict=True)}
    found: dict[int, dict[str, float]] = {}
    for name, unit in units.items():
        own = found.setdefault(cluster[name], {})
        for key, value in metric.sums(unit).items():
            own[key] = own.get(key, 0.0) + value
    names = list(dict.fromkeys(name for own in found.values() for name in own))
    sums = np.array([[own.get(name, 0.0) for name in names] for own in found.values()], dtype=float)
    return Table(names, sums)


def intervals(lines: Sequence[Line], metric: Metric) -> dict[str, Number]:
    """Return every number of a metric with its interval; empty without lines."""
    if not lines:
        return {}
    table = table_of(lines, clusters_of(lines), metric)
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

    ``p`` is two-sided: twice the share of resamples on the less frequent side of 0. It is at least 1 / `RESAMPLES`, and
    at least that of a sign test in which all clusters that differ agree, as a few of them show nothing.
    """
    # Those of one side, as the other one may have found the same media in another folder.
    clusters = clusters_of(a)
    tables = [table_of(lines, clusters, metric) for lines in (a, b)]
    sums = [dict(zip(table.names, table.sums.T, strict=True)) for table in tables]
    differ = [sums[0][name] != sums[1][name] for name in sums[0].keys() & sums[1].keys()]
    smallest = max(1 / RESAMPLES, 2.0 ** (1 - int(np.any(differ, axis=0).sum())))
    # The same seed draws the same clusters on both sides.
    (before, drawn_before), (after, drawn_after) = (_values(metric, table) for table in tables)
    found = {}
    # METEOR may be on one side only.
    for name in (name for name in before if name in after):
        drawn = drawn_after[name] - drawn_before[name]
        number = _number(after[name] - before[name], drawn, len(a))
        drawn = drawn[np.isfinite(drawn)]
        sides = min((drawn <= 0).mean(), (drawn >= 0).mean()) if len(drawn) else 0.5
        found[name] = {**number, "p": min(1.0, max(2 * float(sides), smallest))}
    return found


def _values(metric: Metric, table: Table) -> tuple[Mapping[str, float], Sums]:
    """Return the numbers of all clusters, and those of each resample, [R]."""

    def numbers(sums: np.ndarray) -> Sums:
        return metric.values(dict(zip(table.names, sums.T, strict=True)))

    whole = {name: float(value[0]) for name, value in numbers(table.sums.sum(0, keepdims=True)).items()}
    # A single cluster is always drawn, which says nothing about others.
    resampled = list(_resample(table.sums)) if len(table.sums) > 1 else [np.full(len(table.names), np.nan)]
    return whole, numbers(np.array(resampled))


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
        if None not in scores:
            differ[f"{scores[0]:.3f} with the media and {scores[1]:.3f} {words}"] = number
    if not differ:
        return "It was not measured whether the score needs the media."
    facts = "; ".join(
        f"{words} (difference {number['value']:.3f}, {_range_text(number)}, {number['n']:,} questions)"
        for words, number in differ.items()
    )
    # A few questions may have an interval above 0 by chance, which their p says.
    needed = all((number["low"] or 0) > 0 and number["p"] <= 1 - LEVEL / 100 for number in differ.values())
    start = "The score needs the media" if needed else "It is not shown that the score needs the media"
    return f"{start}: {metric.main} is {facts}."


def _range_text(number: Number) -> str:
    if number["low"] is None:
        return "all about the same media, so without an interval"
    return f"{LEVEL} % {number['low']:.3f} to {number['high']:.3f}"


@dataclass
class Comparison:
    """A comparison of two evaluations.

    Attributes:
        a, b: numbers of each evaluation, on the questions of both.
        difference: B minus A with interval and ``p``, see `differences`.
        won: lines of A and of B in which B scores higher, the largest difference first.
        lost: the same in which B scores lower.
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
                {
                    **x,
                    "answer": {"a": x["answer"], "b": y["answer"]},
                    "score": {"a": x["score"], "b": y["score"]},
                }
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
    both = {x["id"] for x, _ in pairs}
    cut = {line["unit"] for one in (a, b) for line in one.lines[MODEL] if line["id"] not in both}
    pairs = [(x, y) for x, y in pairs if x["unit"] not in cut]
    if not pairs:
        raise InputError(f"{a.folder} and {b.folder} have no question in common; use the same limit")
    settings = [evaluation.facts["settings"] for evaluation in (a, b)]
    if metric is CAPTIONS and len(pairs) < max(len(one.lines[MODEL]) for one in (a, b)):
        # The weights of words in CIDEr-D are those of all captions of an evaluation.
        sides = [
            score_again(side, own.get("tokenizer", "python"))
            for side, own in zip(zip(*pairs, strict=True), settings, strict=True)
        ]
        pairs = list(zip(*sides, strict=True))
    ours, theirs = [x for x, _ in pairs], [y for _, y in pairs]
    # Stable, so that equal differences stay in the order of the questions.
    gains = sorted(pairs, key=lambda pair: pair[0]["score"] - pair[1]["score"])
    losses = sorted(pairs, key=lambda pair: pair[1]["score"] - pair[0]["score"])
    notes = [
        f"{name} differs: {settings[0].get(name)!r} and {settings[1].get(name)!r}"
        for name in _SCORING
        if settings[0].get(name) != settings[1].get(name)
    ]
    # Another frame of all questions is in the notes already.
    if not any(name in note.split()[0] for note in notes for name in ("prompt", "rationales")):
        notes += _count_text(pairs, "question", "have another text")
    notes += _count_text(pairs, "media_sha256", "are about media with another content")
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


def _count_text(pairs: Sequence[tuple[Line, Line]], key: str, words: str) -> list[str]:
    """Return a note if questions of the same id differ, as the published files of one side were changed."""
    count = sum(x.get(key) != y.get(key) for x, y in pairs)
    return [f"{count:,} questions {words} on the other side"] if count else []
