"""A training run: its folder ``runs/<name>``, training with automatic resume, the checkpoint and its report."""

from __future__ import annotations

import glob
import hashlib
import math
import os
import shutil
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from itertools import chain, count
from pathlib import Path
from typing import Any

import yaml
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch import Trainer
from rich.console import Console

from bindllm.atomic import atomic_file, check_replaceable, locked, read_recipe, remove_leftovers
from bindllm.data.datamodule import BindData
from bindllm.errors import BindLLMError, InputError, TrainingError, listed
from bindllm.evaluation.held_out import evaluate_held_out, held_out_rows
from bindllm.evaluation.task import Evaluation
from bindllm.model.card import licenses
from bindllm.model.checkpoint import MANIFEST
from bindllm.report.report import RunFacts, write_report
from bindllm.report.summary import print_summary
from bindllm.training.callbacks import METRICS
from bindllm.training.loggers import log_recipe, log_results
from bindllm.training.module import BindModule
from bindllm.training.optim import describe_groups
from bindllm.training.state import BEST, LAST, Interrupted, RunState, map_write_errors

RUNS = "runs"
OUTPUTS = "checkpoints"
"""Where recipes put checkpoint folders; the run of such an output has its plain name."""

RECIPE = "recipe.yaml"
FINISHED = "finished"
"""Empty file in the folder of a run whose checkpoint is written and measured."""

Change = tuple[str, Any, Any]
"""Dotted key of a recipe, its old and its new value."""

SHUFFLED_LIMIT = 1000
"""Held-out questions that are asked about media of other rows; more take long and change little."""

_PROCESSES = ("trainer.devices", "trainer.num_nodes")
# The strategy often changes with the number of processes; it does not change which rows a step sees.
_PLACEMENT = (*_PROCESSES, "trainer.strategy")
# Keys that may differ in a run that resumes: the output is compared by its folder, the others change no weights.
_HARMLESS = ("output", "save_every_seconds", "trainer.enable_progress_bar")
_LENGTHS = ("trainer.max_epochs", "trainer.max_steps")


def check_output(output: Path, marker: str, *, kind: str, used: Iterable[str | Path]) -> None:
    """Refuse an output that a run cannot replace at its end.

    Args:
        marker: the file that every folder of its kind has.
        kind: what the folder is, such as "a bindllm checkpoint".
        used: folders that the run fills before, or that its result names.

    Raises:
        InputError: the output is a file, or contains other files or one of these folders.
    """
    check_replaceable(output, marker, InputError, kind=kind)
    for path in used:
        if Path(path).resolve().is_relative_to(output.resolve()):
            raise InputError(
                f"output {output} contains {path}, which would be lost when the run writes its output; choose another "
                "folder for one of them"
            )


def run_folder(
    output: str | Path, *, store: str | Path | None = None, init_from: str | Path | None = None
) -> Path:
    """Return the folder of the run that writes a checkpoint folder: each output has its own.

    Raises:
        InputError: ``output`` cannot be replaced at the end of the run, see `check_output`, or is the checkpoint that
            the run starts from.
    """
    output = Path(output)
    found, home = output.resolve(), Path.cwd().resolve()
    if init_from is not None and found == Path(init_from).resolve():
        raise InputError(
            f"output {output} is model.init_from too: the run would replace its own start, and could not be "
            "run twice with the same result; choose another output"
        )
    filled = (RUNS, *([] if store is None else [store]))
    check_output(output, MANIFEST, kind="a bindllm checkpoint", used=filled)
    # The usual place needs no hash in the name of its run.
    if found.parent == home / OUTPUTS:
        return Path(RUNS) / found.name
    # Outputs of one name in two folders are two runs. The path is relative, so that a project may be moved.
    place = os.path.relpath(found, home)
    return Path(RUNS) / f"{found.name}-{hashlib.sha256(os.fsencode(place)).hexdigest()[:8]}"


@contextmanager
def lock_output(output: Path) -> Iterator[None]:
    """Lock the output of a run against a second run during the block, from whatever working directory.

    Raises:
        InputError: another process is using it.
        TrainingError: the place cannot be written, which is found now, and not after the last step.
    """
    busy = InputError(f"another run is writing {output}: wait until it ends, or choose another --output")
    with ExitStack() as held:
        # Rank 0 of the same run holds the lock for all.
        if rank_zero_only.rank == 0:
            with map_write_errors(output):
                held.enter_context(locked(output, busy))
        yield


