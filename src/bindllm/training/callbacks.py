"""Callbacks and the log of a run: checks, the table of parameters, averaged weights, sample answers, progress.

The log is two plain files, ``metrics.csv`` and ``captions.jsonl``. Lightning's own CSV logger deletes the file of an
interrupted run; this one appends to it after a resume.
"""

from __future__ import annotations

import csv
import json
import time
from argparse import Namespace
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, ProgressBar, StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.loggers import Logger
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.text import Text
from torch import Tensor

from bindllm.atomic import atomic_file
from bindllm.data.collate import prompt_batch
from bindllm.data.rows import Sample, spread
from bindllm.errors import InputError, did_you_mean, printable
from bindllm.evaluation.task import media_name
from bindllm.model.quantize import num_weights
from bindllm.objectives import Objective
from bindllm.training.loggers import log_captions
from bindllm.training.optim import check_precision, groups_table

METRICS = "metrics.csv"
CAPTIONS = "captions.jsonl"
COLUMNS = ("epoch", "step", "train_loss", "val_loss", "lr", "gradient_norm")
"""First columns of ``metrics.csv``; others follow when they are first logged."""

# They copy the frozen decoder, and their state holds no trained tensor of ours.
_REFUSED = (WeightAveraging, StochasticWeightAveraging)

# Steps over which the loss on the progress bar is averaged.
_SMOOTH_OVER = 20


def check_trainer(trainer: Trainer, *, num_validation: int) -> None:
    """Refuse a trainer that takes no step or rounds the trained weights, and callbacks that cannot work.

    Args:
        num_validation: number of validation rows (or batches) that a run measures.

    Raises:
        InputError: names the option, or the callback and its metric.
    """
    check_precision(trainer)
    # Lightning accepts 0 and then trains nothing without an error.
    lengths = {
        "max_epochs": trainer.max_epochs,
        "max_steps": trainer.max_steps,
        "limit_train_batches": trainer.limit_train_batches,
    }
    if empty := [name for name, value in lengths.items() if value == 0]:
        raise InputError(f"trainer.{empty[0]} is 0, so no step would be taken; expected at least 1")
    # Lightning finds both faults itself, but only after an epoch.
    for callback in trainer.callbacks:
        kind = type(callback).__name__
        if isinstance(callback, _REFUSED):
            raise InputError(
                f"{kind} of Lightning copies the frozen decoder, and its runs cannot resume. Use "
                "{class_path: bindllm.training.callbacks.AverageWeights, init_args: {decay: 0.999}}"
            )
        # `strict=False` asks Lightning to ignore a metric that is missing.
        monitor, strict = vars(callback).get("monitor"), vars(callback).get("strict", True)
        if not num_validation and strict and isinstance(monitor, str) and monitor.startswith("val_"):
            raise InputError(
                f"{kind} monitors {monitor}, but there are no validation rows to measure it "
                "with; raise held_out of a source, or remove the callback from trainer.callbacks"
            )


def check_monitors(trainer: Trainer, measured: Collection[str]) -> None:
    """Refuse early stopping on a metric that a run does not measure.

    Raises:
        InputError: names the callback, its metric and the closest one.
    """
    for callback in trainer.early_stopping_callbacks:
        if callback.strict and callback.monitor not in measured:
            hint = did_you_mean(callback.monitor, measured)
            raise InputError(f"EarlyStopping monitors {callback.monitor}, which is not measured. {hint}")


