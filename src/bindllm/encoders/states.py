"""Between prepared media and vectors: batches, the keywords of a model's forward, pooling, and grids of tokens."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bindllm.encoders.families import Features, heard
from bindllm.encoders.hub import ModelSpec
from bindllm.errors import EncoderError

# Most states of a tower that belong to no patch: a class token, a distillation token, registers.
_MOST_EXTRA = 16
# These models were trained on texts padded to the full length, without an attention mask.
_PADDED_FAMILIES = ("siglip", "siglip2", "siglip_text_model", "siglip2_text_model")


def batches(spec: ModelSpec, modality: str, inputs: Sequence[Tensor], *, size: int) -> Iterator[list[int]]:
    """Yield the positions of inputs that form one batch, at most ``size`` of them.

    Audio and images of one shape form a batch, since padding would change some models' results. Texts and patches are
    padded under a mask, so any may be combined; sorting by length wastes the least padding.
    """
    # How to read this: group by shape unless padding is masked, then sort and cut into batches.
    masked = modality == "text" or spec.takes_patches(modality)
    groups: dict[Any, list[int]] = {}
    for position, tensor in enumerate(inputs):
        groups.setdefault(None if masked else tensor.shape, []).append(position)
    for positions in groups.values():
        ordered = sorted(positions, key=lambda position: tuple(inputs[position].shape))
        for start in range(0, len(ordered), size):
            yield ordered[start : start + size]


def batch_fields(
    spec: ModelSpec, modality: str, inputs: Sequence[Tensor], processor: Any
) -> dict[str, Tensor]:
    """Return the keywords of the model's forward for a batch of one shape, or of texts or patches of any."""
    if modality == "text":
        return _text_fields(spec, inputs, processor)
    if spec.takes_patches(modality):
        # Patches of all images are padded to the longest sequence; the mask and the shapes undo it inside the model.
        lengths = torch.tensor([grid.shape[0] * grid.shape[1] for grid in inputs])
        flat = [grid.flatten(0, 1) for grid in inputs]
        return {
            "pixel_values": nn.utils.rnn.pad_sequence(flat, batch_first=True),
            "pixel_attention_mask": (torch.arange(int(lengths.max())) < lengths[:, None]).long(),
            "spatial_shapes": torch.tensor([grid.shape[:2] for grid in inputs]),
        }
    if modality in ("image", "video"):
        return {spec.rules.pixels: torch.stack(list(inputs))}
    names = processor.model_input_names
    fields = {names[0]: torch.stack(list(inputs))}
    if "is_longer" in names:
        # CLAP: each window counts as a complete audio clip.
        fields["is_longer"] = torch.zeros(len(inputs), 1, dtype=torch.bool)
    return fields


def _text_fields(spec: ModelSpec, inputs: Sequence[Tensor], tokenizer: Any) -> dict[str, Tensor]:
    """Pad ids to the longest, or to the full length if the model was trained so: ids and mask [B, T]."""
    # SigLIP reads its embedding at the last position, so the length must be that of its training.
    padded = spec.family in _PADDED_FAMILIES
    length = spec.longest_text(tokenizer) if padded else max(len(ids) for ids in inputs)
    ids = torch.full((len(inputs), length), tokenizer.pad_token_id or 0)
    mask = torch.zeros_like(ids)
    for row, own in enumerate(inputs):
        columns = own_columns(spec, tokenizer, len(own), length)
        ids[row, columns], mask[row, columns] = own, 1
    # A model without masks in training must not get one now.
    if padded and "attention_mask" not in tokenizer.model_input_names:
        return {"input_ids": ids}
    return {"input_ids": ids, "attention_mask": mask}


def own_columns(spec: ModelSpec, tokenizer: Any, count: int, length: int) -> slice:
    """Return the positions of a text of some ids in rows of a length; the others are padding."""
    left = spec.family in _PADDED_FAMILIES and tokenizer.padding_side == "left"
    return slice(length - count, length) if left else slice(0, count)


