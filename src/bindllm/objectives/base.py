"""What every objective is: what rows it learns from, what it prepares, and the loss of a batch."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Sequence
from typing import ClassVar, Literal

from torch import Tensor

from bindllm.data.collate import Batch
from bindllm.data.datamodule import BindData
from bindllm.data.rows import Row, Sample
from bindllm.data.source_config import SourceConfig
from bindllm.errors import InputError
from bindllm.model.bindllm import BindLLM
from bindllm.parallel import RunContext

Needs = Literal["answers", "pairs", "labels", "prompts"]
Metrics = dict[str, Tensor]
"""What is logged beside a loss: scalars without gradient, each a mean over the rows (or pairs) of a batch."""

_SERVES: dict[Needs, Callable[[Row | Sample], bool]] = {
    "answers": lambda row: True,
    "pairs": lambda row: row.rejected is not None,
    "labels": lambda row: row.rejected is not None or row.desirable is not None,
    "prompts": lambda row: bool(row.references),
}
_WANTED: dict[Needs, str] = {
    "answers": "rows with an answer",
    "pairs": "pairs: rows with a chosen and a rejected answer (format preference)",
    "labels": "rows that say whether their answer is a desirable one, or pairs (format preference)",
    "prompts": "rows with true answers to compare with",
}


class Objective(ABC):
    """What a run minimises.

    An instance is made while a recipe is read, so constructors only check their arguments.

    Attributes:
        needs: what it learns from; a data set whose rows lack it is refused before anything is loaded.
        uses_reference: whether it compares with the model that training starts from.
    """

    needs: ClassVar[Needs] = "answers"
    uses_reference: ClassVar[bool] = False

    @property
    def can_checkpoint(self) -> bool:
        """Whether a state may be saved now: False while the next step needs more than a saved state holds."""
        return True

    def check(self, data: BindData, stage: str) -> None:
        """Refuse data that the objective cannot learn from; the decoder is not loaded yet.

        Args:
            data: of the run.
            stage: fit, validate or test.

        Raises:
            InputError: names the source, a row of it, and what the row lacks.
        """
        if self.uses_reference and stage != "fit":
            raise InputError(
                f"{type(self).__name__} compares with the model that training started from, so its loss is measured "
                "while training (val_loss in the run's metrics.csv). The trained model's loss per token of the true "
                "answers: the same command with --model.objective null"
            )
        if self.uses_reference and data.streamed:
            raise InputError(
                f"{type(self).__name__} compares every training row with what the model said of it before training, "
                "which takes rows that are known beforehand. Take data on disk (a table) in place of streamed "
                "shards, or the objective ORPO, which compares with nothing"
            )
        splits = {"fit": ("train", "validation"), "validate": ("validation",)}.get(stage, ("test",))
        self.check_rows([sample for split in splits for sample in data.samples(split)], data.sources)

    def check_rows(self, rows: Sequence[Row | Sample], sources: Sequence[SourceConfig]) -> None:
        """Refuse rows that the objective cannot learn from.

        Args:
            rows: to learn from, tokenized or not.
            sources: of the recipe.

        Raises:
            InputError: names the source, a row of it, and what the row lacks.
        """
        lacking = [row for row in rows if not _SERVES[self.needs](row)]
        if not lacking:
            return
        worst, count = Counter(row.source for row in lacking).most_common(1)[0]
        total = sum(row.source == worst for row in rows)
        example = next(row.name for row in lacking if row.source == worst)
        raise InputError(
            f"{type(self).__name__} learns from {_WANTED[self.needs]}. Of the {total} rows of "
            f"{sources[worst].path}, {count} are not such rows; one is {example}. Use other data, or another "
            "model.objective"
        )

    def on_start(self, model: BindLLM) -> None:  # noqa: B027 (most objectives do not need it)
        """Record the initial weights; called before a resumed run restores its own."""

    def prepare(self, model: BindLLM, data: BindData, context: RunContext) -> None:  # noqa: B027 (as above)
        """Compute what all steps need; called once, before the first step.

        Args:
            model: on its device, in eval mode. A resumed run has restored its weights.
            data: the data of the run.
            context: processes, device and folder of the run.
        """

    def on_epoch_start(self) -> None:  # noqa: B027 (as above)
        """Drop anything that belongs to the last epoch; called before each epoch."""

    def add_reference(self, batch: Batch, split: str) -> Batch:
        """Return a batch with the values that `prepare` computed for its rows.

        Args:
            batch: from `bindllm.data.collate.collate`, on the device.
            split: which samples ``batch["numbers"]`` counts: train, validation or test.
        """
        return batch

    @abstractmethod
    def loss(self, model: BindLLM, batch: Batch) -> tuple[Tensor, Metrics]:
        """Return what is minimised, a float32 scalar, and what is logged beside it.

        Args:
            model: in the mode of the moment.
            batch: as `add_reference` returned it.

        Raises:
            InputError: the batch has nothing to learn from.
        """

    def count(self, batch: Batch) -> int:
        """Return the number of things that a batch's loss is a mean of: its weight among other batches."""
        return len(batch["numbers"])

    def held_out(self, model: BindLLM, batch: Batch) -> tuple[Tensor, int, Metrics]:
        """Return a held-out batch's mean loss, the number of things it is a mean of, and metrics as in `loss`."""
        loss, metrics = self.loss(model, batch)
        return loss, self.count(batch), metrics


def check_positive(name: str, value: float) -> float:
    """Return a number of a recipe, or refuse it.

    Raises:
        InputError: it is not finite, or not above 0.
    """
    if not (math.isfinite(value) and value > 0):
        raise InputError(f"{name} must be finite and above 0, not {value}")
    return value