class AverageWeights(Callback):
    """Measures and saves an exponential moving average of the trained tensors in place of the last ones.

    Lightning's own `EMAWeightAveraging` copies the frozen decoder too.

    Args:
        decay: weight of the earlier average in each step, 0 to below 1.

    Raises:
        InputError: the decay is out of range.
    """

    def __init__(self, decay: float = 0.999) -> None:
        if not 0 <= decay < 1:
            raise InputError(f"AverageWeights: decay is {decay}, expected 0 to below 1")
        self.decay, self._step = decay, 0
        # Only trained tensors, which are few: the frozen decoder is its own average.
        self._average: dict[str, Tensor] = {}

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start with the initial weights, or with the average of the resumed run, on the device."""
        for name, value in pl_module.state_dict().items():
            self._average[name] = self._average.get(name, value).to(value.device, copy=True)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Add the weights after an optimizer step."""
        # Batches whose gradients are still accumulated have not changed the weights.
        if trainer.global_step > self._step:
            self._step = trainer.global_step
            for name, value in pl_module.state_dict().items():
                self._average[name].lerp_(value, 1 - self.decay)

    def state_dict(self) -> dict[str, Any]:
        """Return step and average; Lightning saves them with the run."""
        # Lightning saves it within the state of the run, so it resumes with the weights it belongs to.
        return {"step": self._step, "average": self._average}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the values of `state_dict`."""
        self._step, self._average = state_dict["step"], dict(state_dict["average"])

    @torch.no_grad()
    def _swap(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # `validate` has no average: it measures the weights of a checkpoint.
        for name, value in pl_module.state_dict().items() if self._average else ():
            # In place, because optimizer and injection hold these tensors.
            trained = value.clone()
            value.copy_(self._average[name])
            self._average[name].copy_(trained)

    # The average is measured, and is the result of the run; steps continue with the trained weights.
    on_validation_epoch_start = on_validation_end = on_fit_end = _swap


class ParameterTable(Callback):
    """Prints the report of the data and the parameters before the first step; checks the other callbacks."""

    def __init__(self) -> None:
        self._is_checked = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check the trainer; the data is ready and the decoder is not loaded yet."""
        if stage == "fit":
            validated = trainer.limit_val_batches and len(trainer.datamodule.samples("validation"))
            check_trainer(trainer, num_validation=int(validated))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Refuse a misspelled metric after the first step, when the names are known, and not after an epoch.

        Raises:
            InputError: a callback monitors a metric that will not be measured.
        """
        if self._is_checked or not trainer.global_step:
            return
        self._is_checked = True
        # Objectives measure the same values of held-out rows as in training, under another prefix.
        logged = set(trainer.callback_metrics)
        logged |= {"val_loss", *(f"val_{name.removeprefix('train_')}" for name in logged)}
        if type(pl_module.objective).held_out is not Objective.held_out:
            # Such an objective may measure other values of held-out rows.
            logged |= {
                callback.monitor
                for callback in trainer.early_stopping_callbacks
                if "val_" in callback.monitor
            }
        check_monitors(trainer, logged)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the report of the data, and the table."""
        groups = pl_module.model.parameter_groups()
        # The adapter's parameters are part of the decoder, but have their own row.
        grouped = {id(value) for group in groups.values() for _, value in group}
        # Packed weights hold several values in a byte, which `num_weights` counts.
        values = pl_module.model.decoder.parameters()
        frozen = sum(num_weights(value) for value in values if id(value) not in grouped)
        if trainer.is_global_zero:
            Console().print(trainer.datamodule.report, groups_table(groups, frozen))


