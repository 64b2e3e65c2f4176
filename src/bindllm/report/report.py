"""The report of a run: the files it is made from, and the page that is made of them.

    metrics.json            the numbers, for programs
    report.html             the same for people: one file, nothing to fetch
    report/captions.jsonl   one row per held-out picture with captions, where there are any
    report/answers.jsonl    one row per held-out question, where there are any
    report/log.csv          the training log
    report/facts.json       what else the page says about the run

The page is always made from these files (and the recipe and gates beside them), so it can be made again at any time.
"""

from __future__ import annotations

import csv
import json
import math
import platform
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bindllm.atomic import atomic_file, write_json
from bindllm.errors import InputError
from bindllm.model.checkpoint import read_manifest, read_weights, resolve_path
from bindllm.report.page import ReportData, render_page
from bindllm.report.summary import KINDS

METRICS_FILE = "metrics.json"
PAGE_FILE = "report.html"
CAPTIONS_FILE = "report/captions.jsonl"
ANSWERS_FILE = "report/answers.jsonl"
LOG_FILE = "report/log.csv"
FACTS_FILE = "report/facts.json"
SECONDS = ("embed", "train", "evaluate")

_PACKAGES = ("bindllm", "torch", "transformers", "lightning", "torchmetrics", "pycocoevalcap")


def software_versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that numbers depend on; those not installed are left out."""
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return versions


def git_revision(folder: str | Path = ".") -> str | None:
    """Return the commit that is checked out around a folder, marked where files differ from it, or None."""
    command = ["git", "describe", "--always", "--dirty=, with changes", "--exclude=*", "--abbrev=12"]
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


@dataclass
class RunFacts:
    """What a report says about a run besides its numbers, captions, log, recipe and gates. All JSON-able.

    Args:
        title: heading of the page.
        parameters: a row per parameter group: ``group``, ``tensors``, ``parameters``, ``trainable``.
        data: the fields of a `bindllm.data.report.DataReport`.
        licences: a row per part: ``part``, ``name``, ``licence``.
        problems: what could not be measured, and why.
        device: where the model was trained.
        finished: when, as text.
        software: versions by package.
        revision: git revision, or None.
    """

    title: str = "bindllm run"
    parameters: list[dict[str, Any]] = field(default_factory=list)
    data: dict[str, Any] = field(default_factory=dict)
    licences: list[dict[str, str]] = field(default_factory=list)
    problems: dict[str, str] = field(default_factory=dict)
    device: str = ""
    finished: str = field(default_factory=lambda: datetime.now().strftime("%Y-%m-%d %H:%M"))
    software: dict[str, str] = field(default_factory=software_versions)
    revision: str | None = field(default_factory=git_revision)


def write_report(
    folder: str | Path,
    *,
    metrics: Mapping[str, Any],
    facts: RunFacts,
    captions: Sequence[Mapping[str, Any]] = (),
    answers: Sequence[Mapping[str, Any]] = (),
    log: str | Path | None = None,
) -> Path:
    """Write ``metrics.json``, the files that the page is made from, and the page.

    Args:
        folder: a checkpoint folder.
        metrics: the content of ``metrics.json``: ``tasks`` (the metrics of each variant of each task, None if not
            defined; see `bindllm.report.summary.KINDS`), ``seconds`` (``embed``, ``train``, ``evaluate``) and
            ``trainable_parameters``.
        facts: the rest.
        captions: rows with the fields of `bindllm.evaluation.captions.CaptionRow`.
        answers: rows with the fields of `bindllm.evaluation.answers.AnswerRow`.
        log: CSV file with the columns ``step``, ``train_loss`` and ``val_loss``, or None.

    Returns:
        the path of the page.

    Raises:
        InputError: a number is missing from the metrics; nothing was written.
        MissingExtraError: matplotlib is not installed; everything but the page was written.
    """
    folder = Path(folder)
    _check_metrics(metrics, source="metrics")
    write_json(folder / METRICS_FILE, dict(metrics))
    kinds = metrics["tasks"]
    for kind, name, rows in (("captions", CAPTIONS_FILE, captions), ("answers", ANSWERS_FILE, answers)):
        if kind in kinds:
            lines = (json.dumps(dict(row), ensure_ascii=False) + "\n" for row in rows)
            _write(folder / name, "".join(lines))
        else:
            (folder / name).unlink(missing_ok=True)
    _write(folder / FACTS_FILE, json.dumps(asdict(facts), indent=2, ensure_ascii=False) + "\n")
    if log is None:
        (folder / LOG_FILE).unlink(missing_ok=True)
    else:
        with atomic_file(folder / LOG_FILE) as part:
            shutil.copyfile(log, part)
    return rebuild_report(folder)


def rebuild_report(folder: str | Path) -> Path:
    """Make the page again from the files in a checkpoint folder, and return its path.

    A picture that cannot be opened any more becomes a grey tile with its name.

    Raises:
        CheckpointError: the folder is not a checkpoint folder.
        InputError: the folder holds no report, or one of its files is damaged.
        MissingExtraError: matplotlib is not installed.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    metrics, facts = (_parse(_read(folder / name), folder / name) for name in (METRICS_FILE, FACTS_FILE))
    _check_metrics(metrics, source=str(folder / METRICS_FILE))
    kinds = metrics["tasks"]
    unknown = RunFacts(finished="unknown", software={}, revision=None)
    log = _read_log(folder / LOG_FILE)
    recipe = folder / "recipe.yaml"
    data = ReportData(
        metrics=metrics,
        captions=_read_rows(folder / CAPTIONS_FILE) if "captions" in kinds else [],
        answers=_read_rows(folder / ANSWERS_FILE) if "answers" in kinds else [],
        facts={**asdict(unknown), **facts},
        training=_series(log, "train_loss"),
        validation=_series(log, "val_loss"),
        gates=_read_gates(folder, manifest),
        recipe=recipe.read_text(encoding="utf-8") if recipe.exists() else "",
    )
    page = render_page(data, resolve=partial(resolve_path, folder=folder, manifest=manifest))
    _write(folder / PAGE_FILE, page)
    return folder / PAGE_FILE