def is_finished(folder: Path, recipe: str, output: Path) -> bool:
    """Return whether the run of exactly this recipe is finished, and its checkpoint in place; changes nothing."""
    return _is_written_by(recipe, output, longer=False) and any(
        not changes and (place / FINISHED).exists() for place, changes in _earlier_runs(folder, recipe)
    )


def open_run(
    folder: Path,
    recipe: str,
    output: Path,
    *,
    resume: bool = True,
    overwrite: bool = False,
    say: Callable[[str], Any] = print,
) -> None:
    """Prepare the folder: afterwards it holds a state if, and only if, the run resumes from it.

    An interrupted run of the same recipe is resumed, also one that was set aside. A run whose recipe only lacks
    further epochs or steps is continued, also a finished one. Every other run that was interrupted is set aside.

    Args:
        resume: False always starts from scratch.
        overwrite: the run may replace a checkpoint of another run in ``output``; a finished run is not continued.

    Raises:
        InputError: the run would replace a checkpoint that it does not continue, or only the number of processes has
            changed, which would lose the interrupted run.
    """
    earlier = _earlier_runs(folder, recipe) if resume else []
    fitting = [
        (place, changes)
        for place, changes in earlier
        if all(map(_is_longer, changes)) and not (overwrite and (place / FINISHED).exists())
    ]
    # Checked first: a refused command changes nothing.
    continues = fitting and _is_written_by(recipe, output)
    if (output / MANIFEST).is_file() and not (overwrite or continues):
        raise InputError(
            f"output {output} holds a trained model, which this run would replace. Choose another --output, or replace "
            "it with --overwrite. More epochs of the same recipe continue a finished run: --trainer.max_epochs"
        )
    if fitting:
        # The same recipe before a shorter one.
        place, changes = min(fitting, key=lambda run: len(run[1]))
        kind = "interrupted" if _is_interrupted(place) else "finished"
        _bring_back(place, folder)
        say(f"resuming the {kind} run in {folder}{f' with {_listed(changes)}' if changes else ''}")
    else:
        if earlier and earlier[0][0] == folder and _is_interrupted(folder):
            _refuse_other_processes(*earlier[0])
            say(f"starting from scratch: the recipe has changed ({_listed(earlier[0][1])})")
        if folder.exists() and (aside := _set_aside(folder)):
            say(f"the interrupted run is kept in {aside}; its own command resumes it")
    with atomic_file(folder / RECIPE) as part:
        part.write_text(recipe, encoding="utf-8")


def _refuse_other_processes(folder: Path, changes: list[Change]) -> None:
    """Refuse a run that differs from the interrupted one only in its processes: it is probably meant to resume."""
    # Each process sees its share of a step's rows, so another number of them is another run.
    keys = [key for key, _, _ in changes]
    if any(key in _PROCESSES for key in keys) and all(key.startswith(_PLACEMENT) for key in keys):
        raise InputError(
            f"the interrupted run in {folder} had another number of processes ({_listed(changes)}), and would see "
            "other rows in each step. Restore it, or start another run with another --output"
        )


def _earlier_runs(folder: Path, recipe: str) -> list[tuple[Path, list[Change]]]:
    """Return the folders with a state of a run, the current one first, and the changes of the recipe since then."""
    # Also runs that were set aside: their own command must find them again.
    aside = sorted(folder.parent.glob(f"{glob.escape(folder.name)}.previous*"))
    places = [place for place in (folder, *aside) if (place / LAST).exists()]
    return [(place, list(_changes(_read_recipe(place), yaml.safe_load(recipe)))) for place in places]


def _is_written_by(recipe: str, output: Path, *, longer: bool = True) -> bool:
    """Return whether a checkpoint was written by a run of this recipe, or by a shorter one."""
    if not (output / MANIFEST).is_file():
        return False
    # Compared by the recipe that is stored in the checkpoint, whatever folder the run was in.
    changes = list(_changes(_read_recipe(output), yaml.safe_load(recipe)))
    return all(map(_is_longer, changes)) if longer else not changes


def _read_recipe(folder: Path) -> dict[str, Any]:
    file = folder / RECIPE
    try:
        return read_recipe(file) if file.is_file() else {}
    except InputError:
        # Edited or damaged: it is another recipe than that of any run.
        return {}


