"""A training run: its folder ``runs/<name>``, training with automatic resume, the checkpoint and its report."""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from bindllm.atomic import atomic_file, remove_leftovers
from bindllm.data.datamodule import BindData
from bindllm.errors import BindLLMError, InputError, printable
from bindllm.evaluation.held_out import evaluate_held_out, held_out_rows
from bindllm.evaluation.task import Evaluation
from bindllm.model.checkpoint import MANIFEST, licenses
from bindllm.report.report import RunFacts, write_report
from bindllm.report.summary import media_words, summarize
from bindllm.training.module import BindModule
from bindllm.training.optim import describe_groups
from bindllm.training.runlog import METRICS
from bindllm.training.state import BEST, LAST, Interrupted, RunState, map_write_errors

RUNS = "runs"
RECIPE = "recipe.yaml"

SHUFFLED_LIMIT = 1000
"""Held-out questions that are asked about media of other rows; more take long and change little."""

_SHOWN_ROWS = 5
_SHOWN_CHANGES = 5
_PROCESSES = ("trainer.devices", "trainer.num_nodes")
# The strategy often changes with the number of processes; it does not change which rows a step sees.
_PLACEMENT = (*_PROCESSES, "trainer.strategy")


def run_folder(output: str | Path, *, init_from: str | Path | None = None) -> Path:
    """Return the folder of the run that writes a checkpoint folder.

    Args:
        output: the checkpoint folder.
        init_from: the checkpoint folder whose weights the run starts with, if any.

    Raises:
        InputError: ``output`` holds other files than a checkpoint, or the checkpoint that the run starts from; it
            would be replaced at the end of the run.
    """
    output = Path(output)
    if init_from is not None and output.resolve() == Path(init_from).resolve():
        raise InputError(
            f"output {output} is model.init_from too: the run would replace its own start, and could not be "
            "run twice with the same result; choose another output"
        )
    if output.is_dir() and any(output.iterdir()) and not (output / MANIFEST).is_file():
        raise InputError(
            f"output {output} is a folder with other content (no {MANIFEST}); choose another one"
        )
    return Path(RUNS) / output.resolve().name


@contextmanager
def lock_run(folder: Path) -> Iterator[None]:
    """Lock the folder against a second run during the block; the lock is released if this process dies.

    Raises:
        InputError: another process is using it.
    """
    if rank_zero_only.rank != 0:
        # Rank 0 of the same run holds the lock.
        yield
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder.with_name(f".{folder.name}.lock"), timeout=0)
    try:
        with lock:
            yield
    except Timeout as error:
        raise InputError(
            f"another run is using {folder}: wait until it ends, or give this one an --output of another name"
        ) from error


def open_run(folder: Path, recipe: str, *, resume: bool = True, say: Callable[[str], Any] = print) -> None:
    """Prepare the folder: afterwards it holds a state if, and only if, the run resumes from it.

    Args:
        folder: the run's folder.
        recipe: the resolved recipe; an interrupted run of the same recipe is resumed.
        resume: False always starts from scratch.
        say: prints a sentence.

    Raises:
        InputError: only the number of processes has changed, which would lose the interrupted run.
    """
    state, earlier = folder / LAST, folder / RECIPE
    if state.exists():
        old = yaml.safe_load(earlier.read_text(encoding="utf-8")) if earlier.exists() else {}
        changes = list(_changes(old, yaml.safe_load(recipe)))
        if resume and not changes:
            for name in (LAST, BEST):
                remove_leftovers(folder / name)
            say(f"resuming the interrupted run in {folder}")
            return
        others = any(change.startswith(_PROCESSES) for change in changes)
        if resume and others and all(change.startswith(_PLACEMENT) for change in changes):
            raise InputError(
                f"the interrupted run in {folder} had another number of processes ({_listed(changes)}), and would see "
                "other rows in each step. Restore it, or start from scratch with --resume false"
            )
        reason = f"the recipe has changed ({_listed(changes)})" if changes else "as asked"
        say(f"starting from scratch: {reason}; the interrupted run is kept in {_aside(folder)}")
    if folder.exists():
        _set_aside(folder)
    with atomic_file(earlier) as part:
        part.write_text(recipe, encoding="utf-8")


