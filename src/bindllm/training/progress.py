"""Progress of a run: one bar with the time left on a terminal, a line now and then in a log file."""

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
    """The time left as the run measured it: rich's own estimate forgets everything older than half a minute."""

    def render(self, task: Task) -> Text:
        return Text(task.fields.get("left", ""), style="cyan")


class RunProgress(ProgressBar):
    """Shows where a run is and how long it will take.

    Args:
        captions: its latest answers are shown after each validation.
        every_seconds: without a terminal, a line is printed at this interval.
    """

    def __init__(self, captions: SampleCaptions | None = None, *, every_seconds: float = 30.0) -> None:
        super().__init__()
        self.captions, self.every_seconds = captions, every_seconds
        self.console = Console()
        self._bar: Progress | None = None
        self._loss, self._losses = 0.0, 0
        self._first_step, self._started, self._printed = 0, 0.0, 0.0

    def disable(self) -> None:
        """Show nothing (Lightning asks for it on all processes but the first)."""
        self.console = Console(quiet=True)

    def enable(self) -> None:
        """Show again."""
        self.console = Console()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the bar at the step that the run goes on from."""
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
        """Move on."""
        # Not the output of the step, which is weighed for the gradient; between two steps there is none yet.
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
        """Say why the bar stands still."""
        if self._bar is not None:
            self._bar.update(self._task, description="validating", left="")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the validation loss and a few answers; these lines stay on the terminal."""
        loss = trainer.callback_metrics.get("val_loss")
        if not self._losses or loss is None:
            return
        self.console.print(
            f"[bold]epoch {trainer.current_epoch + 1}[/bold]  step {trainer.global_step}  "
            f"train loss {self._loss:.3f}  [bold]validation loss {float(loss):.3f}[/bold]"
        )
        for row in self.captions.latest if self.captions else ():
            said = printable(row["generated"]) or "(nothing)"
            asked = f"{printable(row['question'])}  " if "question" in row else ""
            line = Text.assemble("  ", asked, (row["true"], "dim"), "  →  ", said)
            self.console.print(line, overflow="ellipsis", no_wrap=True)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remove the bar."""
        self._close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave the terminal as it was."""
        self._close()

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _time_left(self, trainer: Trainer) -> str:
        """Estimate from all steps of this part of the run, its validations included."""
        done = trainer.global_step - self._first_step
        if done < 3:
            return ""
        rest = trainer.estimated_stepping_batches - trainer.global_step
        seconds = int((time.monotonic() - self._started) / done * rest)
        return f"{seconds // 60}:{seconds % 60:02d} left"
