"""A command is a typed function: its parameters are the options, its docstring is the help.

`argparse` splits the words of a command line into options; `jsonargparse` checks and converts the values by the type
hints. The rules: positional parameters are positional arguments, keyword-only parameters are options, a dataclass is
a group of options, a tuple is an option that may be repeated, a bool is a flag, ``bool | float`` is a flag that may
have a value. A group whose parameter ends with an underscore puts its name before its options: ``pixels`` of
``media_: MediaLimits`` is ``--media_pixels``.
"""

from __future__ import annotations

import argparse
import inspect
import os
import re
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import fields, is_dataclass
from functools import cache
from typing import Any, Literal, NoReturn, get_args, get_origin, get_type_hints

from jsonargparse import ArgumentError, ArgumentParser, set_parsing_settings

from bindllm.errors import UsageError, did_you_mean

OVERRIDES = "overrides"
"""Parameter of a command that gets the options of an encoder (``--encoder.NAME VALUE``) or, with ``--config``, the keys
of a recipe."""

# Lines of jsonargparse that say nothing about the mistake, and the decoration around names and types.
_NOISE = (
    *(
        "Does not validate against",
        "Subtypes:",
        "Errors:",
        "Given value type:",
        "- Expected a <class 'NoneType'>",
    ),
    *("- Not a valid subclass", "Subclass types expect", "- a class path (str)", "- a dict with"),
    *("Given value: [", "Given value: {", "Given value: Namespace"),
)
# A value that starts with the name of a home folder, after its option.
_HOME = re.compile(r"^(--[\w.]+=)(~[^/]*)")
_DECORATION = re.compile(r"Parser key \"|\"(?=:)|Not of type \w+: |\ba <class '|<class '|'>")


class _Words(argparse.ArgumentParser):
    """Splits a command line into options; raises `UsageError` instead of ending the process."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}. Options: {self.prog} --help")

    def refuse(self, unknown: Sequence[str]) -> NoReturn:
        """Raise for words that are not options of the command, with the closest option."""
        if not unknown[0].startswith("-") and "--config" in self._option_string_actions:
            option = "--folder" if os.path.isdir(unknown[0]) else "--config"
            raise UsageError(f"{unknown[0]!r} has no option before it: {self.prog} {option} {unknown[0]}")
        options = [name for name in self._option_string_actions if name.startswith("--")]
        hint = did_you_mean(unknown[0].partition("=")[0], options)
        raise UsageError(f"unrecognized arguments: {' '.join(unknown)}. {hint}")


def read_command(name: str, function: Callable[..., int], words: Sequence[str]) -> dict[str, Any]:
    """Read a command line by the signature of a function.

    Args:
        function: the command; its Google docstring explains every parameter.

    Returns:
        the arguments of the function.

    Raises:
        UsageError: unknown options, missing arguments, or values of a wrong type.
    """
    schema, parser, keys = _parsers(name, function)
    # A shell expands ~ at the start of a word, not after --option=.
    words = [_HOME.sub(lambda found: found[1] + os.path.expanduser(found[2]), word) for word in words]
    takes_overrides = OVERRIDES in inspect.signature(function).parameters
    # Arguments of an encoder, and unknown words that belong to a recipe, are read by the command itself.
    words, overrides = _take_overrides(words) if takes_overrides else (words, [])
    # Intermixed: files and prompts may come before, between and after the options. Python 3.11 cannot do so with "--".
    parse = parser.parse_known_args if "--" in words else parser.parse_known_intermixed_args
    given, unknown = parse(words)
    values = {keys[option]: value for option, value in vars(given).items()}
    if unknown and not (takes_overrides and "config" in values):
        parser.refuse(unknown)
    try:
        # Only given values: the defaults are those of the signature.
        chosen = schema.instantiate(schema.parse_object(values))
    except ArgumentError as error:
        message = plain_message(str(error))
        # Errors name the option that was typed, not the key of the schema.
        option = {key: f"--{option}" for option, key in keys.items()}.get(message.partition(":")[0])
        raise UsageError(message if option is None else f"{option}:{message.partition(':')[2]}") from error
    return {**vars(chosen), **({OVERRIDES: overrides + unknown} if takes_overrides else {})}


def _take_overrides(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the words without arguments of an encoder, and these arguments, each as ``--encoder.NAME=VALUE``."""
    kept, taken, waits = [], [], False
    for word in words:
        if waits and not word.startswith("--"):
            taken[-1] += f"={word}"
            waits = False
        elif waits := word.startswith("--encoder."):
            taken.append(word)
            waits = "=" not in word
        else:
            kept.append(word)
    return kept, taken


