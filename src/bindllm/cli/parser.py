"""The parser of recipes: what jsonargparse complains about, in words of a recipe and with the closest name."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from importlib import import_module
from inspect import signature
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn, get_type_hints

import lightning.pytorch.callbacks
import lightning.pytorch.loggers
import yaml
from lightning.pytorch.cli import LightningArgumentParser

from bindllm.cli.usage import UsageError
from bindllm.errors import known_names
from bindllm.imports import name_module
from bindllm.model.checkpoint import classes_in

# What jsonargparse says, and where in it the unknown name and the place that should know it are.
_UNKNOWN_KEY = re.compile(r"Group '(?P<group>\S+)' does not accept option '(?P<key>\S+)'")
_UNKNOWN_OPTION = re.compile(r"(?:^Option '|unrecognized arguments: --)(?P<key>[^\s'=]+)")
_UNKNOWN_ARGUMENT = re.compile(r"class_path '(?P<path>\S+)':\s+Option '(?P<key>\S+)' is not accepted")
_OF_CLASS = re.compile(r"class_path '(?P<path>\S+)':")
_UNKNOWN_CLASS = re.compile(r"module '(?P<path>\S+)' has no attribute '(?P<key>\S+)'")
_UNKNOWN_MODULE = re.compile(r"No module named '(?P<key>\S+)'")
_UNKNOWN_NAME = re.compile(r"dot import path string: (?P<key>\S+)")
_UNKNOWN_CHOICE = re.compile(r"(?P<known>one of '.*)\. Got value: (?P<key>\S+)")
_WRONG_VALUE = re.compile(r"Parser key \"(?P<key>[^\"]+)\"")
_MISSING = re.compile(r"arguments are required: (?P<key>[^\s,]+)")
# A value that may be of several types, with a complaint about each of them.
_UNION = re.compile(
    r"Does not validate against any of the Union subtypes\n.*\n +Errors:\n(?P<errors>(?P<indent> +)- (?:.*\n)+?)"
    r" +Given value type: .*\n +Given value: (?P<value>.*)"
)

# What Lightning finds by the name of the class alone.
_BARE_NAMES = {
    "trainer.callbacks": lightning.pytorch.callbacks.__all__,
    "trainer.logger": lightning.pytorch.loggers.__all__,
}


class RecipeParser(LightningArgumentParser):
    """Raises `UsageError` with the closest name that exists, instead of leaving the process."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise; parsers of nested values hand the message to the one of the whole recipe."""
        if not self.exit_on_error:
            super().error(message, ex)
        known = [action.dest for action in self._actions]
        plain = _plain(message)
        hint = _hint(message, known) or _hint_of_choice(plain)
        raise UsageError(f"{plain}\n{hint}".rstrip(), key=_key(message)) from ex


def name_classes(args: Sequence[str]) -> None:
    """Make the modules visible whose classes a command line and its recipes name.

    jsonargparse imports classes while it parses, so this comes first. A class may be anywhere in a recipe, also without
    ``class_path``: every string that reads as an import path of a file in the working directory counts.

    Args:
        args: options with values, such as ``--config FILE`` and ``--model.encoders+=my_lab.RadarEncoder``.
    """
    words = [part for word in args for part in (word.split("=", 1) if word.startswith("--") else [word])]
    configs = [value for option, value in pairwise(words) if option == "--config"]
    waiting: list[tuple[Any, Path]] = [(_read_yaml(word), Path()) for word in words]
    read = {Path(file).resolve() for file in configs}
    waiting += [(_read_yaml(file), file.parent) for file in read]
    while waiting:
        tree, folder = waiting.pop()
        for text in _strings(tree):
            # A recipe may name further recipes, relative to itself.
            file = (folder / text).resolve() if text.endswith((".yaml", ".yml")) else None
            if file is not None and file not in read:
                read.add(file)
                waiting.append((_read_yaml(file), file.parent))
            elif (
                "." in text
                and all(part.isidentifier() for part in text.split("."))
                and not Path(text).exists()
            ):
                name_module(text)


