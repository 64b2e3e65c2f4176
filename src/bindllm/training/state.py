"""The saved state of a run, so that an interrupted run resumes with the loss of at most its last minute.

    runs/<name>/last.ckpt               everything that training needs to resume, replaced atomically
    runs/<name>/best-<step>.safetensors the trained tensors with the lowest validation loss so far

States are saved where the next step needs nothing else: after a step that no validation follows, or after the
validation and all decisions based on it. A resumed run takes the same steps, to the bit, as a run without interruption.
"""

from __future__ import annotations

import math
import os
import random
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.callbacks.early_stopping import EarlyStoppingReason
from safetensors import SafetensorError
from torch import Tensor

from bindllm.atomic import atomic_file, open_tensors, write_tensors
from bindllm.errors import CheckpointError, InputError, TrainingError
from bindllm.model.checkpoint import read_manifest
from bindllm.parallel import Processes
from bindllm.training.callbacks import RunLog

LAST = "last.ckpt"
BEST = "best-*.safetensors"
_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)
# Attributes of `RunState` that a run needs to resume, in addition to the values of Lightning.
_SAVED = (
    *("best_loss", "best_step", "seconds", "stopped_early", "_is_validated", "_rows", "_sources", "_parts"),
    *("_generators", "_num_processes"),
)


class Interrupted(Exception):
    """The run was asked to stop, and has saved its state."""


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes Lightning's states atomically, and reads them without unpickling.

    Lightning writes to the system's temporary folder and moves the file, which is a copy on another file system:
    killed during the copy, it leaves a partial state in place of the earlier one.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None
    ) -> None:
        """Write a state.

        Raises:
            TrainingError: the disk is full or not writable; an earlier state at ``path`` is unchanged.
        """
        with _writing(path) as part:
            torch.save(checkpoint, part)

    def load_checkpoint(self, path: str | Path, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Read a state, onto the CPU.

        Raises:
            CheckpointError: it is damaged, or holds more than tensors and plain values.
        """
        try:
            # Whatever Lightning asks for: `weights_only=False` would unpickle, and could run code.
            return torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # torch raises many types for a damaged file
            # An empty file gives an error without a text.
            reason, *_ = str(error).splitlines() or [type(error).__name__]
            raise CheckpointError(
                f"{path} cannot be read ({reason}); start the run again with --resume false"
            ) from error


@contextmanager
def _writing(path: str | Path) -> Iterator[Path]:
    """Write a file atomically; raises `TrainingError` if the disk is full or not writable."""
    with map_write_errors(path), atomic_file(path) as part:
        yield part


@contextmanager
def map_write_errors(path: str | Path) -> Iterator[None]:
    """Turn the errors of a full disk, also those of torch and safetensors, into a `TrainingError`."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        raise TrainingError(
            f"{path} cannot be written ({error}). Earlier files are unchanged: free some disk space and run the same "
            "command again"
        ) from error