def plain_message(message: str) -> str:
    """Return a message of jsonargparse on one line, without the types that a value does not have."""
    # A union prints one complaint for each of its types; those of types that were never meant are noise.
    lines = [line.strip() for line in message.splitlines()]
    kept = [line.removeprefix("- ") for line in lines if not line.startswith(_NOISE)]
    text = " ".join(line if line.endswith(":") else f"{line};" for line in kept).rstrip(";")
    return _DECORATION.sub("", text.replace("a typing.Literal", "one of "))


def refuse_together(**options: Any) -> None:
    """Refuse options that exclude each other.

    Raises:
        UsageError: more than one of them was given.
    """
    # None, False and () are the defaults of options that were not given.
    given = [f"--{name}" for name, value in options.items() if value not in (None, False, ())]
    if len(given) > 1:
        raise UsageError(f"{' and '.join(given)} cannot be given together; choose one")


@cache
def _parsers(name: str, function: Callable[..., int]) -> tuple[ArgumentParser, _Words, dict[str, str]]:
    """Return the two parsers of a command, and the key of the schema for each of its arguments."""
    # The fields of our dataclasses are documented below each of them.
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    # The schema knows types and docstrings, argparse knows words, positions and usage lines.
    schema = ArgumentParser(exit_on_error=False)
    schema.add_function_arguments(function, as_group=False, skip={OVERRIDES})
    return schema, *_parser(name, function, {action.dest: action.help for action in schema._actions})


def _parser(
    name: str, function: Callable[..., int], helps: dict[str, str | None]
) -> tuple[_Words, dict[str, str]]:
    """Return the parser of a command's words, and the key of the schema for each of its arguments."""
    # Docstring: purpose, further paragraphs, Args (read by jsonargparse), Example.
    text, _, example = (inspect.getdoc(function) or "").partition("\n\nExample:\n")
    purpose, *more = text.partition("\n\nArgs:")[0].split("\n\n")
    example = inspect.cleandoc(example)
    parser = _Words(
        prog=f"bindllm {name}",
        description="\n\n".join([textwrap.fill(purpose, 78, break_on_hyphens=False), *more]),
        epilog=f"example:\n  {example}" if example else None,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    keys, hints = {}, get_type_hints(function)
    for parameter in inspect.signature(function).parameters.values():
        key, kind = parameter.name, hints[parameter.name]
        if is_dataclass(kind):
            group = parser.add_argument_group((inspect.getdoc(kind) or "").partition("\n")[0].rstrip("."))
            kinds = get_type_hints(kind)
            prefix = key if key.endswith("_") else ""
            for field in fields(kind):
                # A name that is a keyword of Python ends with an underscore: from_ is --from.
                option = prefix + field.name.rstrip("_")
                keys[option] = f"{key}.{field.name}"
                default = getattr(parameter.default, field.name)
                _add(group, f"--{option}", kinds[field.name], default, helps[keys[option]])
        elif key != OVERRIDES:
            keys[key] = key
            option = f"--{key}" if parameter.kind is parameter.KEYWORD_ONLY else key
            _add(parser, option, kind, parameter.default, helps[key])
    # The usage line shows only required words: all options would fill a screen.
    needed = [action for action in parser._actions if action.required or not action.option_strings]
    words = parser._get_formatter()
    words.add_usage(None, needed, [], prefix="")
    parser.usage = f"{' '.join(words.format_help().split())} [options]"
    return parser, keys


def _add(parser: argparse._ActionsContainer, option: str, kind: Any, default: Any, text: str | None) -> None:
    """Add an argument whose value stays a text; the schema converts it and knows its default."""
    kinds = [kind, *get_args(kind)]
    # Shown as a metavar and checked by the schema, whose message has the closest name.
    choices = [choice for one in kinds if get_origin(one) is Literal for choice in get_args(one)]
    is_many, is_positional = get_origin(kind) is tuple, not option.startswith("--")
    is_required = default is inspect.Parameter.empty
    shape: dict[str, Any] = {"metavar": "{" + ",".join(choices) + "}"} if choices else {}
    if any(isinstance(one, type) and issubclass(one, int | float) for one in kinds):
        shape = {"metavar": "N"}
    if kind is bool:
        shape = {"action": "store_true"}
    elif bool in kinds:
        shape |= {"nargs": "?", "const": True}
    elif is_positional:
        shape["nargs"] = ("+" if is_required else "*") if is_many else (None if is_required else "?")
    else:
        shape |= {"action": "append" if is_many else "store", "required": is_required}
    shown = "" if is_required or default in (None, False, "") else default
    shown = " ".join(default) if is_many and not is_required else shown
    if isinstance(shown, float):
        shown = f"{shown:g}"
    # Digits of a large number in groups, as the option itself reads them.
    elif isinstance(shown, int) and shown >= 10_000:
        shown = f"{shown:_}"
    help_text = (text or "").replace("%", "%%") + (f" (default: {shown})" if shown else "")
    parser.add_argument(option, default=argparse.SUPPRESS, help=help_text, **shape)
