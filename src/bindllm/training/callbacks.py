"""What a run shows of itself: the table of parameters, and what the model says of a few held-out pictures."""

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
    """Refuse callbacks that watch a validation figure where there is nothing to validate with.

    Args:
        callbacks: those of a trainer.
        num_validation: validation rows (or batches) that a run will measure.

    Raises:
        InputError: names the callback and what it watches.
    """
    for callback in callbacks:
        watched, strict = vars(callback).get("monitor"), vars(callback).get("strict", True)
        if not num_validation and strict and isinstance(watched, str) and watched.startswith("val_"):
            raise InputError(
                f"{type(callback).__name__} watches {watched}, but there are no validation rows to measure it "
                "with; raise held_out of a source, or remove the callback from trainer.callbacks"
            )


class ParameterTable(Callback):
    """Prints what became of the data, what is trained and what is frozen, before the first step."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse callbacks that would find nothing to watch; the data are ready, the decoder is not loaded yet.

        Raises:
            InputError: a callback watches the validation, and there is none.
        """
        if stage == "fit":
            validated = trainer.limit_val_batches and len(trainer.datamodule.samples("validation"))
            check_monitors(trainer.callbacks, num_validation=int(validated))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the report of the data, and the table."""
        groups = pl_module.model.parameter_groups()
        # The adapter's parameters are inside the decoder, and have a row of their own.
        grouped = {id(value) for group in groups.values() for _, value in group}
        values = pl_module.model.decoder.parameters()
        frozen = sum(num_weights(value) for value in values if id(value) not in grouped)
        if trainer.is_global_zero:
            Console().print(trainer.datamodule.report, groups_table(groups, frozen))


class SampleCaptions(Callback):
    """Lets the model answer for a few fixed validation pictures after each validation: the loss in words.

    A row of `latest` says what was asked (``question``) where that differs from row to row: not for captions.

    Args:
        log: where the answers are kept.
        count: number of pictures.
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
        # On all processes: those that share a decoder run it together.
        model = pl_module.model
        batch = prompt_batch(samples, trainer.datamodule.lookup, pad_id=model.tokenizer.pad_token_id)
        ids = model.generate_from(**batch, do_sample=False, max_new_tokens=self.max_new_tokens)
        texts = [text.strip() for text in model.tokenizer.batch_decode(ids, skip_special_tokens=True)]
        if not trainer.is_global_zero:
            return
        self.latest = [_row(sample, text) for sample, text in zip(samples, texts, strict=True)]
        # The step under which Lightning logs the validation loss that belongs to these answers.
        step = trainer.fit_loop.epoch_loop._batches_that_stepped
        self.run_log.log_captions(self.latest, step)
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_text("captions", _markdown(self.latest), step)


def spread(samples: Sequence[Sample], count: int) -> list[Sample]:
    """Return up to ``count`` samples that show something, evenly spread, so that they are not all of one kind."""
    shown = [sample for sample in samples if sample.media]
    count = min(count, len(shown))
    return [shown[n * len(shown) // count] for n in range(count)]


def _row(sample: Sample, answer: str) -> dict[str, str]:
    """What was shown, what was asked unless it is a caption, what is true and what was generated."""
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
