"""The log of a run as two plain files: ``metrics.csv`` and ``captions.jsonl``.

Lightning's own CSV logger deletes the file of an interrupted run; this one appends to it after a resume.
"""

from __future__ import annotations

import csv
import json
from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.loggers import Logger

from bindllm.atomic import atomic_file

METRICS = "metrics.csv"
CAPTIONS = "captions.jsonl"
COLUMNS = ("epoch", "step", "train_loss", "val_loss", "lr", "gradient_norm")
"""First columns of ``metrics.csv``; others follow when they are first logged."""


class RunLog(Logger):
    """Writes each row immediately, so that a killed run keeps its log.

    Args:
        folder: the run's folder.

    Example:
        log = RunLog("runs/quickstart")
        Trainer(logger=[log])
    """

    def __init__(self, folder: str | Path) -> None:
        super().__init__()
        self.folder = Path(folder)
        # Grows with the first row that has another name, see `log_metrics`.
        self._columns = list(COLUMNS)

    @property
    def name(self) -> str:
        """Name of the run."""
        return self.folder.name

    @property
    def version(self) -> str:
        """Empty: a run has one log, also when it was interrupted."""
        return ""

    @property
    def save_dir(self) -> str:
        """The run's folder."""
        return str(self.folder)

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Do nothing: the folder holds the recipe."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Append a row."""
        file, row = self.folder / METRICS, {**metrics, "step": step}
        unknown = [name for name in row if name not in self._columns]
        # A new column means a new header, so the whole file is written again; that is rare.
        if unknown or not file.exists():
            rows = self._rows()
            self._columns += unknown
            self._write(rows)
        # Opened for each row: nothing stays in a buffer that a kill would lose.
        with file.open("a", newline="", encoding="utf-8") as stream:
            csv.DictWriter(stream, self._columns).writerow(row)

    @rank_zero_only
    def log_captions(self, captions: Sequence[Mapping[str, Any]], step: int) -> None:
        """Append captions, each with its step."""
        # One JSON object a line, so that a cut last line costs one answer.
        with (self.folder / CAPTIONS).open("a", encoding="utf-8") as stream:
            for caption in captions:
                stream.write(json.dumps({"step": step, **caption}, ensure_ascii=False) + "\n")

    @rank_zero_only
    def keep_before(self, step: int) -> None:
        """Drop rows logged at or after a step: the run resumes there and will log them again."""
        # A row that was cut by a kill has no step, or one that is not a number.
        rows = [row for row in self._rows() if row["step"].isdigit() and int(row["step"]) < step]
        # Columns that the earlier part of the run has added stay.
        self._columns += [name for row in rows[:1] for name in row if name not in self._columns]
        self._write(rows)
        file = self.folder / CAPTIONS
        if file.exists():
            # Not splitlines(): it also splits at characters that JSON does not escape, such as U+2028.
            lines = file.read_text(encoding="utf-8").split("\n")
            kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] < step]
            with atomic_file(file) as part:
                part.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")

    def _rows(self) -> list[dict[str, str]]:
        file = self.folder / METRICS
        if not file.exists():
            return []
        with file.open(newline="", encoding="utf-8") as stream:
            return list(csv.DictReader(stream, restval=""))

    def _write(self, rows: Sequence[Mapping[str, str]]) -> None:
        with (
            atomic_file(self.folder / METRICS) as part,
            part.open("w", newline="", encoding="utf-8") as stream,
        ):
            writer = csv.DictWriter(stream, self._columns)
            writer.writeheader()
            writer.writerows(rows)
