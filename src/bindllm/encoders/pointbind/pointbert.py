"""The Point-BERT variant: one level of groups and a plain transformer (https://arxiv.org/abs/2111.14819, section 3)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bindllm.encoders.pointbind.blocks import Block, GroupNetwork, Head, position_network
from bindllm.encoders.pointbind.cloud import Level, gather, make_level


@dataclass(frozen=True)
class PointBertSizes:
    """Sizes of the network; the defaults are the published ones.

    Args:
        groups: G, number of groups.
        neighbors: K, points of a group.
        channels: widths of the network over a group; the last is reduced to ``width``.
        position: inner width of the position network.
        width: D of the transformer.
        depth: its blocks.
        heads: heads of a block.
        projection: width between feature and head.
    """

    groups: int = 512
    neighbors: int = 32
    channels: tuple[int, ...] = (128, 256, 512, 256)
    position: int = 128
    width: int = 384
    depth: int = 12
    heads: int = 6
    projection: int = 512

    @property
    def least_points(self) -> int:
        """How many points a cloud needs."""
        return max(self.groups, self.neighbors)


class PointBert(nn.Module):
    """Groups -> tokens -> transformer with a class token -> class token joined with the maximum of the others."""

    def __init__(self, sizes: PointBertSizes) -> None:
        super().__init__()
        self.sizes = sizes
        self.groups = GroupNetwork(3, sizes.channels)
        self.reduce = nn.Linear(sizes.channels[-1], sizes.width)
        self.position = position_network(sizes.position, sizes.width)
        self.class_token = nn.Parameter(torch.empty(1, 1, sizes.width))
        self.class_position = nn.Parameter(torch.empty(1, 1, sizes.width))
        self.blocks = nn.ModuleList(Block(sizes.width, sizes.heads) for _ in range(sizes.depth))
        self.norm = nn.LayerNorm(sizes.width)
        self.head = Head(2 * sizes.width, sizes.projection)

    def group(self, points: Tensor) -> list[Level]:
        """Group points [B, N, 3]; sampling starts at point 0 (the published code starts anywhere)."""
        return [make_level(points, self.sizes.groups, self.sizes.neighbors)]

    def forward(self, points: Tensor, levels: list[Level]) -> tuple[Tensor, Tensor]:
        """Encode grouped clouds.

        Args:
            points: [B, N, 3], float32.
            levels: the result of `group`.

        Returns:
            feature [B, 2 * D] and group tokens [B, G, D].
        """
        centers, _, neighbors = levels[0]
        dtype = self.class_token.dtype
        # Coordinates relative to the center: a group describes its shape, the position network its place.
        around = (gather(points, neighbors) - centers.unsqueeze(2)).to(dtype)
        x = self.prepend(self.class_token, self.reduce(self.groups(around)))
        position = self.prepend(self.class_position, self.position(centers.to(dtype)))
        for block in self.blocks:
            # Added again before every block, so it accumulates in the stream: the weights were trained this way.
            x = block(x + position)
        # Both summaries together: class token and maximum, as in the paper's classifier.
        x = self.norm(x)
        return torch.cat([x[:, 0], x[:, 1:].amax(dim=1)], dim=-1), x[:, 1:]

    def prepend(self, first: Tensor, rest: Tensor) -> Tensor:
        """Put one learned vector in front of the tokens of every cloud."""
        return torch.cat([first.expand(len(rest), -1, -1), rest], dim=1)