def token_grids(
    states: Tensor, spec: ModelSpec, modality: str, inputs: Sequence[Tensor], processor: Any
) -> list[Tensor]:
    """Return the states of each media on its own grid, [*grid, C], without class tokens, registers and padding.

    Args:
        states: last hidden states of a batch, [B, S, C] or [B, C, H, W].
        inputs: the B prepared media; audio: single windows.

    Raises:
        EncoderError: the states of an image, a video or a spectrogram fit no grid of patches.
    """
    # Convolutional towers, and CLAP, give a grid.
    if states.dim() == 4:
        return list(states.movedim(1, -1))
    if modality == "text":
        columns = [own_columns(spec, processor, len(ids), states.shape[1]) for ids in inputs]
        return [row[own] for row, own in zip(states, columns, strict=True)]
    if spec.takes_patches(modality):
        shapes = [grid.shape[:2] for grid in inputs]
        return [row[: math.prod(s)].unflatten(0, s) for row, s in zip(states, shapes, strict=True)]
    if modality == "audio" and spec.patch is None:
        return list(states)
    # A spectrogram comes as frames and bands; its patches lie the other way round.
    size = inputs[0].shape[::-1] if modality == "audio" else inputs[0].shape[-2:]
    grid = [(side - (spec.patch or 1)) // step + 1 for side, step in zip(size, spec.strides, strict=True)]
    if modality == "video":
        grid.insert(0, len(inputs[0]) // (spec.tubelet or 1))
    # Hierarchical towers merge patches two by two.
    while math.prod(grid) > states.shape[1]:
        grid = [side // 2 for side in grid]
    # Class tokens and registers come first.
    extra = states.shape[1] - math.prod(grid)
    if spec.patch is None or not math.prod(grid) or extra > _MOST_EXTRA:
        raise EncoderError(
            f"{spec.family}: the {states.shape[1]} hidden states of {modality} media of size {list(size)} fit no grid "
            "of patches; the tokens of this model are not supported"
        )
    return list(states[:, extra:].unflatten(1, grid))


def tower_vectors(
    output: Features, spec: ModelSpec, modality: str, fields: dict[str, Tensor], pooling: str
) -> Tensor:
    """Reduce the states of a single tower to one vector for each media of a batch: [B, E].

    Args:
        fields: keywords of the model's forward; they may hold the mask of the states.
        pooling: as for `HuggingFace`.

    Raises:
        EncoderError: the pooler was asked for, and the model has none.
    """
    pooled, states = output
    # Order of preference: the folder's own setting, the pooler of image towers, then first or mean.
    if pooling == "auto":
        own = "pooler" if modality == "image" and pooled is not None else None
        fallback = "first" if modality == "image" and states.dim() == 3 else "mean"
        pooling = spec.pooling or own or fallback
    if pooling == "pooler":
        if pooled is None:
            raise EncoderError(f"this {spec.family} has no pooler; choose another pooling")
        return pooled.flatten(1)
    # Convolutional towers give a grid [B, C, H, W].
    if states.dim() == 4:
        states = states.flatten(2).transpose(1, 2)
    mask = fields.get("attention_mask")
    if spec.family == "whisper":
        mask = heard(fields["input_features"])
    mask = torch.ones(states.shape[:2], dtype=torch.long, device=states.device) if mask is None else mask
    return pool(states, mask, pooling)


def pool(states: Tensor, mask: Tensor, pooling: str) -> Tensor:
    """Reduce states [B, T, E] to [B, E] over the positions with mask 1, [B, T]; the padding is on the right.

    Args:
        pooling: "first", "last" or "mean".

    Examples:
        >>> pool(torch.arange(6.0).view(1, 3, 2), torch.tensor([[1, 1, 0]]), "mean")
        tensor([[1., 2.]])
    """
    if pooling == "first":
        return states[:, 0]
    if pooling == "last":
        # The last position that is not padding.
        return states[torch.arange(len(states), device=states.device), mask.sum(1) - 1]
    weights = mask.unsqueeze(-1).float()
    return (states.float() * weights).sum(1) / weights.sum(1)
