"""From prepared media to embeddings: checked, cut into views, run in chunks, and averaged again.

A view is one input of a trunk: an image, two frames of a crop of a video, two seconds of audio. A media may have
several views, and the media of a batch may differ in their number.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from bindllm.encoders.imagebind.network import Trunk
from bindllm.encoders.imagebind.stems import CONTEXT, PATCHES, SIGNAL
from bindllm.errors import InputError

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


def cut_views(modality: str, inputs: Sequence[Tensor]) -> tuple[list[Tensor], list[int]]:
    """Return all views of a batch in order, without copying, and how many each input has.

    Args:
        modality: one of ImageBind's.
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
        unit embeddings of the V views, [V, E], float32; the tokens of each view, [T, D] in the dtype of the
        weights, or none unless they are kept.
    """
    weight = trunk.head.project.weight
    limit = _CPU_BYTES if weight.device.type == "cpu" else _ACCELERATOR_BYTES
    # Views of a batch have one shape, so the first one decides for all.
    size = max(1, limit // trunk.widest_bytes(views[0].shape))
    embeddings, tokens = [], []
    for start in range(0, len(views), size):
        chunk = torch.stack(tuple(views[start : start + size])).to(weight.device)
        vectors, sequence = trunk(_as_input(modality, chunk, weight.dtype))
        embeddings.append(F.normalize(vectors.float(), dim=-1))
        if keep_tokens:
            tokens.extend(sequence.unbind(0))
    return torch.cat(embeddings), tokens


def average_views(embeddings: Tensor, counts: Sequence[int]) -> Tensor:
    """Return the mean over the views of each media: [V, E] -> [B, E]; a mean of unit vectors is shorter than one."""
    return torch.stack([part.mean(0) for part in embeddings.split(list(counts))])


def _as_input(modality: str, chunk: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the input of the trunk: 8-bit images normalized, everything but ids in the dtype of the weights."""
    if modality == "text":
        return chunk.long()
    if modality in ("image", "video") and chunk.dtype == torch.uint8:
        shape = (3,) + (1,) * (chunk.dim() - 2)
        mean, deviation = (
            chunk.new_tensor(row, dtype=torch.float32).view(shape) for row in (_MEAN, _DEVIATION)
        )
        chunk = chunk.float().div_(255).sub_(mean).div_(deviation)
    return chunk.to(dtype)
