"""``bindllm validate`` and ``bindllm test``: the loss of a trained model on a split of its recipe."""

from __future__ import annotations

import sys
from pathlib import Path

from bindllm.cli.recipe import RecipeCLI, quiet
from bindllm.errors import InputError
from bindllm.model.checkpoint import MANIFEST


def validate(args: list[str]) -> int:
    """Print the loss on the validation split."""
    return _measure("validate", args)


def test(args: list[str]) -> int:
    """Print the loss on the test split."""
    return _measure("test", args)


def _measure(verb: str, args: list[str]) -> int:
    """Run a trained model over a split: the folder that the recipe writes, or one that the command line names."""
    with quiet():
        cli = RecipeCLI(verb, args)
        module = cli.model
        # A second stage's own init_from is where its training began, not what came of it.
        if not any(option.partition("=")[0] == "--model.init_from" for option in args):
            module.init_from = cli.config.output
        if not (Path(module.init_from) / MANIFEST).is_file():
            raise InputError(
                f"{module.init_from} holds no trained model: run bindllm fit first, or name another checkpoint "
                "folder with --model.init_from"
            )
        watched = sys.stdout.isatty()
        trainer = cli.make_trainer(logger=False, enable_checkpointing=False, enable_progress_bar=watched)
        run = trainer.validate if verb == "validate" else trainer.test
        losses = run(module, cli.datamodule, verbose=False)
    if not losses or not losses[0]:
        split = "validation" if verb == "validate" else verb
        raise InputError(
            f"there are no rows to {verb} with: no source of the recipe has any of split {split}. Name such a split in "
            "its rows, hold some out (held_out), or add a source with split: " + split
        )
    for name, loss in losses[0].items() if trainer.is_global_zero else ():
        print(f"{name} {loss:.4f}")
    return 0
