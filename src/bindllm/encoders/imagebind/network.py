"""One trunk of ImageBind: stem, transformer blocks and head; loading its weights; and running prepared media.

ImageBind (https://arxiv.org/abs/2305.05665), section 3.2 and appendix B: a pre-norm Vision Transformer
(https://arxiv.org/abs/2010.11929) for each modality; all six trunks are made of these modules. Letters: ``B`` views,
``T`` tokens, ``D`` width of the trunk, ``E`` embedding width. For inference only: it has no dropout, and control flow
depends only on shapes, so `torch.compile` compiles a whole trunk.

A view is one input of a trunk: an image, two frames of a crop of a video, two seconds of audio. A media may have
several views, and the media of a batch may differ in their number.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bindllm.atomic import open_tensors, require_file
from bindllm.encoders import shape_problems
from bindllm.encoders.imagebind.config import ImageBindConfig, TrunkConfig, how_to_convert
from bindllm.errors import EncoderError, InputError

CONTEXT = 77
"""Ids of a text."""

SIGNAL = (6, 2000)
"""Channels and steps of an IMU signal."""

_VOCABULARY = 49_408
# Steps of an IMU signal that become one token.
_WINDOW = 8
_STEM_EPSILON, _NORM_EPSILON = 1e-5, 1e-6
_MLP_EXPANSION = 4
_LARGEST_SCALE = 100.0

# These trunks let every token also attend to one learned key and value.
_WITH_BIAS_KEY = ("audio", "depth", "thermal", "imu")

_MEAN = (0.48145466, 0.4578275, 0.40821073)
_DEVIATION = (0.26862954, 0.26130258, 0.27577711)

# The shape of a view; None: any size. Images are square, except for the spectrogram.
_SHAPES: dict[str, tuple[int | None, ...]] = {
    "image": (3, None, None),
    "video": (3, None, None, None),
    "text": (CONTEXT,),
    "audio": (1, 128, 204),
    "depth": (1, None, None),
    "thermal": (1, None, None),
    "imu": SIGNAL,
}
_NAMES: dict[str, str] = {
    "image": "[3, H, H]",
    "video": "[3, frames, H, H] with one or two frames",
    "depth": "[1, H, H]",
    "thermal": "[1, H, H]",
}

# Bytes of the widest activation of a chunk. On a CPU larger ones are mapped and cleared by the system again in every
# layer, which costs more than reading the weights once more; on an accelerator this bounds the memory of long videos.
_CPU_BYTES = 24 << 20
_ACCELERATOR_BYTES = 512 << 20


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
        self.norm = nn.LayerNorm(width, eps=_STEM_EPSILON) if patches.norm else nn.Identity()
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

    def grid(self, shape: Sequence[int]) -> tuple[int, int]:
        """Return the rows and columns of patches of a view of this shape."""
        size, stride = self.weight.shape[-1], self.patches.stride
        rows, columns = ((side - size) // stride + 1 for side in shape[-2:])
        return rows, columns

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
        self.norm = nn.LayerNorm(width, eps=_STEM_EPSILON)
        self.class_token = nn.Parameter(torch.empty(width))
        self.positions = nn.Parameter(torch.empty(1 + steps // _WINDOW, width))

    def forward(self, signal: Tensor) -> Tensor:
        """Return tokens [B, 251, D] of a signal [B, 6, 2000]."""
        # Windows do not overlap: 250 windows of 8 steps, all channels of a window in one row.
        windows = signal.unfold(2, _WINDOW, _WINDOW).transpose(1, 2).flatten(2)
        tokens = self.norm(F.linear(windows, self.weight))
        return torch.cat([self.class_token.expand(len(tokens), 1, -1), tokens], 1) + self.positions


class TextStem(nn.Module):
    """Word pieces looked up in a table, with positions and without a class token."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(_VOCABULARY, width)
        self.positions = nn.Parameter(torch.empty(CONTEXT, width))

    def forward(self, ids: Tensor) -> Tensor:
        """Return tokens [B, 77, D] of ids [B, 77], int64."""
        return self.embedding(ids) + self.positions


