"""Reading a recipe that has mistakes: each is noted and taken out, until all of them are known."""

from __future__ import annotations

import copy
import re
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentParser

from bindllm.cli.recipe import RecipeCLI
from bindllm.cli.usage import UsageError
from bindllm.errors import BindLLMError

# How a complaint about an item of a list begins, and where in it the part of the item is named.
_ITEM = re.compile(r"^(?P<list>[\w.]+): (?:Problem with given class_path '\S*?(?P<kind>\w+)':\s+)?")
_PARTS = (
    re.compile(r"Group '(?P<group>\S+)' does not accept option '(?P<name>\S+)'"),
    re.compile(r"(?P<group>)Option '(?P<name>\S+)' is not accepted"),
    re.compile(r"':\n\s+(?P<group>)(?P<name>[\w.]+): "),
)
_MISSING = "arguments are required"


class Problems(list[str]):
    """What is wrong so far."""

    @contextmanager
    def noted(self) -> Iterator[None]:
        """Note an error of the block and go on after it."""
        try:
            yield
        except BindLLMError as error:
            self.append(str(error))


def read_recipe(file: str, overrides: Sequence[str], problems: Problems) -> Any:
    """Read a recipe key by key: what cannot be used is noted and left out, until the rest can be read.

    Returns:
        the resolved recipe, or None when required parts are missing.
    """
    try:
        recipe = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        problems.append(f"the recipe {file} cannot be read: {error}")
        return None
    if not isinstance(recipe, dict):
        problems.append(f"the recipe {file} holds {type(recipe).__name__}, expected keys and values")
        return None
    options, removed = list(overrides), []
    altered: list[Any] = []
    while True:
        config, error = _parse(recipe, options)
        if error is None:
            return config
        place, key = _list_of(recipe, error)
        is_option = any(option.partition("=")[0].rstrip("+") == f"--{key}" for option in options)
        if place is not None and not is_option:
            before = yaml.safe_dump(place)
            place[:] = _sound_items(recipe, options, key, problems, altered)
            if yaml.safe_dump(place) != before:
                removed.append(key)
                continue
        # That a key is missing is no news when it was taken out here.
        if not (error.key and any(f"{error.key}.".startswith(f"{key}.") for key in removed)):
            problems.append(str(error))
        if not (_remove(recipe, error.key) or _remove_option(options, error.key)):
            return None
        removed.append(error.key)


def build_part(kind: type, values: dict[str, Any], problems: Problems) -> Any:
    """Build one dataclass of a recipe; note all complaints of its own, not only the first; None if there are any."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--value", type=kind)

    def build(chosen: dict[str, Any]) -> Any:
        return parser.instantiate(parser.parse_object({"value": chosen})).value

    try:
        return build(values)
    except BindLLMError as error:
        whole = str(error)
    needed = {
        field.name: values[field.name]
        for field in fields(kind)
        if field.default is MISSING and field.default_factory is MISSING
    }
    alone = Problems()
    for name, value in values.items():
        with alone.noted():
            build({**needed, name: value})
    problems += dict.fromkeys(alone or [whole])
    return None


def _parse(recipe: dict[str, Any], options: Sequence[str]) -> tuple[Any, UsageError | None]:
    """Return the resolved recipe, or why it cannot be read."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "recipe.yaml"
        file.write_text(yaml.safe_dump(recipe), encoding="utf-8")
        try:
            return RecipeCLI("check", ["--config", str(file), *options], build=False).config, None
        except UsageError as error:
            return None, error


def _list_of(recipe: dict[str, Any], error: UsageError) -> tuple[list[Any] | None, str]:
    """Return the list of the recipe that an error is about, with its key, or None."""
    found = _ITEM.match(str(error))
    for key in (error.key, found["list"] if found else ""):
        *parents, last = key.split(".")
        place = _inside(recipe, parents)
        if isinstance(place, dict) and isinstance(place.get(last), list) and place[last]:
            return place[last], key
    return None, ""


def _sound_items(
    recipe: dict[str, Any], options: Sequence[str], key: str, problems: Problems, altered: list[Any]
) -> list[Any]:
    """Note all that is wrong with each item of a list, and take it out; return the items that can then be read.

    Items that something was taken out of are added to ``altered``: what they lack now is no news.
    """
    *parents, last = key.split(".")
    items = _inside(recipe, parents)[last]
    trial = copy.deepcopy(recipe)
    place, sound = _inside(trial, parents), []
    for number, item in enumerate(items, start=1):
        place[last] = [item]
        while (error := _parse(trial, options)[1]) is not None and _list_of(trial, error)[1] == key:
            message = str(error)
            if not (_MISSING in message and any(item is other for other in altered)):
                found = _ITEM.match(message)
                kind = f" ({found['kind']})" if found and found["kind"] else ""
                problems.append(f"{key}, item {number}{kind}: {_ITEM.sub('', message, count=1)}")
            if not _remove_part(item, message):
                break
            altered.append(item)
        else:
            sound.append(item)
    return sound


def _remove_part(item: Any, message: str) -> bool:
    """Remove from an item what a message complains about; return whether there was anything."""
    if not isinstance(item, dict):
        return False
    values = item.get("init_args", {}) if "class_path" in item else item
    for pattern in _PARTS:
        if found := pattern.search(message):
            return _remove(values, f"{found['group']}.{found['name']}".strip("."))
    return False


def _inside(place: Any, keys: Sequence[str]) -> Any:
    """Return what is at the end of a path of keys, or None."""
    for key in keys:
        place = place.get(key) if isinstance(place, dict) else None
    return place


def _remove(recipe: dict[str, Any], key: str | None) -> bool:
    """Empty a list of a recipe, or remove another value, by its dotted key; return whether there was anything."""
    *parents, last = (key or "").split(".")
    place = _inside(recipe, parents)
    if not isinstance(place, dict) or last not in place or place[last] == []:
        return False
    if isinstance(place[last], list):
        place[last] = []
    else:
        del place[last]
    return True


def _remove_option(options: list[str], key: str | None) -> bool:
    """Remove an option and its value from a command line; return whether it was there."""
    for n, option in enumerate(options):
        if option.partition("=")[0] == f"--{key}":
            del options[n : n + (1 if "=" in option else 2)]
            return True
    return False
