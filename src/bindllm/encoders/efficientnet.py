"""EfficientNet-Lite0, the image encoder of most recipes, in plain torch.

The network is the B0 of EfficientNet (https://arxiv.org/abs/1905.11946, table 1) in its "Lite" variant: mobile
inverted bottlenecks (https://arxiv.org/abs/1801.04381, section 3.3) without squeeze-and-excitation, and ReLU6
in place of swish. The weights were trained in TensorFlow, so strided convolutions pad as its "SAME" does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal, Self, TypeVar, get_args, overload

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor, nn

from bindllm.atomic import open_tensors, require_file
from bindllm.encoders import Embedded, fingerprint, once, shape_problems
from bindllm.errors import EncoderError, InputError, check_choice
from bindllm.media import Media, open_image

Fit = Literal["whole", "crop"]

# Raise the number when other numbers come out for the same image: stored embeddings are then computed again.
_REVISION = "efficientnet-lite0 1"

_ADVICE = "fetch it with `bindllm fetch efficientnet-lite0`, or set `weights` to the folder that holds it"

_SIDE = 224
_STEM_CHANNELS, _HEAD_CHANNELS = 32, 1280
# Of the TensorFlow training; torch's default is 1e-5.
_BATCH_NORM_EPSILON = 1e-3

# repeats, kernel, stride of the first block, expansion, channels out
_STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)

Item = TypeVar("Item")
Result = TypeVar("Result")


def each_on_one_thread(function: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
    """Apply a function to each item, as many at the same time as torch has threads, each call on one thread.

    Args:
        function: runs in threads of its own, with the gradient mode of the caller.

    Examples:
        >>> each_on_one_thread(lambda x: (x * 2, torch.get_num_threads()), [1, 2, 3])
        [(2, 1), (4, 1), (6, 1)]
    """
    # How to read this: as many workers as torch has threads, each with torch set to one thread.
    threads = torch.get_num_threads()
    if threads == 1:
        return [function(item) for item in items]
    has_gradients = torch.is_grad_enabled()

    def start() -> None:
        torch.set_num_threads(1)
        torch.set_grad_enabled(has_gradients)

    pool = ThreadPoolExecutor(threads, "single", initializer=start)
    try:
        with pool:
            return list(pool.map(function, items))
    finally:
        # What a thread sets holds for itself, and for threads that begin later.
        torch.set_num_threads(threads)


class EfficientNetLite:
    """EfficientNet-Lite0 trained on ImageNet-1k: the pooled features of an image, E = 1280.

    Args:
        weights: folder with ``model.safetensors``, the tensors named as published.
        fit: how an image becomes 224 x 224: "whole" shrinks all of it and fills up with white, since a caption
            speaks of the whole image; "crop" takes the largest square in the middle, as in ImageNet's test.

    Raises:
        InputError: ``fit`` is neither.

    Examples:
        >>> encoder = EfficientNetLite("checkpoints/efficientnet-lite0")
        >>> encoder.prepare(Media.image(np.zeros((300, 400, 3), np.uint8))).shape
        torch.Size([224, 224, 3])
    """

    modalities = ("image",)
    embedding_size = _HEAD_CHANNELS
    token_sizes: ClassVar = {"image": _HEAD_CHANNELS}
    space = "efficientnet-lite0"

    def __init__(self, weights: str = "checkpoints/efficientnet-lite0", *, fit: Fit = "whole") -> None:
        check_choice("fit", fit, get_args(Fit))
        # Nothing is read here: a recipe constructs encoders without their weights.
        self.config: dict[str, Any] = {"weights": str(weights), "fit": fit}
        self._file = Path(weights) / "model.safetensors"
        self._fit = fit
        self._device = torch.device("cpu")
        self._fingerprint: str | None = None

    def fingerprint(self) -> str:
        """Return the sha256 of the weights file, the settings and the revision of the preprocessing.

        Raises:
            EncoderError: the weights are missing.
        """
        # Hashed once: a run asks for it at every lookup in the store.
        if self._fingerprint is None:
            require_file(self._file, EncoderError, _ADVICE)
            self._fingerprint = fingerprint({"fit": self._fit}, _REVISION, self._file)
        return self._fingerprint

    def to(self, device: torch.device | str) -> Self:
        """Move the network, now or once it is loaded, to a device."""
        self._device = torch.device(device)
        if "_network" in vars(self):
            self._network.to(self._device)
        return self

    def prepare(self, media: Media) -> Tensor:
        """Return an image as [224, 224, 3] of uint8.

        Raises:
            MediaError: the image cannot be read.
        """
        # The size allows JPEGs to be decoded at a reduced scale.
        image = open_image(media.source, size=_SIDE)
        if self._fit == "crop":
            square = ImageOps.fit(image, (_SIDE, _SIDE), Image.Resampling.BICUBIC)
        else:
            width, height = (max(1, round(side * _SIDE / max(image.size))) for side in image.size)
            square = Image.new("RGB", (_SIDE, _SIDE), "white")
            shrunk = image.resize((width, height), Image.Resampling.BICUBIC)
            square.paste(shrunk, ((_SIDE - width) // 2, (_SIDE - height) // 2))
        return torch.from_numpy(np.array(square))

    # jsonargparse compares the last annotation with `Encoder`; the two overloads describe both results.
    @overload
    def embed(self, modality: str, inputs: Sequence[Tensor], *, tokens: Literal[False] = False) -> Tensor: ...

    @overload
    def embed(self, modality: str, inputs: Sequence[Tensor], *, tokens: Literal[True]) -> Embedded: ...

    def embed(self, modality: str, inputs: Sequence[Tensor], *, tokens: bool = False) -> Tensor:
        """Return the embeddings of prepared images: [B, 1280], float32, unit norm.

        On a CPU their bits depend neither on the rest of the batch nor on the number of threads.

        Args:
            modality: "image".
            inputs: B prepared images.
            tokens: also return the 7 x 7 features, [7, 7, 1280] for each image; an embedding is their mean, normalized.

        Raises:
            InputError: a modality other than image.
            EncoderError: the weights are missing or do not fit.
        """
        if modality not in self.modalities:
            raise InputError(f"EfficientNetLite embeds image media, not {modality!r}")
        features = partial(self._features, tokens=tokens)
        if self._device.type != "cpu":
            parts = [features(inputs)]
        else:
            # One by one: larger batches are a tenth faster at best, and their bits could depend on their size.
            parts = each_on_one_thread(features, [[one] for one in inputs])
        embeddings = torch.cat([part.embeddings for part in parts])
        return (
            Embedded(embeddings, [grid for part in parts for grid in part.tokens]) if tokens else embeddings
        )

    def blocks(self, modality: str) -> list[nn.Module]:
        """Return the 16 blocks of the network, in order."""
        return list(self._network.blocks)

    @once
    def _network(self) -> _Network:
        return _load(self._file).to(self._device)

    def _features(self, inputs: Sequence[Tensor], *, tokens: bool) -> Embedded:
        images = torch.stack(list(inputs)).to(self._device)
        # Permuting [B, H, W, 3] to [B, 3, H, W] is free, and gives the channels-last order that is fastest.
        # The published scaling: 0..255 to about -1..1.
        pixels = (images.permute(0, 3, 1, 2).float() - 127) / 128
        features = self._network(pixels)
        embeddings = F.normalize(features.mean(dim=(2, 3)), dim=-1)
        return Embedded(embeddings, list(features.movedim(1, -1)) if tokens else [])


class _Convolution(nn.Module):
    """Convolution with "SAME" padding, the batch norm folded into it, then ReLU6 if ``active``."""

    def __init__(
        self, width: int, out: int, kernel: int, *, stride: int = 1, groups: int = 1, active: bool = True
    ) -> None:
        super().__init__()
        self.published_shape = (out, width // groups, kernel, kernel)
        # At stride 2 and even sides "SAME" pads one more at the right and bottom. A kernel with an extra zero
        # row and column in front, padded evenly, is the same sum without a padded copy of the input.
        self.extra = stride - 1
        self.convolution = nn.Conv2d(
            width, out, kernel + self.extra, stride=stride, padding=kernel // 2, groups=groups
        )
        self.active = active

    def load(self, weight: Tensor, scale: Tensor, shift: Tensor) -> None:
        """Take a published kernel and the scale and shift of its batch norm, both [out]."""
        front = (self.extra, 0, self.extra, 0)
        # Batch norm after a convolution is a scale and a shift per channel: both fit into kernel and bias.
        folded = F.pad(weight * scale[:, None, None, None], front)
        self.convolution.weight = nn.Parameter(folded, requires_grad=False)
        self.convolution.bias = nn.Parameter(shift, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.convolution(x)
        return F.hardtanh_(x, 0.0, 6.0) if self.active else x


class _Block(nn.Module):
    """Mobile inverted bottleneck: widen, filter each channel, narrow; added to its input if the shapes agree."""

    def __init__(self, width: int, out: int, kernel: int, *, stride: int, expansion: int) -> None:
        super().__init__()
        inner = width * expansion
        self.expand = _Convolution(width, inner, 1) if expansion > 1 else None
        self.depthwise = _Convolution(inner, inner, kernel, stride=stride, groups=inner)
        self.project = _Convolution(inner, out, 1, active=False)
        self.adds = stride == 1 and width == out

    def forward(self, x: Tensor) -> Tensor:
        inner = x if self.expand is None else self.expand(x)
        narrow = self.project(self.depthwise(inner))
        return narrow.add_(x) if self.adds else narrow


class _Network(nn.Module):
    """Stem, blocks and head: [B, 3, 224, 224] -> [B, 1280, 7, 7]."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = _Convolution(3, _STEM_CHANNELS, 3, stride=2)
        # Only the first block of a stage has the stride; the others keep the resolution.
        blocks, width = [], _STEM_CHANNELS
        for repeats, kernel, first_stride, expansion, out in _STAGES:
            for stride in [first_stride] + [1] * (repeats - 1):
                blocks.append(_Block(width, out, kernel, stride=stride, expansion=expansion))
                width = out
        self.blocks = nn.Sequential(*blocks)
        self.head = _Convolution(width, _HEAD_CHANNELS, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)))

    def published_names(self) -> Iterator[tuple[_Convolution, str, str]]:
        """Yield every convolution with the published names of its kernel and of its batch norm."""
        # The names are those of the widespread PyTorch port; its blocks are numbered through all stages.
        yield self.stem, "_conv_stem", "_bn0"
        for n, block in enumerate(self.blocks):
            if block.expand is not None:
                yield block.expand, f"_blocks.{n}._expand_conv", f"_blocks.{n}._bn0"
            yield block.depthwise, f"_blocks.{n}._depthwise_conv", f"_blocks.{n}._bn1"
            yield block.project, f"_blocks.{n}._project_conv", f"_blocks.{n}._bn2"
        yield self.head, "_conv_head", "_bn1"


