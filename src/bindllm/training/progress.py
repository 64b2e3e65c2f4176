"""Progress of a run: one bar with the time left on a terminal, a line at intervals in a log file.

Lightning's `RichProgressBar` has one bar per epoch, estimates the time left from the last 30 seconds, and prints
nothing readable into a log file. This bar spans the whole run, also after a resume.
"""

from __future__ import annotations

import time
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn
from rich.text import Text

from bindllm.errors import printable
from bindllm.training.callbacks import SampleCaptions

_SMOOTH_OVER = 20
"""Steps over which the loss on the bar is averaged."""


class _TimeLeft(ProgressColumn):
    """The time left as the run measured it; rich's own estimate uses only the last 30 seconds."""

    def render(self, task: Task) -> Text:
        return Text(task.fields.get("left", ""), style="cyan")


class RunProgress(ProgressBar):
    """Shows the step, the loss and the time left of a run.

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
        if self.console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), _TimeLeft())
            self._bar = Progress(*columns, console=self.console)
            self._bar.start()
            total = int(trainer.estimated_stepping_batches)
            self._task = self._bar.add_task("training", total=total, completed=trainer.global_step)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Update the bar, or print a line."""
        # Not the output of the step, which is weighted for the gradient; before the first optimizer step it is missing.
        if (loss := trainer.callback_metrics.get("train_loss")) is not None:
            self._losses += 1
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
            said = printable(row["model"]) or "(nothing)"
            asked = f"{printable(row['question'])}  " if "question" in row else ""
            line = Text.assemble("  ", asked, (printable(row["reference"]), "dim"), "  →  ", said)
            self.console.print(line, overflow="ellipsis", no_wrap=True)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the bar."""
        self._close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Stop the bar, so that the terminal is usable."""
        self._close()

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _time_left(self, trainer: Trainer) -> str:
        """Estimate from all steps since the start or resume, including validations."""
        done = trainer.global_step - self._first_step
        if done < 3:
            return ""
        rest = trainer.estimated_stepping_batches - trainer.global_step
        seconds = int((time.monotonic() - self._started) / done * rest)
        return f"{seconds // 60}:{seconds % 60:02d} left"
