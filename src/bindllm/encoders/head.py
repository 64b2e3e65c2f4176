"""The head that carries a tower's vectors into a joint space: all that is learnt where the tower is frozen.

A norm and a linear map, as ImageBind ends each of its towers (arXiv 2305.05665, section 3.3), or a small MLP.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from bindllm.errors import InputError


@dataclass
class HeadConfig:
    """Shape of the head."""

    depth: int = 2
    """Linear maps: 1 is a linear head, 2 an MLP with one hidden layer."""

    width: int = 1024
    """Width of the hidden layers; of no meaning at depth 1."""

    dropout: float = 0.1
    """Share of hidden values that a training step leaves out, 0 to below 1."""

    def __post_init__(self) -> None:
        for name, value, fits, expected in (
            ("depth", self.depth, self.depth >= 1, "at least 1"),
            ("width", self.width, self.width >= 1, "at least 1"),
            ("dropout", self.dropout, 0 <= self.dropout < 1, "from 0 to below 1"),
        ):
            if not fits:
                raise InputError(f"head.{name} is {value}, expected {expected}")


class Head(nn.Module):
    """Norm, hidden layers with GELU, a linear map, and unit length.

    Args:
        inputs: W, the width of the tower's vectors.
        outputs: E, the embedding width of the joint space.
        config: its shape.

    Example:
        >>> import torch
        >>> Head(8, 16, HeadConfig(depth=1)).eval()(torch.ones(3, 8)).shape
        torch.Size([3, 16])
    """

    def __init__(self, inputs: int, outputs: int, config: HeadConfig) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.LayerNorm(inputs)]
        width = inputs
        for _ in range(config.depth - 1):
            layers += [nn.Linear(width, config.width), nn.GELU(), nn.Dropout(config.dropout)]
            width = config.width
        self.layers = nn.Sequential(*layers, nn.Linear(width, outputs))

    def forward(self, vectors: Tensor) -> Tensor:
        """Return unit embeddings [B, E] of a tower's vectors [B, W]."""
        return F.normalize(self.layers(vectors), dim=-1)