def _load(file: Path) -> _Network:
    """Read the published tensors into a network, batch norms folded; every tensor is accounted for."""
    with open_tensors(file, EncoderError, _ADVICE) as stream:
        tensors = {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118 (not a dictionary)
    # Built without memory: initial weights would be thrown away, and drawing them would disturb a seeded run.
    with torch.device("meta"):
        network = _Network()
    problems = _compare(network, {name: tuple(tensor.shape) for name, tensor in tensors.items()})
    if problems:
        raise EncoderError(f"{file}: these are not the weights of EfficientNet-Lite0: {'; '.join(problems)}")
    for convolution, kernel, norm in network.published_names():
        # scale = gamma / sqrt(var + eps), shift = beta - mean * scale.
        deviation = (tensors[f"{norm}.running_var"] + _BATCH_NORM_EPSILON).sqrt()
        scale = tensors[f"{norm}.weight"] / deviation
        shift = tensors[f"{norm}.bias"] - tensors[f"{norm}.running_mean"] * scale
        convolution.load(tensors[f"{kernel}.weight"], scale, shift)
    return network.eval().to(memory_format=torch.channels_last)


def _compare(network: _Network, found: dict[str, tuple[int, ...]]) -> list[str]:
    """Compare the file's names and shapes with those of the network; see `shape_problems`."""
    expected: dict[str, tuple[int, ...]] = {}
    # The classifier and the counters of batch norm belong to the published file but make no features.
    unused = {"_fc.weight", "_fc.bias"}
    for convolution, kernel, norm in network.published_names():
        expected[f"{kernel}.weight"] = convolution.published_shape
        for part in ("weight", "bias", "running_mean", "running_var"):
            expected[f"{norm}.{part}"] = convolution.published_shape[:1]
        unused.add(f"{norm}.num_batches_tracked")
    return shape_problems(expected, {name: shape for name, shape in found.items() if name not in unused})