class RunLog(Logger):
    """Writes each row immediately, so that a killed run keeps its log.

    Args:
        folder: the run's folder.

    Example:
        log = RunLog("runs/quickstart")
        Trainer(logger=[log])
    """

    def __init__(self, folder: str | Path) -> None:
        super().__init__()
        self.folder = Path(folder)
        # Grows with the first row that has another name, see `log_metrics`.
        self._columns = list(COLUMNS)

    @property
    def name(self) -> str:
        """Name of the run."""
        return self.folder.name

    @property
    def version(self) -> str:
        """Empty: a run has one log, also when it was interrupted."""
        return ""

    @property
    def save_dir(self) -> str:
        """The run's folder."""
        return str(self.folder)

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Do nothing: the folder holds the recipe."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Append a row."""
        file, row = self.folder / METRICS, {**metrics, "step": step}
        unknown = [name for name in row if name not in self._columns]
        # A new column means a new header, so the whole file is written again; that is rare.
        if unknown or not file.exists():
            rows = self._rows()
            self._columns += unknown
            self._write(rows)
        # Opened for each row: nothing stays in a buffer that a kill would lose.
        with file.open("a", newline="", encoding="utf-8") as stream:
            csv.DictWriter(stream, self._columns).writerow(row)

    @rank_zero_only
    def log_captions(self, captions: Sequence[Mapping[str, Any]], step: int) -> None:
        """Append captions, each with its step."""
        # One JSON object a line, so that a cut last line costs one answer.
        with (self.folder / CAPTIONS).open("a", encoding="utf-8") as stream:
            for caption in captions:
                stream.write(json.dumps({"step": step, **caption}, ensure_ascii=False) + "\n")

    @rank_zero_only
    def keep_before(self, step: int) -> None:
        """Drop rows logged at or after a step: the run resumes there and will log them again."""
        # A row that was cut by a kill has no step, or one that is not a number.
        rows = [row for row in self._rows() if row["step"].isdigit() and int(row["step"]) < step]
        # Columns that the earlier part of the run has added stay.
        self._columns += [name for row in rows[:1] for name in row if name not in self._columns]
        self._write(rows)
        file = self.folder / CAPTIONS
        if file.exists():
            # Not splitlines(): it also splits at characters that JSON does not escape, such as U+2028.
            lines = file.read_text(encoding="utf-8").split("\n")
            kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] < step]
            with atomic_file(file) as part:
                part.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")

    def _rows(self) -> list[dict[str, str]]:
        file = self.folder / METRICS
        if not file.exists():
            return []
        with file.open(newline="", encoding="utf-8") as stream:
            return list(csv.DictReader(stream, restval=""))

    def _write(self, rows: Sequence[Mapping[str, str]]) -> None:
        with (
            atomic_file(self.folder / METRICS) as part,
            part.open("w", newline="", encoding="utf-8") as stream,
        ):
            writer = csv.DictWriter(stream, self._columns)
            writer.writeheader()
            writer.writerows(rows)


class SampleCaptions(Callback):
    """Generates answers for a few fixed validation rows with media after each validation.

    Rows of `latest` have the keys ``media``, ``reference``, ``model``, and ``question`` unless it is a caption.

    Args:
        log: receives the answers.
        count: number of rows.
        max_new_tokens: longest answer.
    """

    def __init__(self, log: RunLog, *, count: int = 4, max_new_tokens: int = 32) -> None:
        self.run_log, self.count, self.max_new_tokens = log, count, max_new_tokens
        self.latest: list[dict[str, str]] = []

    @torch.no_grad()
    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Generate, and write the answers to the log."""
        # Rows without media say nothing about how much the model sees.
        shown = [sample for sample in trainer.datamodule.samples("validation") if sample.media]
        samples = spread(shown, self.count)
        if trainer.sanity_checking or not samples:
            return
        # On all processes, because processes that share a decoder run it together.
        model = pl_module.model
        batch = prompt_batch(samples, trainer.datamodule.lookup, pad_id=model.tokenizer.pad_token_id)
        texts = model.decode(model.generate_from(**batch, max_new_tokens=self.max_new_tokens))
        if not trainer.is_global_zero:
            return
        self.latest = [_row(sample, text) for sample, text in zip(samples, texts, strict=True)]
        # The step under which Lightning logs the loss of this validation.
        step = trainer.fit_loop.epoch_loop._batches_that_stepped
        self.run_log.log_captions(self.latest, step)
        log_captions(trainer.loggers, self.latest, step=step)


def _row(sample: Sample, answer: str) -> dict[str, str]:
    """Return media, question (unless it is a caption), reference answers and the model's answer."""
    # The last question is the one that was answered.
    questions = [message.text for message in sample.conversation.messages if message.role == "user"]
    asked = {} if sample.task == "caption" else {"question": questions[-1]}
    reference = " | ".join(dict.fromkeys(sample.references))
    return {"media": media_name(sample), **asked, "reference": reference, "model": answer}


