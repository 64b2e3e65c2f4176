"""Families of transformers that do not follow the common form: their inputs, and how their vector is made.

Anything that is not named here is read from the config of the model (`bindllm.encoders.hub.read_spec`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Features(NamedTuple):
    """The output of a model for a batch, under the names of transformers.

    Args:
        pooler_output: the vector in the joint space, [B, E]; None: it is pooled from the states.
        last_hidden_state: [B, S, C].
    """

    pooler_output: Tensor | None
    last_hidden_state: Tensor


def _features(model: Any, modality: str, fields: Mapping[str, Tensor]) -> Any:
    # transformers' own method for the modality, such as get_image_features.
    return getattr(model, f"get_{modality}_features")(**fields)


def _causal_text(model: Any, modality: str, fields: Mapping[str, Tensor]) -> Any:
    # transformers drops a mask without padding, and then AIMv2 would read a text in both directions. A mask with its
    # causal part is taken as it is.
    if modality == "text":
        mask = fields["attention_mask"].bool()
        allowed = mask[:, None, None] & mask.new_ones(mask.shape[1], mask.shape[1]).tril()  # [B, 1, T, T]
        bias = torch.zeros(allowed.shape, dtype=model.dtype, device=mask.device)
        fields = {**fields, "attention_mask": bias.masked_fill(~allowed, torch.finfo(model.dtype).min)}
    return _features(model, modality, fields)


def _heads_of_pe(model: Any, modality: str, fields: Mapping[str, Tensor]) -> Features:
    # As its `forward`, which needs both modalities at once: the first state of a text, the pooled state of audio.
    if modality == "text":
        states = model.text_model(**fields, output_hidden_states=True).hidden_states[-1]
        return Features(model.text_audio_head(states[:, 0]), states)
    output = model.audio_encoder(**fields)
    return Features(model.audio_head(output.pooler_output), output.last_hidden_state)


def _without_predictor(model: Any, modality: str, fields: Mapping[str, Tensor]) -> Features:
    # The predictor guesses masked parts of the video, and is only needed for training.
    return Features(None, model(**fields, skip_predictor=True).last_hidden_state)


@dataclass(frozen=True)
class Family:
    """A family.

    Args:
        modalities: its modalities.
        features: returns the features of a batch of a modality; None: by calling the model.
        part: of the model that is the encoder; empty: the whole model.
        frames: keys of the config for the number of frames of a video.
        pixels: keyword of the model for the frames.
    """

    modalities: tuple[str, ...]
    features: Callable[[Any, str, Mapping[str, Tensor]], Any] | None = None
    part: str = ""
    frames: tuple[str, ...] = ()
    pixels: str = "pixel_values"

    def encoder(self, model: nn.Module) -> nn.Module:
        """Return the part of a model that is the encoder."""
        return model.get_submodule(self.part)

    def run(self, model: Any, modality: str, fields: Mapping[str, Tensor]) -> Features:
        """Return the features of a batch."""
        output = model(**fields) if self.features is None else self.features(model, modality, fields)
        if isinstance(output, Features):
            return output
        return Features(output.get("pooler_output"), output.get("last_hidden_state"))

    def num_frames(self, config: Mapping[str, Any]) -> int | None:
        """Return the number of frames of a video, or None."""
        value: Any = config
        for key in self.frames:
            value = value.get(key) if isinstance(value, Mapping) else None
        return value if isinstance(value, int) else None


_JOINT, _TOWER = Family((), features=_features), Family(())

# Names of lists of blocks, and the beginning of the name of a joint model's tower.
_LISTS = ("layers", "layer", "blocks", "stages", "h")
_TOWERS = {"image": "vision", "video": "vision"}


def find_blocks(model: nn.Module, modality: str, *, joint: bool) -> list[nn.Module]:
    """Return the blocks that a modality passes through, in order; of a model in stages, such as Swin, the stages."""
    lists = {
        path: part
        for path, part in model.named_modules()
        if isinstance(part, nn.ModuleList)
        and path.rpartition(".")[2] in _LISTS
        and (not joint or path.startswith(_TOWERS.get(modality, modality)))
    }
    # A list inside of a block is not one of blocks.
    outer = {path: part for path, part in lists.items() if not any(path.startswith(f"{o}.") for o in lists)}
    return list(max(outer.values(), key=len, default=[]))


FAMILIES: Mapping[str, Family] = {
    "aimv2": Family(("image", "text"), features=_causal_text),
    "pe_audio": Family(("audio", "text"), features=_heads_of_pe),
    "videomae": Family(("video",), frames=("num_frames",)),
    "vjepa2": Family(
        ("video",), features=_without_predictor, frames=("frames_per_clip",), pixels="pixel_values_videos"
    ),
    "whisper": Family(("audio",), part="encoder"),
    "xclip": Family(("video", "text"), features=_features, frames=("vision_config", "num_frames")),
}
"""The families, by the ``model_type`` of their config."""

REFUSED: Mapping[str, str] = dict.fromkeys(
    ("pe_video", "pe_audio_video"),
    "PE-Video and PE-AV need the package timm for their images, and are not supported, also if it is installed; use "
    "PE-Audio for audio and texts, X-CLIP for videos and texts, or a tower for videos such as VideoMAE",
)
"""Families that cannot be served, with the reason."""


def family_of(model_type: str, *, joint: bool) -> Family:
    """Return the family of a ``model_type``; one that is not named here has the common form."""
    return FAMILIES.get(model_type, _JOINT if joint else _TOWER)


def heard(features: Tensor) -> Tensor:
    """Return which states of Whisper's encoder belong to the audio and not to the silence that fills its 30 seconds.

    Args:
        features: log-mel frames, [B, bands, frames]; silence has the lowest value of all.

    Returns:
        1 or 0 for each state, [B, frames / 2], at least one 1 in each row.
    """
    loud = (features > features.amin(dim=(1, 2), keepdim=True)).any(1).long()  # [B, frames]
    # Up to the last frame that is not silent.
    mask = loud.flip(1).cummax(1).values.flip(1)
    mask[:, 0] = 1
    return mask[:, ::2]
