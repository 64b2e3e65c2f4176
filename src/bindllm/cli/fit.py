"""``bindllm fit``: train, save the checkpoint folder, measure it, and write the report."""

from __future__ import annotations

import importlib.util
import signal
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from bindllm.atomic import atomic_file, remove_leftovers
from bindllm.cli.processes import wait_for_rank_zero
from bindllm.cli.recipe import RecipeCLI, quiet
from bindllm.cli.runs import RECIPE, lock_run, open_run, run_folder
from bindllm.errors import BindLLMError, InputError, printable
from bindllm.evaluation.held_out import evaluate_held_out, held_out_rows
from bindllm.evaluation.task import Evaluation
from bindllm.model.checkpoint import licenses
from bindllm.report.report import RunFacts, write_report
from bindllm.report.summary import media_words, summarize
from bindllm.training.callbacks import ParameterTable, SampleCaptions
from bindllm.training.optim import describe_groups
from bindllm.training.progress import RunProgress
from bindllm.training.runlog import METRICS, RunLog
from bindllm.training.state import AtomicCheckpointIO, Interrupted, RunState, map_write_errors

SHOWN_ROWS = 5
SHUFFLED_LIMIT = 1000
"""Held-out questions that are asked about wrong pictures; more would take long and say the same."""
REPORT_PACKAGES = ("torchmetrics", "pycocoevalcap", "matplotlib")


def fit(args: list[str]) -> int:
    """Train as a recipe says, and leave a checkpoint folder with its report."""
    console = Console(highlight=False)
    if missing := [name for name in REPORT_PACKAGES if importlib.util.find_spec(name) is None]:
        console.print(
            f"{', '.join(missing)} not installed: the model will be trained and saved, but its report will not be "
            "whole. For the report: pip install 'bindllm[report]'",
            markup=False,
        )
    with quiet():
        cli = RecipeCLI("fit", args)
        if not cli.model.trainable:
            raise InputError(
                "model.trainable is empty: nothing would be trained; name groups, such as [bind, inject]"
            )
        folder = run_folder(cli.config.output, init_from=cli.config.model.init_from)
        state = RunState(folder, RunLog(folder), every_seconds=cli.config.save_every_seconds)
        trainer = _trainer(cli, state)
        with lock_run(folder):
            return _run(cli, state, trainer, console)


def _run(cli: RecipeCLI, state: RunState, trainer: Trainer, console: Console) -> int:
    """Train, save and measure in a run's folder that nobody else uses; return the exit code."""
    output, recipe, folder = Path(cli.config.output), cli.resolved(), state.folder
    # Processes that Lightning starts for further devices find the folder as the first one made it ready.
    if rank_zero_only.rank == 0:
        open_run(folder, recipe, resume=cli.config.resume, say=partial(console.print, markup=False))
    wait_for_rank_zero(trainer)
    handler = signal.getsignal(signal.SIGINT)
    try:
        going_on = state.last if state.last.exists() else None
        trainer.fit(cli.model, cli.datamodule, ckpt_path=going_on, weights_only=True)
    except Interrupted as stop:
        console.print(f"{stop}; the same command goes on from there")
        return 130
    except SystemExit as stop:
        # So Lightning ends after a Ctrl-C in the midst of something (embedding, say), and ignores further ones.
        signal.signal(signal.SIGINT, handler)
        raise KeyboardInterrupt from stop
    if not trainer.is_global_zero:
        return 0
    model = cli.model.model
    if (best := state.best_weights()) is not None:
        model.load_trainable_state(best, source=str(folder))
    # The run's folder is this process's alone, and so is the checkpoint's: what is there, a kill has left.
    remove_leftovers(output)
    with map_write_errors(output):
        model.save_pretrained(output, data=_data_names(cli))
        with atomic_file(output / RECIPE) as part:
            part.write_text(recipe, encoding="utf-8")
    # From here on the trained folder is safe, whatever the measurement does.
    model.to(trainer.strategy.root_device)
    code = _measure(cli, state, console)
    state.forget()
    return code