class RunProgress(ProgressBar):
    """Shows the step, the loss and the time left of a run: a bar on a terminal, a line at intervals in a log file.

    Lightning's `RichProgressBar` has one bar per epoch, estimates the time left from the last 30 seconds, and prints
    nothing readable into a log file. This bar spans the whole run, also after a resume.

    Args:
        captions: callback whose latest answers are shown after each validation.
        every_seconds: interval of the printed lines without a terminal, in seconds.
    """

    def __init__(self, captions: SampleCaptions | None = None, *, every_seconds: float = 30.0) -> None:
        super().__init__()
        self.captions, self.every_seconds = captions, every_seconds
        self.console = Console()
        self._bar: Progress | None = None
        self._loss, self._losses = 0.0, 0
        self._first_step, self._started, self._printed = 0, 0.0, 0.0

    def disable(self) -> None:
        """Show nothing; Lightning calls this on all processes but the first."""
        self.console = Console(quiet=True)

    def enable(self) -> None:
        """Show the progress again."""
        self.console = Console()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the bar at the step from which the run resumes."""
        self._first_step, self._started = trainer.global_step, time.monotonic()
        self._printed = self._started
        # A log file gets lines at intervals instead, see below: a bar would fill it with control characters.
        if self.console.is_terminal:
            left = TextColumn("[cyan]{task.fields[left]}")
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), left)
            self._bar = Progress(*columns, console=self.console)
            self._bar.start()
            total = int(trainer.estimated_stepping_batches)
            self._task = self._bar.add_task("training", total=total, completed=trainer.global_step, left="")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Update the bar, or print a line."""
        # Not the output of the step, which is weighted for the gradient; before the first optimizer step it is missing.
        if (loss := trainer.callback_metrics.get("train_loss")) is not None:
            self._losses += 1
            # A running mean: plain over the first steps, then exponential, so it starts without a bias.
            self._loss += (float(loss) - self._loss) / min(self._losses, _SMOOTH_OVER)
        left = self._time_left(trainer)
        if self._bar is not None:
            text = f"epoch {trainer.current_epoch + 1}  loss {self._loss:.3f}"
            self._bar.update(self._task, description=text, completed=trainer.global_step, left=left)
        elif time.monotonic() - self._printed >= self.every_seconds:
            self._printed = time.monotonic()
            self.console.print(
                f"step {trainer.global_step}/{int(trainer.estimated_stepping_batches)}  "
                f"epoch {trainer.current_epoch + 1}  loss {self._loss:.3f}  {left}"
            )

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Label the bar while it stands still."""
        if self._bar is not None:
            self._bar.update(self._task, description="validating", left="")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the validation loss and a few answers above the bar."""
        # The sanity check before the first step has no training loss.
        loss = trainer.callback_metrics.get("val_loss")
        if not self._losses or loss is None:
            return
        self.console.print(
            f"[bold]epoch {trainer.current_epoch + 1}[/bold]  step {trainer.global_step}  "
            f"train loss {self._loss:.3f}  [bold]validation loss {float(loss):.3f}[/bold]"
        )
        for row in self.captions.latest if self.captions else ():
            # Texts of models and data may hold control characters and markup: `Text` draws them as they are.
            said = printable(row["model"]) or "(nothing)"
            asked = f"{printable(row['question'])}  " if "question" in row else ""
            line = Text.assemble("  ", asked, (printable(row["reference"]), "dim"), "  →  ", said)
            self.console.print(line, overflow="ellipsis", no_wrap=True)

    def on_train_end(self, *_: Any) -> None:
        """Stop the bar, also after an exception, so that the terminal is usable."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    on_exception = on_train_end

    def _time_left(self, trainer: Trainer) -> str:
        """Estimate from all steps since the start or resume, including validations."""
        done = trainer.global_step - self._first_step
        # The first steps include warm-up of kernels and caches.
        if done < 3:
            return ""
        rest = trainer.estimated_stepping_batches - trainer.global_step
        seconds = int((time.monotonic() - self._started) / done * rest)
        return f"{seconds // 60}:{seconds % 60:02d} left"
