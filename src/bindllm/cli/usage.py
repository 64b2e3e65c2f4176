"""Mistakes on the command line: one error, with the closest name that exists."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from bindllm.errors import BindLLMError, known_names

GIVE_RECIPE = "Give a recipe with --config"


class UsageError(BindLLMError):
    """A command line or a recipe that cannot be read; the command ends with exit code 2.

    Args:
        message: what is wrong, and the closest name that exists.
        key: the key of the recipe that it is about, or an empty text.
    """

    def __init__(self, message: str, *, key: str = "") -> None:
        super().__init__(message)
        self.key = key


class Arguments(argparse.ArgumentParser):
    """An argument parser that raises `UsageError`, and names the closest option to an unknown one."""

    def __init__(self, verb: str, description: str) -> None:
        super().__init__(prog=f"bindllm {verb}", description=description, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        """Raise, instead of printing and leaving the process."""
        raise UsageError(f"{message}. {unknown_option_hint(message, self)}".rstrip())


def add_allow(options: argparse._ActionsContainer) -> None:
    """Add ``--allow CLASS``, without which a folder names nothing but classes of bindllm."""
    options.add_argument(
        "--allow",
        action="append",
        default=[],
        metavar="CLASS",
        help="import path of a class outside bindllm that the folder may name; may be repeated",
    )


def refuse_bare_names(verb: str, args: Sequence[str]) -> None:
    """Refuse a command line that starts with the name of a file instead of an option, or that is empty.

    Raises:
        UsageError: says which option the name belongs to.
    """
    if not args:
        raise UsageError(f"{verb} needs a recipe. {GIVE_RECIPE}: bindllm {verb} --config FILE")
    if not args[0].startswith("-"):
        raise UsageError(
            f"{args[0]!r} has no option before it. {GIVE_RECIPE}: bindllm {verb} --config {args[0]}"
        )


def read_number(
    kind: type[int] | type[float], expected: str, fits: Callable[[Any], bool]
) -> Callable[[str], Any]:
    """Return a reader of an option's number.

    Args:
        kind: int or float.
        expected: what the number must be, as the end of the sentence "... must be ...".
        fits: whether a number is that.
    """

    def read(text: str) -> int | float:
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not fits(value):
            raise argparse.ArgumentTypeError(f"must be {expected}, not {text}")
        return value

    return read


def unknown_option_hint(message: str, parser: argparse.ArgumentParser) -> str:
    """Return a hint for the first option that the parser does not know, or nothing."""
    unknown = re.search(r"unrecognized arguments: (--[^\s=]+)", message)
    if unknown is None:
        return f"Options: {parser.prog} --help"
    options = [name for action in parser._actions for name in action.option_strings if name.startswith("--")]
    return known_names(unknown[1], options)
