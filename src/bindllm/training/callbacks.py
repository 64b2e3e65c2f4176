"""Callbacks of a run: checks and the table of parameters, an average of the weights, answers for validation rows."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, StochasticWeightAveraging, WeightAveraging
from rich.console import Console
from torch import Tensor

from bindllm.data.collate import prompt_batch
from bindllm.data.rows import Sample
from bindllm.errors import InputError, did_you_mean
from bindllm.model.quantize import num_weights
from bindllm.objectives import Objective
from bindllm.training.optim import groups_table
from bindllm.training.runlog import RunLog

# They copy the frozen decoder, and their state holds no trained tensor of ours.
_REFUSED = (WeightAveraging, StochasticWeightAveraging)


def check_trainer(trainer: Trainer, *, num_validation: int) -> None:
    """Refuse a trainer that takes no step, and callbacks that cannot work.

    Args:
        trainer: the trainer of a recipe.
        num_validation: number of validation rows (or batches) that a run measures.

    Raises:
        InputError: names the option, or the callback and its metric.
    """
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
        self._average: dict[str, Tensor] = {}

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start with the initial weights, or with the average of the resumed run, on the device."""
        for name, value in pl_module.state_dict().items():
            self._average[name] = self._average.get(name, value).to(value.device, copy=True)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Add the weights after an optimizer step."""
        if trainer.global_step > self._step:
            self._step = trainer.global_step
            for name, value in pl_module.state_dict().items():
                self._average[name].lerp_(value, 1 - self.decay)

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure the average."""
        self._swap(pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Continue with the trained weights."""
        self._swap(pl_module)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """End with the average."""
        self._swap(pl_module)

    def state_dict(self) -> dict[str, Any]:
        """Return step and average; Lightning saves them with the run."""
        # Lightning saves it within the state of the run, so it resumes with the weights it belongs to.
        return {"step": self._step, "average": self._average}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the values of `state_dict`."""
        self._step, self._average = state_dict["step"], dict(state_dict["average"])

    @torch.no_grad()
    def _swap(self, module: LightningModule) -> None:
        for name, value in module.state_dict().items():
            trained = value.clone()
            value.copy_(self._average[name])
            self._average[name].copy_(trained)


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
        values = pl_module.model.decoder.parameters()
        frozen = sum(num_weights(value) for value in values if id(value) not in grouped)
        if trainer.is_global_zero:
            Console().print(trainer.datamodule.report, groups_table(groups, frozen))


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
        samples = spread(trainer.datamodule.samples("validation"), self.count)
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


def spread(samples: Sequence[Sample], count: int) -> list[Sample]:
    """Return up to ``count`` samples with media, evenly spread, so that they are not all of one source."""
    shown = [sample for sample in samples if sample.media]
    count = min(count, len(shown))
    return [shown[n * len(shown) // count] for n in range(count)]


def _row(sample: Sample, answer: str) -> dict[str, str]:
    """Return media, question (unless it is a caption), reference answers and the model's answer."""
    questions = [message.text for message in sample.conversation.messages if message.role == "user"]
    asked = {} if sample.task == "caption" else {"question": questions[-1]}
    reference = " | ".join(dict.fromkeys(sample.references))
    return {"media": _media_name(sample), **asked, "reference": reference, "model": answer}


def _media_name(sample: Sample) -> str:
    source = sample.media[-1][0].source
    return str(source) if isinstance(source, str | Path) else sample.media[-1][0].name
