"""Output of a run: the table of parameters, and the model's answers for a few validation rows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from rich.console import Console

from bindllm.data.collate import prompt_batch
from bindllm.data.rows import Sample
from bindllm.errors import InputError
from bindllm.model.quantize import num_weights
from bindllm.training.optim import groups_table
from bindllm.training.runlog import RunLog


def check_monitors(callbacks: Sequence[Callback], *, num_validation: int) -> None:
    """Refuse callbacks that monitor a validation metric if there are no validation rows.

    Args:
        callbacks: the callbacks of a trainer.
        num_validation: number of validation rows (or batches) that a run measures.

    Raises:
        InputError: names the callback and its metric.
    """
    for callback in callbacks:
        monitor, strict = vars(callback).get("monitor"), vars(callback).get("strict", True)
        if not num_validation and strict and isinstance(monitor, str) and monitor.startswith("val_"):
            raise InputError(
                f"{type(callback).__name__} monitors {monitor}, but there are no validation rows to measure it "
                "with; raise held_out of a source, or remove the callback from trainer.callbacks"
            )


class ParameterTable(Callback):
    """Prints the report of the data, and the trained and frozen parameters, before the first step."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check the callbacks; the data is ready and the decoder is not loaded yet.

        Raises:
            InputError: a callback monitors the validation, and there are no validation rows.
        """
        if stage == "fit":
            validated = trainer.limit_val_batches and len(trainer.datamodule.samples("validation"))
            check_monitors(trainer.callbacks, num_validation=int(validated))

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
        """Generate, and write the answers to the log and to TensorBoard."""
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
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_text("captions", _markdown(self.latest), step)


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


def _markdown(rows: Sequence[dict[str, str]]) -> str:
    columns = [
        name for name in ("media", "question", "reference", "model") if any(name in row for row in rows)
    ]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    return "\n".join([*lines, *(f"| {' | '.join(row.get(name, '') for name in columns)} |" for row in rows)])


def _media_name(sample: Sample) -> str:
    source = sample.media[-1][0].source
    return str(source) if isinstance(source, str | Path) else sample.media[-1][0].name
