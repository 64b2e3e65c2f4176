"""Log-probabilities of whole answers."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bindllm.data.collate import Batch, model_inputs
from bindllm.model.bindllm import BindLLM


def answer_log_probs(model: BindLLM, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return the log-probability of the supervised tokens of each row.

    Args:
        model: in any mode; the result has a gradient if gradients are enabled.
        batch: inputs of the model, R rows.

    Returns:
        The sum over the supervised tokens of each row, in nats, [R], float32 (float64 if the logits are); and the
        number of these tokens, [R].
    """
    output = model(**model_inputs(batch))
    logits = output.logits.to(torch.promote_types(output.logits.dtype, torch.float32))
    each = -nn.functional.cross_entropy(logits, output.targets, reduction="none")
    own = output.rows == torch.arange(len(batch["labels"]), device=each.device)[:, None]
    # Not index_add: on GPUs its order of additions varies, so a resumed run would differ in the last bits.
    return torch.where(own, each, 0).sum(1), own.sum(1)