class Attention(nn.Module):
    """Multi-head self-attention, with a learned extra key and value, or a causal order, if the trunk has them."""

    def __init__(self, width: int, num_heads: int, *, bias_key: bool, causal: bool) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.causal = causal
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        for name in ("bias_key", "bias_value"):
            self.register_parameter(name, nn.Parameter(torch.empty(width)) if bias_key else None)

    def forward(self, x: Tensor) -> Tensor:
        """Mix tokens [B, T, D]."""
        # [B, T, 3 D] -> three of [B, heads, T, D / heads].
        packed = self.qkv(x).unflatten(-1, (3, self.num_heads, -1))
        query, key, value = packed.permute(2, 0, 3, 1, 4).unbind(0)
        if self.bias_key is not None:
            key, value = self._extended(key, self.bias_key), self._extended(value, self.bias_value)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=self.causal)
        return self.out(mixed.transpose(1, 2).flatten(2))

    def _extended(self, heads: Tensor, extra: Tensor) -> Tensor:
        """Append a vector [D] to the positions of [B, heads, T, D / heads], without a projection."""
        last = extra.view(self.num_heads, 1, -1).expand(len(heads), -1, -1, -1)
        return torch.cat([heads, last], 2)


class Block(nn.Module):
    """Attention, then a feed-forward layer with exact GELU; each after a norm and added to its input."""

    def __init__(self, width: int, num_heads: int, *, bias_key: bool, causal: bool) -> None:
        super().__init__()
        self.norm_1 = nn.LayerNorm(width, eps=_NORM_EPSILON)
        self.attention = Attention(width, num_heads, bias_key=bias_key, causal=causal)
        self.norm_2 = nn.LayerNorm(width, eps=_NORM_EPSILON)
        self.up = nn.Linear(width, _MLP_EXPANSION * width)
        self.down = nn.Linear(_MLP_EXPANSION * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Return tokens of the same shape, [B, T, D]."""
        # A layer's output is fresh memory, so the sum may be written there, with gradients too.
        x = self.attention(self.norm_1(x)).add_(x)
        return self.down(F.gelu(self.up(self.norm_2(x)))).add_(x)


class Head(nn.Module):
    """Norm and projection of the one token that stands for the whole."""

    def __init__(self, width: int, embedding_size: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=_NORM_EPSILON)
        self.project = nn.Linear(width, embedding_size, bias=False)

    def forward(self, token: Tensor) -> Tensor:
        """[B, D] -> [B, E]."""
        return self.project(self.norm(token))


class Trunk(nn.Module):
    """The network of one modality.

    Args:
        name: which trunk, of `bindllm.encoders.imagebind.config.TRUNKS`.
        size: its size.
        embedding_size: E.
    """

    def __init__(self, name: str, size: TrunkConfig, embedding_size: int) -> None:
        super().__init__()
        # Text is read at its end token, all other modalities at the class token.
        self.pools_largest_id = name == "text"
        stems = {"text": TextStem, "imu": SignalStem}
        self.stem = stems[name](size.width) if name in stems else ImageStem(PATCHES[name], size.width)
        self.input_norm = nn.LayerNorm(size.width, eps=_NORM_EPSILON) if name == "vision" else nn.Identity()
        self.blocks = nn.ModuleList(
            Block(size.width, size.num_heads, bias_key=name in _WITH_BIAS_KEY, causal=name == "text")
            for _ in range(size.num_blocks)
        )
        self.head = Head(size.width, embedding_size)
        # The published model learns a temperature for every modality but the anchor, vision.
        self.register_parameter("log_scale", None if name == "vision" else nn.Parameter(torch.empty(())))

    def forward(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Embed views.

        Args:
            inputs: vision [B, 3, H, H] or [B, 3, frames, H, H] with one or two frames; audio [B, 1, 128, 204];
                depth and thermal [B, 1, H, H]; imu [B, 6, 2000]; all in the dtype of the weights; text [B, 77],
                int64.

        Returns:
            the head's vectors, [B, E], not normalized; the tokens before it, [B, T, D], class token first (text:
            the 77 word pieces). Both in the dtype of the weights.
        """
        tokens = self.input_norm(self.stem(inputs))
        for block in self.blocks:
            tokens = block(tokens)
        return self.head(self._pooled(tokens, inputs)), tokens

    def _pooled(self, tokens: Tensor, inputs: Tensor) -> Tensor:
        if not self.pools_largest_id:
            return tokens[:, 0]
        # The end token has the largest id. If a text contains it, argmax takes the first one.
        ends = inputs.argmax(1)
        return tokens[torch.arange(len(tokens), device=tokens.device), ends]

    def on_grid(self, inputs: Tensor, tokens: Tensor) -> list[Tensor]:
        """Return the tokens of each view without class token, [*grid, D]; those of a text up to its end token.

        Args:
            tokens: the tokens that it returned, [B, T, D].
        """
        if self.pools_largest_id:
            return [row[: end + 1] for row, end in zip(tokens, inputs.argmax(1).tolist(), strict=True)]
        tokens = tokens[:, 1:]
        return list(
            tokens.unflatten(1, self.stem.grid(inputs.shape)) if isinstance(self.stem, ImageStem) else tokens
        )

    def widest_bytes(self, shape: Sequence[int]) -> int:
        """Return the bytes of the largest activation that one view of this shape makes."""
        # The feed-forward layer is the widest: four times D for every token.
        inner, stem = self.blocks[0].up, self.stem
        count = 1 + math.prod(stem.grid(shape)) if isinstance(stem, ImageStem) else len(stem.positions)
        return count * inner.out_features * inner.weight.element_size()

    def scale(self) -> Tensor | float:
        """Return the factor by which the published model stretches its unit embeddings, float32."""
        return 1.0 if self.log_scale is None else self.log_scale.float().exp().clamp(max=_LARGEST_SCALE)


def trunk_file(folder: Path, trunk: str) -> Path:
    """Return the file with the weights of a trunk; an EncoderError if it does not exist."""
    file = folder / f"{trunk}.safetensors"
    require_file(file, EncoderError, how_to_convert(folder))
    return file


# Tensors made in inference mode could never take part in training, even long after the first use.
@torch.inference_mode(False)
def load_trunk(
    folder: Path, trunk: str, config: ImageBindConfig, *, dtype: torch.dtype, device: torch.device
) -> Trunk:
    """Build a trunk from its file, frozen.

    Raises:
        EncoderError: the file is missing, damaged, or has other tensors than the config asks for; lists them all.
    """
    file = trunk_file(folder, trunk)
    # Built without memory: initial weights would be thrown away, and drawing them would disturb a seeded run.
    with torch.device("meta"):
        network = Trunk(trunk, config.trunks[trunk], config.embedding_size)
    expected = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    with open_tensors(file, EncoderError, "convert it again") as tensors:
        found = {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
        if problems := shape_problems(expected, found):
            raise EncoderError(
                f"{file}: these are not the weights of ImageBind's {trunk} trunk in the size that config.json "
                f"states: {'; '.join(problems)}. {how_to_convert(folder)}"
            )
        # The scale is a logarithm of up to 100: half precision would change the published result visibly.
        state = {
            name: tensors.get_tensor(name).to(device, torch.float32 if name == "log_scale" else dtype)
            for name in expected
        }
    network.load_state_dict(state, assign=True)
    return network.requires_grad_(False).eval()


def cut_views(modality: str, inputs: Sequence[Tensor]) -> tuple[list[Tensor], list[int]]:
    """Return all views of a batch in order, without copying, and how many each input has.

    Args:
        inputs: each one view, or [S, ...] with S views.

    Raises:
        InputError: no input, or one of a shape that the trunk does not take.
    """
    views: list[Tensor] = []
    counts = []
    for number, tensor in enumerate(inputs):
        # One more dimension than a view has: several views of one media.
        several = tensor.dim() == len(_SHAPES[modality]) + 1
        shape = tensor.shape[1:] if several else tensor.shape
        if not (_fits(modality, shape) and len(tensor)):
            expected = _NAMES.get(modality, str(list(_SHAPES[modality])))
            raise InputError(
                f"prepared {modality} media number {number} has shape {list(tensor.shape)}; "
                f"expected {expected}, or several such views with their number in front"
            )
        parts = tensor.unbind(0) if several else (tensor,)
        views.extend(parts)
        counts.append(len(parts))
    if not views:
        raise InputError(f"there is no {modality} media to embed; give at least one")
    if len(sizes := {tuple(view.shape) for view in views}) > 1:
        raise InputError(f"the {modality} media of one batch must have one size, not {sorted(sizes)}")
    return views, counts


def _fits(modality: str, shape: Sequence[int]) -> bool:
    expected = _SHAPES[modality]
    if len(shape) != len(expected):
        return False
    # None in a shape means any size.
    if any(size not in (found, None) for found, size in zip(shape, expected, strict=True)):
        return False
    if modality == "video" and shape[1] not in (1, 2):
        return False
    if modality not in ("image", "video", "depth", "thermal"):
        return True
    patch = PATCHES["vision" if modality in ("image", "video") else modality].kernel[-1]
    # Square, and at least one patch wide.
    return shape[-2] == shape[-1] >= patch


def run_views(
    trunk: Trunk, modality: str, views: Sequence[Tensor], *, keep_tokens: bool
) -> tuple[Tensor, list[Tensor]]:
    """Run views through their trunk, as many at a time as suits the device.

    Returns:
        unit embeddings of the V views, [V, E], float32; the tokens of each view, [*grid, D] in the dtype of the
        weights (see `Trunk.on_grid`), or none unless they are kept.
    """
    weight = trunk.head.project.weight
    limit = _CPU_BYTES if weight.device.type == "cpu" else _ACCELERATOR_BYTES
    # Views of a batch have one shape, so the first one decides for all.
    size = max(1, limit // trunk.widest_bytes(views[0].shape))
    embeddings, tokens = [], []
    for start in range(0, len(views), size):
        chunk = torch.stack(tuple(views[start : start + size])).to(weight.device)
        chunk = _as_input(modality, chunk, weight.dtype)
        vectors, sequence = trunk(chunk)
        embeddings.append(F.normalize(vectors.float(), dim=-1))
        if keep_tokens:
            tokens.extend(trunk.on_grid(chunk, sequence))
    return torch.cat(embeddings), tokens


def average_views(embeddings: Tensor, counts: Sequence[int]) -> Tensor:
    """Return the mean over the views of each media: [V, E] -> [B, E]; a mean of unit vectors is shorter than one."""
    return torch.stack([part.mean(0) for part in embeddings.split(list(counts))])


def _as_input(modality: str, chunk: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the input of the trunk: 8-bit images normalized, everything but ids in the dtype of the weights."""
    if modality == "text":
        return chunk.long()
    if modality in ("image", "video") and chunk.dtype == torch.uint8:
        # The channels come second: [B, 3, H, W] or [B, 3, frames, H, W].
        chunk = normalize_pixels(chunk.float().div_(255).movedim(1, -3)).movedim(-3, 1)
    return chunk.to(dtype)


def normalize_pixels(pixels: Tensor) -> Tensor:
    """Standardize RGB values 0..1, [..., 3, H, W], by the statistics of CLIP's training data."""
    mean, deviation = (pixels.new_tensor(row).view(3, 1, 1) for row in (_MEAN, _DEVIATION))
    return (pixels - mean) / deviation
