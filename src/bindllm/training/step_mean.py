"""The loss of a step as one mean over everything that the step learns from, however its batches are spread.

A step gathers the gradients of several batches: of `accumulate_grad_batches` in turn, on every device. Lightning
divides by the number of batches, and so would let a token of a batch with few tokens weigh more than one of a batch
with many. Here each counts the same, so the step is that of one large batch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from lightning.pytorch import Trainer
from torch import Tensor

from bindllm.training.strategies import averages_gradients


class StepMean:
    """Weighs the batches of a step by what they hold.

    A step of one batch on one device is left alone, to the bit. So is one of DeepSpeed, which keeps gradients to
    itself: there each batch weighs the same.

    Example:
        loss = step_mean.add(loss, count, trainer=trainer)      # for each batch, before backward
        mean = step_mean.finish(gradients, trainer=trainer)     # before the optimizer moves
    """

    def __init__(self) -> None:
        self._batches: list[tuple[Tensor, int]] = []

    def add(self, loss: Tensor, count: int, *, trainer: Trainer) -> Tensor:
        """Return what to take the gradient of.

        Args:
            loss: of a batch, a mean.
            count: the number of things that it is a mean of.
            trainer: of the run.
        """
        self._batches.append((loss.detach(), count))
        return loss * count if _divisor(trainer) > 1 else loss

    def finish(self, gradients: Sequence[Tensor], *, trainer: Trainer) -> Tensor:
        """Scale the gradients of a step in place, on all devices alike, and return the step's mean loss.

        Args:
            gradients: averaged over devices, and over batches by Lightning.
            trainer: of the run.
        """
        batches, self._batches = self._batches, []
        if len(batches) == 1 and _divisor(trainer) == 1 == trainer.world_size:
            return batches[0][0]
        own = sum(torch.stack([loss * count, torch.full_like(loss, count)]) for loss, count in batches)
        total, count = trainer.strategy.reduce(own, reduce_op="sum")
        if (divisor := _divisor(trainer)) > 1:
            torch._foreach_mul_(list(gradients), divisor / count)
        return total / count


def _divisor(trainer: Trainer) -> int:
    """How many batches the gradients of a step have been divided by."""
    if not averages_gradients(trainer.strategy):
        return 1
    return trainer.world_size * trainer.accumulate_grad_batches
