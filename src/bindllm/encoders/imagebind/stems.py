"""From pixels, windows and word pieces to tokens: the first layer of each trunk, with its positions.

ImageBind (https://arxiv.org/abs/2305.05665), section 3.2 and appendix B. Letters: ``B`` views, ``T`` tokens, ``D``
width of the trunk.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_NORM_EPSILON = 1e-5

CONTEXT = 77
"""Ids of a text."""
_VOCABULARY = 49_408

SIGNAL = (6, 2000)
"""Channels and steps of an IMU signal."""
_WINDOW = 8


@dataclass(frozen=True)
class Patches:
    """How an image is cut into patches.

    Args:
        kernel: shape of a patch: channels, frames (if there are several), rows, columns.
        stride: pixels from one patch to the next.
        grid: patches down and across that the position table is made for.
        norm: a layer norm follows.
    """

    kernel: tuple[int, ...]
    stride: int
    grid: tuple[int, int]
    norm: bool


# Audio patches overlap (stride 10 of 16); all others tile the image.
PATCHES = {
    "vision": Patches(kernel=(3, 2, 14, 14), stride=14, grid=(16, 16), norm=False),
    "audio": Patches(kernel=(1, 16, 16), stride=10, grid=(12, 19), norm=True),
    "depth": Patches(kernel=(1, 16, 16), stride=16, grid=(14, 14), norm=True),
    "thermal": Patches(kernel=(1, 16, 16), stride=16, grid=(14, 14), norm=True),
}


class ImageStem(nn.Module):
    """Patches of an image, a video of one or two frames or a spectrogram, each a token; the class token first."""

    def __init__(self, patches: Patches, width: int) -> None:
        super().__init__()
        self.patches = patches
        rows, columns = patches.grid
        self.weight = nn.Parameter(torch.empty(width, *patches.kernel))
        self.norm = nn.LayerNorm(width, eps=_NORM_EPSILON) if patches.norm else nn.Identity()
        self.class_token = nn.Parameter(torch.empty(width))
        self.positions = nn.Parameter(torch.empty(1 + rows * columns, width))

    def forward(self, image: Tensor) -> Tensor:
        """Return tokens [B, 1 + rows * columns, D].

        Args:
            image: [B, C, H, W], or a video [B, C, frames, H, W] of one or two frames; a still image counts as
                two equal frames.
        """
        tokens, grid = self.cut(image)
        return torch.cat([self.class_token.expand(len(tokens), 1, -1), tokens], 1) + self._positions(grid)

    def cut(self, image: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Return the patches as tokens [B, rows * columns, D], row by row, and the rows and columns."""
        weight = self.weight
        if image.dim() == 5 and image.shape[2] == 1:
            image = image[:, :, 0]
        if image.dim() == 4 and weight.dim() == 5:
            # Two equal frames: convolving both is the same as convolving one with the sum of the two kernels.
            weight = weight.sum(2)
        size, stride = weight.shape[-1], self.patches.stride
        # A convolution with stride, written as a matrix product: patches are rows, kernels are columns.
        windows = image.unfold(-2, size, stride).unfold(-2, size, stride)
        rows, columns = windows.shape[-4:-2]
        # [B, C, (frames,) rows, columns, height, width of a patch] with the grid in front, as rows of a product.
        flat = windows.movedim((-4, -3), (1, 2)).flatten(3).flatten(1, 2)
        return self.norm(F.linear(flat, weight.flatten(1))), (rows, columns)

    def count(self, shape: Sequence[int]) -> int:
        """Return how many tokens a view of this shape becomes."""
        size, stride = self.weight.shape[-1], self.patches.stride
        rows, columns = ((side - size) // stride + 1 for side in shape[-2:])
        return 1 + rows * columns

    def _positions(self, grid: tuple[int, int]) -> Tensor:
        """Return the position table, resized if the image has another grid than the table."""
        if grid == self.patches.grid:
            return self.positions
        own, table = self.positions[:1], self.positions[1:]
        # In float32, since half precision would move the positions.
        square = table.float().unflatten(0, self.patches.grid).permute(2, 0, 1)[None]
        resized = F.interpolate(square, size=grid, mode="bicubic", align_corners=False)
        return torch.cat([own, resized[0].flatten(1).T.to(own.dtype)])


class SignalStem(nn.Module):
    """Windows of an IMU signal, all channels of a window one token; the class token first."""

    def __init__(self, width: int) -> None:
        super().__init__()
        channels, steps = SIGNAL
        self.weight = nn.Parameter(torch.empty(width, channels * _WINDOW))
        self.norm = nn.LayerNorm(width, eps=_NORM_EPSILON)
        self.class_token = nn.Parameter(torch.empty(width))
        self.positions = nn.Parameter(torch.empty(1 + steps // _WINDOW, width))

    def forward(self, signal: Tensor) -> Tensor:
        """Return tokens [B, 251, D] of a signal [B, 6, 2000]."""
        # Windows do not overlap: 250 windows of 8 steps, all channels of a window in one row.
        windows = signal.unfold(2, _WINDOW, _WINDOW).transpose(1, 2).flatten(2)
        tokens = self.norm(F.linear(windows, self.weight))
        return torch.cat([self.class_token.expand(len(tokens), 1, -1), tokens], 1) + self.positions

    def count(self, shape: Sequence[int]) -> int:
        """Return how many tokens a view becomes: always as many as there are positions."""
        return len(self.positions)


class TextStem(nn.Module):
    """Word pieces looked up in a table, with positions and without a class token."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(_VOCABULARY, width)
        self.positions = nn.Parameter(torch.empty(CONTEXT, width))

    def forward(self, ids: Tensor) -> Tensor:
        """Return tokens [B, 77, D] of ids [B, 77], int64."""
        return self.embedding(ids) + self.positions

    def count(self, shape: Sequence[int]) -> int:
        """Return how many tokens a view becomes: always as many as there are positions."""
        return len(self.positions)


def build_stem(trunk: str, width: int) -> nn.Module:
    """Return the stem of a trunk."""
    if trunk == "text":
        return TextStem(width)
    if trunk == "imu":
        return SignalStem(width)
    return ImageStem(PATCHES[trunk], width)
