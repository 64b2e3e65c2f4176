"""What a run keeps on disk while it runs, so that nothing but the last moments can be lost.

    runs/<name>/last.ckpt           everything that training needs to go on, replaced in one step
    runs/<name>/best.safetensors    the trained tensors with the lowest validation loss so far

Saved states lie between two steps that need nothing from each other: after a step that no validation follows, or
after the validation and all that is decided from it. A run that goes on from one takes the same steps, to the bit,
as a run that was never interrupted.
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
from lightning.pytorch.strategies import Strategy
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, distributed

from bindllm.atomic import atomic_file
from bindllm.errors import BindLLMError, CheckpointError, InputError, TrainingError
from bindllm.training.runlog import RunLog
from bindllm.training.watch import Watch

LAST = "last.ckpt"
BEST = "best-*.safetensors"
_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(Exception):
    """The run was asked to stop, and has saved its state."""


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes Lightning's states in one step, and reads them without unpickling.

    Lightning itself writes to the system's temporary folder and moves the file from there, which is a copy when
    that is another file system: killed meanwhile, it leaves a part of a state where the whole one was.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None
    ) -> None:
        """Write a state.

        Raises:
            TrainingError: the disk is full or not writable; an earlier state at ``path`` is untouched.
        """
        with _writing(path) as part:
            torch.save(checkpoint, part)

    def load_checkpoint(self, path: str | Path, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Read a state, onto the CPU.

        Raises:
            CheckpointError: it is damaged, or holds more than tensors and plain values.
        """
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # torch raises many kinds for a damaged file
            raise CheckpointError(
                f"{path} cannot be read ({str(error).splitlines()[0]}); start the run afresh with --resume false"
            ) from error


@contextmanager
def _writing(path: str | Path) -> Iterator[Path]:
    """Write a file in one step; a disk that is full or not writable gives a `TrainingError`."""
    with map_write_errors(path), atomic_file(path) as part:
        yield part


