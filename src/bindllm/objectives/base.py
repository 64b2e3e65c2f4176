"""The base class of objectives (rows that it can learn from, preparation, loss of a batch), and the default one."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor

from bindllm.data.collate import Batch, model_inputs
from bindllm.data.datamodule import BindData
from bindllm.data.rows import IGNORE, Row, Sample
from bindllm.data.source_config import SourceConfig
from bindllm.errors import InputError
from bindllm.model.bindllm import BindLLM, BindOutput
from bindllm.objectives.log_probs import log_probs
from bindllm.parallel import RunContext

Needs = Literal["answers", "pairs", "labels", "prompts"]
Metrics = dict[str, Tensor]
"""Values that are logged with a loss: scalars without gradient, each a mean over the rows (or pairs) of a batch."""

# A pair has both a wanted and an unwanted answer, so it also serves objectives that need labels.
_SERVES: dict[Needs, Callable[[Row | Sample], bool]] = {
    "answers": lambda row: True,
    "pairs": lambda row: row.rejected is not None,
    "labels": lambda row: row.rejected is not None or row.desirable is not None,
    "prompts": lambda row: bool(row.references),
}
# The same kinds in words, for the error message.
_WANTED: dict[Needs, str] = {
    "answers": "rows with an answer",
    "pairs": "pairs: rows with a chosen and a rejected answer (format preference)",
    "labels": "rows whose answer is labeled desirable or undesirable, or pairs (format preference)",
    "prompts": "rows with reference answers",
}


class Objective(ABC):
    """The loss that a run minimizes.

    The instance is created while the recipe is parsed, so constructors only check their arguments.

    Attributes:
        needs: the kind of rows it learns from. Data of another kind is refused before anything is loaded.
        uses_reference: whether the loss compares with the initial model.
        drops_tokens: whether training drops bind tokens at random (`BindNetwork`); not if the loss compares two passes
            over the same rows, which must read the same tokens.
    """

    needs: ClassVar[Needs] = "answers"
    uses_reference: ClassVar[bool] = False
    drops_tokens: ClassVar[bool] = True

    @property
    def can_checkpoint(self) -> bool:
        """Whether a state may be saved now: False while the next step needs more than a saved state holds."""
        return True

    def check(self, data: BindData, stage: str) -> None:
        """Refuse data that the objective cannot learn from; called before the decoder is loaded.

        Args:
            data: the data of the run.
            stage: fit, validate or test.

        Raises:
            InputError: names the source, one of its rows, and the missing field.
        """
        # The reference is the model at the start of the run, which no checkpoint keeps.
        if self.uses_reference and stage != "fit":
            raise InputError(
                f"{type(self).__name__} compares with the initial model, so its loss is measured in training only "
                "(val_loss in the run's metrics.csv). For the loss per token of the reference answers, add "
                "--model.objective null"
            )
        # Streamed rows are seen once: their reference cannot be computed before training, nor be looked up later.
        if data.streamed and (self.uses_reference or self.needs == "prompts"):
            reason, other = "looks up the reference answers of a row", ""
            if self.uses_reference:
                reason = "compares all training rows with the initial model"
                other = ", or the objective ORPO, which has no reference"
            raise InputError(
                f"{type(self).__name__} {reason}, so it needs all rows before training. Use a table on disk instead of "
                f"streamed shards{other}"
            )
        # Validation rows too: a run must not fail after its first epoch.
        splits = {"fit": ("train", "validation"), "validate": ("validation",)}.get(stage, ("test",))
        self.check_rows([sample for split in splits for sample in data.samples(split)], data.sources)

    def check_rows(self, rows: Sequence[Row | Sample], sources: Sequence[SourceConfig]) -> None:
        """Refuse rows that the objective cannot learn from.

        Args:
            rows: to learn from, tokenized or not.
            sources: of the recipe.

        Raises:
            InputError: names the source, one of its rows, and the missing field.
        """
        lacking = [row for row in rows if not _SERVES[self.needs](row)]
        if not lacking:
            return
        # One source is named, the one with most of these rows: usually its format is wrong.
        worst, count = Counter(row.source for row in lacking).most_common(1)[0]
        total = sum(row.source == worst for row in rows)
        example = next(row.name for row in lacking if row.source == worst)
        raise InputError(
            f"{type(self).__name__} learns from {_WANTED[self.needs]}. {count} of the "
            f"{total} rows of {sources[worst].path} are not; the first one is {example}. Use other data, or "
            "another model.objective"
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
            batch: a batch of `bindllm.data.collate.collate`, on the device.
            split: the split that ``batch["numbers"]`` indexes: train, validation or test.
        """
        return batch

    @abstractmethod
    def loss(self, model: BindLLM, batch: Batch) -> tuple[Tensor, Metrics]:
        """Return the loss, a float32 scalar, and further values to log.

        Args:
            model: in training or eval mode.
            batch: as `add_reference` returned it.

        Raises:
            InputError: the batch has nothing to learn from.
        """

    def count(self, batch: Batch) -> int:
        """Return the number of terms in the mean loss of a batch, which is its weight among other batches."""
        return len(batch["numbers"])

    def held_out(self, model: BindLLM, batch: Batch) -> tuple[Tensor, int, Metrics]:
        """Return the mean loss of a held-out batch, the number of its terms, and metrics as in `loss`."""
        # The count lets the caller average over batches of different size without a bias.
        loss, metrics = self.loss(model, batch)
        return loss, self.count(batch), metrics


