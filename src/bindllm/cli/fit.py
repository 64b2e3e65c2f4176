"""``bindllm fit``, ``embed``, ``validate`` and ``test``: the commands that run a recipe."""

from __future__ import annotations

import importlib.util
import sys
from functools import partial
from pathlib import Path

from lightning.pytorch import Trainer
from rich.console import Console

from bindllm.cli.processes import graceful_stop, launch, wait_for_rank_zero
from bindllm.cli.recipe import RecipeCLI, quiet
from bindllm.errors import InputError
from bindllm.model.checkpoint import MANIFEST
from bindllm.training.callbacks import ParameterTable, RunLog, RunProgress, SampleCaptions
from bindllm.training.run import Run, lock_output, make_loggers, run_folder
from bindllm.training.state import AtomicCheckpointIO, RunState

REPORT_PACKAGES = ("torchmetrics", "pycocoevalcap", "matplotlib")


def fit(args: list[str]) -> int:
    """Train a model from a recipe, and write a checkpoint folder with its report."""
    console = Console(highlight=False)
    # Said before hours of training; the model itself needs none of them.
    if missing := [name for name in REPORT_PACKAGES if importlib.util.find_spec(name) is None]:
        console.print(
            f"{', '.join(missing)} not installed: the model will be trained and saved, but its report will be "
            "incomplete. For the report: pip install 'bindllm[report]'",
            markup=False,
        )
    with quiet():
        cli = RecipeCLI("fit", args)
        if not cli.model.trainable:
            raise InputError(
                "model.trainable is empty: nothing would be trained; name groups, such as [bind, inject]"
            )
        config = cli.config
        folder = run_folder(config.output, init_from=config.model.init_from)
        rehearses = bool(cli.trainer_options.get("fast_dev_run"))
        if rehearses:
            # A rehearsal must not touch the state of a real run.
            folder = folder.with_name(f".{folder.name}.fast_dev_run")
        state = RunState(folder, RunLog(folder), every_seconds=config.save_every_seconds)
        trainer = _trainer(cli, state)
        output = Path(config.output)
        # From here on no second command can rename or continue this run. A rehearsal writes only its own folder.
        with lock_output(folder if rehearses else output):
            run = Run(cli.model, cli.datamodule, trainer, state, output, cli.resolved(), console)
            if rehearses:
                folder.mkdir(parents=True, exist_ok=True)
                return run.rehearse()
            return run.train(resume=config.resume, overwrite=config.overwrite, wait=wait_for_rank_zero)


def embed(args: list[str]) -> int:
    """Embed the media of all splits of a recipe, and print how much was read and embedded.

    The recipe's trainer chooses devices and nodes. A stopped command resumes, with any number of processes.
    """
    with quiet(), graceful_stop():
        cli = RecipeCLI("embed", args)
        data = cli.datamodule
        # Problems of the sources are reported once, before there are further processes to report them too.
        data.read()
        # The other processes run this command again, from its start.
        first = launch(cli.trainer_options, data.embed, again=partial(embed, args))
        if not first:
            return 0
        # Only rank 0 reads the store again, to print what all processes have done.
        data.setup()
    Console().print(data.report)
    return 0


def validate(args: list[str]) -> int:
    """Print the loss on the validation split."""
    return _measure("validate", "validation", args)


def test(args: list[str]) -> int:
    """Print the loss on the test split."""
    return _measure("test", "test", args)


def _measure(command: str, split: str, args: list[str]) -> int:
    """Measure the loss of a trained model: the checkpoint that the recipe writes, or one that the command names."""
    with quiet():
        cli = RecipeCLI(command, args)
        module = cli.model
        # The recipe's own init_from names the weights before training, not the trained ones.
        if not any(option.partition("=")[0] == "--model.init_from" for option in args):
            module.init_from = cli.config.output
        if not (Path(module.init_from) / MANIFEST).is_file():
            raise InputError(
                f"{module.init_from} holds no trained model: run bindllm fit first, or name another checkpoint "
                "folder with --model.init_from"
            )
        trainer = cli.make_trainer(
            logger=False, enable_checkpointing=False, enable_progress_bar=sys.stdout.isatty()
        )
        # Through the same loop as the validations of a run, so the losses can be compared.
        run = trainer.validate if command == "validate" else trainer.test
        losses = run(module, cli.datamodule, verbose=False)
    if not losses or not losses[0]:
        raise InputError(
            f"there are no rows to {command} with: no source of the recipe has any rows of split {split}. Name such a "
            f"split in its rows, hold some out (held_out), or add a source with split: {split}"
        )
    for name, loss in losses[0].items() if trainer.is_global_zero else ():
        print(f"{name} {loss:.4f}")
    return 0


def _trainer(cli: RecipeCLI, state: RunState) -> Trainer:
    """Build the recipe's trainer with the callbacks and loggers of every run."""
    options = cli.trainer_options
    captions = SampleCaptions(state.run_log)
    callbacks = [ParameterTable(), captions, state]
    if options.get("enable_progress_bar") is not False:
        # After the captions, which it prints; before the state, which Lightning runs last in any case.
        callbacks.insert(2, RunProgress(captions))
    # A recipe may add plugins, such as a cluster environment, next to ours for states.
    plugins = options.get("plugins") or []
    return cli.make_trainer(
        callbacks=callbacks,
        default_root_dir=state.folder,
        enable_checkpointing=True,
        logger=[state.run_log, *make_loggers(options.get("logger"), state.folder)],
        plugins=[*(plugins if isinstance(plugins, list | tuple) else [plugins]), AtomicCheckpointIO()],
    )
