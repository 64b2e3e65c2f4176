"""Average precision, and what a random order would give."""

from __future__ import annotations

import torch
from torch import Tensor

from bindllm.errors import MissingExtraError


def average_precisions(scores: Tensor, targets: Tensor) -> Tensor:
    """Return the average precision of each class: float64, [C].

    Args:
        scores: cosine of each item with each class, -1..1, [N, C].
        targets: whether the class is right, bool [N, C]; each class is right for at least one item, since without one
            there is no such number.

    Raises:
        MissingExtraError: torchmetrics is not installed.
    """
    try:
        from torchmetrics.functional.classification import binary_average_precision
    except ImportError as error:
        raise MissingExtraError(
            "torchmetrics", extra="report", purpose="compute average precision"
        ) from error
    # Outside of 0..1 torchmetrics would take them for logits, and its sigmoid would make more of them equal.
    shares = ((scores.double() + 1) / 2).clamp(0, 1)
    # One by one: its mean over classes counts a class without a right item as 0.
    parts = zip(shares.unbind(dim=1), targets.long().unbind(dim=1), strict=True)
    return torch.stack([binary_average_precision(share, target).double() for share, target in parts])


def chance_of_precision(num_right: Tensor, num_items: int) -> Tensor:
    """Return the expected average precision of items in random order: float64, [C].

    Args:
        num_right: items for which the class is right, at least 1, [C].
        num_items: all items.

    Example:
        >>> chance_of_precision(torch.tensor([1]), 2)
        tensor([0.7500], dtype=torch.float64)
    """
    harmonic = float((1 / torch.arange(1, num_items + 1, dtype=torch.float64)).sum())
    others = (num_right.double() - 1) / max(num_items - 1, 1)
    return (harmonic + others * (num_items - harmonic)) / num_items
