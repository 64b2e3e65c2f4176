"""Modules of both encoders: the network over a group, the transformer block, the head."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

EMBEDDING_SIZE = 1024
"""Width of ImageBind's joint space."""

_BATCH_NORM_EPSILON = 1e-5
_HEAD_NORM_EPSILON = 1e-6
_EXPANSION = 4


class GroupNetwork(nn.Module):
    """One vector for a group of points: a small PointNet (https://arxiv.org/abs/1612.00593) in two steps.

    Each batch norm is folded into the layer before it, see `fold_norms`.

    Args:
        inputs: C, channels of a point.
        channels: widths after the four layers; the last is the width of the vector.
    """

    def __init__(self, inputs: int, channels: Sequence[int]) -> None:
        super().__init__()
        first, second, third, fourth = channels
        self.first = nn.Linear(inputs, first)
        self.second = nn.Linear(first, second)
        self.third = nn.Linear(2 * second, third)
        self.fourth = nn.Linear(third, fourth)

    def forward(self, points: Tensor) -> Tensor:
        """Return [B, G, D] for points [B, G, K, C]."""
        each = self.second(F.relu(self.first(points)))
        both = each.amax(dim=2)
        # The third layer takes the group's maximum next to every point. That half of the product is the same for all
        # points of a group, so it is computed once.
        of_group, of_point = self.third.weight.split(each.shape[-1], dim=1)
        shared = F.linear(both, of_group, self.third.bias).unsqueeze(2)
        return self.fourth(F.relu(F.linear(each, of_point) + shared)).amax(dim=2)


class Block(nn.Module):
    """Pre-norm transformer block: attention, then a perceptron, each added to the stream."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"a width of {width} cannot be shared by {heads} heads")
        self.heads = heads
        self.attention_norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.output = nn.Linear(width, width)
        self.mlp_norm = nn.LayerNorm(width)
        self.widen = nn.Linear(width, _EXPANSION * width)
        self.narrow = nn.Linear(_EXPANSION * width, width)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return [B, T, D]; ``mask`` [B, T, T] is true if a token attends to another; None: all do."""
        qkv = self.qkv(self.attention_norm(x)).unflatten(-1, (3, self.heads, -1))
        # [B, T, 3, heads, head size] -> three of [B, heads, T, head size].
        queries, keys, values = qkv.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(
            queries, keys, values, attn_mask=None if mask is None else mask.unsqueeze(1)
        )
        x = x + self.output(mixed.transpose(1, 2).flatten(2))
        return x + self.narrow(F.gelu(self.widen(self.mlp_norm(x))))


class Head(nn.Module):
    """From an encoder's feature to the joint space: [B, feature] -> [B, 1024], not normalized.

    Both steps are Point-Bind's own: a projection to the width that it trains in, and the head of the point modality.
    """

    def __init__(self, feature: int, projection: int) -> None:
        super().__init__()
        self.projection = nn.Parameter(torch.empty(feature, projection))
        self.norm = nn.LayerNorm(projection, eps=_HEAD_NORM_EPSILON)
        self.linear = nn.Linear(projection, EMBEDDING_SIZE, bias=False)

    def forward(self, feature: Tensor) -> Tensor:
        """Return [B, 1024] for [B, feature]."""
        return self.linear(self.norm(feature @ self.projection))


def position_network(inner: int, width: int) -> nn.Sequential:
    """Return the network from the center of a group to its position vector: [..., 3] -> [..., D]."""
    return nn.Sequential(nn.Linear(3, inner), nn.GELU(), nn.Linear(inner, width))


def fold_norms(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Fold every batch norm ``NAME_norm.*``, with its running statistics, into the layer ``NAME`` before it.

    Folding is done in double precision: it moves the outputs by no more than rounding does.

    Args:
        tensors: by name; those of a norm without all its parts, or without its layer, are left.
    """
    # y = gain * (W x + b - mean) / sqrt(var + eps) + shift is again a linear layer.
    folded = dict(tensors)
    for name in [
        name.removesuffix("_norm.running_var") for name in tensors if name.endswith("_norm.running_var")
    ]:
        parts = [f"{name}_norm.{part}" for part in ("weight", "bias", "running_mean", "running_var")]
        layer = [f"{name}.weight", f"{name}.bias"]
        if (
            not tensors.keys() >= {*parts, *layer}
            or len({tensors[part].shape for part in [*parts, layer[1]]}) > 1
        ):
            continue
        gain, shift, mean, variance = (folded.pop(part).double() for part in parts)
        scale = gain / (variance + _BATCH_NORM_EPSILON).sqrt()
        weight, bias = (tensors[part] for part in layer)
        folded[layer[0]] = (weight.double() * scale.unsqueeze(1)).to(weight.dtype)
        folded[layer[1]] = ((bias.double() - mean) * scale + shift).to(bias.dtype)
    return folded
