"""Odds-ratio preference optimization (arXiv 2403.07691, eq. 3 to 7), without a reference model."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from bindllm.data.collate import Batch
from bindllm.errors import InputError
from bindllm.model.bindllm import BindLLM
from bindllm.objectives.base import Metrics, Needs, Objective, answer_log_probs, check_positive


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