def _aside(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.previous")


def _set_aside(folder: Path) -> None:
    """Keep one earlier run; a run without a saved state never replaces a run that has one."""
    aside = _aside(folder)
    if (aside / LAST).exists() and not (folder / LAST).exists():
        shutil.rmtree(folder)
        return
    if aside.exists():
        shutil.rmtree(aside)
    os.replace(folder, aside)


def _changes(old: Any, new: Any, key: str = "") -> Iterator[str]:
    """Yield the differences between two recipes, one entry per key."""
    if isinstance(old, dict) and isinstance(new, dict):
        for name in dict.fromkeys([*old, *new]):
            yield from _changes(old.get(name), new.get(name), f"{key}.{name}" if key else str(name))
    elif old != new:
        yield f"{key}: {old} -> {new}"


def _listed(changes: list[str]) -> str:
    more = f", and {len(changes) - _SHOWN_CHANGES} more" if len(changes) > _SHOWN_CHANGES else ""
    return ", ".join(changes[:_SHOWN_CHANGES]) + more


@dataclass(frozen=True)
class Run:
    """A run in a folder that no other process uses.

    Args:
        module: the model and its objective.
        data: the data.
        trainer: Lightning's trainer; `state` is one of its callbacks.
        state: state, log and folder of the run.
        output: checkpoint folder that the run writes.
        recipe: the resolved recipe.
        console: prints the progress.
    """

    module: BindModule
    data: BindData
    trainer: Trainer
    state: RunState
    output: Path
    recipe: str
    console: Console

    def train(self, *, resume: bool, wait: Callable[[Trainer], None]) -> int:
        """Train, save the checkpoint and measure it.

        Args:
            resume: False starts from scratch even if an interrupted run of the recipe exists.
            wait: waits until rank 0 has prepared the folder.

        Returns:
            the exit code.
        """
        folder = self.state.folder
        if rank_zero_only.rank == 0:
            open_run(folder, self.recipe, resume=resume, say=partial(self.console.print, markup=False))
        wait(self.trainer)
        handler = signal.getsignal(signal.SIGINT)
        try:
            last = self.state.last if self.state.last.exists() else None
            self.trainer.fit(self.module, self.data, ckpt_path=last, weights_only=True)
        except Interrupted as stop:
            self.console.print(f"{stop}; the same command resumes the run")
            return 130
        except SystemExit as stop:
            # Lightning exits like this after a Ctrl-C outside of a training step, and ignores further ones.
            signal.signal(signal.SIGINT, handler)
            raise KeyboardInterrupt from stop
        if not self.trainer.is_global_zero:
            return 0
        self._save()
        # From here on the checkpoint is safe, whatever the evaluation does.
        self.module.model.to(self.trainer.strategy.root_device)
        code = self._measure()
        self.state.forget()
        return code

    def _save(self) -> None:
        """Write the best weights and the recipe to the checkpoint folder."""
        model = self.module.model
        if (best := self.state.best_weights()) is not None:
            model.load_trainable_state(best, source=str(self.state.folder))
        # No other process writes to the checkpoint folder: temporary files in it are leftovers of a killed one.
        remove_leftovers(self.output)
        with map_write_errors(self.output):
            model.save_pretrained(self.output, data=self._data_names)
            with atomic_file(self.output / RECIPE) as part:
                part.write_text(self.recipe, encoding="utf-8")

    @property
    def _data_names(self) -> list[str]:
        return [source.path for source in self.data.sources]

    def _measure(self) -> int:
        """Evaluate the trained model, write its report and print a summary; return the exit code."""
        self.console.print(f"trained model: {self.output}", markup=False)
        held_out = held_out_rows(self.data.samples)
        if not held_out:
            self.console.print("no held-out rows: nothing is measured, and no report is written")
            return 0
        try:
            measured = evaluate_held_out(
                self.module.model,
                held_out,
                train_samples=self.data.samples("train"),
                lookup=self.data.lookup,
                shuffled_limit=SHUFFLED_LIMIT,
                progress=self.console.is_terminal,
            )
            metrics, page = self._report(measured)
        except BindLLMError as error:
            self.console.print(f"the report is not complete: {error}", style="yellow", markup=False)
            return 1
        print_summary(self.console, metrics, measured, page, modalities=self.data.report.modalities)
        return 0

    def _report(self, measured: Evaluation) -> tuple[dict[str, Any], Path]:
        """Write the report; return the metrics and the page."""
        model = self.module.model
        groups = describe_groups(model.parameter_groups())
        seconds = {**self.state.seconds, "evaluate": measured.seconds}
        metrics = {
            "tasks": measured.metrics,
            "seconds": {name: round(value, 1) for name, value in seconds.items()},
            "trainable_parameters": sum(row["parameters"] for row in groups if row["trainable"]),
        }
        facts = RunFacts(
            title=self.output.name,
            parameters=groups,
            data=asdict(self.data.report),
            licenses=licenses(model.describe(), data=self._data_names),
            problems=measured.problems,
            device=str(model.device),
        )
        log = self.state.folder / METRICS
        return metrics, write_report(self.output, metrics=metrics, facts=facts, rows=measured.rows, log=log)


def make_loggers(chosen: Any, folder: Path) -> list[Logger]:
    """Return the loggers that a recipe chooses; by default TensorBoard, if it is installed."""
    if chosen is False:
        return []
    if chosen not in (None, True):
        return list(chosen) if isinstance(chosen, list | tuple) else [chosen]
    if importlib.util.find_spec("tensorboard") is None:
        print(
            "tensorboard is not installed (pip install 'bindllm[report]'): the run is logged to metrics.csv only"
        )
        return []
    return [TensorBoardLogger(folder, name="", version="")]


def print_summary(
    console: Console, metrics: dict[str, Any], measured: Evaluation, page: Path, *, modalities: set[str]
) -> None:
    """Print the headline, a few captions and answers, and the path of the report."""
    console.print(f"report:        {page}\n", markup=False)
    num_captions = len(measured.rows.get("captions", ()))
    for sentence in summarize(metrics, num_captions=num_captions, modalities=modalities):
        console.print(sentence, markup=False)
    for rows in measured.rows.values():
        if rows:
            console.print(_shown(rows, modalities))


def _shown(rows: list[dict[str, Any]], modalities: set[str]) -> Table:
    """Return a table of a few held-out rows, evenly spread."""
    # Relative widths: a long caption in one column must not squeeze the others.
    table = Table(box=box.SIMPLE, expand=True)
    table.add_column(f"held-out {media_words(modalities)[0]}", ratio=1, overflow="fold")
    asked = "question" in rows[0]
    if asked:
        table.add_column("question", ratio=2)
    table.add_column("true", ratio=1)
    table.add_column("generated", ratio=1, no_wrap=True, overflow="ellipsis")
    step = max(1, len(rows) // _SHOWN_ROWS)
    for row in rows[::step][:_SHOWN_ROWS]:
        question = (row["question"],) if asked else ()
        cells = (Path(row["media"] or "").name, *question, row["references"][0], row["model"] or "")
        table.add_row(*(Text(printable(cell)) for cell in cells))
    return table
