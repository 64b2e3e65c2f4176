"""The report of a run: its files, and the page that is made from them.

    metrics.json            the metrics, for programs
    report.html             the page, for people: one file that loads nothing else
    report/captions.jsonl   one row per held-out image with captions, if there are any
    report/answers.jsonl    one row per held-out question, if there are any
    report/episodes.jsonl   one row per held-out episode, if there are any
    report/log.csv          the training log
    report/thumbnails.json  the images of the page, by their path in the rows
    report/facts.json       further facts of the run

The page is always made from these files and the folder's recipe and gates, so it can be made again at any time, also
by someone who got the folder from someone else: no file outside the folder is opened for it.
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
from jinja2 import TemplateError

from bindllm.atomic import atomic_file, read_json, require_file, write_json
from bindllm.errors import BindLLMError, InputError
from bindllm.evaluation.task import VARIANTS
from bindllm.imports import resolve_path
from bindllm.model.checkpoint import home_of, read_manifest, read_weights
from bindllm.report.page import ReportData, draw_thumbnails, render_page, shown_rows
from bindllm.report.summary import KEYS, variant_names

METRICS_FILE = "metrics.json"
PAGE_FILE = "report.html"
ROW_FILES = {task: f"report/{task}.jsonl" for task in ("captions", "answers", "episodes")}
LOG_FILE = "report/log.csv"
FACTS_FILE = "report/facts.json"
THUMBNAILS_FILE = "report/thumbnails.json"
SECONDS = ("embed", "train", "evaluate")

# About a file of a report that cannot be read.
_ADVICE = "write the report again with bindllm fit"

_PACKAGES = ("bindllm", "torch", "transformers", "lightning")


def software_versions() -> dict[str, str]:
    """Return the versions of Python and of the installed packages that metrics depend on."""
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return versions


def git_revision(folder: str | Path = ".") -> str | None:
    """Return the commit that is checked out around a folder, or None.

    Whether files differ from it is not asked: to compare them, git runs commands that ``.git/config`` names, and the
    folder may come from someone else.
    """
    try:
        # `rev-parse` compares no files, so it starts no filter, hook or pager of the repository.
        done = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=folder, capture_output=True, text=True, timeout=10, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip()[:12] if done.returncode == 0 else None


@dataclass
class RunFacts:
    """Facts of a run other than its metrics, rows, log, recipe and gates. All JSON-able.

    Args:
        parameters: a row per parameter group: ``group``, ``tensors``, ``parameters``, ``trainable``.
        data: the fields of a `bindllm.data.report.DataReport`.
        licenses: a row per part: ``part``, ``name``, ``license``.
        problems: the error of each measurement that failed.
    """

    title: str = "bindllm run"
    parameters: list[dict[str, Any]] = field(default_factory=list)
    data: dict[str, Any] = field(default_factory=dict)
    licenses: list[dict[str, str]] = field(default_factory=list)
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
    rows: Mapping[str, Sequence[Mapping[str, Any]]],
    log: str | Path | None = None,
) -> Path:
    """Write ``metrics.json``, the files that the page is made from, and the page.

    Args:
        metrics: the content of ``metrics.json``: ``tasks`` (the metrics of each variant of each task, None if not
            defined; see `bindllm.report.summary.KEYS`), ``seconds`` (``embed``, ``train``, ``evaluate``) and
            ``trainable_parameters``.
        rows: held-out rows by task, as in `bindllm.evaluation.task.Evaluation.rows`.
        log: CSV file with the columns ``step``, ``train_loss`` and ``val_loss``, or None.

    Returns:
        the path of the page.

    Raises:
        InputError: a metric is missing; nothing was written.
        MissingExtraError: matplotlib is not installed; everything but the page was written.
    """
    folder = Path(folder)
    _check_metrics(metrics, source="metrics")
    # Metrics first: they are complete even if an image or matplotlib fails below.
    write_json(folder / METRICS_FILE, dict(metrics))
    for task, name in ROW_FILES.items():
        if task in metrics["tasks"]:
            lines = (json.dumps(dict(row), ensure_ascii=False) + "\n" for row in rows.get(task, ()))
            _write(folder / name, "".join(lines))
        else:
            # Rows of an earlier run in the same folder would be shown as this run's.
            (folder / name).unlink(missing_ok=True)
    # Paths of rows start at the project of the checkpoint, wherever this process runs.
    resolve = partial(resolve_path, home=home_of(folder, read_manifest(folder)))
    shown = [dict(row) for own in rows.values() for row in shown_rows(own)]
    write_json(folder / THUMBNAILS_FILE, draw_thumbnails(shown, resolve))
    _write(folder / FACTS_FILE, json.dumps(asdict(facts), indent=2, ensure_ascii=False) + "\n")
    # A log of an earlier run in the same folder would be drawn as this run's.
    if log is None:
        (folder / LOG_FILE).unlink(missing_ok=True)
    else:
        with atomic_file(folder / LOG_FILE) as part:
            shutil.copyfile(log, part)
    return rebuild_report(folder)


def rebuild_report(folder: str | Path) -> Path:
    """Make the page again from the files in a checkpoint folder, and return its path.

    An image without a thumbnail in the folder becomes a gray tile with its name.

    Raises:
        CheckpointError: the folder is not a checkpoint folder.
        InputError: the folder holds no report, or one of its files is damaged.
        MissingExtraError: matplotlib is not installed.
    """
    folder = Path(folder)
    try:
        page = render_page(_read_data(folder))
    except BindLLMError:
        raise
    # Each file can be read, but its values may have any shape: the folder may come from someone else.
    except (LookupError, TypeError, AttributeError, ValueError, TemplateError) as error:
        raise InputError(f"the report in {folder} is damaged ({error!r}); {_ADVICE}") from error
    # The page is the last file: a report that has one is complete.
    _write(folder / PAGE_FILE, page)
    return folder / PAGE_FILE


def _read_data(folder: Path) -> ReportData:
    """Read the content of a page from the files in a folder."""
    manifest = read_manifest(folder)
    metrics, facts = (read_json(folder / name, InputError, _ADVICE) for name in (METRICS_FILE, FACTS_FILE))
    _check_metrics(metrics, source=str(folder / METRICS_FILE))
    # Facts that were not recorded must not be replaced by those of this machine and this moment.
    unknown = RunFacts(finished="unknown", software={}, revision=None)
    log = list(csv.DictReader(_read_lines(folder / LOG_FILE))) if (folder / LOG_FILE).exists() else []
    recipe, thumbnails = folder / "recipe.yaml", folder / THUMBNAILS_FILE
    return ReportData(
        metrics=metrics,
        rows={
            task: _read_rows(folder / name) for task, name in ROW_FILES.items() if task in metrics["tasks"]
        },
        # Older folders lack newer facts.
        facts={**asdict(unknown), **facts},
        training=_series(log, "train_loss"),
        validation=_series(log, "val_loss"),
        gates=_read_gates(folder, manifest),
        recipe="".join(_read_lines(recipe)) if recipe.exists() else "",
        thumbnails=read_json(thumbnails, InputError, _ADVICE) if thumbnails.exists() else {},
    )


def _check_metrics(metrics: Mapping[str, Any], *, source: str) -> None:
    # Every task needs all variants and keys; a metric that is not defined is None, not missing.
    tasks = metrics.get("tasks") or {}
    missing = [] if tasks else ["tasks"]
    if unknown := [task for task in tasks if task not in VARIANTS]:
        raise InputError(f"{source} has unknown tasks {', '.join(unknown)}; expected {', '.join(VARIANTS)}")
    for task, variants in tasks.items():
        missing += [
            f"tasks.{task}.{name}.{key}"
            for name in variant_names(task, variants)
            for key in KEYS[task]
            if key not in variants.get(name, ())
        ]
    # All gaps are named at once: a run of hours should fail here only once.
    missing += [f"seconds.{key}" for key in SECONDS if key not in metrics.get("seconds", ())]
    missing += [name for name in ("trainable_parameters",) if name not in metrics]
    if missing:
        raise InputError(f"{source} lacks {', '.join(missing)}; give every metric, None if it is not defined")


def _write(file: Path, text: str) -> None:
    with atomic_file(file) as part:
        # File names may hold bytes that are not UTF-8; they are written as \udc.., and JSON reads them back unchanged.
        part.write_text(text, encoding="utf-8", errors="backslashreplace")


def _read_rows(file: Path) -> list[dict[str, Any]]:
    try:
        return [json.loads(line) for line in _read_lines(file)]
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file} is damaged ({error}); {_ADVICE}") from error


def _read_lines(file: Path) -> list[str]:
    """Return the lines of a file with their ends, as they are: a quoted cell may hold line breaks."""
    require_file(file, InputError, _ADVICE)
    with file.open(newline="", encoding="utf-8") as stream:
        return list(stream)


def _series(log: Sequence[Mapping[str, str]], column: str) -> list[tuple[int, float]]:
    """Return the finite values of a column with their steps; most rows of a log lack some of its columns."""
    points = [(int(row["step"]), float(row[column])) for row in log if row.get(column) and row.get("step")]
    return [(step, value) for step, value in points if math.isfinite(value)]


def _read_gates(folder: Path, manifest: dict[str, Any]) -> np.ndarray:
    """Return the gates as the injection applies them: kinds ``value`` and ``attend`` put them through tanh."""
    gates = read_weights(folder, manifest)["injection.gates"].float()
    return (torch.tanh(gates) if manifest["inject"]["kind"] in ("value", "attend") else gates).numpy()
