"""Bootstrap intervals (Efron 1979) of every number of a benchmark, and of differences of two evaluations.

Questions about the same media are not independent, so media are resampled, each with all its questions. Both sides of a
difference use the same resamples (a paired test).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from bindllm.evaluation.benchmarks.metrics import Line, Metric, Sums

RESAMPLES = 1000
LEVEL = 95
"""Percent of the resamples inside an interval."""

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
    for name in before:
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
