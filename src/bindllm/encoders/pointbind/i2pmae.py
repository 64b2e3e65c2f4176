"""The I2P-MAE variant: three levels of ever larger groups, each with its own transformer.

I2P-MAE (https://arxiv.org/abs/2212.06785) with the hierarchical encoder of Point-M2AE
(https://arxiv.org/abs/2205.14401, section 3.1).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from bindllm.encoders.pointbind.blocks import Block, GroupNetwork, Head, position_network
from bindllm.encoders.pointbind.cloud import Level, gather, make_level, within

# The sampling operator that the weights were trained with passes over points this near to the origin (squared).
DEAD_ZONE = 1e-3


@dataclass(frozen=True)
class I2PMAESizes:
    """Sizes of the network, one number per level where they are tuples; the defaults are the published ones.

    Args:
        groups: G, number of groups of each level.
        neighbors: K, how many points (then: groups of the level below) make a group.
        channels: widths of the networks over a group; the last of each is the width D of its transformer.
        depth: blocks of each transformer.
        heads: heads of a block.
        radius: a token attends to tokens with a center nearer than this, in units of the cloud's radius.
        projection: width between feature and head.
    """

    groups: tuple[int, ...] = (512, 256, 64)
    neighbors: tuple[int, ...] = (48, 24, 24)
    channels: tuple[tuple[int, ...], ...] = ((128, 256, 512, 96), (96, 96, 192, 192), (192, 192, 384, 384))
    depth: tuple[int, ...] = (5, 5, 5)
    heads: tuple[int, ...] = (6, 6, 6)
    radius: tuple[float, ...] = (0.24, 0.48, 0.96)
    projection: int = 512

    def __post_init__(self) -> None:
        levels = [self.groups, self.neighbors, self.channels, self.depth, self.heads, self.radius]
        if len({len(numbers) for numbers in levels}) > 1 or not self.groups:
            raise ValueError("every level needs all of its sizes")
        if any(count < wanted for count, wanted in zip(self.groups, self.neighbors[1:], strict=False)):
            raise ValueError("a level has fewer groups than the next one gathers into one")

    @property
    def least_points(self) -> int:
        """How many points a cloud needs."""
        return max(self.groups[0], self.neighbors[0])


class I2PMAE(nn.Module):
    """Groups -> tokens -> transformer, level upon level; the mean of the last tokens plus their maximum."""

    def __init__(self, sizes: I2PMAESizes) -> None:
        super().__init__()
        self.sizes = sizes
        inputs = [3, *(channels[-1] for channels in sizes.channels)]
        self.scales = nn.ModuleList(
            Scale(width, *rest)
            for width, *rest in zip(
                inputs, sizes.channels, sizes.depth, sizes.heads, sizes.radius, strict=False
            )
        )
        self.norm = nn.LayerNorm(inputs[-1])
        self.head = Head(inputs[-1], sizes.projection)

    def group(self, points: Tensor) -> list[Level]:
        """Group points [B, N, 3]; the centers of a level are picked among those of the level below."""
        # Each level groups the centers of the one below it.
        levels: list[Level] = []
        for count, neighbors in zip(self.sizes.groups, self.sizes.neighbors, strict=True):
            levels.append(make_level(points, count, neighbors, dead_zone=DEAD_ZONE))
            points = levels[-1].centers
        return levels

    def forward(self, points: Tensor, levels: list[Level]) -> tuple[Tensor, Tensor]:
        """Encode grouped clouds.

        Args:
            points: [B, N, 3], float32.
            levels: the result of `group`.

        Returns:
            feature [B, D] and group tokens [B, G, D] of the last level.
        """
        first = levels[0]
        around = gather(points, first.neighbors) - first.centers.unsqueeze(2)
        x = self.scales[0](around.to(self.norm.weight.dtype), first.centers)
        for scale, level in zip(self.scales[1:], levels[1:], strict=True):
            x = scale(gather(x, level.neighbors), level.centers)
        x = self.norm(x)
        # Mean and maximum over the last groups, as in Point-M2AE's classifier.
        return x.mean(dim=1) + x.amax(dim=1), x


class Scale(nn.Module):
    """One level: the network over its groups, positions, and blocks that see as far as the radius."""

    def __init__(self, inputs: int, channels: tuple[int, ...], depth: int, heads: int, radius: float) -> None:
        super().__init__()
        width = channels[-1]
        self.radius = radius
        self.groups = GroupNetwork(inputs, channels)
        self.position = position_network(width, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))

    def forward(self, members: Tensor, centers: Tensor) -> Tensor:
        """Return tokens [B, G, D] for the members [B, G, K, C] of groups around centers [B, G, 3]."""
        x = self.groups(members)
        position = self.position(centers.to(members.dtype))
        # The published code adds -100000 to the other scores. The softmax turns those into exact zeros, as it does
        # here: a token always sees itself, and no two scores of a token lie that far apart.
        near = within(centers, self.radius)
        for block in self.blocks:
            # Added again before every block, so it accumulates in the stream: the weights were trained this way.
            x = block(x + position, near)
        return x