@contextmanager
def map_write_errors(path: str | Path) -> Iterator[None]:
    """Turn what a full disk raises, here and in torch and safetensors, into one `TrainingError`."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        raise TrainingError(
            f"{path} cannot be written ({error}). What was saved before is untouched: make room and run the same "
            "command again"
        ) from error


class RunState(Checkpoint):
    """Saves the state of a run, keeps the best weights, and turns the first Ctrl-C into an orderly stop.

    Of several processes the first one writes, and what it writes is whole: what is trained is the same on all of them.

    Args:
        folder: the run's folder.
        log: what the run has logged so far.
        every_seconds: a state is saved when this much time has passed since the last one.

    Attributes:
        best_loss: lowest validation loss so far, or None.
        best_step: the step it was reached at.
        seconds: time spent in ``embed`` and in ``train`` (with validation), over all parts of an interrupted run.
    """

    def __init__(self, folder: str | Path, log: RunLog, *, every_seconds: float = 60.0) -> None:
        self.folder, self.run_log = Path(folder), log
        self.every_seconds = every_seconds
        self.best_loss: float | None = None
        self.best_step = 0
        self.seconds = {"embed": 0.0, "train": 0.0}
        self._stopped_early = False
        self._rows: dict[str, Any] | None = None
        self._random: RandomState | None = None
        self._num_processes = 1
        self._watch: Watch | None = None
        self._interrupted = self._may_stop = False
        self._clock = self._saved_at = time.monotonic()
        self._handlers: dict[int, Any] = {}

    @property
    def last(self) -> Path:
        """Where the state is."""
        return self.folder / LAST

    @property
    def _best_file(self) -> Path:
        """Where the best weights are; the step is in the name, so that a state never finds those of a later one."""
        return self.folder / BEST.replace("*", str(self.best_step))

    def state_dict(self) -> dict[str, Any]:
        """Return what the callback itself must know after a resume."""
        return {
            "best_loss": self.best_loss,
            "best_step": self.best_step,
            "seconds": self.seconds,
            "stopped_early": self._stopped_early,
            "rows": self._rows,
            "random": self._random,
            "num_processes": self._num_processes,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what `state_dict` returned.

        Raises:
            CheckpointError: the state is of another version of bindllm.
            InputError: the state is of a run on another number of processes.
        """
        if state_dict.keys() != self.state_dict().keys():
            raise CheckpointError(
                f"the interrupted run in {self.folder} is of another version of bindllm, which kept other things. "
                "Finish it with that version, or start afresh with --resume false (it is kept beside the new one)"
            )
        if state_dict["num_processes"] != self._num_processes:
            raise InputError(
                f"the interrupted run in {self.folder} had {state_dict['num_processes']} processes, this one has "
                f"{self._num_processes}: it would see other rows in each step. Give it as many, or start afresh "
                "with --resume false"
            )
        self.best_loss, self.best_step = state_dict["best_loss"], state_dict["best_step"]
        self.seconds, self._stopped_early = state_dict["seconds"], state_dict["stopped_early"]
        self._rows, self._random = state_dict["rows"], state_dict["random"]

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Connect the processes, where there are several, so that none waits for one that is gone."""
        self._num_processes = trainer.world_size
        if trainer.world_size > 1:
            self._watch = Watch(
                trainer.global_rank,
                trainer.world_size,
                host=trainer.strategy.cluster_environment.main_address,
                broadcast=trainer.strategy.broadcast,
            )

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Go on being finished, if early stopping ended the run before the state was saved."""
        trainer.should_stop = self._stopped_early

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check that the data are the same, cut the log back to where the run goes on, and listen to signals.

        Lightning would compare the data itself, but only with loaders made after the state was read; the schedule
        needs the length of an epoch, and so its loader, before that.
        """
        if self._rows is not None:
            trainer.train_dataloader.load_state_dict(self._rows)
        if self._random is not None:
            restore_random_state(self._random, trainer.strategy)
        self._clock = self._saved_at = time.monotonic()
        self.seconds["embed"] += trainer.datamodule.report.seconds_embedding
        self.run_log.keep_before(trainer.global_step)
        if threading.current_thread() is threading.main_thread():
            # A run in the background has SIGINT ignored: Ctrl-C is meant for what is in the foreground.
            heard = [number for number in _STOP_SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
            self._handlers = {number: signal.signal(number, self._on_signal) for number in heard}

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Stop, if that was asked for and the state is saved."""
        self._stop_if_asked(trainer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save when it is time or the run is asked to stop, unless a validation or an optimizer step is pending.

        Lightning takes a validation that follows a saved step for done, and forgets accumulated gradients; an
        objective that is to go on with the same batch forgets what it knows of it.
        """
        late = time.monotonic() - self._saved_at >= self.every_seconds
        due = trainer.strategy.reduce_boolean_decision(self._interrupted or late, all=False)
        done = batch_idx + 1
        # Without an epoch to count in, Lightning counts the batches between validations over the whole run.
        every = (
            trainer.fit_loop.epoch_loop.total_batch_idx + 1
            if trainer.check_val_every_n_epoch is None
            else done
        )
        validates = trainer.is_last_batch or every % (trainer.val_check_batch or every + 1) == 0
        pending = done % trainer.accumulate_grad_batches or not pl_module.objective.can_checkpoint
        if due and not validates and not pending:
            self._save(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the weights if they are the best so far."""
        loss = float(trainer.callback_metrics.get("val_loss", math.inf))
        # Not "loss >= best": that is false for NaN, which would then be the best.
        if trainer.sanity_checking or not loss < (math.inf if self.best_loss is None else self.best_loss):
            return
        self.best_loss, self.best_step = loss, trainer.global_step
        if trainer.is_global_zero:
            tensors = {name: value.cpu().contiguous() for name, value in pl_module.state_dict().items()}
            with _writing(self._best_file) as part:
                save_file(tensors, part)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save after the validation and the decisions of all other callbacks: Lightning runs checkpoints last."""
        self._stopped_early = trainer.should_stop
        self._save(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop before the run is measured, if that was asked for."""
        self._stop_if_asked(trainer)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Give the signals back, and leave the other processes in order."""
        self._release_signals()
        if self._watch is not None:
            self._watch.stop()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Give the signals back, and let the other processes know; Lightning calls no teardown after an exception."""
        self._release_signals()
        if self._watch is None:
            return
        if isinstance(exception, Interrupted):
            self._watch.stop()
        elif self._watch.explains(exception):
            # It has said so. What the library would do now is to wait for the lost process once more.
            os._exit(1)
        else:
            self._watch.fail(_in_short(exception))

    def best_weights(self) -> dict[str, Tensor] | None:
        """Return the tensors with the lowest validation loss, or None where none was measured."""
        return None if self.best_loss is None else load_file(self._best_file)

    def forget(self) -> None:
        """Remove state and best weights: the run is finished and its checkpoint folder written."""
        for file in (self.last, *self.folder.glob(BEST)):
            file.unlink(missing_ok=True)

    def _save(self, trainer: Trainer) -> None:
        now = time.monotonic()
        self.seconds["train"] += now - self._clock
        self._clock = self._saved_at = now
        self._rows = trainer.train_dataloader.state_dict()
        self._random = random_state(trainer.strategy)
        trainer.save_checkpoint(self.last)
        # Only now: killed before, the run goes on from a state that names earlier best weights.
        if trainer.is_global_zero:
            for file in set(self.folder.glob(BEST)) - {self._best_file}:
                file.unlink()
        # All processes or none: the signal may have reached one of them a moment before the others.
        self._may_stop = trainer.strategy.reduce_boolean_decision(self._interrupted, all=False)

    def _stop_if_asked(self, trainer: Trainer) -> None:
        # Not right after the save: Lightning logs a step when all callbacks are done with it.
        if self._may_stop:
            raise Interrupted(f"stopped at step {trainer.global_step}")

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        """Ask for a stop at the next saved state; a second signal does what it does elsewhere."""
        self._interrupted = True
        self._release_signals()
        # A handler may interrupt a print, so it must not print itself.
        os.write(2, b"\nstopping as soon as the state can be saved; press Ctrl-C again to stop at once\n")

    def _release_signals(self) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers = {}


def _in_short(error: BaseException) -> str:
    """Our own errors explain themselves; of others the kind tells more than the text."""
    lines = str(error).splitlines() or [""]
    return lines[0] if isinstance(error, BindLLMError) else f"{type(error).__name__}: {lines[0]}".rstrip(": ")


RandomState = dict[str, Tensor]
"""By generator, one row for each process."""


def random_state(strategy: Strategy) -> RandomState:
    """Return the state of the generators of all processes; all of them must call this.

    Args:
        strategy: connects the processes.
    """
    own = _own(strategy.root_device)
    if not distributed.is_initialized():
        return {name: value.unsqueeze(0) for name, value in own.items()}
    gathered = {}
    for name, value in own.items():
        sent = value.to(strategy.root_device)
        rows = [torch.empty_like(sent) for _ in range(distributed.get_world_size())]
        distributed.all_gather(rows, sent)
        gathered[name] = torch.stack(rows).cpu()
    return gathered


def restore_random_state(state: RandomState, strategy: Strategy) -> None:
    """Set the generators of this process to what they were.

    Args:
        state: as `random_state` returned it, of as many processes.
        strategy: connects the processes.
    """
    # A copy: torch reads a generator's state from the start of the storage.
    own = {name: rows[strategy.global_rank].clone() for name, rows in state.items()}
    torch.set_rng_state(own["torch"])
    *words, position, has_normal, normal = own["numpy"].view(torch.float64).tolist()
    np.random.set_state(("MT19937", np.array(words, dtype=np.uint32), int(position), int(has_normal), normal))
    *words, has_normal, normal = own["python"].view(torch.float64).tolist()
    random.setstate((3, tuple(int(word) for word in words), normal if has_normal else None))
    if strategy.root_device.type == "cuda" and "cuda" in own:
        torch.cuda.set_rng_state(own["cuda"], strategy.root_device)


def _own(device: torch.device) -> RandomState:
    """The generators of this process, as bytes: a float64 holds a 32-bit word exactly."""
    _, words, position, has_normal, normal = np.random.get_state(legacy=True)
    numpy_state = [*words.tolist(), position, has_normal, normal]
    _, words, normal = random.getstate()
    python_state = [*words, normal is not None, normal or 0.0]
    state = {
        "torch": torch.get_rng_state(),
        "numpy": torch.tensor(numpy_state, dtype=torch.float64).view(torch.uint8),
        "python": torch.tensor(python_state, dtype=torch.float64).view(torch.uint8),
    }
    return {**state, "cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else state
