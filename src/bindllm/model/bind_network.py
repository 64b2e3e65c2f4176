"""The bind network: from the joint space of the encoders to the width of the decoder.

A projection, then residual blocks of RMSNorm and SwiGLU, as in ImageBind-LLM section 3.2 (arXiv 2309.03905).
It is the largest trainable part and runs on one vector per media group, so its cost is small compared with
the decoder's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from bindllm.errors import InputError, did_you_mean

MOST_DEPTH = 1000
"""Largest depth: a damaged checkpoint cannot ask for more."""

NORMS = ("rms", "layer")
FUSIONS = ("unit", "mean")


@dataclass
class BindConfig:
    """Shape of the bind network, and how its input is made."""

    depth: int = 3
    """Number of residual blocks after the projection; 3 in the paper, 0 leaves only the projection."""

    expansion: int = 4
    """Inner width of a block as a multiple of the decoder's width."""

    norm: Literal["rms", "layer"] = "rms"
    """`rms` as in the paper; `layer` (LayerNorm with bias) for the first released weights."""

    bias: bool = False
    """Whether the layers of a block have biases, as in the first released weights."""

    fusion: Literal["unit", "mean"] = "unit"
    """How several media become one embedding: their mean at `unit` length, or the released weights' plain `mean`."""

    def __post_init__(self) -> None:
        for what, value, known in (("norm", self.norm, NORMS), ("fusion", self.fusion, FUSIONS)):
            if value not in known:
                raise InputError(
                    f"unknown {what} {value!r} of the bind network. {did_you_mean(str(value), known)}"
                )
        is_whole = isinstance(self.depth, int) and isinstance(self.expansion, int)
        if not is_whole or not 0 <= self.depth <= MOST_DEPTH or self.expansion < 1:
            raise InputError(
                f"bind network with depth {self.depth} and expansion {self.expansion}: depth must be 0 to "
                f"{MOST_DEPTH}, expansion at least 1, and both whole numbers"
            )


class SwiGLUBlock(nn.Module):
    """One residual block: ``z + down(silu(gate(n)) * up(n))`` with ``n = norm(z)``."""

    def __init__(self, width: int, config: BindConfig) -> None:
        super().__init__()
        inner, bias = config.expansion * width, config.bias
        # The published constants; neither follows the decoder's own.
        self.norm = nn.RMSNorm(width, eps=1e-6) if config.norm == "rms" else nn.LayerNorm(width, eps=1e-5)
        self.gate = nn.Linear(width, inner, bias=bias)
        self.up = nn.Linear(width, inner, bias=bias)
        self.down = nn.Linear(inner, width, bias=bias)

    def forward(self, z: Tensor) -> Tensor:
        """Return ``z`` with the block added: [..., D] to [..., D]."""
        # Pre-norm residual block, as in LLaMA: the stream itself is never normalized.
        n = self.norm(z)
        return z + self.down(nn.functional.silu(self.gate(n)) * self.up(n))


class BindNetwork(nn.Module):
    """Maps unit embeddings to decoder-wide vectors (ImageBind-LLM section 3.2).

    Args:
        embedding_size: ``E``, width of the joint space.
        width: ``D``, the decoder's hidden size.
        config: depth, expansion, kind of norm, biases.

    Examples:
        >>> network = BindNetwork(1024, 64, BindConfig(depth=2))
        >>> network(torch.nn.functional.normalize(torch.randn(5, 1, 1024), dim=-1)).shape
        torch.Size([5, 1, 64])
    """

    def __init__(self, embedding_size: int, width: int, config: BindConfig) -> None:
        super().__init__()
        # The projection has no norm before it: its input has unit length already.
        self.projection = nn.Linear(embedding_size, width)
        self.blocks = nn.ModuleList(SwiGLUBlock(width, config) for _ in range(config.depth))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Start with outputs of unit size: a unit vector times weights of unit variance has it."""
        # Rows of unit variance times a unit vector: outputs of variance 1, whatever E is.
        nn.init.normal_(self.projection.weight)
        nn.init.zeros_(self.projection.bias)
        for block in self.blocks:
            for linear in (block.gate, block.up, block.down):
                # Variance 1 / fan-in keeps the variance of activations through a block.
                nn.init.normal_(linear.weight, std=linear.in_features**-0.5)
                if linear.bias is not None:
                    nn.init.zeros_(linear.bias)

    def forward(self, embedding: Tensor) -> Tensor:
        """Map embeddings to bind vectors.

        Args:
            embedding: unit-norm (shorter with fusion ``mean``), [..., E].

        Returns:
            bind vectors, [..., D], in the dtype of the network's weights.
        """
        # Embeddings are float32; the network may run in another dtype.
        z = self.projection(embedding.to(self.projection.weight.dtype))
        for block in self.blocks:
            z = block(z)
        return z
