"""``bindllm align``: train an encoder of a new modality for the joint space of another encoder."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.cli import LightningArgumentParser
from rich import box
from rich.console import Console
from rich.table import Table

from bindllm.cli.recipes.recipe import RecipeCLI, add_overwrite, quiet
from bindllm.encoders.aligned import MANIFEST
from bindllm.errors import InputError
from bindllm.training.align.data import AlignData
from bindllm.training.align.module import METRICS, RECALL_AT, AlignModule, save_aligned
from bindllm.training.callbacks import AverageWeights, RunProgress, check_monitors, check_trainer
from bindllm.training.optim import describe_groups
from bindllm.training.run import check_output, lock_output


class AlignCLI(RecipeCLI):
    """Reads the recipe of an alignment, which has a module and data of its own."""

    kinds = (AlignModule, AlignData)
    example = "recipes/align-text.yaml"

    def __init__(self, args: Sequence[str]) -> None:
        super().__init__("align", args)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the folder, and link the encoders to the data."""
        parser.add_argument(
            "--output", type=str, required=True, help="folder of the encoder that the run writes"
        )
        add_overwrite(parser)
        parser.link_arguments("seed_everything", "data.seed", compute_fn=int)
        parser.link_arguments("model.tower", "data.tower", apply_on="instantiate")
        parser.link_arguments("model.target", "data.target", apply_on="instantiate")


def align(args: list[str]) -> int:
    """Train from a recipe, measure on held-out pairs, and write the folder of the encoder."""
    with quiet(), ExitStack() as held:
        cli = AlignCLI(args)
        output, model, data = Path(cli.config.output), cli.model, cli.datamodule
        # Everything that can refuse the run comes before the first file is embedded.
        _check_output(output, model, data)
        rehearses = bool(cli.trainer_options.get("fast_dev_run"))
        if not rehearses:
            held.enter_context(lock_output(output))
        replaced = (output / MANIFEST).is_file()
        if replaced and not (cli.config.overwrite or rehearses):
            raise InputError(
                f"output {output} holds an aligned encoder, which this run would replace. Choose another --output, or "
                "replace it with --overwrite"
            )
        started = time.perf_counter()
        trainer = _trainer(cli)
        # Lightning attaches it only in `fit`; reading the pairs needs its devices before.
        data.trainer = trainer
        # Before `fit`, so that the report of the data is printed before the first step.
        data.setup()
        check_trainer(trainer, num_validation=data.report.pairs["validation"])
        if trainer.is_global_zero:
            for line in data.report.lines():
                print(line)
        try:
            trainer.fit(model, data)
        except SystemExit as stop:
            # Lightning exits like this after a Ctrl-C.
            raise KeyboardInterrupt from stop
        if not trainer.is_global_zero:
            return 0
        if rehearses:
            print("fast_dev_run: the steps ran without an error; nothing was saved")
            return 0
        # Measured and saved with the weights of the best epoch; the test split has chosen nothing.
        best = model.take_best()
        metrics = {
            "validation": best.metrics,
            "test": model.measure(data, "test"),
            "epoch": best.epoch,
            "epochs": trainer.current_epoch,
            "temperature": round(1 / model.temperature().item(), 4),
            "pairs": data.report.pairs,
            "skipped": data.report.skipped.total,
            "trained_parameters": sum(row["parameters"] for row in describe_groups(model.groups())),
            "seconds": round(time.perf_counter() - started, 1),
        }
        save_aligned(output, model, data, metrics=metrics, recipe=cli.resolved())
    _print(output, metrics, replaced=replaced)
    # A class outside bindllm must be allowed by whoever loads the folder.
    foreign = type(model.tower)
    if not foreign.__module__.startswith("bindllm."):
        name = f"{foreign.__module__}.{foreign.__qualname__}"
        print(
            f"it uses {name}, which is imported only if it is allowed: allow: [{name}] under init_args, or --allow"
        )
    return 0


def _check_output(output: Path, model: AlignModule, data: AlignData) -> None:
    """Refuse an output that the run cannot replace."""
    # Tower and target may be folders of earlier runs; a frozen one is part of the result.
    parts = [part.config["weights"] for part in (model.tower, model.target) if part.config.get("weights")]
    check_output(output, MANIFEST, kind="an aligned encoder", used=[data.store, *parts])


def _trainer(cli: AlignCLI) -> Trainer:
    """Build the recipe's trainer.

    Raises:
        InputError: a callback monitors an unknown metric, or would have no effect.
    """
    options = cli.trainer_options
    progress = [] if options.get("enable_progress_bar") is False else [RunProgress()]
    trainer = cli.make_trainer(
        callbacks=progress, enable_checkpointing=False, logger=options.get("logger") or False
    )
    if any(isinstance(callback, AverageWeights) for callback in trainer.callbacks):
        raise InputError(
            "AverageWeights has no effect in align, which keeps the best epoch; remove it from trainer.callbacks"
        )
    check_monitors(trainer, METRICS)
    return trainer


def _print(output: Path, metrics: dict[str, Any], *, replaced: bool) -> None:
    """Print the folder of the encoder and how well it retrieves."""
    print(
        f"aligned encoder: {output} (epoch {metrics['epoch']} of {metrics['epochs']}, temperature "
        f"{metrics['temperature']:g}, {metrics['seconds']:.0f} s){', replaced an earlier one' if replaced else ''}"
    )
    split = "test" if metrics["test"] else "validation"
    if not metrics[split]:
        print(
            "there are no held-out pairs, so nothing is measured, and the weights of the last epoch are kept"
        )
        return
    title = f"held-out pairs ({split}): percent, by chance in brackets"
    table = Table(title=title, title_justify="left", box=box.SIMPLE, pad_edge=False, collapse_padding=True)
    for column in ("", "queries", "gallery", *(f"recall@{k}" for k in RECALL_AT), "median\nrank"):
        table.add_column(column, justify="left" if not column else "right", no_wrap=True)
    # Only the directions of retrieval are dictionaries; loss and similarity are numbers.
    for way, found in metrics[split].items():
        if isinstance(found, dict):
            recalls = (
                f"{100 * found[f'recall@{k}']:.1f} ({100 * found[f'chance@{k}']:.1f})" for k in RECALL_AT
            )
            counts = (str(found["queries"]), str(found["gallery"]))
            table.add_row(way.replace("_", " "), *counts, *recalls, f"{found['median_rank']:g}")
    Console().print(table)
