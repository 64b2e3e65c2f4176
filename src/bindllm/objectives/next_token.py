"""Next-token cross entropy over the answers: the objective for captions and instructions."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bindllm.data.collate import Batch, model_inputs
from bindllm.data.rows import IGNORE
from bindllm.errors import InputError
from bindllm.model.bindllm import BindLLM
from bindllm.objectives.base import Metrics, Objective


class NextToken(Objective):
    """Mean cross entropy of the supervised tokens; of a preference pair, those of the chosen answer."""

    def loss(self, model: BindLLM, batch: Batch) -> tuple[Tensor, Metrics]:
        """Return the loss of a batch, per supervised token."""
        # The first rows are the answers to imitate; rejected ones of pairs follow them.
        rows = len(batch["numbers"])
        output = model(**{name: value[:rows] for name, value in model_inputs(batch).items()})
        return next_token_loss(output.logits, output.targets), {}

    def count(self, batch: Batch) -> int:
        """Return the number of supervised tokens."""
        # From the second position: no token predicts the first one.
        return int((batch["labels"][: len(batch["numbers"]), 1:] != IGNORE).sum())


def next_token_loss(logits: Tensor, targets: Tensor | None) -> Tensor:
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
    if targets is None or targets.numel() == 0:
        raise InputError(
            "a batch has no supervised token, so it has no loss. Check the label mask of your rows with "
            "bindllm check --config RECIPE: captions may be empty, or data.max_length too small for the prompt"
        )
    # In float32: a sum over a large vocabulary loses its small terms in bfloat16.
    return nn.functional.cross_entropy(logits.to(torch.float32), targets)