def _read_yaml(source: str | Path) -> Any:
    """Return the content of a file or a text; None if it cannot be read: the parser reports that."""
    try:
        return yaml.safe_load(source.read_text(encoding="utf-8") if isinstance(source, Path) else source)
    except (OSError, ValueError, yaml.YAMLError):
        return None


def _strings(tree: Any) -> Iterator[str]:
    """Yield all strings among the values of a recipe."""
    if isinstance(tree, str):
        yield tree
    elif isinstance(tree, dict | list):
        for value in tree.values() if isinstance(tree, dict) else tree:
            yield from _strings(value)


def _plain(message: str) -> str:
    """Say what jsonargparse says in words of a recipe."""
    message = re.sub(r'Parser key "([^"]+)":\s*', r"\1: ", message)
    message = re.sub(r"a typing\.Literal\[([^\]]+)\]", r"one of \1", message)
    message = re.sub(r"(?:a )?<class '([^']+)'>", r"\1", message)
    message = _UNION.sub(_complaint, message)
    return message.replace("Expected a dot import path string:", "no class is called")


def _complaint(union: re.Match[str]) -> str:
    """Return what matters of the complaints about each type that a value may have."""
    entries = re.split(rf"^{union['indent']}- ", union["errors"], flags=re.MULTILINE)[1:]
    complaints = [" ".join(entry.split()) for entry in entries]
    about_class = [text for text in complaints if text.startswith(("Problem with", "Expected a dot import"))]
    if about_class:
        return "; ".join(about_class)
    expected = [
        text for text in complaints if not text.startswith(("Not a valid subclass", "Expected NoneType"))
    ]
    return f"{', or '.join(expected or complaints).replace(', or Expected', ', or')}. Got value: {union['value']}"


def _key(message: str) -> str:
    """Return the key of the recipe that a message is about."""
    if found := _UNKNOWN_KEY.search(message):
        return f"{found['group']}.{found['key']}"
    found = _UNKNOWN_OPTION.search(message) or _WRONG_VALUE.search(message) or _MISSING.search(message)
    return found["key"] if found else ""


def _hint(message: str, known: Sequence[str]) -> str:
    """Return a sentence with the closest known name to the one that the message complains about."""
    if found := _UNKNOWN_ARGUMENT.search(message):
        return known_names(found["key"], signature(_class_at(found["path"])).parameters)
    if found := _UNKNOWN_KEY.search(message):
        if owner := _OF_CLASS.search(message):
            return _known_parts(_class_at(owner["path"]), found["group"], found["key"])
        return _known_children(f"{found['group']}.{found['key']}", known)
    if found := _UNKNOWN_OPTION.search(message):
        return _known_children(found["key"], known)
    if found := _UNKNOWN_CLASS.search(message):
        return known_names(found["key"], classes_in(import_module(found["path"])))
    found = _UNKNOWN_NAME.search(message)
    if found and _key(message) in _BARE_NAMES:
        return known_names(found["key"], _BARE_NAMES[_key(message)])
    if found or _UNKNOWN_MODULE.search(message):
        return "Give the full import path of a class, such as bindllm.encoders.EfficientNetLite."
    return ""


def _class_at(path: str) -> type:
    module, _, name = path.rpartition(".")
    return getattr(import_module(module), name)


def _known_parts(kind: type, group: str, key: str) -> str:
    """Return the closest name to a key that a part of a class does not know, such as ``columns`` of a source."""
    for name in group.split("."):
        part = get_type_hints(kind.__init__).get(name)
        if not isinstance(part, type):
            return ""
        kind = part
    return known_names(key, signature(kind).parameters)


def _hint_of_choice(plain: str) -> str:
    """Return a sentence with the closest of the values that can be chosen."""
    found = _UNKNOWN_CHOICE.search(plain)
    return known_names(found["key"], re.findall(r"'([^']+)'", found["known"])) if found else ""


def _known_children(key: str, known: Sequence[str]) -> str:
    """Return the closest name to the first part of a dotted key that does not exist."""
    prefix = ""
    for part in key.split("."):
        children = {name[len(prefix) :].split(".")[0] for name in known if name.startswith(prefix)}
        if part not in children:
            return known_names(part, children)
        prefix += f"{part}."
    return ""
