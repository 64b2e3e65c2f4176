"""The contrastive loss that teaches a modality to a joint space, and its temperature."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bindllm.errors import InputError

MAX_SCALE = 100.0
"""Largest factor of the similarities, as in CLIP (arXiv 2103.00020, section 2.5): a temperature of at least 0.01."""


@dataclass
class TemperatureConfig:
    """Temperature of the softmax over similarities."""

    start: float = 0.07
    """Where it starts, 0.01 to 1."""

    learned: bool = True
    """Learnt with the head, never below 0.01; else it stays."""

    def __post_init__(self) -> None:
        if not 1 / MAX_SCALE <= self.start <= 1:
            raise InputError(f"model.temperature.start is {self.start}, expected {1 / MAX_SCALE:g} to 1")


class Temperature(nn.Module):
    """The factor of the similarities: the exponential of one number, which is learnt or fixed.

    Example:
        >>> round(Temperature(TemperatureConfig(start=0.05))().item(), 3)
        20.0
    """

    def __init__(self, config: TemperatureConfig) -> None:
        super().__init__()
        log_scale = torch.tensor(math.log(1 / config.start))
        self.log_scale = nn.Parameter(log_scale, requires_grad=config.learned)

    def forward(self) -> Tensor:
        """Return 1 / temperature, a number."""
        return self.log_scale.exp()

    @torch.no_grad()
    def clamp(self) -> None:
        """Bring the temperature back to 0.01 to 1, after a step."""
        self.log_scale.clamp_(0.0, math.log(MAX_SCALE))


def contrastive_loss(media: Tensor, targets: Tensor, belongs: Tensor, scale: Tensor) -> Tensor:
    """Return InfoNCE in both directions (arXiv 2305.05665, section 3.2), averaged over the pairs of a batch.

    Each row is told from all rows of the other side that do not belong to it: what belongs to it besides its own
    partner (a second caption of the picture, the same caption of another picture, a copy of the file) is left out of
    the sum, neither pulled nor pushed.

    Args:
        media: unit embeddings [B, E] that are taught.
        targets: unit embeddings [B, E] of their partners, frozen.
        belongs: bool [B, B]: media i and target j are a pair of the data; true on the diagonal.
        scale: 1 / temperature.

    Example:
        >>> rows = torch.eye(2)
        >>> contrastive_loss(rows, rows, torch.eye(2, dtype=torch.bool), torch.tensor(1.0))
        tensor(0.3133)
    """
    own = torch.eye(len(media), dtype=torch.bool, device=media.device)
    logits = (scale * media @ targets.T).masked_fill(belongs & ~own, float("-inf"))
    labels = torch.arange(len(media), device=media.device)
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2
