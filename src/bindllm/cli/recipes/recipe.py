"""Reading a recipe with LightningCLI: its model, data and trainer, with the closest name for every mistake."""

from __future__ import annotations

import inspect
import logging
import math
import os
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from pkgutil import resolve_name
from typing import Any, NoReturn, get_type_hints

import lightning.pytorch.callbacks
import lightning.pytorch.loggers
import yaml
from jsonargparse import Namespace, set_parsing_settings
from lightning.fabric.utilities.warnings import PossibleUserWarning
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from bindllm.atomic import read_recipe
from bindllm.cli import COMMANDS
from bindllm.cli.arguments import plain_message
from bindllm.data.datamodule import BindData
from bindllm.errors import InputError, UsageError, did_you_mean, own_cause
from bindllm.imports import classes_in, name_module, strings_in
from bindllm.training.module import BindModule
from bindllm.training.preflight import Problems

GIVE_RECIPE = "Give a recipe with --config"

_FULL_PATH = "Give the full import path of a class, such as bindllm.encoders.EfficientNetLite."

# Lightning finds these by the name of the class only.
_BARE_NAMES = [*lightning.pytorch.callbacks.__all__, *lightning.pytorch.loggers.__all__]

# The names in a message of jsonargparse, from the outermost part of a recipe to the mistake; or the value that is one.
_NAMES = re.compile(
    r"(?:class_path|module) '(?P<object>[\w.]+)'|(?:ption '|Group '|attribute '|--)(?P<name>[\w.]+)"
)
_VALUE = re.compile(r"(?:(?P<is_class>string)|value): (?P<value>[\w.-]+)$", re.MULTILINE)
_CHOICES = re.compile(r"Literal\[(.*?)\]")

# How jsonargparse says that required keys are missing, and a part of a recipe that has nothing valid in it.
_INCOMPLETE = "the following arguments are required"
_NOTHING = object()

TRAINER_DEFAULTS = {
    "enable_model_summary": False,
    "log_every_n_steps": 5,
    "num_sanity_val_steps": 0,
}


class RecipeParser(LightningArgumentParser):
    """Raises `UsageError` with the closest name that exists, instead of ending the process."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise; parsers of nested values pass the message on to the parser of the whole recipe."""
        # jsonargparse tries nested parsers and collects their messages.
        if not self.exit_on_error:
            super().error(message, ex)
        hint = closest_name(message, [action.dest for action in self._actions])
        raise UsageError(f"{plain_message(message)}\n{hint}".rstrip()) from ex


def closest_name(message: str, keys: Sequence[str]) -> str:
    """Return a hint with the closest known name for the mistake in a message of jsonargparse.

    The message names the parts of the recipe from the outside in, so the names are followed, through keys, modules and
    the arguments of classes, until one of them is unknown.
    """
    if found := _VALUE.search(message):
        # The message quotes the literals of the type, and the value that is none of them.
        choices = re.findall(r"'([^']+)'", " ".join(_CHOICES.findall(message)))
        hint = did_you_mean(found["value"], _BARE_NAMES if found["is_class"] else choices)
        return hint if hint.startswith("Did you mean") else _FULL_PATH if found["is_class"] else ""
    # From the keys of the recipe inwards, one name of the message at a time.
    owner: Any = keys
    for found in _NAMES.finditer(message):
        if found["object"]:
            owner = _find_object(found["object"])
            continue
        for part in found["name"].split("."):
            children = _children(owner)
            if part not in children:
                return did_you_mean(part, children)
            owner = children[part]
    return _FULL_PATH if owner is None else ""


def _find_object(path: str) -> Any:
    """Return the module or the class with an import path, None if it does not exist."""
    try:
        return resolve_name(path)
    except (ImportError, AttributeError):
        return None


def _children(owner: Any) -> dict[str, Any]:
    """Return the names inside a part of a recipe: of dotted keys, a module, or the arguments of a class."""
    if isinstance(owner, list):
        heads = {key.partition(".")[0] for key in owner}
        return {head: [key[len(head) + 1 :] for key in owner if key.startswith(f"{head}.")] for head in heads}
    if inspect.ismodule(owner):
        return dict.fromkeys(classes_in(owner))
    if not inspect.isclass(owner):
        return {}
    hints = get_type_hints(owner.__init__)
    return {name: hints.get(name) for name in inspect.signature(owner).parameters}