def _bring_back(place: Path, folder: Path) -> None:
    """Make a run the current one, ready to resume; the current one is set aside in turn."""
    if place != folder:
        # A name that is searched too: a kill between the renames leaves a run that is found again.
        waiting = folder.with_name(f"{folder.name}.previous-next")
        os.replace(place, waiting)
        if folder.exists():
            _set_aside(folder)
        os.replace(waiting, folder)
    for name in (LAST, BEST):
        remove_leftovers(folder / name)
    # It is not finished any more: a kill from here on must not lose it.
    (folder / FINISHED).unlink(missing_ok=True)


def _set_aside(folder: Path) -> Path | None:
    """Rename the folder; return its new path if it holds an interrupted run, None if nothing can be lost.

    Of runs that are not interrupted the last one is kept, for its log. Interrupted ones are never deleted.
    """
    ends = chain([""], (f"-{number}" for number in count(2)))
    places = (folder.with_name(f"{folder.name}.previous{end}") for end in ends)
    # The first free name: one without a folder, or with one that holds nothing to lose.
    aside = next(place for place in places if not _is_interrupted(place))
    interrupted = _is_interrupted(folder)
    if aside.exists():
        shutil.rmtree(aside)
    os.replace(folder, aside)
    return aside if interrupted else None


def _is_interrupted(folder: Path) -> bool:
    return (folder / LAST).exists() and not (folder / FINISHED).exists()


def _changes(old: Any, new: Any, key: str = "") -> Iterator[Change]:
    """Yield the differences between two recipes that change the result, one entry per key."""
    if isinstance(old, dict) and isinstance(new, dict):
        for name in dict.fromkeys([*old, *new]):
            yield from _changes(old.get(name), new.get(name), f"{key}.{name}" if key else str(name))
    elif old != new and key not in _HARMLESS:
        # Lists are compared as a whole: a source that moves changes the order of all rows.
        yield key, old, new


def _is_longer(change: Change) -> bool:
    """Return whether a change only adds epochs or steps; -1 is a run without end."""
    key, old, new = change
    # A missing limit is null: such a run had no length that could be extended.
    numbers = isinstance(old, int) and isinstance(new, int)
    return key in _LENGTHS and numbers and 0 < old < (math.inf if new == -1 else new)


def _listed(changes: Sequence[Change]) -> str:
    return listed([f"{key}: {old} -> {new}" for key, old, new in changes])


