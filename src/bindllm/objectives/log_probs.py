"""Log-probabilities of chosen tokens, without a float32 copy of all logits.

Logits are the largest tensors of a training step. What pays is that they are read a few rows at a time, which stay in
the cache of a CPU, and that their gradient is written once, as in the fused cross entropy of Liger Kernel (arXiv
2410.10989, section 3.2).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

# Entries of a chunk. On an accelerator it fills the device instead of a cache.
_CPU_CHUNK, _CHUNK = 2**19, 2**25


def log_probs(logits: Tensor, tokens: Tensor) -> Tensor:
    """Return the log-probabilities of some tokens, with a gradient.

    Args:
        logits: [N, V], any float dtype.
        tokens: ids at each position, [N, K]; an id may occur several times.

    Returns:
        In nats, [N, K], float32 (float64 if the logits are).

    Examples:
        >>> log_probs(torch.zeros(1, 8), torch.tensor([[0, 5]]))  # -log(8)
        tensor([[-2.0794, -2.0794]])
    """
    return _LogProbs.apply(logits, tokens)


class _LogProbs(torch.autograd.Function):
    """Forward ``x[t] - log sum exp x``, backward ``g[t] - softmax(x) * sum g``, in float32 and in chunks of rows."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, tokens: Tensor) -> Tensor:
        dtype = torch.promote_types(logits.dtype, torch.float32)
        sums = logits.new_empty(len(logits), 1, dtype=dtype)
        for rows in _chunks(logits):
            sums[rows] = logits[rows].to(dtype).logsumexp(-1, keepdim=True)
        ctx.save_for_backward(logits, tokens, sums)
        return logits.gather(-1, tokens).to(dtype) - sums

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        logits, tokens, sums = ctx.saved_tensors
        found = torch.empty_like(logits)
        for rows in _chunks(logits):
            own = gradient[rows]
            wide = (logits[rows].to(sums.dtype) - sums[rows]).exp_().mul_(-own.sum(-1, keepdim=True))
            # Not scatter_add: on GPUs its order of additions varies, so a resumed run would differ in the last bits.
            places = torch.arange(len(wide), device=wide.device)[:, None], tokens[rows]
            found[rows] = wide.index_put_(places, own, accumulate=True)
        return found, None


def _chunks(logits: Tensor) -> Iterator[slice]:
    size = max(1, (_CPU_CHUNK if logits.device.type == "cpu" else _CHUNK) // logits.shape[1])
    return (slice(start, start + size) for start in range(0, len(logits), size))