def name_classes(args: Sequence[str]) -> None:
    """Make the modules visible whose classes a command line and its recipes name.

    jsonargparse imports classes while it parses, so this comes first. A class may be anywhere in a recipe, also without
    ``class_path``: every string that reads as an import path of a file in the working directory counts.

    Args:
        args: options with values, such as ``--config FILE`` and ``--model.encoders+=my_lab.RadarEncoder``.
    """
    # Options and values alike: any of them may name a class.
    words = [part for word in args for part in (word.split("=", 1) if word.startswith("--") else [word])]
    configs = [value for option, value in pairwise(words) if option == "--config"]
    waiting: list[tuple[Any, Path]] = [(_try_yaml(word), Path()) for word in words]
    read = {Path(file).resolve() for file in configs}
    waiting += [(_try_yaml(file), file.parent) for file in read]
    while waiting:
        # Depth first; `read` stops recipes that name each other.
        tree, folder = waiting.pop()
        for text in strings_in(tree):
            # A recipe may name further recipes, relative to itself.
            file = (folder / text).resolve() if text.endswith((".yaml", ".yml")) else None
            if file is not None and file not in read:
                read.add(file)
                waiting.append((_try_yaml(file), file.parent))
            elif (
                "." in text
                and all(part.isidentifier() for part in text.split("."))
                and not Path(text).exists()
            ):
                name_module(text)


def _try_yaml(source: str | Path) -> Any:
    """Return the content of a file or a text; None if it cannot be read: the parser reports that."""
    try:
        return yaml.safe_load(source.read_text(encoding="utf-8") if isinstance(source, Path) else source)
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return None


def expand_home(part: Any) -> Any:
    """Return a part of a recipe in which paths that start with ``~`` start at the home folder, as in a shell."""
    if isinstance(part, str):
        # Changes nothing but the name of a home folder, so other texts stay.
        return os.path.expanduser(part)
    if isinstance(part, list):
        return [expand_home(item) for item in part]
    if isinstance(part, dict):
        return {name: expand_home(value) for name, value in part.items()}
    if isinstance(part, Namespace):
        vars(part).update({name: expand_home(value) for name, value in vars(part).items()})
    return part


