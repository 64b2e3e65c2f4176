"""Loggers of a run, such as TensorBoard, W&B and MLflow: the recipe, captions and final metrics go to all of them.

Lightning itself sends them the losses. A logger that fails, such as one without a network, costs no run.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.loggers import Logger, MLFlowLogger, TensorBoardLogger, WandbLogger

_log = logging.getLogger("bindllm")

HELD_OUT = "held_out"
"""Prefix of the metrics of held-out rows."""


def make_loggers(chosen: Any, folder: Path) -> list[Logger]:
    """Return the loggers that a recipe chooses; by default TensorBoard, if it is installed."""
    if chosen is False:
        return []
    if chosen not in (None, True):
        return list(chosen) if isinstance(chosen, list | tuple) else [chosen]
    # Found, not imported: importing it takes seconds.
    if importlib.util.find_spec("tensorboard") is None:
        print(
            "tensorboard is not installed (pip install 'bindllm[report]'): the run is logged to metrics.csv only"
        )
        return []
    return [TensorBoardLogger(folder, name="", version="")]


@rank_zero_only
def log_recipe(loggers: Iterable[Logger], recipe: Mapping[str, Any]) -> None:
    """Send the resolved recipe as hyperparameters."""
    for logger in loggers:
        _attempt(logger, lambda logger: logger.log_hyperparams(dict(recipe)))


@rank_zero_only
def log_results(loggers: Iterable[Logger], metrics: Mapping[str, Any], *, step: int) -> None:
    """Send the metrics of held-out rows, such as ``held_out/captions/model/cider``; only numbers are sent."""
    flat = dict(_flat(metrics, HELD_OUT))
    for logger in loggers:
        _attempt(logger, lambda logger: logger.log_metrics(flat, step=step))


@rank_zero_only
def log_captions(loggers: Iterable[Logger], captions: Sequence[Mapping[str, str]], *, step: int) -> None:
    """Send sample answers to loggers that take texts."""
    columns = list(dict.fromkeys(name for row in captions for name in row))
    rows = [[row.get(name, "") for name in columns] for row in captions]
    # A cell must not end its row.
    cells = [[" ".join(cell.replace("|", "/").split()) for cell in row] for row in rows]
    table = "\n".join(f"| {' | '.join(line)} |" for line in (columns, ["---"] * len(columns), *cells))
    for logger in loggers:
        _attempt(logger, lambda logger: _log_table(logger, table, columns, rows, step))


def _log_table(logger: Logger, table: str, columns: list[str], rows: list[list[str]], step: int) -> None:
    match logger:
        case TensorBoardLogger():
            logger.experiment.add_text("captions", table, step)
        case WandbLogger():
            logger.log_text(key="captions", columns=columns, data=rows, step=step)
        case MLFlowLogger():
            logger.experiment.log_text(logger.run_id, table, f"captions/{step}.md")
        # Of a package that may not be installed.
        case _ if type(logger).__name__ == "SwanLabLogger":
            logger.log_text("captions", [table], step)


def _attempt(logger: Logger, work: Callable[[Logger], Any]) -> None:
    try:
        work(logger)
    # A server may fail in any way.
    except Exception as error:
        _log.warning("%s could not log: %s", type(logger).__name__, error)


def _flat(values: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, float]]:
    for name, value in values.items():
        key = f"{prefix}/{name}"
        if isinstance(value, Mapping):
            yield from _flat(value, key)
        elif isinstance(value, int | float):
            yield key, float(value)
