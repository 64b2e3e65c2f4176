"""The folder of a run, ``runs/<name>``: whether to go on with what is in it, or to set it aside and start afresh."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout
from lightning.fabric.utilities.rank_zero import rank_zero_only

from bindllm.atomic import atomic_file, remove_leftovers
from bindllm.errors import InputError
from bindllm.model.checkpoint import MANIFEST
from bindllm.training.state import BEST, LAST

RUNS = "runs"
RECIPE = "recipe.yaml"
_SHOWN_CHANGES = 5
_PROCESSES = ("trainer.devices", "trainer.num_nodes")
# Where it runs, a strategy often changes with them; it alone never makes two runs see other rows.
_PLACES = (*_PROCESSES, "trainer.strategy")


def run_folder(output: str | Path, *, init_from: str | Path | None = None) -> Path:
    """Return the folder of the run that writes a checkpoint folder.

    Args:
        output: the checkpoint folder.
        init_from: the checkpoint folder that the run begins with, if any.

    Raises:
        InputError: ``output`` holds something else than a checkpoint, or the one that the run starts from: either
            would be replaced at its end.
    """
    output = Path(output)
    if init_from is not None and output.resolve() == Path(init_from).resolve():
        raise InputError(
            f"output {output} is model.init_from too: the run would replace what it starts from, and could not be "
            "run twice with the same result; choose another output"
        )
    if output.is_dir() and any(output.iterdir()) and not (output / MANIFEST).is_file():
        raise InputError(
            f"output {output} is a folder with other content (no {MANIFEST}); choose another one"
        )
    return Path(RUNS) / output.resolve().name


@contextmanager
def lock_run(folder: Path) -> Iterator[None]:
    """Keep a second run out of the folder for the length of the block; the system lets go if this process dies.

    Raises:
        InputError: another process is using it.
    """
    if rank_zero_only.rank != 0:
        # One of several processes of the run that holds it.
        yield
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder.with_name(f".{folder.name}.lock"), timeout=0)
    try:
        with lock:
            yield
    except Timeout as error:
        raise InputError(
            f"another run is using {folder}: wait for its end, or give this one an --output of another name"
        ) from error


def open_run(folder: Path, recipe: str, *, resume: bool = True, say: Callable[[str], Any] = print) -> None:
    """Make the folder ready: afterwards it holds a state if, and only if, the run is to go on from it.

    Args:
        folder: the run's folder.
        recipe: the resolved recipe, which decides whether an interrupted run is the same.
        resume: False starts afresh in any case.
        say: takes a sentence for the user, if there is anything to say.

    Raises:
        InputError: nothing has changed but the number of processes, which is not worth an interrupted run.
    """
    state, earlier = folder / LAST, folder / RECIPE
    if state.exists():
        old = yaml.safe_load(earlier.read_text(encoding="utf-8")) if earlier.exists() else {}
        changes = list(_changes(old, yaml.safe_load(recipe)))
        if resume and not changes:
            for name in (LAST, BEST):
                remove_leftovers(folder / name)
            say(f"going on with the interrupted run in {folder}")
            return
        others = any(change.startswith(_PROCESSES) for change in changes)
        if resume and others and all(change.startswith(_PLACES) for change in changes):
            raise InputError(
                f"the interrupted run in {folder} had another number of processes ({_listed(changes)}), and would see "
                "other rows in each step. Restore it, or start afresh with --resume false"
            )
        reason = f"the recipe has changed ({_listed(changes)})" if changes else "as asked"
        say(f"starting afresh: {reason}; the interrupted run is kept in {_aside(folder)}")
    if folder.exists():
        _set_aside(folder)
    with atomic_file(earlier) as part:
        part.write_text(recipe, encoding="utf-8")


def _aside(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.previous")


def _set_aside(folder: Path) -> None:
    """Keep one earlier run; a run without a saved state never takes the place of one with it."""
    aside = _aside(folder)
    if (aside / LAST).exists() and not (folder / LAST).exists():
        shutil.rmtree(folder)
        return
    if aside.exists():
        shutil.rmtree(aside)
    os.replace(folder, aside)


def _changes(old: Any, new: Any, key: str = "") -> Iterator[str]:
    """Yield what differs between two recipes, one entry per key."""
    if isinstance(old, dict) and isinstance(new, dict):
        for name in dict.fromkeys([*old, *new]):
            yield from _changes(old.get(name), new.get(name), f"{key}.{name}" if key else str(name))
    elif old != new:
        yield f"{key}: {old} -> {new}"


def _listed(changes: list[str]) -> str:
    more = f", and {len(changes) - _SHOWN_CHANGES} more" if len(changes) > _SHOWN_CHANGES else ""
    return ", ".join(changes[:_SHOWN_CHANGES]) + more
