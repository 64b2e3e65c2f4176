"""A recipe, read by LightningCLI: model, data and trainer, with what belongs to the run as a whole."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from jsonargparse import set_parsing_settings
from lightning.fabric.utilities.warnings import PossibleUserWarning
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from bindllm.cli.parser import RecipeParser, name_classes
from bindllm.cli.usage import GIVE_RECIPE, UsageError, refuse_bare_names
from bindllm.data.datamodule import BindData
from bindllm.errors import BindLLMError, InputError
from bindllm.training.module import BindModule

TRAINER_DEFAULTS = {
    "enable_model_summary": False,
    "log_every_n_steps": 5,
    "num_sanity_val_steps": 0,
}


class RecipeCLI(LightningCLI):
    """Reads a recipe, and builds model and data from it.

    Args:
        verb: for the usage line.
        args: ``--config`` and overrides.
        build: False only reads.

    Attributes:
        config: the resolved recipe.
        model: a `BindModule`, its decoder not loaded yet.
        datamodule: a `BindData`, with the model's tokenizer and encoders.

    Raises:
        UsageError: unknown keys, wrong types, missing values.
    """

    kinds: tuple[type, type] = (BindModule, BindData)
    """Classes of the sections `model` and `data`."""

    def __init__(self, verb: str, args: Sequence[str], *, build: bool = True) -> None:
        self.build, self.verb = build, verb
        refuse_bare_names(verb, args)
        # Fields of our dataclasses are explained below each of them; that is where --help finds its words.
        set_parsing_settings(docstring_parse_attribute_docstrings=True)
        super().__init__(
            *self.kinds,
            run=False,
            args=list(args),
            parser_class=RecipeParser,
            parser_kwargs={
                "prog": f"bindllm {verb}",
                "allow_abbrev": False,
                "description": "A recipe is a YAML file; every key of it is an option too.",
            },
            save_config_callback=None,
            seed_everything_default=0,
            trainer_defaults=TRAINER_DEFAULTS,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add what belongs to neither model, data nor trainer, and hand tokenizer and encoders to the data."""
        parser.add_argument("--output", type=str, required=True, help="checkpoint folder that the run writes")
        parser.add_argument(
            "--resume", type=bool, default=True, help="go on with an interrupted run of the same recipe"
        )
        parser.add_argument(
            "--save_every_seconds", type=float, default=60.0, help="time between saved states of a run"
        )
        parser.link_arguments("seed_everything", "data.seed", compute_fn=int)
        parser.link_arguments("model.tokenizer", "data.tokenizer", apply_on="instantiate")
        parser.link_arguments("model.encoders", "data.encoders", apply_on="instantiate")

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse; Lightning's own version warns whenever a process has arguments of its own."""
        name_classes(args)
        try:
            self.config = parser.parse_args(args)
        except UsageError as error:
            if any(option.partition("=")[0] == "--config" for option in args):
                raise
            raise UsageError(
                f"{error}\n{GIVE_RECIPE}: bindllm {self.verb} --config FILE", key=error.key
            ) from error

    def instantiate_classes(self) -> None:
        """Build model and data; the trainer depends on the verb.

        Raises:
            BindLLMError: what a part says of its own arguments.
        """
        if self.build:
            try:
                built = self.parser.instantiate(self.config)
            except ValueError as error:
                raise _of_the_part(error) from error
            self.model, self.datamodule, self.trainer_options = built.model, built.data, dict(built.trainer)

    def make_trainer(self, *, callbacks: Sequence[Callback] = (), **options: Any) -> Trainer:
        """Build the recipe's trainer with further callbacks, and options that replace the recipe's.

        Raises:
            InputError: options that contradict each other, or ask for what this machine does not have.
        """
        own = self.trainer_options.get("callbacks") or []
        own = own if isinstance(own, list) else [own]
        try:
            return Trainer(**{**self.trainer_options, **options, "callbacks": [*own, *callbacks]})
        except (MisconfigurationException, ImportError, ValueError) as error:
            raise InputError(f"trainer: {error}") from error

    def resolved(self) -> str:
        """Return the recipe with every default filled in, as YAML that can be given to ``--config``."""
        config = self.config.clone()
        for key in ("config", "resume"):
            config.pop(key, None)
        return self.parser.dump(config, skip_unset=False)


def _of_the_part(error: ValueError) -> Exception:
    """Return what a part said of its arguments: jsonargparse wraps that where the part may also be null."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, BindLLMError):
        cause = cause.__cause__
    return error if cause is None else cause


@contextmanager
def quiet() -> Iterator[None]:
    """Leave out what Lightning says about every run; its warnings about this run stay."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=PossibleUserWarning)
            warnings.filterwarnings("ignore", message=".*LeafSpec.*")
            warnings.filterwarnings("ignore", message=".*across ranks is zero.*")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
