"""Importing classes by name: which ones a folder may name, and which modules of the working directory are visible.

The command imports from the working directory only modules that a class path of the user names, and modules that
those import themselves. Libraries probe for many optional packages (``cuda``, ``pydot``, ...), and with the directory
on ``sys.path`` any file of such a name would run.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

from bindllm.errors import BindLLMError, did_you_mean

_SEARCHED = "The command line searches {}, and Python the folders of PYTHONPATH"


class _NamedModules:
    """Finds in a folder the top-level modules that were named; everything else there is invisible."""

    def __init__(self) -> None:
        self.folders: dict[str, str] = {}

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        # `path` is set for submodules, which Python finds through their package.
        folder = self.folders.get(name) if path is None else None
        return None if folder is None else PathFinder.find_spec(name, [folder], target)


# One finder for the process: Python's own import table is global too.
_NAMED = _NamedModules()


def find_named_modules() -> None:
    """Let modules of the working directory be imported from now on, once `name_module` names them."""
    _NAMED.folders.clear()
    if _NAMED not in sys.meta_path:
        # Last, so that a file cannot replace an installed package.
        sys.meta_path.append(_NAMED)


def name_module(path: str) -> None:
    """Make the module of an import path visible, and the modules that it imports.

    Modules are read, not imported, to find their own imports. Without `find_named_modules` this has no effect.

    Args:
        path: import path of a class or function, such as ``"my_lab.RadarEncoder"``.
    """
    if _NAMED not in sys.meta_path:
        return
    # How to read this: a walk over the import graph, from the named module to the local files that it needs.
    done, waiting = set(), [path]
    while waiting:
        name = waiting.pop()
        if name in done:
            continue
        done.add(name)
        files = list(_files(name))
        if files:
            # The first name wins: a later change of directory must not exchange a module.
            _NAMED.folders.setdefault(name.partition(".")[0], os.getcwd())
        for package, file in files:
            waiting += _imported(file, package)


def _files(name: str) -> Iterator[tuple[list[str], Path]]:
    """Yield the files along a dotted path, each with the names of the package that it belongs to."""
    parts = name.split(".")
    if not all(part.isidentifier() for part in parts):
        return
    for depth in range(1, len(parts) + 1):
        module = Path(*parts[:depth])
        candidates = (parts[:depth], module / "__init__.py"), (parts[: depth - 1], module.with_suffix(".py"))
        yield from ((package, file) for package, file in candidates if file.is_file())


def _imported(file: Path, package: Sequence[str]) -> Iterator[str]:
    """Yield the dotted names that a file imports, wherever in it."""
    try:
        tree = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError):
        # Importing it will report the error.
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            # Relative imports: one dot is the package itself, each further dot one level up.
            above = package[: len(package) - node.level + 1] if node.level else []
            base = [*above, *([node.module] if node.module else [])]
            yield from (".".join([*base, alias.name]) for alias in node.names)


def build_named(
    path: Any,
    arguments: Mapping[str, Any],
    *,
    allow: Sequence[str],
    problem: Callable[[Any], str],
    failure: type[BindLLMError],
) -> Any:
    """Build an object of the class that a file names.

    Args:
        allow: import paths outside ``bindllm.`` that the caller trusts. It replaces any ``allow`` in ``arguments``.
        problem: returns why what the path leads to must not be called, as the end of "it is ..."; "": it may be.

    Raises:
        BindLLMError: a ``failure``: the class is not allowed, has a problem, or cannot be imported or built.
    """
    # In a text, parts of the allowed name would be allowed too.
    allow = (allow,) if isinstance(allow, str) else allow
    # How to read this: a class path from a file is untrusted. It must be well-formed, part of bindllm or allowed by
    # the caller, importable, and without a problem. Only then is it called.
    if not isinstance(path, str) or not all(path.split(".")) or "." not in path:
        raise failure(
            f"{path!r} is not the import path of a class; expected one such as 'my_lab.RadarEncoder'"
        )
    if not path.startswith("bindllm.") and path not in allow:
        raise failure(
            f"the folder names the class {path!r}, which is not part of bindllm and would run code from there. "
            f"If you trust it, pass allow=[{path!r}], or --allow {path} on the command line."
        )
    module, _, name = path.rpartition(".")
    try:
        # Registers the module, so that only named ones are imported from the working directory.
        if path in allow:
            name_module(path)
        # Only now may code of the module run: the path passed the checks above.
        home = importlib.import_module(module)
        try:
            kind = getattr(home, name)
        except AttributeError as error:
            hint = did_you_mean(name, classes_in(home))
            raise failure(f"{path} cannot be built: {module} has no {name!r}. {hint}") from error
        if found := problem(kind):
            raise failure(
                f"the folder names {path!r}, but it is {found}; nothing was called. Load only folders from a source "
                "you trust, or copy the folder again"
            )
        return kind(**_replace_allow(kind, arguments, allow))
    except BindLLMError:
        raise
    # This may be untrusted code: any exception of it means that the object cannot be built.
    except Exception as error:
        reason = f" with {arguments}: {type(error).__name__}: {error}"
        if isinstance(error, ModuleNotFoundError):
            reason = f": it needs {error.name!r}, which is not installed"
            # The class's own module is missing, not one that it imports.
            if f"{module}.".startswith(f"{error.name}."):
                reason = f": the module {error.name!r} was not found. {_SEARCHED.format(Path.cwd())}"
        raise failure(f"{path} cannot be built{reason}") from error


def resolve_path(value: Any, home: Path) -> Any:
    """Return a constructor argument from a file; a local path is made relative to the current directory.

    Paths are kept as the recipe gave them; one that does not exist from the current directory is looked up from
    ``home``, the directory in which the file was made, so that a moved project still loads from anywhere.
    """
    # A word without a separator is a setting, even if a folder of that name exists.
    if not isinstance(value, str) or not {"/", os.sep} & set(value) or os.path.exists(value):
        return value
    return os.path.relpath(moved) if (moved := home / value).exists() else value


def strings_in(tree: Any) -> Iterator[str]:
    """Yield all strings among the values of a recipe; each may name a file or a class."""
    if isinstance(tree, str):
        yield tree
    elif isinstance(tree, Mapping | list | tuple):
        for value in tree.values() if isinstance(tree, Mapping) else tree:
            yield from strings_in(value)


def classes_in(module: ModuleType) -> list[str]:
    """Return the names of the classes that a module defines; imported ones do not count."""
    names = vars(module)
    own = [
        name
        for name, value in names.items()
        if isinstance(value, type) and value.__module__ == module.__name__
    ]
    return list(names.get("__all__", own))


def _replace_allow(kind: Any, arguments: Mapping[str, Any], allow: Sequence[str]) -> dict[str, Any]:
    """Return constructor arguments with the caller's ``allow`` instead of the file's.

    A file must not extend the list that its reader allows, so its own value is dropped, whatever its type.
    """
    kept = {name: value for name, value in arguments.items() if name != "allow"}
    try:
        takes_allow = "allow" in inspect.signature(kind).parameters
    except (TypeError, ValueError):
        # Classes that are not written in Python may have no signature.
        takes_allow = False
    return {**kept, "allow": list(allow)} if takes_allow else kept
