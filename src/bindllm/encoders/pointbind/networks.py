"""Both networks of Point-Bind, Point-BERT and I2P-MAE, and loading them from a converted folder.

Point-BERT (https://arxiv.org/abs/2111.14819, section 3): one level of groups and a plain transformer. I2P-MAE
(https://arxiv.org/abs/2212.06785) with the hierarchical encoder of Point-M2AE (https://arxiv.org/abs/2205.14401,
section 3.1): three levels of ever larger groups, each with its own transformer.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bindllm.atomic import open_tensors, read_json, require_file
from bindllm.encoders import shape_problems
from bindllm.encoders.pointbind.cloud import Level, gather, make_level, within
from bindllm.errors import EncoderError, did_you_mean

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
        # The head reads class token and maximum next to each other, hence twice the width.
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
        # Sizes come from an untrusted config: tuples of different lengths would build a network without some levels.
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


CONFIG, WEIGHTS = "config.json", "model.safetensors"

_VARIANTS = {"point-bert": (PointBert, PointBertSizes), "i2p-mae": (I2PMAE, I2PMAESizes)}


def read_config(folder: Path) -> dict[str, Any]:
    """Return the content of ``config.json``: ``variant``, and ``sizes`` where they are not the published ones.

    Raises:
        EncoderError: the converted folder does not exist, or its config does not describe a network.
    """
    advice = (
        f"`bindllm convert pointbind FILE --output {folder}` makes it from the published file, or set `weights` to the "
        "folder that holds it"
    )
    require_file(folder / WEIGHTS, EncoderError, advice)
    config = read_json(folder / CONFIG, EncoderError, advice)
    # A config is untrusted: every entry is checked before a class is built from it.
    variant = config.get("variant") if isinstance(config, dict) else None
    if not isinstance(variant, str) or variant not in _VARIANTS:
        raise EncoderError(
            f"{folder / CONFIG}: the variant {variant!r} is unknown. {did_you_mean(str(variant), _VARIANTS)}"
        )
    if not isinstance(config.get("sizes", {}), dict):
        raise EncoderError(f"{folder / CONFIG}: sizes must be an object of names and numbers")
    return config


def build_network(config: dict[str, Any], *, source: str) -> PointBert | I2PMAE:
    """Build the network that a config describes, without memory for its weights.

    Raises:
        EncoderError: unknown or impossible sizes.
    """
    network, kind = _VARIANTS[config["variant"]]
    sizes = config.get("sizes", {})
    known = [field.name for field in dataclasses.fields(kind)]
    try:
        for name in sizes:
            if name not in known:
                raise EncoderError(
                    f"{source}: the size {name!r} is unknown. {did_you_mean(str(name), known)}"
                )
        # Built without memory: initial weights would be thrown away, and drawing them would disturb a seeded run.
        with torch.device("meta"):
            return network(kind(**{name: _as_tuples(value) for name, value in sizes.items()}))
    except (TypeError, ValueError, RuntimeError) as error:
        raise EncoderError(f"{source}: no network can have the sizes {sizes!r} ({error})") from error


def token_width(config: dict[str, Any], *, source: str) -> int:
    """Return D, the width of the group tokens of the network that a config describes.

    Raises:
        EncoderError: unknown or impossible sizes.
    """
    # The last norm is over exactly these tokens, in both networks.
    return build_network(config, source=source).norm.normalized_shape[0]


def load_network(folder: Path, dtype: torch.dtype) -> PointBert | I2PMAE:
    """Build the network of a converted folder and fill it.

    Raises:
        EncoderError: the folder is missing, damaged, or its parts do not fit each other.
    """
    config = read_config(folder)
    network = build_network(config, source=str(folder / CONFIG))
    # Tensors made in inference mode could not be moved later, outside it.
    with torch.inference_mode(False), torch.no_grad():
        with open_tensors(folder / WEIGHTS, EncoderError, "convert it again") as stream:
            tensors = {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118 (not a dictionary)
        # The file holds the norms separately; the network has them folded in.
        tensors = fold_norms(tensors)
        shapes = (
            {name: value.shape for name, value in part.items()} for part in (network.state_dict(), tensors)
        )
        if problems := shape_problems(*shapes):
            raise EncoderError(
                f"{folder / WEIGHTS}: these are not the weights of Point-Bind's {config['variant']} variant: "
                f"{'; '.join(problems)}"
            )
        network.load_state_dict({name: tensor.to(dtype) for name, tensor in tensors.items()}, assign=True)
    return network.eval().requires_grad_(False)


def _as_tuples(value: Any) -> Any:
    return tuple(map(_as_tuples, value)) if isinstance(value, list) else value
