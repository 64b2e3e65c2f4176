"""Direct preference optimization: makes chosen answers likelier than rejected ones, relative to the initial model.

DPO (arXiv 2305.18290, eq. 7), its label smoothing (E. Mitchell, "A note on DPO with noisy preferences", 2023) and IPO
(arXiv 2310.12036, eq. 17).
"""

from __future__ import annotations

from typing import ClassVar, Literal

from torch import Tensor, nn

from bindllm.data.collate import Batch
from bindllm.data.datamodule import BindData
from bindllm.errors import InputError, did_you_mean
from bindllm.model.bindllm import BindLLM
from bindllm.objectives.base import Metrics, Needs, Objective, answer_log_probs, check_positive
from bindllm.objectives.reference import References
from bindllm.parallel import RunContext

LOSSES = ("sigmoid", "ipo")


class DPO(Objective):
    """Learns from pairs of a chosen and a rejected answer, and stays near the initial model.

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
        if loss not in LOSSES:
            raise InputError(f"DPO: unknown loss {loss!r}. {did_you_mean(loss, LOSSES)}")
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
        beta: see `DPO`.
        kind: sigmoid or ipo.
        label_smoothing: see `DPO`.

    Returns:
        Losses, [B].

    Examples:
        >>> import torch
        >>> [round(value, 4) for value in dpo_loss(torch.tensor([0.0, 10.0]), beta=0.1).tolist()]  # log(2), less
        [0.6931, 0.3133]
    """
    # IPO regresses the gap to a finite target, so sure preferences do not push it without end.
    if kind == "ipo":
        return (gap - 1 / (2 * beta)) ** 2
    # With smoothing, a share of the labels counts as swapped.
    right, wrong = nn.functional.logsigmoid(beta * gap), nn.functional.logsigmoid(-beta * gap)
    return -(1 - label_smoothing) * right - label_smoothing * wrong