@dataclass(frozen=True)
class Run:
    """A run whose output no other process writes.

    Args:
        trainer: Lightning's trainer; `state` is one of its callbacks.
    """

    module: BindModule
    data: BindData
    trainer: Trainer
    state: RunState
    output: Path
    recipe: str
    console: Console

    def train(self, *, resume: bool, overwrite: bool, wait: Callable[[Trainer], None]) -> int:
        """Train, save the checkpoint and measure it.

        Args:
            resume: False starts from scratch even if an interrupted run of the recipe exists.
            overwrite: the run may replace a checkpoint that it does not continue.
            wait: waits until rank 0 has prepared the folder.

        Returns:
            the exit code.

        Raises:
            InputError: the run would replace a checkpoint of another run.
            TrainingError: no step was taken, or training diverged; a validated checkpoint is written before.
        """
        folder, say = self.state.folder, partial(self.console.print, markup=False)
        # All processes read this, and none has changed anything yet: they decide the same.
        if resume and not overwrite and is_finished(folder, self.recipe, self.output):
            say(
                f"{self.output} is trained by this recipe already. To continue: --trainer.max_epochs with more epochs. "
                "To train it again: --overwrite"
            )
            return 0
        if rank_zero_only.rank == 0:
            # One process renames folders; the others wait below until it is done.
            open_run(folder, self.recipe, self.output, resume=resume, overwrite=overwrite, say=say)
        wait(self.trainer)
        try:
            self._fit()
        except Interrupted as stop:
            self.console.print(f"{stop}; the same command resumes the run")
            return 130
        if self.state.stopped_early:
            step = self.trainer.global_step
            say(f"a callback, such as early stopping, ended the run at step {step}, before its last epoch")
        # A run that diverged still leaves its best validated weights, and then reports the error.
        problem = self.state.problem(self.trainer)
        # Only one process reports it: the launcher kills this one as soon as another one fails.
        if not self.trainer.is_global_zero:
            return 0
        if problem is None or self.state.best_loss is not None:
            self._save()
        if problem is not None:
            raise TrainingError(problem)
        # From here on the checkpoint is safe, whatever the evaluation does.
        self.module.model.to(self.trainer.strategy.root_device)
        code = self._measure()
        # Only now: without this file the same command measures again, without a training step.
        if code == 0:
            (folder / FINISHED).touch()
        return code

    def rehearse(self) -> int:
        """Run the few steps of Lightning's ``fast_dev_run``; nothing is kept. Return the exit code."""
        try:
            self._fit()
        finally:
            if rank_zero_only.rank == 0:
                # The folder of a rehearsal has a name of its own, so no run is lost.
                shutil.rmtree(self.state.folder, ignore_errors=True)
        if self.trainer.is_global_zero:
            self.console.print("fast_dev_run: the steps ran without an error; nothing was saved")
        return 0

    def _fit(self) -> None:
        """Train from the saved state, if there is one.

        Raises:
            KeyboardInterrupt: Ctrl-C outside of a training step.
        """
        # Lightning replaces the handler during fit.
        handler = signal.getsignal(signal.SIGINT)
        last = self.state.last if self.state.last.exists() else None
        if self.trainer.loggers:
            log_recipe(self.trainer.loggers, yaml.safe_load(self.recipe))
        try:
            self.trainer.fit(self.module, self.data, ckpt_path=last, weights_only=True)
        except SystemExit as stop:
            # Lightning exits like this after a Ctrl-C, and ignores further ones.
            signal.signal(signal.SIGINT, handler)
            raise KeyboardInterrupt from stop

    def _save(self) -> None:
        """Write the best weights and the recipe to the checkpoint folder."""
        model, kept = self.module.model, ""
        # Without validation the last weights are the result.
        if (best := self.state.best_weights()) is not None:
            model.load_trainable_state(best, source=str(self.state.folder))
            step, steps = self.state.best_step, self.trainer.global_step
            kept = f" (step {step} of {steps}: the lowest validation loss, {self.state.best_loss:.4f})"
        # No other process writes to the checkpoint folder: temporary files in it are leftovers of a killed one.
        remove_leftovers(self.output)
        with map_write_errors(self.output):
            model.save_pretrained(self.output, data=self._data_names, files={RECIPE: self.recipe})
        self.console.print(f"trained model: {self.output}{kept}", markup=False)

    @property
    def _data_names(self) -> list[str]:
        return [source.path for source in self.data.sources]

    def _measure(self) -> int:
        """Evaluate the trained model, write its report and print a summary; return the exit code."""
        held_out = held_out_rows(self.data.samples)
        if not held_out:
            self.console.print("no held-out rows: nothing is measured, and no report is written")
            return 0
        # The weights are saved: a failed measurement is reported, and the same command repeats it.
        try:
            measured = evaluate_held_out(
                self.module.model,
                held_out,
                train_samples=self.data.samples("train"),
                lookup=self.data.lookup,
                shuffled_limit=SHUFFLED_LIMIT,
                progress=self.console.is_terminal,
            )
            metrics, page = self._report(measured)
        except BindLLMError as error:
            self.console.print(f"the report is not complete: {error}", style="yellow", markup=False)
            return 1
        print_summary(self.console, metrics, measured.rows, page, modalities=self.data.report.modalities)
        return 0

    def _report(self, measured: Evaluation) -> tuple[dict[str, Any], Path]:
        """Write the report; return the metrics and the page."""
        model = self.module.model
        # The time of a run counts all its parts, also those before an interruption.
        groups = describe_groups(model.parameter_groups())
        seconds = {**self.state.seconds, "evaluate": measured.seconds}
        metrics = {
            "tasks": measured.metrics,
            "seconds": {name: round(value, 3) for name, value in seconds.items()},
            "trainable_parameters": sum(row["parameters"] for row in groups if row["trainable"]),
        }
        facts = RunFacts(
            title=self.output.name,
            parameters=groups,
            data=asdict(self.data.report),
            licenses=licenses(model.describe(), data=self._data_names),
            problems=measured.problems,
            device=str(model.device),
        )
        log_results(self.trainer.loggers, measured.metrics, step=self.trainer.global_step)
        log = self.state.folder / METRICS
        return metrics, write_report(self.output, metrics=metrics, facts=facts, rows=measured.rows, log=log)
