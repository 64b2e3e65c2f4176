"""``bindllm check``: all problems of a recipe, a checkpoint folder or an encoder at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jsonargparse.typing import NonNegativeInt
from rich.console import Console

from bindllm.cli.arguments import refuse_together
from bindllm.cli.options import build_encoder, encoder_folder, read_media
from bindllm.cli.recipes.recipe import CheckedRecipe, quiet
from bindllm.errors import CheckpointError, UsageError, printable_lines
from bindllm.model.checkpoint import MANIFEST
from bindllm.testing import check_encoder
from bindllm.training.callbacks import check_trainer
from bindllm.training.memory import memory_lines, plan_run
from bindllm.training.preflight import CheckedParts, Problems, check_checkpoint, check_recipe


@dataclass(frozen=True)
class EncoderCheckOptions:
    """Encoder or checkpoint."""

    media: tuple[str, ...] = ()
    """FILE or MODALITY:FILE to check the encoder with; repeat it, at least two of a modality"""
    allow: tuple[str, ...] = ()
    """import path of a class outside bindllm that the folder may name; may be repeated"""


@dataclass(frozen=True)
class RecipeCheckOptions:
    """Recipe."""

    rows: NonNegativeInt = 3
    """number of training rows to print with their label mask"""
    memory: bool = False
    """estimate the memory that each device needs, before any weight is loaded"""
    memory_limit: str | None = None
    """memory of a device, such as 24GB (default: that of this machine)"""


def check(
    *,
    config: str | None = None,
    folder: str | None = None,
    encoder: str | None = None,
    recipe_options: RecipeCheckOptions = RecipeCheckOptions(),
    encoder_options: EncoderCheckOptions = EncoderCheckOptions(),
    overrides: Sequence[str] = (),
) -> int:
    """Find all problems of a recipe, a checkpoint or an encoder, before a run does.

    Nothing is trained or written.

    Args:
        config: a recipe; its keys may follow as options
        folder: a checkpoint folder
        encoder: import path of a class, or folder of an encoder. Arguments of its constructor are given as
            --encoder.NAME VALUE
        overrides: keys of the recipe, or arguments of the encoder

    Example:
        bindllm check --config recipes/scenes.yaml --memory
    """
    refuse_together(config=config, folder=folder, encoder=encoder)
    if not (config or folder or encoder):
        raise UsageError(
            "nothing to check: give --config RECIPE, --folder CHECKPOINT or --encoder CLASS_OR_FOLDER"
        )
    # An option that has no effect would be taken for a check that has passed.
    if recipe_options != RecipeCheckOptions() and not config:
        raise UsageError("--rows and --memory are about a recipe: give one with --config FILE")
    if (encoder_options.media or (overrides and folder)) and not encoder:
        raise UsageError(
            "--media and --encoder.NAME are about an encoder: give one with --encoder CLASS_OR_FOLDER"
        )
    if encoder_options.allow and config:
        raise UsageError(
            "--allow is about the classes that a folder names; the classes of a recipe are allowed"
        )
    # Noted, not raised: one call shows all problems.
    problems, console = Problems(), Console(highlight=False, soft_wrap=True)
    with quiet():
        if config:
            _check_recipe(config, overrides, recipe_options, problems, console)
        elif folder:
            _check_folder(folder, encoder_options.allow, problems)
        else:
            with problems.noted():
                # Inside the block, because a wrong media is a problem too, not the end of the command.
                samples = [read_media(text) for text in encoder_options.media]
                check_encoder(build_encoder(encoder, overrides, allow=encoder_options.allow), samples)
    for number, problem in enumerate(problems, start=1):
        console.print(f"{number}. {printable_lines(problem)}", markup=False)
    if problems and config:
        console.print(f"relative paths start from {Path.cwd()}", markup=False)
    console.print(f"{len(problems)} problem{'s' * (len(problems) > 1)}" if problems else "no problems")
    return 1 if problems else 0


def _check_folder(folder: str, allow: Sequence[str], problems: Problems) -> None:
    with problems.noted():
        if Path(folder).is_dir() and not Path(folder, MANIFEST).is_file() and encoder_folder(folder):
            raise CheckpointError(
                f"{folder} is the folder of an encoder, not a checkpoint: bindllm check --encoder {folder}"
            )
        check_checkpoint(folder, problems, allow=allow)


def _check_recipe(
    file: str, overrides: Sequence[str], options: RecipeCheckOptions, problems: Problems, console: Console
) -> None:
    cli = CheckedRecipe(file, overrides, problems)
    # Without required keys nothing can be built, and the messages so far say which.
    if not cli.is_complete:
        return

    def say(line: Any) -> None:
        console.print(printable_lines(line) if isinstance(line, str) else line, markup=False)

    recipe = cli.config.as_dict()
    checked = check_recipe(recipe, problems, say, previewed=options.rows)
    # The estimate needs a model that can be built.
    if not problems and (options.memory or options.memory_limit):
        with problems.noted():
            plan = plan_run(recipe, checked.parts, checked.encoders, checked.rows("train"), checked.tokenizer)
            lines, problem = memory_lines(plan, options.memory_limit)
            for line in lines:
                say(line)
            problems += [problem] if problem else []
    if not problems:
        with problems.noted():
            _check_run(cli, checked, problems)


def _check_run(cli: CheckedRecipe, checked: CheckedParts, problems: Problems) -> None:
    """Note the problems that the objective and the trainer of a recipe find."""
    # Last: building imports classes of the user and may take seconds.
    cli.build_parts()
    # Trainer and objective refuse the same as at the start of a run, some minutes earlier.
    validation = checked.rows("validation")
    with problems.noted():
        cli.model.objective.check_rows(checked.rows("train") + validation, checked.sources)
    trainer = cli.make_trainer(logger=False)
    check_trainer(trainer, num_validation=trainer.limit_val_batches and len(validation))