def _check_metrics(metrics: Mapping[str, Any], *, source: str) -> None:
    missing = [] if metrics.get("tasks") else ["tasks"]
    for kind, numbers in metrics.get("tasks", {}).items():
        variants, keys = KINDS[kind]
        missing += [
            f"{kind}.{name}.{key}" for name in variants for key in keys if key not in numbers.get(name, ())
        ]
    missing += [f"seconds.{key}" for key in SECONDS if key not in metrics.get("seconds", ())]
    missing += [name for name in ("trainable_parameters",) if name not in metrics]
    if missing:
        raise InputError(
            f"{source} lacks {', '.join(missing)}; give every number, None where it is not defined"
        )


def _write(file: Path, text: str) -> None:
    with atomic_file(file) as part:
        # File names may hold bytes that are not UTF-8; written as \udc.., JSON reads them back as they were.
        part.write_text(text, encoding="utf-8", errors="backslashreplace")


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise InputError(
            f"{file} does not exist: the folder was saved without a report; run bindllm fit"
        ) from error


def _parse(text: str, file: Path) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise InputError(f"{file} is damaged ({error}); run bindllm fit again") from error


def _read_rows(file: Path) -> list[dict[str, Any]]:
    # Not splitlines(): texts may hold the separators at which it would cut, and JSON leaves them as they are.
    return [_parse(line, file) for line in _read(file).split("\n") if line]


def _read_log(file: Path) -> list[dict[str, str]]:
    if not file.exists():
        return []
    with file.open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def _series(log: Sequence[Mapping[str, str]], column: str) -> list[tuple[int, float]]:
    """Return the finite values of a column with their steps; most rows of a log have only some of its columns."""
    points = [(int(row["step"]), float(row[column])) for row in log if row.get(column) and row.get("step")]
    return [(step, value) for step, value in points if math.isfinite(value)]


def _read_gates(folder: Path, manifest: dict[str, Any]) -> np.ndarray:
    """Return the gates as the injection applies them: kind ``value`` puts them through tanh."""
    gates = read_weights(folder, manifest)["injection.gates"].float()
    return (torch.tanh(gates) if manifest["inject"]["kind"] == "value" else gates).numpy()
