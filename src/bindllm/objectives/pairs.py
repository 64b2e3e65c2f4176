"""Objectives for pairs, which make chosen answers likelier than rejected ones.

Relative to the initial model: DPO (arXiv 2305.18290, eq. 7), its label smoothing (E. Mitchell, "A note on DPO with
noisy preferences", 2023) and IPO (arXiv 2310.12036, eq. 17). Without a reference model: ORPO (arXiv 2403.07691, eq. 3
to 7), odds-ratio preference optimization.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from bindllm.data.collate import Batch
from bindllm.data.datamodule import BindData
from bindllm.errors import InputError, check_choice
from bindllm.model.bindllm import BindLLM
from bindllm.objectives.base import Metrics, Needs, Objective, answer_log_probs, check_positive
from bindllm.objectives.reference import References
from bindllm.parallel import RunContext

LOSSES = ("sigmoid", "ipo")


class DPO(Objective):
    """Direct preference optimization: learns from pairs of answers, and stays near the initial model.

    Args:
        beta: strength of the pull toward the initial model. For ``ipo`` the paper's tau.
        loss: sigmoid (DPO) or ipo.
        label_smoothing: expected share of swapped pairs, 0 to below 0.5 (only for sigmoid).
        normalize_length: use the mean over the tokens of an answer instead of the sum, so that long answers do not
            weigh more than short ones (arXiv 2411.15124, section 5.1). The papers of both losses use sums.

    Raises:
        InputError: a value is out of range, or options exclude each other.
    """

    needs: ClassVar[Needs] = "pairs"
    uses_reference: ClassVar[bool] = True
    drops_tokens: ClassVar[bool] = False

    def __init__(
        self,
        beta: float = 0.1,
        loss: Literal["sigmoid", "ipo"] = "sigmoid",
        label_smoothing: float = 0.0,
        normalize_length: bool = False,
    ) -> None:
        check_choice("loss", loss, LOSSES)
        # From one half on, it would prefer the rejected answers.
        if not 0 <= label_smoothing < 0.5:
            raise InputError(f"DPO: label_smoothing must be from 0 to below 0.5, not {label_smoothing}")
        if label_smoothing and loss == "ipo":
            raise InputError("DPO: label_smoothing is only for loss sigmoid; remove it with ipo")
        self.beta = check_positive("DPO: beta", beta)
        self.kind, self.label_smoothing, self.normalize_length = loss, label_smoothing, normalize_length
        self._references = References()

    def on_start(self, model: BindLLM) -> None:
        """Record the weights of the reference model."""
        self._references.on_start(model)

    def prepare(self, model: BindLLM, data: BindData, context: RunContext) -> None:
        """Compute or read the reference log-probabilities of all training and validation pairs."""
        # Two columns of answers per split: the chosen and the rejected one of each pair.
        splits = {split: data.samples(split) for split in ("train", "validation")}
        columns = {
            split: [samples, [sample.rejected for sample in samples]]
            for split, samples in splits.items()
            if samples
        }
        self._references.prepare(model, data, context, columns)

    def add_reference(self, batch: Batch, split: str) -> Batch:
        """Add ``reference``, the reference log-probability of each row, [2B]."""
        # One column after the other, in the order of the batch: chosen answers, then rejected ones.
        return {**batch, "reference": self._references.of(split, batch["numbers"]).T.flatten()}

    def loss(self, model: BindLLM, batch: Batch) -> tuple[Tensor, Metrics]:
        """Return the mean loss of the pairs; logs rewards, their margin, and how often it is positive."""
        log_probs, num_tokens = answer_log_probs(model, batch)
        # log(p / p_ref) of each answer; the first half of the batch are the chosen ones.
        ratio = log_probs - batch["reference"]
        chosen, rejected = (ratio / num_tokens if self.normalize_length else ratio).chunk(2)
        gap = chosen - rejected
        loss = dpo_loss(gap, beta=self.beta, kind=self.kind, label_smoothing=self.label_smoothing)
        # The implicit rewards of the paper: beta times the log ratio.
        chosen, rejected, gap = (self.beta * value.detach() for value in (chosen, rejected, gap))
        metrics = {"margin": gap, "accuracy": gap > 0, "chosen_reward": chosen, "rejected_reward": rejected}
        return loss.mean(), {name: value.float().mean() for name, value in metrics.items()}


def dpo_loss(gap: Tensor, *, beta: float, kind: str = "sigmoid", label_smoothing: float = 0.0) -> Tensor:
    """Return the loss of each pair.

    Args:
        gap: log ratio (trained / reference) of the chosen answer minus that of the rejected one, [B].
        kind: sigmoid or ipo.

    Returns:
        Losses, [B].

    Examples:
        >>> [round(value, 4) for value in dpo_loss(torch.tensor([0.0, 10.0]), beta=0.1).tolist()]  # log(2), less
        [0.6931, 0.3133]
    """
    # IPO regresses the gap to a finite target, so sure preferences do not push it without end.
    if kind == "ipo":
        return (gap - 1 / (2 * beta)) ** 2
    # With smoothing, a share of the labels counts as swapped.
    right, wrong = nn.functional.logsigmoid(beta * gap), nn.functional.logsigmoid(-beta * gap)
    return -(1 - label_smoothing) * right - label_smoothing * wrong


class ORPO(Objective):
    """Learns the chosen answer of each pair, and raises its odds above those of the rejected one.

    Args:
        weight: weight of the odds ratio relative to the loss of the chosen answer; the paper's lambda.

    Raises:
        InputError: the weight is not above 0.
    """

    needs: ClassVar[Needs] = "pairs"

    def __init__(self, weight: float = 0.1) -> None:
        self.weight = check_positive("ORPO: weight", weight)

    def loss(self, model: BindLLM, batch: Batch) -> tuple[Tensor, Metrics]:
        """Return the mean loss of the pairs; logs the loss of the chosen answers and the log odds ratio.

        Raises:
            InputError: a streamed row, which no earlier check has seen, is not a pair.
        """
        rows, pairs = len(batch["numbers"]), len(batch["labels"]) - len(batch["numbers"])
        # Streamed batches are checked here, all others before the run.
        if pairs < rows:
            raise InputError(
                f"ORPO learns from pairs of a chosen and a rejected answer, and {rows - pairs} of {rows} rows of a "
                "batch are not pairs; use only sources of format preference"
            )
        log_probs, num_tokens = answer_log_probs(model, batch)
        # Means over tokens: odds of whole answers would underflow (equation 3 of the paper does the same).
        chosen, rejected = (log_probs / num_tokens).chunk(2)
        ratio = log_odds(chosen) - log_odds(rejected)
        # Equation 6: imitation of the chosen answer, plus a push of its odds above the rejected one.
        loss = -chosen - self.weight * nn.functional.logsigmoid(ratio)
        metrics = {"margin": ratio, "accuracy": chosen > rejected, "chosen_loss": -chosen}
        return loss.mean(), {name: value.detach().float().mean() for name, value in metrics.items()}


def log_odds(log_prob: Tensor) -> Tensor:
    """Return log(p / (1 - p)), of any shape.

    Args:
        log_prob: log p, at most 0. A p of 1, whose odds are infinite, is treated as the largest number below 1.

    Examples:
        >>> round(log_odds(torch.tensor(0.2).log()).item(), 4)  # log(0.2 / 0.8)
        -1.3863
    """
    log_prob = log_prob.clamp(max=-torch.finfo(log_prob.dtype).eps)
    # expm1 keeps 1 - p exact for p near 1.
    return log_prob - torch.log(-torch.expm1(log_prob))