def check_positive(name: str, value: float) -> float:
    """Return a number of a recipe if it is finite and above 0.

    Raises:
        InputError: it is not finite, or not above 0.
    """
    # NaN and infinity pass a plain comparison with 0 or a YAML float, and would reach the weights.
    if not (math.isfinite(value) and value > 0):
        raise InputError(f"{name} must be finite and above 0, not {value}")
    return value


def token_log_probs(
    model: Callable[..., BindOutput], batch: Batch, *, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Return the log-probability of each supervised token of a batch, row after row.

    Args:
        model: a `BindLLM` in any mode; the result has a gradient if gradients are enabled.
        batch: inputs of the model; the N supervised tokens are its labels after the first of each row.

    Returns:
        Log-probabilities in nats, [N], float32 (float64 if the logits are); and the row of each token, [N].
    """
    output = model(**model_inputs(batch))
    logits = output.logits
    if temperature != 1:
        # In float32, because differences of log-probabilities in bfloat16 are mostly rounding.
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
    return log_probs(logits, output.targets[:, None])[:, 0], output.rows


def answer_log_probs(model: BindLLM, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return the log-probability of the supervised tokens of each row.

    Args:
        model: in any mode; the result has a gradient if gradients are enabled.

    Returns:
        The sum over the supervised tokens of each row, in nats, [R], float32 (float64 if the logits are); and the
        number of these tokens, [R].
    """
    return sum_by_row(*token_log_probs(model, batch), len(batch["labels"]))


def sum_by_row(values: Tensor, rows: Tensor, num_rows: int) -> tuple[Tensor, Tensor]:
    """Return the sum of the values of each row, [R], and their number, [R].

    Args:
        values: a value for each token, [N].
        rows: the row of each token, [N].
    """
    own = rows == torch.arange(num_rows, device=rows.device)[:, None]
    # Not index_add: on GPUs its order of additions varies, so a resumed run would differ in the last bits.
    return torch.where(own, values, 0).sum(1), own.sum(1)


class NextToken(Objective):
    """Mean cross entropy of the supervised tokens; of a preference pair, those of the chosen answer.

    Args:
        unlikelihood: weight of `unlikelihood_loss` in training, against answers that repeat themselves; 0: none.
    """

    def __init__(self, unlikelihood: float = 0.0) -> None:
        self.unlikelihood = check_positive("unlikelihood", unlikelihood) if unlikelihood else 0.0

    def loss(self, model: BindLLM, batch: Batch) -> tuple[Tensor, Metrics]:
        """Return the loss of a batch, per supervised token."""
        # The first rows are the answers to imitate; rejected ones of pairs follow them.
        rows = len(batch["numbers"])
        output = model(**{name: value[:rows] for name, value in model_inputs(batch).items()})
        loss = next_token_loss(output.logits, output.targets)
        # The loss of held-out rows does not depend on the settings.
        if not (self.unlikelihood and model.training):
            return loss, {}
        repeated = unlikelihood_loss(output.logits, output.targets, output.rows)
        return loss + self.unlikelihood * repeated, {"unlikelihood": repeated.detach()}

    def count(self, batch: Batch) -> int:
        """Return the number of supervised tokens."""
        # From the second position: no token predicts the first one.
        return int((batch["labels"][: len(batch["numbers"]), 1:] != IGNORE).sum())


def next_token_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the mean cross entropy of the supervised tokens, in nats per token.

    Args:
        logits: at the positions that predict a supervised token, [N, V], any float dtype.
        targets: the supervised tokens, [N].

    Returns:
        A float32 scalar.

    Raises:
        InputError: no token is supervised. Its mean would be NaN, and would end the run some steps later.

    Examples:
        >>> round(next_token_loss(torch.zeros(3, 8), torch.tensor([0, 5, 7])).item(), 4)  # log(8)
        2.0794
    """
    if not len(targets):
        raise InputError(
            "a batch has no supervised token, so it has no loss. Check the label mask of your rows with "
            "bindllm check --config RECIPE: captions may be empty, or data.max_length too small for the prompt"
        )
    return -log_probs(logits, targets[:, None]).mean()


def unlikelihood_loss(logits: Tensor, targets: Tensor, rows: Tensor) -> Tensor:
    """Return how likely a model repeats tokens of its answer, ``-log(1 - p)`` summed over them, per supervised token.

    At each position these are the earlier supervised tokens of the row that are not the target. This is the token-level
    unlikelihood of Welleck et al. (arXiv 1908.04319, section 5.1), but a token counts as often as it occurs.

    Args:
        logits: at the positions that predict a supervised token, [N, V], any float dtype.
        targets: the supervised tokens, [N].
        rows: the row of each, [N].

    Returns:
        A float32 scalar.

    Examples:
        >>> likely = torch.zeros(2, 8)
        >>> round(unlikelihood_loss(likely, torch.tensor([0, 5]), torch.tensor([0, 0])).item(), 4)  # log(8 / 7) / 2
        0.0668
    """
    said = (rows[:, None] == rows).tril(-1) & (targets[:, None] != targets)
    likely = log_probs(logits, targets.expand(len(targets), -1))
    unlikely = torch.log(-torch.expm1(likely.clamp(max=-1e-6)))
    return -torch.where(said, unlikely, 0).sum() / len(targets)
