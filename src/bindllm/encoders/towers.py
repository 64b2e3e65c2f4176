"""From prepared media to a model's vectors: batches that leave each row alone, masks, and the pooling of towers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bindllm.encoders.hub import Design
from bindllm.errors import EncoderError

# These were trained on texts padded to the full length, with the padding seen.
_PADDED_FAMILIES = ("siglip", "siglip2", "siglip_text_model", "siglip2_text_model")
# These take pictures of any shape, as patches under a mask.
_PATCH_FAMILIES = ("siglip2", "siglip2_vision_model")


def takes_patches(design: Design, modality: str) -> bool:
    """Tell whether a model takes pictures of any shape, as a grid of patches each."""
    return modality == "image" and design.family in _PATCH_FAMILIES


def max_tokens(design: Design, tokenizer: Any) -> int:
    """Return the longest text that both the tokenizer and the model's positions allow."""
    return min(tokenizer.model_max_length, design.max_tokens or tokenizer.model_max_length)


def batches(design: Design, modality: str, inputs: Sequence[Tensor], *, size: int) -> Iterator[list[int]]:
    """Yield the places of inputs that go through the model together, at most ``size`` of them.

    Sounds and pictures of one shape go together, since padding would change some models' results. Texts and
    patches are padded under a mask, so any go together; neighbours in length waste least.
    """
    masked = modality == "text" or takes_patches(design, modality)
    groups: dict[Any, list[int]] = {}
    for place, tensor in enumerate(inputs):
        groups.setdefault(None if masked else tensor.shape, []).append(place)
    for places in groups.values():
        ordered = sorted(places, key=lambda place: tuple(inputs[place].shape))
        for start in range(0, len(ordered), size):
            yield ordered[start : start + size]


def batch_fields(
    design: Design, modality: str, inputs: Sequence[Tensor], processor: Any
) -> dict[str, Tensor]:
    """Return the keywords of the model's forward for one batch.

    Args:
        design: of the model.
        modality: image, text or audio.
        inputs: pictures of one shape, patches, ids of texts, or windows of sound of one shape.
        processor: the tokenizer for text, the feature extractor for audio.
    """
    if modality == "text":
        return _text_fields(design, inputs, processor)
    if takes_patches(design, modality):
        lengths = torch.tensor([grid.shape[0] * grid.shape[1] for grid in inputs])
        flat = [grid.flatten(0, 1) for grid in inputs]
        return {
            "pixel_values": nn.utils.rnn.pad_sequence(flat, batch_first=True),
            "pixel_attention_mask": (torch.arange(int(lengths.max())) < lengths[:, None]).long(),
            "spatial_shapes": torch.tensor([grid.shape[:2] for grid in inputs]),
        }
    if modality == "image":
        return {"pixel_values": torch.stack(list(inputs))}
    names = processor.model_input_names
    fields = {names[0]: torch.stack(list(inputs))}
    if "is_longer" in names:
        # CLAP: each window is a whole sound.
        fields["is_longer"] = torch.zeros(len(inputs), 1, dtype=torch.bool)
    return fields


def _text_fields(design: Design, inputs: Sequence[Tensor], tokenizer: Any) -> dict[str, Tensor]:
    """Pad ids to the longest, or to the full length where the model was trained so: ids and mask [B, T]."""
    padded = design.family in _PADDED_FAMILIES
    length = max_tokens(design, tokenizer) if padded else max(len(ids) for ids in inputs)
    left = padded and tokenizer.padding_side == "left"
    ids = torch.full((len(inputs), length), tokenizer.pad_token_id or 0)
    mask = torch.zeros_like(ids)
    for row, own in enumerate(inputs):
        place = slice(length - len(own), length) if left else slice(0, len(own))
        ids[row, place], mask[row, place] = own, 1
    if padded and "attention_mask" not in tokenizer.model_input_names:
        return {"input_ids": ids}
    return {"input_ids": ids, "attention_mask": mask}


def tower_vectors(
    model: nn.Module, design: Design, modality: str, fields: dict[str, Tensor], pooling: str
) -> Tensor:
    """Run a single tower on a batch and reduce its states to one vector each: [B, E].

    Raises:
        EncoderError: the pooler was asked for, and the model has none.
    """
    output = model(**fields)
    states, pooled = output.last_hidden_state, output.get("pooler_output")
    if pooling == "auto":
        own = "pooler" if modality == "image" and pooled is not None else None
        fallback = "first" if modality == "image" and states.dim() == 3 else "mean"
        pooling = design.pooling or own or fallback
    if pooling == "pooler":
        if pooled is None:
            raise EncoderError(f"{type(model).__name__} has no pooler; choose another pooling")
        return pooled.flatten(1)
    if states.dim() == 4:
        states = states.flatten(2).transpose(1, 2)
    mask = fields.get("attention_mask")
    mask = torch.ones(states.shape[:2], dtype=torch.long, device=states.device) if mask is None else mask
    return pool(states, mask, pooling)


def pool(states: Tensor, mask: Tensor, pooling: str) -> Tensor:
    """Reduce states [B, T, E] to [B, E] over the places where the mask [B, T] is 1; its padding is on the right.

    Args:
        states: [B, T, E].
        mask: 1 or 0, [B, T].
        pooling: "first", "last" or "mean".

    Example:
        >>> pool(torch.arange(6.0).view(1, 3, 2), torch.tensor([[1, 1, 0]]), "mean")
        tensor([[1., 2.]])
    """
    if pooling == "first":
        return states[:, 0]
    if pooling == "last":
        return states[torch.arange(len(states), device=states.device), mask.sum(1) - 1]
    weights = mask.unsqueeze(-1).float()
    return (states.float() * weights).sum(1) / weights.sum(1)
