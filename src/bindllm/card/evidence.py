"""The measurements that a card may state: evaluation folders of this checkpoint, and the held-out rows of its training.

An evaluation folder holds ``evaluation.json`` (scores, groups, counts, settings) and ``items.jsonl``, one line for each
item and variant.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from bindllm.atomic import read_json, require_file
from bindllm.errors import InputError
from bindllm.evaluation.task import MODEL
from bindllm.report.report import METRICS_FILE, ROW_FILES
from bindllm.report.summary import KEYS, METRICS

EVALUATION = "evaluation.json"
ITEMS = "items.jsonl"
HELD_OUT = "held-out "
"""Start of the name of a task of the training run."""

_RESAMPLES = 1000
_Z = 1.96
"""Standard errors of a 95 % interval."""

_SHARES = ("accuracy", "exact_match")
"""Metrics of ``metrics.json`` that are a share of items, so that value and count give their interval."""

_ADVICE = "evaluate the checkpoint again"


@dataclass(frozen=True)
class Figure:
    """A measured value with its 95 % interval.

    Args:
        value: the value; None if it is not defined.
        low: lower end; None if the interval is unknown.
        high: upper end.
        n: number of items; None if it is unknown.
    """

    value: float | None
    low: float | None = None
    high: float | None = None
    n: int | None = None

    def __str__(self) -> str:
        if self.value is None:
            return "-"
        if self.low is None or self.high is None:
            return _rounded(self.value)
        return f"{_rounded(self.value)} ({_rounded(self.low)} to {_rounded(self.high)})"


def _rounded(value: float) -> str:
    """Return a value with four digits; a tiny one is not distinguished from others."""
    return f"{value:.4g}" if value == 0 or abs(value) >= 0.001 else f"{value:.4f}"


Scores = dict[str, dict[str, Figure]]
"""Figures by metric, by variant or by group."""


@dataclass(frozen=True)
class Evidence:
    """One evaluation.

    Args:
        name: the benchmark.
        file: the file that the figures are from.
        scores: figures of each variant.
        groups: figures of ``model`` for each value of each label.
        counts: numbers of items, of missing media and of answers that could not be parsed.
        settings: settings of the evaluation.
        items: lines of ``items.jsonl``.
    """

    name: str
    file: str
    scores: Scores
    groups: Mapping[str, Scores] = field(default_factory=dict)
    counts: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    items: Sequence[Mapping[str, Any]] = ()

    @property
    def main(self) -> str:
        """The main metric: the first one."""
        return next(iter(self.scores[MODEL]))

    def of(self, variant: str) -> dict[str, Mapping[str, Any]]:
        """Return the items of a variant by their id."""
        return {str(item["id"]): item for item in self.items if item["variant"] == variant}


def mean_of(values: Iterable[float]) -> Figure:
    """Return the mean of values with its 95 % interval: Wilson's for shares, else by bootstrap with a fixed seed.

    Examples:
        >>> mean_of([0, 0, 0, 0])
        Figure(value=0.0, low=0.0, high=0.4899, n=4)
        >>> mean_of([]).value is None
        True
    """
    data = np.fromiter(values, dtype=float)  # [n]
    if not (count := len(data)):
        return Figure(None, n=0)
    mean = float(data.mean())
    if set(np.unique(data)) <= {0.0, 1.0}:
        # Resampling answers that are all wrong would give no width at all.
        center, spread = (
            mean + _Z**2 / (2 * count),
            _Z * math.sqrt(mean * (1 - mean) / count + (_Z / (2 * count)) ** 2),
        )
        low, high = ((center + side * spread) / (1 + _Z**2 / count) for side in (-1, 1))
    else:
        random = np.random.default_rng(0)
        # One resample at a time: all at once would need n times 1000 numbers.
        means = [random.choice(data, count).mean() for _ in range(_RESAMPLES)]
        low, high = np.quantile(means, (0.025, 0.975))
    return Figure(mean, round(float(low), 4), round(float(high), 4), count)


def read_evaluation(folder: Path, manifest: Mapping[str, Any]) -> Evidence:
    """Read an evaluation folder.

    Raises:
        InputError: a file is missing or damaged, or the evaluation is of other weights.
    """
    file = folder / EVALUATION
    content = read_json(file, InputError, _ADVICE)
    try:
        if content["fingerprint"] != manifest["weights_sha256"]:
            raise InputError(
                f"{file} measured other weights than those of this checkpoint: {_ADVICE}, or leave the folder out"
            )
        scores = _scores(content["scores"])
        # Reading it here makes a damaged file an error now, not in the middle of the card.
        assert scores[MODEL]
        groups = {str(label): _scores(found) for label, found in content.get("groups", {}).items()}
        items = _read_lines(folder / ITEMS)
        return Evidence(
            str(content["benchmark"]),
            str(file),
            scores,
            groups,
            content["counts"],
            content["settings"],
            items,
        )
    except (LookupError, TypeError, AttributeError, AssertionError) as error:
        raise InputError(f"{file} is damaged ({error!r}); {_ADVICE}") from error


def _scores(content: Mapping[str, Any]) -> Scores:
    return {
        str(variant): {
            str(metric): Figure(*(found.get(key) for key in ("value", "low", "high", "n")))
            for metric, found in metrics.items()
        }
        for variant, metrics in content.items()
    }


def _read_lines(file: Path) -> list[dict[str, Any]]:
    require_file(file, InputError, _ADVICE)
    try:
        lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file} is damaged ({error}); {_ADVICE}") from error
    return lines


def read_held_out(folder: Path) -> list[Evidence]:
    """Read the held-out tasks of the training run; empty if the folder has no ``metrics.json``.

    Raises:
        InputError: a file is damaged.
    """
    file = folder / METRICS_FILE
    if not file.is_file():
        return []
    tasks = read_json(file, InputError)["tasks"]
    try:
        return [_held_out(folder, name, variants) for name, variants in tasks.items()]
    except (LookupError, TypeError, AttributeError) as error:
        raise InputError(f"{file} is damaged ({error!r}); write it again with bindllm fit") from error


def _held_out(folder: Path, task: str, variants: Mapping[str, Mapping[str, Any]]) -> Evidence:
    """Return one task of the training run in the form of an evaluation folder."""
    rows = _read_lines(folder / ROW_FILES[task]) if task in ROW_FILES else []
    number = len(rows) or None
    # How to read this: nested tables by type and by subset become groups, all other entries are metrics.
    scores = {name: _figures(task, found, number) for name, found in variants.items()}
    model, groups = variants[MODEL], {}
    if by_type := model.get("by_type"):
        counts = model["count_by_type"]
        groups["type"] = {name: {"accuracy": _share(value, counts[name])} for name, value in by_type.items()}
    if by_subset := model.get("by_subset"):
        groups["subset"] = {name: _figures(task, found, None) for name, found in by_subset.items()}
    items = [item for n, row in enumerate(rows) for item in _items(n, row, variants)]
    count = model.get("count", number)
    return Evidence(HELD_OUT + task, str(folder / METRICS_FILE), scores, groups, {"items": count}, {}, items)


def _figures(task: str, metrics: Mapping[str, Any], number: int | None) -> dict[str, Figure]:
    """Return the metrics of a variant, those in which higher is better first."""
    count = metrics.get("count", number)
    keys = sorted(
        METRICS.keys() & set(KEYS[task]),
        key=lambda key: (METRICS[key].lower_is_better, KEYS[task].index(key)),
    )
    return {
        key: _share(metrics[key], count) if key in _SHARES else Figure(metrics[key], n=count) for key in keys
    }


def _share(value: float | None, count: int | None) -> Figure:
    """Return a share of items: the interval of so many right ones and wrong ones."""
    if value is None or not count:
        return Figure(value, n=count)
    return mean_of([1.0] * round(value * count) + [0.0] * (count - round(value * count)))


def _items(number: int, row: Mapping[str, Any], variants: Iterable[str]) -> Iterable[dict[str, Any]]:
    """Yield the answers of one held-out row; only that of the model has a score."""
    right = row.get("right", row.get("exact"))
    labels = ("modality", "type", "subset")
    for variant in variants:
        if (text := row.get(variant)) is not None:
            yield {
                "id": number,
                "variant": variant,
                "answer": text,
                "parsed": text,
                "target": row["references"],
                "score": float(right) if variant == MODEL and right is not None else None,
                "groups": {label: row[label] for label in labels if row.get(label)},
            }


def is_finite(figure: Figure) -> bool:
    """Return whether a figure has a value that a program can read."""
    return figure.value is not None and math.isfinite(figure.value)