class RecipeCLI(LightningCLI):
    """Reads a recipe, and builds model and data from it.

    Args:
        build: False only reads the recipe.

    Attributes:
        model: a `BindModule`, its decoder not loaded yet.
        datamodule: a `BindData`, with the model's tokenizer and encoders.

    Raises:
        UsageError: unknown keys, wrong types, missing values.
    """

    kinds: tuple[type, type] = (BindModule, BindData)
    """Classes of the sections `model` and `data`."""

    example = "recipes/scenes.yaml"
    """A recipe for the help."""

    def __init__(self, command: str, args: Sequence[str], *, build: bool = True) -> None:
        # Before the parent, whose constructor parses and builds.
        self.build, self.command = build, command
        _require_recipe(command, args)
        # The fields of our dataclasses are documented below each of them.
        set_parsing_settings(docstring_parse_attribute_docstrings=True)
        super().__init__(
            *self.kinds,
            run=False,
            args=list(args),
            parser_class=RecipeParser,
            parser_kwargs={
                "prog": f"bindllm {command}",
                "allow_abbrev": False,
                "usage": f"bindllm {command} --config RECIPE [options]",
                "description": f"{COMMANDS[command][1].capitalize()}. A recipe is a YAML file; every key of it is an "
                "option too.",
                "epilog": f"example: bindllm {command} --config {self.example}",
            },
            save_config_callback=None,
            seed_everything_default=0,
            trainer_defaults=TRAINER_DEFAULTS,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the keys of the run itself, and link tokenizer and encoders of the model to the data."""
        parser.add_argument("--output", type=str, required=True, help="checkpoint folder that the run writes")
        parser.add_argument(
            "--resume", type=bool, default=True, help="resume an interrupted run of the same recipe"
        )
        add_overwrite(parser)
        parser.add_argument(
            "--save_every_seconds", type=float, default=60.0, help="time between saved states of a run"
        )
        # One seed for weights and order; tokenizer and encoders are the model's own objects, not second copies.
        parser.link_arguments("seed_everything", "data.seed", compute_fn=int)
        parser.link_arguments("model.tokenizer", "data.tokenizer", apply_on="instantiate")
        parser.link_arguments("model.encoders", "data.encoders", apply_on="instantiate")
        parser.link_arguments("model.token_modalities", "data.token_modalities", apply_on="instantiate")
        parser.link_arguments("model.context_config", "data.context", apply_on="instantiate")

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse; Lightning's own version warns whenever a process has arguments of its own."""
        name_classes(args)
        try:
            self.config = expand_home(parser.parse_args(args))
        except UsageError as error:
            if any(option.partition("=")[0] == "--config" for option in args):
                raise
            raise UsageError(f"{error}\n{GIVE_RECIPE}: bindllm {self.command} --config FILE") from error

    def instantiate_classes(self) -> None:
        """Build model and data, see `build_parts`; the trainer depends on the command."""
        if self.build:
            self.build_parts()

    def build_parts(self) -> None:
        """Build model and data from the recipe as it was read.

        Raises:
            BindLLMError: a part refuses its arguments.
        """
        try:
            built = self.parser.instantiate(self.config)
        # A part refuses its arguments, or its package is not installed, as wandb for its logger.
        except (ValueError, ImportError, MisconfigurationException) as error:
            # jsonargparse wraps the error of a part that may also be null.
            cause = own_cause(error) or InputError(f"the recipe cannot be used: {plain_message(str(error))}")
            raise cause from error
        self.model, self.datamodule, self.trainer_options = built.model, built.data, dict(built.trainer)

    def make_trainer(self, *, callbacks: Sequence[Callback] = (), **options: Any) -> Trainer:
        """Build the recipe's trainer with further callbacks before its own, and options that replace the recipe's.

        Raises:
            InputError: options that contradict each other, or ask for what this machine does not have.
        """
        own = listed(self.trainer_options.get("callbacks"))
        # Lightning divides the loss by the one, and ignores the other.
        for name, least in (("accumulate_grad_batches", 1), ("gradient_clip_val", 0)):
            if (value := self.trainer_options.get(name)) is not None and not value >= least:
                raise InputError(f"trainer.{name} is {value}, expected at least {least}")
        try:
            return Trainer(**{**self.trainer_options, **options, "callbacks": [*callbacks, *own]})
        # TypeError and RuntimeError: a list of CPUs, a number of nodes that the launcher has not started.
        except (MisconfigurationException, ImportError, ValueError, TypeError, RuntimeError) as error:
            raise InputError(f"trainer: {error}") from error

    def resolved(self) -> str:
        """Return the recipe with every default filled in, as YAML that can be given to ``--config``."""
        config = self.config.clone()
        # These say how to run, not what: a resumed run has the same recipe.
        for key in ("config", "resume", "overwrite"):
            config.pop(key, None)
        # Validated when it was parsed.
        return self.parser.dump(config, skip_unset=False, skip_validation=True)


def listed(value: Any) -> list[Any]:
    """Return the items of a key for which Lightning accepts one item, several, or null."""
    return list(value) if isinstance(value, list | tuple) else [] if value is None else [value]


def add_overwrite(parser: LightningArgumentParser) -> None:
    """Add the option that lets a run replace the result of another one."""
    parser.add_argument(
        "--overwrite",
        type=bool,
        nargs="?",
        const=True,
        default=False,
        help="replace a result in the output folder",
    )


def _require_recipe(command: str, args: Sequence[str]) -> None:
    """Refuse an empty command line, or one that starts with the name of a file instead of an option.

    Raises:
        UsageError: says which option the name belongs to.
    """
    if not args:
        raise UsageError(f"{command} needs a recipe. {GIVE_RECIPE}: bindllm {command} --config FILE")
    if not args[0].startswith("-"):
        raise UsageError(
            f"{args[0]!r} has no option before it. {GIVE_RECIPE}: bindllm {command} --config {args[0]}"
        )


@contextmanager
def quiet() -> Iterator[None]:
    """Suppress the messages that Lightning prints in every run; its warnings about this run stay."""
    # Restored afterwards: a caller in Python keeps its own levels.
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


class CheckedRecipe(RecipeCLI):
    """Reads a recipe that has mistakes: each is noted and skipped, until all of them are known.

    Attributes:
        config: the resolved recipe without its mistakes.
        is_complete: all required keys are in it; otherwise it must not be used.
    """

    def __init__(self, file: str, overrides: Sequence[str], problems: Problems) -> None:
        self._problems = problems
        self._parsed: dict[tuple[str, ...], tuple[str | None, Namespace]] = {}
        super().__init__("check", ["--config", file, *overrides], build=False)

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse the recipe part by part, then its overrides one by one."""
        self.config, self.is_complete = Namespace(), False
        name_classes(args)
        try:
            recipe = read_recipe(args[1])
        except InputError as error:
            self._problems.append(str(error))
            return
        # How to read this: a part with a message is split until the smallest wrong piece is found; the rest stays.
        recipe = self._valid(recipe, lambda part: self._mistake([_as_option(part)]))
        words = [_as_option({} if recipe is _NOTHING else recipe)]
        for option in _split_options(args[2:]):
            # Tried together with all earlier ones, because an option may depend on another.
            if message := self._mistake([*words, *option]):
                self._problems.append(message)
            else:
                words += option
        message, config = self._parse(words)
        if message is None:
            self.config, self.is_complete = expand_home(config), True
        else:
            self._problems.append(message)

    def _parse(self, words: Sequence[str]) -> tuple[str | None, Namespace]:
        """Return the error message about a command line, if any, and its values; each line is parsed once."""
        key = tuple(words)
        if key not in self._parsed:
            try:
                self._parsed[key] = None, self.parser.parse_args(words)
            except UsageError as error:
                self._parsed[key] = str(error), Namespace()
        return self._parsed[key]

    def _mistake(self, words: Sequence[str]) -> str | None:
        """Return the mistake in a command line; that keys of the recipe itself are missing is not one yet."""
        message, _ = self._parse(words)
        return None if message is None or message.startswith(_INCOMPLETE) else message

    def _valid(self, part: Any, mistake: Callable[[Any], str | None], where: str = "") -> Any:
        """Return the valid parts of a part of the recipe, `_NOTHING` if there are none; note its mistakes.

        Args:
            part: keys and values, a list or a plain value.
            mistake: returns the mistake in a recipe that has a changed part instead of this one.
            where: number of the item of a list that the part belongs to.
        """
        # Whole and valid parts need no look inside, so a recipe without mistakes is parsed once.
        message, known = mistake(part), len(self._problems)
        if message is None:
            return part
        kept: Any = _NOTHING
        if isinstance(part, dict):
            kept = self._valid_keys(part, mistake, where)
        elif isinstance(part, list):
            items = [
                self._valid(item, lambda changed: mistake([changed]), where or f"item {number}")
                for number, item in enumerate(part, start=1)
            ]
            kept = [item for item in items if item is not _NOTHING]
        # Each part of it may be valid, and all together not.
        if len(self._problems) == known:
            key, colon, rest = message.partition(":")
            self._problems.append(f"{key}, {where}{colon}{rest}" if where else message)
        return kept

    def _valid_keys(self, part: dict[str, Any], mistake: Callable[[Any], str | None], where: str) -> Any:
        """Return the keys and values that are valid together, `_NOTHING` if something required is missing then."""
        # The arguments of a class are read together with its path. Each is tried without the others: reading few keys
        # is fast.
        base = {name: value for name, value in part.items() if name == "class_path"}
        # Without required keys there is always a message: a key is valid if no other message comes.
        missing = mistake(base)
        if missing and _INCOMPLETE not in missing:
            return _NOTHING
        kept = dict(base)
        for name, value in part.items():
            if name in base:
                continue

            def changed(value: Any, name: str = name) -> str | None:
                message = mistake({**base, name: value})
                return None if message is None or _only_misses(message, missing) else message

            if (valid := self._valid(value, changed, where)) is not _NOTHING:
                kept[name] = valid
        return _NOTHING if mistake(kept) else kept


def _only_misses(message: str, missing: str | None) -> bool:
    """Return whether a message says nothing but that some keys are missing that an earlier one says are missing."""
    # Both end with the names; before them is the class that they belong to.
    (place, _, names), (earlier, _, others) = (
        text.partition(f"{_INCOMPLETE}: ") for text in (message, missing or "")
    )
    return place == earlier and set(names.split(", ")) <= set(others.split(", "))


def _as_option(recipe: dict[str, Any]) -> str:
    """Return the option that gives a recipe as text; jsonargparse takes that like the name of a file."""
    return f"--config={yaml.safe_dump(recipe, default_flow_style=True, width=math.inf)}"


def _split_options(words: Sequence[str]) -> list[list[str]]:
    """Return each option of a command line with its value."""
    options: list[list[str]] = []
    for word in words:
        if word.startswith("--") or not options:
            options.append([])
        options[-1].append(word)
    return options