def _trainer(cli: RecipeCLI, state: RunState) -> Trainer:
    """Build the recipe's trainer with what every run keeps and shows."""
    options = cli.trainer_options
    captions = SampleCaptions(state.run_log)
    callbacks = [ParameterTable(), captions, state]
    if options.get("enable_progress_bar") is not False:
        callbacks.insert(2, RunProgress(captions))
    return cli.make_trainer(
        callbacks=callbacks,
        default_root_dir=state.folder,
        enable_checkpointing=True,
        logger=[state.run_log, *_loggers(options.get("logger"), state.folder)],
        plugins=[*_as_list(options.get("plugins")), AtomicCheckpointIO()],
    )


def _loggers(chosen: Any, folder: Path) -> list[Logger]:
    """Return the recipe's loggers; by default TensorBoard, where it is installed."""
    if chosen is False:
        return []
    if chosen not in (None, True):
        return _as_list(chosen)
    if importlib.util.find_spec("tensorboard") is None:
        print(
            "tensorboard is not installed (pip install 'bindllm[report]'): the run is logged to metrics.csv alone"
        )
        return []
    return [TensorBoardLogger(folder, name="", version="")]


def _as_list(value: Any) -> list[Any]:
    if value is None:
        return []
    return list(value) if isinstance(value, list | tuple) else [value]


def _data_names(cli: RecipeCLI) -> list[str]:
    return [source.path for source in cli.datamodule.sources]


def _measure(cli: RecipeCLI, state: RunState, console: Console) -> int:
    """Measure the trained model, write its report, and say how it went; return the exit code."""
    data, model, output = cli.datamodule, cli.model.model, Path(cli.config.output)
    console.print(f"trained model: {output}", markup=False)
    held_out = held_out_rows(data.samples)
    if not held_out:
        console.print("there are no held-out rows, so nothing is measured and there is no report")
        return 0
    try:
        measured = evaluate_held_out(
            model,
            held_out,
            train_samples=data.samples("train"),
            lookup=data.lookup,
            shuffled_limit=SHUFFLED_LIMIT,
            progress=console.is_terminal,
        )
        groups = describe_groups(model.parameter_groups())
        seconds = {**state.seconds, "evaluate": measured.seconds}
        metrics = {
            "tasks": measured.metrics,
            "seconds": {name: round(value, 1) for name, value in seconds.items()},
            "trainable_parameters": sum(row["parameters"] for row in groups if row["trainable"]),
        }
        facts = RunFacts(
            title=output.name,
            parameters=groups,
            data=asdict(data.report),
            licenses=licenses(model.describe(), data=_data_names(cli)),
            problems=measured.problems,
            device=str(model.device),
        )
        log = state.folder / METRICS
        page = write_report(output, metrics=metrics, facts=facts, rows=measured.rows, log=log)
    except BindLLMError as error:
        console.print(f"the report is not complete: {error}", style="yellow", markup=False)
        return 1
    _summary(console, metrics, measured, page, modalities=data.report.modalities)
    return 0


def _summary(
    console: Console, metrics: dict[str, Any], measured: Evaluation, page: Path, *, modalities: set[str]
) -> None:
    """Print the headline, a few captions and answers, and where everything is."""
    console.print(f"report:        {page}\n", markup=False)
    num_captions = len(measured.rows.get("captions", ()))
    for sentence in summarize(metrics, num_captions=num_captions, modalities=modalities):
        console.print(sentence, markup=False)
    for rows in measured.rows.values():
        if rows:
            console.print(_shown(rows, modalities))


def _shown(rows: list[dict[str, Any]], modalities: set[str]) -> Table:
    """Return a table of a few held-out rows, evenly spread."""
    # Shares of the width: a long caption of one column must not squeeze the others out.
    table = Table(box=box.SIMPLE, expand=True)
    table.add_column(f"held-out {media_words(modalities)[0]}", ratio=1, overflow="fold")
    asked = "question" in rows[0]
    if asked:
        table.add_column("question", ratio=2)
    table.add_column("true", ratio=1)
    table.add_column("generated", ratio=1, no_wrap=True, overflow="ellipsis")
    step = max(1, len(rows) // SHOWN_ROWS)
    for row in rows[::step][:SHOWN_ROWS]:
        question = (row["question"],) if asked else ()
        cells = (Path(row["media"] or "").name, *question, row["references"][0], row["model"] or "")
        table.add_row(*(Text(printable(cell)) for cell in cells))
    return table