class RunState(Checkpoint):
    """Saves the state of a run, keeps the best weights, and makes the first Ctrl-C stop at a saved state.

    Only rank 0 writes, because all processes hold the same trained tensors.

    Args:
        every_seconds: time between saved states.

    Attributes:
        best_loss: lowest validation loss so far, or None.
        best_step: the step it was reached at.
        stopped_early: whether a callback has ended the run before its last step.
        seconds: time spent in ``embed`` and in ``train`` (with validation), over all parts of an interrupted run.
    """

    def __init__(self, folder: str | Path, log: RunLog, *, every_seconds: float = 60.0) -> None:
        self.folder, self.run_log = Path(folder), log
        self.every_seconds = every_seconds
        self.best_loss: float | None = None
        self.best_step = 0
        self.seconds = {"embed": 0.0, "train": 0.0}
        self.stopped_early = self._ended = self._is_validated = False
        self._validated: dict[str, Tensor] = {}
        self._sources: dict[str, str] = {}
        self._parts: dict[str, str | None] = {}
        self._rows: dict[str, Any] | None = None
        self._generators: GeneratorStates | None = None
        self._num_processes = 1
        self._interrupted = self._may_stop = False
        self._clock = self._saved_at = time.monotonic()
        self._handlers: dict[int, Any] = {}

    @property
    def last(self) -> Path:
        """Path of the saved state."""
        return self.folder / LAST

    @property
    def _best_file(self) -> Path:
        """Path of the best weights; its name has the step, so that a state never reads those of a later step."""
        return self.folder / BEST.replace("*", str(self.best_step))

    def state_dict(self) -> dict[str, Any]:
        """Return the values that the callback needs to resume."""
        return {name.lstrip("_"): vars(self)[name] for name in _SAVED}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the values of `state_dict`.

        Raises:
            CheckpointError: the state was saved by another version of bindllm.
            InputError: the state was saved by another number of processes.
        """
        # Refused as a whole: a state of which only a part is known would resume to something else.
        if state_dict.keys() != self.state_dict().keys():
            raise CheckpointError(
                f"the interrupted run in {self.folder} was saved by another version of bindllm. Finish it with that "
                "version, or start again with --resume false (it is kept next to the new one)"
            )
        if state_dict["num_processes"] != self._num_processes:
            raise InputError(
                f"the interrupted run in {self.folder} had {state_dict['num_processes']} processes, this one has "
                f"{self._num_processes}: each step would have other rows. Use the same number, or train with another "
                "--output"
            )
        vars(self).update({name: state_dict[name.lstrip("_")] for name in _SAVED})

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Remove the state of the loader, which is kept here: changed data is then found and named in one place."""
        checkpoint["loops"]["fit_loop"]["state_dict"].pop("combined_loader", None)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Note the number of processes, because a state only resumes with the same number."""
        self._num_processes = trainer.world_size

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Do not train further if early stopping had ended the run when the state was saved."""
        # Lightning does not save this flag, and would train one more epoch.
        trainer.should_stop = self.stopped_early

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check that model and data are the same, truncate the log to the resumed step, and install signal handlers.

        Lightning restores only loaders that are created after the state was read, but the schedule needs the length of
        an epoch, and so its loader, before that.

        Raises:
            InputError: the data, the decoder, an encoder or the initial weights have changed; names them.
        """
        # Counts of each source, only for the message: the loader compares the rows themselves.
        sources = {source.path: source.counted for source in trainer.datamodule.report.sources}
        parts = _frozen_parts(pl_module)
        if self._rows is not None:
            if other := [name for name in self._parts | parts if self._parts.get(name) != parts.get(name)]:
                raise self._refusal(trainer, f"another {' and another '.join(other)} is in its place")
            try:
                trainer.train_dataloader.load_state_dict(self._rows)
            except InputError as error:
                raise self._refusal(trainer, self._changed_rows(sources)) from error
        self._sources, self._parts = sources, parts
        if self._generators is not None:
            restore_generators(self._generators, Processes.of_trainer(trainer), trainer.strategy.root_device)
        self._clock = self._saved_at = time.monotonic()
        # Over all parts of the run: a resumed part finds its media in the store.
        self.seconds["embed"] += trainer.datamodule.report.seconds_embedding
        # Steps after the saved one are taken again, and would be in the log twice.
        self.run_log.keep_before(trainer.global_step)
        # Python allows handlers only there; a run in a notebook or a test may be elsewhere.
        if threading.current_thread() is threading.main_thread():
            # A background job ignores SIGINT: Ctrl-C is meant for the foreground job.
            handled = [number for number in _STOP_SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
            self._handlers = {number: signal.signal(number, self._on_signal) for number in handled}

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        """Stop if requested and the state is saved."""
        # Not right after the save: Lightning logs a step after all callbacks.
        if self._may_stop:
            raise Interrupted(f"stopped at step {trainer.global_step}")

    # The same after the last step, before the evaluation.
    on_train_end = on_train_batch_start

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save if it is time or a stop is requested, unless a validation or an optimizer step is pending.

        After a resume, Lightning skips a validation that was due at the saved step and loses accumulated gradients. An
        objective loses its data about a batch that it uses again.
        """
        late = time.monotonic() - self._saved_at >= self.every_seconds
        # A collective decision: clocks and signals differ, and a save needs all processes.
        due = trainer.strategy.reduce_boolean_decision(self._interrupted or late, all=False)
        done = batch_idx + 1
        # Either limit may end the run; -1 stands for none.
        ends_epoch = trainer.is_last_batch and trainer.current_epoch + 1 == trainer.max_epochs
        self._ended = ends_epoch or trainer.global_step >= trainer.max_steps != -1
        # Weights are kept only if they are validated, so the last step always is.
        if self._ended and trainer.enable_validation:
            trainer.should_stop = True
            if trainer.check_val_every_n_epoch is not None:
                trainer.check_val_every_n_epoch = 1
        # Without an epoch to count in, Lightning counts the batches between validations over the whole run.
        every = (
            trainer.fit_loop.epoch_loop.total_batch_idx + 1
            if trainer.check_val_every_n_epoch is None
            else done
        )
        validates = (
            self._ended or trainer.is_last_batch or every % (trainer.val_check_batch or every + 1) == 0
        )
        # Half a step cannot be saved: Lightning's state holds no gradients.
        pending = done % trainer.accumulate_grad_batches or not pl_module.objective.can_checkpoint
        if due and not validates and not pending:
            self._save(trainer)

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Copy the weights that are measured: a callback may exchange them during the validation, as an average."""
        if not trainer.sanity_checking and trainer.is_global_zero:
            # Lightning runs checkpoint callbacks last: another one has exchanged the weights by now.
            tensors = pl_module.state_dict().items()
            self._validated = {name: tensor.to("cpu", copy=True) for name, tensor in tensors}

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the measured weights if they are the best so far."""
        loss = float(trainer.callback_metrics.get("val_loss", math.nan))
        measured, self._validated = self._validated, {}
        # Distinguishes a run without validation from one whose losses were never finite.
        self._is_validated |= not trainer.sanity_checking
        best = math.inf if self.best_loss is None else self.best_loss
        if trainer.sanity_checking or not (math.isfinite(loss) and loss < best):
            return
        self.best_loss, self.best_step = loss, trainer.global_step
        if trainer.is_global_zero:
            # A new name for each step: the state on disk still names the file of the earlier one.
            with _writing(self._best_file) as part:
                write_tensors(part, measured)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save after the validation and the decisions of all other callbacks: Lightning runs checkpoints last."""
        # At the planned end `should_stop` is ours, see above; a longer run must not inherit it.
        self.stopped_early = trainer.should_stop and not self._ended
        self._save(trainer)

    def teardown(self, *_: Any, **__: Any) -> None:
        """Restore the signal handlers."""
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers = {}

    # Lightning calls no teardown after an exception.
    on_exception = teardown

    def best_weights(self) -> dict[str, Tensor] | None:
        """Return the tensors with the lowest validation loss, or None without validation."""
        if self.best_loss is None:
            return None
        advice = "restore these weights with the lowest validation loss, or start again with --resume false"
        with open_tensors(self._best_file, CheckpointError, advice) as stream:
            return {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118 (not a dictionary)

    def problem(self, trainer: Trainer) -> str | None:
        """Return why the result of a run that has ended cannot be trusted, or None."""
        if trainer.global_step == 0:
            return (
                "no step was taken, so nothing was saved; check max_epochs, max_steps and limit_train_batches of the "
                "trainer"
            )
        diverged = [
            callback.stopping_reason_message
            for callback in trainer.early_stopping_callbacks
            if callback.stopping_reason is EarlyStoppingReason.NON_FINITE_METRIC
        ]
        # Without early stopping a run continues after NaN; one without any finite loss has no result.
        if not diverged and (self.best_loss is not None or not self._is_validated):
            return None
        kept = (
            "Nothing was saved"
            if self.best_loss is None
            else f"The weights of step {self.best_step} are kept"
        )
        found = diverged[0] if diverged else "The validation loss was never finite."
        return f"training has diverged: {found} {kept}. Lower model.optim.lr, and look at metrics.csv in {self.folder}"

    def _changed_rows(self, sources: dict[str, str]) -> str:
        """Return the sources that have changed since the state was saved."""
        # The loader only knows that its rows differ; the counts show which source to look at.
        before = self._sources
        changes = [
            f"{path}: {before.get(path, 'none')} then, {sources.get(path, 'none')} now"
            for path in before | sources
            if before.get(path) != sources.get(path)
        ]
        same = f"the rows or media of {', '.join(sources)} are as many, but not the same"
        return f"its rows have changed: {'; '.join(changes) or same}"

    def _refusal(self, trainer: Trainer, reason: str) -> InputError:
        return InputError(
            f"{self.last} (step {trainer.global_step}) cannot resume, because {reason}. Restore the earlier ones "
            "and run the same command, or train with another --output; this state then stays as it is"
        )

    def _save(self, trainer: Trainer) -> None:
        # Time since the last save: steps that a kill loses are not counted.
        now = time.monotonic()
        self.seconds["train"] += now - self._clock
        self._clock = self._saved_at = now
        self._rows = trainer.train_dataloader.state_dict()
        self._generators = generator_states(Processes.of_trainer(trainer), trainer.strategy.root_device)
        trainer.save_checkpoint(self.last)
        # After the save: a run that is killed before it resumes from a state that names earlier best weights.
        if trainer.is_global_zero:
            for file in set(self.folder.glob(BEST)) - {self._best_file}:
                file.unlink()
        # All processes or none: the signal may reach one of them before the others.
        self._may_stop = trainer.strategy.reduce_boolean_decision(self._interrupted, all=False)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        """Request a stop at the next saved state; a second signal has its usual effect."""
        self._interrupted = True
        self.teardown()
        # A handler may interrupt a print, so it must not call print.
        os.write(2, b"\nstopping as soon as the state can be saved; press Ctrl-C again to stop at once\n")


def _frozen_parts(module: LightningModule) -> dict[str, str | None]:
    """Identify the parts of a run that no state holds: decoder, encoders and initial weights, by their names."""
    described = module.model.describe()
    parts = {f"decoder {described['decoder']['name']}": described["decoder"]["fingerprint"]}
    for number, encoder in enumerate(described["encoders"]):
        # The state holds the trained blocks of a tuned encoder.
        parts[f"encoder {number + 1}, {encoder['class_path']}"] = encoder.get("base", encoder["fingerprint"])
    if module.init_from is not None:
        # A reference model is a copy of these weights.
        manifest = read_manifest(module.init_from)
        hashes = [manifest[name] for name in sorted(manifest) if name.endswith("_sha256")]
        parts[f"checkpoint {module.init_from}"] = " ".join(hashes)
    return parts


GeneratorStates = list[dict[str, Any]]
"""State of the random number generators of each process, in order of rank, as tensors and plain numbers."""


def generator_states(processes: Processes, device: torch.device) -> GeneratorStates:
    """Return the state of the random number generators of all processes; all of them must call this."""
    # A saved state is read without unpickling, which would refuse arrays of numpy.
    name, words, *rest = np.random.get_state(legacy=True)
    own = {
        "torch": torch.get_rng_state(),
        "numpy": [name, torch.tensor(words, dtype=torch.int64), *rest],
        "python": random.getstate(),
    }
    if device.type == "cuda":
        own["cuda"] = torch.cuda.get_rng_state(device)
    return processes.gather(own)


def restore_generators(states: GeneratorStates, processes: Processes, device: torch.device) -> None:
    """Restore the random number generators of this process from the result of `generator_states`."""
    own = states[processes.rank]
    torch.set_rng_state(own["torch"])
    name, words, *rest = own["numpy"]
    np.random.set_state((name, np.asarray(words), *rest))
    version, words, normal = own["python"]
    random.setstate((version, tuple(words), normal))
    # A run that was saved on another kind of device resumes too, with a new sequence there.
    if device.type == "cuda" and "cuda" in own:
        torch.cuda.set_rng_state(own["cuda"], device)
