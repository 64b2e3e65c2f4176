"""The measurements that a card may state: evaluations of this checkpoint, and the held-out rows of its training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bindllm.atomic import read_json
from bindllm.errors import InputError
from bindllm.evaluation.benchmarks.bootstrap import Number, intervals
from bindllm.evaluation.benchmarks.folder import Evaluation, find_evaluations
from bindllm.evaluation.benchmarks.metrics import SCORE, Line
from bindllm.report.report import METRICS_FILE, ROW_FILES
from bindllm.report.summary import KEYS, METRICS, summarize


def read_evaluations(folders: Sequence[Path], fingerprint: str) -> list[Evaluation]:
    """Read evaluations; a folder may hold several in its subfolders.

    Raises:
        InputError: a folder has none, one is damaged or interrupted, or one is of other weights.
    """
    found = [evaluation for folder in folders for evaluation in find_evaluations(folder).values()]
    for one in found:
        if one.facts.get("checkpoint_fingerprint") != fingerprint:
            raise InputError(
                f"{one.folder} measured other weights or settings than those of this checkpoint: evaluate it again, or "
                "leave the folder out"
            )
    names = [one.name for one in found]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise InputError(f"{', '.join(twice)} was given twice; give one evaluation of each benchmark")
    return found


@dataclass(frozen=True)
class HeldOut:
    """The held-out rows of the training run."""

    scores: dict[str, dict[str, dict[str, float | None]]]
    sentences: list[str]
    counts: dict[str, int]


def read_held_out(folder: Path, modalities: Sequence[str]) -> HeldOut:
    """Read ``metrics.json`` of a checkpoint; empty if the folder has none.

    Raises:
        InputError: the file cannot be read.
    """
    file = folder / METRICS_FILE
    if not file.is_file():
        return HeldOut({}, [], {})
    metrics = read_json(file, InputError)
    counts = {task: _count(folder, task, variants) for task, variants in metrics["tasks"].items()}
    scores = {
        task: {
            name: {key: found[key] for key in KEYS[task] if key in METRICS}
            for name, found in variants.items()
        }
        for task, variants in metrics["tasks"].items()
    }
    sentences = summarize(metrics, num_captions=counts.get("captions", 0), modalities=modalities)
    return HeldOut(scores, sentences, counts)


def _count(folder: Path, task: str, variants: Mapping[str, Any]) -> int:
    if "count" in variants["model"]:
        return variants["model"]["count"]
    # One row for each image with captions.
    return len((folder / ROW_FILES[task]).read_text(encoding="utf-8").splitlines())


def share(lines: Sequence[Line], flags: Sequence[bool]) -> Number:
    """Return the share of lines that are flagged, with its interval."""
    return mean([{**line, "score": float(flag)} for line, flag in zip(lines, flags, strict=True)])


def mean(lines: Sequence[Line]) -> Number:
    """Return the mean score of lines, with its interval."""
    return intervals(lines, SCORE)["score"]


def number_text(number: Number | None) -> str:
    """Return a number with its interval; one without a width is omitted, as resampling equal values shows nothing.

    Examples:
        >>> number_text({"value": 0.5, "low": 0.4, "high": 0.61234, "n": 9})
        '0.5 (0.4 to 0.6123)'
        >>> number_text({"value": 0.0, "low": 0.0, "high": 0.0, "n": 9}), number_text(None)
        ('0', '-')
    """
    if number is None or number["value"] is None:
        return "-"
    low, high = number.get("low"), number.get("high")
    if low is None or high is None or low == high:
        return _digits(number["value"])
    return f"{_digits(number['value'])} ({_digits(low)} to {_digits(high)})"


def _digits(value: float) -> str:
    # Below a thousandth, the exponent would be the only thing that a reader sees.
    return f"{value:.4g}" if value == 0 or abs(value) >= 0.001 else f"{value:.4f}"


def percent(number: Number) -> str:
    """Return a share with its interval, see `number_text`."""
    value, low, high = (number[key] for key in ("value", "low", "high"))
    return f"{value:.1%}" if low is None or low == high else f"{value:.1%} ({low:.1%} to {high:.1%})"


def is_inside(value: float, number: Number) -> bool:
    """Return whether a value is in the interval of a number; one without an interval shows nothing."""
    return number["low"] is None or number["low"] <= value <= number["high"]
