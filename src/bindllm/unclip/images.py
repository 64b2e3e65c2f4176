"""The image encoder of an unCLIP pipeline, as an encoder of bindllm: its space is the one that the pipeline draws."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bindllm.encoders import fingerprint, hub, once
from bindllm.encoders.huggingface import run_processor
from bindllm.errors import CheckpointError
from bindllm.media import Media, open_image
from bindllm.unclip.folder import PipelineSpec, load_part, read_pipeline

# Raise the number when other numbers come out for the same image: stored embeddings are then computed again.
_REVISION = "unclip images 1"


class PipelineImages:
    """Images in the space of an unCLIP pipeline, by its own image encoder, a CLIP vision tower with its projection.

    As the encoder of `bindllm.Imagine` it gives variations of images.

    Args:
        pipeline: folder of the pipeline, or its id on the hub.
        revision: commit on the hub.

    Example:
        PipelineImages("checkpoints/stable-unclip")
    """

    modalities = ("image",)

    def __init__(self, pipeline: str, *, revision: str | None = None) -> None:
        # Nothing is read here: a recipe constructs encoders without their weights.
        self.config: dict[str, Any] = {"pipeline": str(pipeline), "revision": revision}
        self._device = torch.device("cpu")

    @once
    def spec(self) -> PipelineSpec:
        """The facts about the pipeline; reads its JSON files."""
        return read_pipeline(**{"name": self.config["pipeline"], "revision": self.config["revision"]})

    @property
    def embedding_size(self) -> int:
        """D, the width of the projection."""
        return self.spec.width

    @once
    def _fingerprint(self) -> str:
        folders = self.spec.folder / "image_encoder", self.spec.folder / "feature_extractor"
        files = [file for folder in folders for pair in hub.settings_files(folder) for file in pair]
        return fingerprint({}, _REVISION, *files, *sorted(folders[0].glob("*.safetensors")))

    def fingerprint(self) -> str:
        """Return the sha256 of weights, config, settings of the processor, and the revision of this code."""
        return self._fingerprint

    @once
    def model(self) -> nn.Module:
        """The vision tower in float32, frozen."""
        return load_part(self.spec.folder, "image_encoder", dtype=torch.float32).to(self._device)

    @once
    def _processor(self) -> Any:
        # Not the class that the folder names, which needs torchvision.
        from transformers import CLIPImageProcessorPil

        folder = self.spec.folder / "feature_extractor"
        with hub.loading(folder, part="processor for image media", failure=CheckpointError):
            return CLIPImageProcessorPil.from_pretrained(folder, trust_remote_code=False)

    def to(self, device: torch.device | str) -> Self:
        """Move the model, now or once it is loaded, to a device."""
        self._device = torch.device(device)
        if "model" in vars(self):
            self.model.to(self._device)
        return self

    def prepare(self, media: Media) -> Tensor:
        """Return the pixels of an image as the pipeline's processor gives them, [3, H, W].

        Raises:
            MediaError: it cannot be read; the message names it.
        """
        image = open_image(media.source, size=None)
        made = run_processor(self._processor, image, media, owner=self.spec.name)
        return made["pixel_values"][0].float()

    def embed(self, modality: str, inputs: Sequence[Tensor]) -> Tensor:
        """Return unit embeddings of prepared images, float32 [B, D]."""
        return F.normalize(self._project(inputs), dim=-1)

    @torch.no_grad()
    def _project(self, inputs: Sequence[Tensor]) -> Tensor:
        """Return the embeddings of prepared images at the length that the pipeline was trained on, [B, D]."""
        # One at a time: the largest tower of these pipelines fills a processor with a single image.
        rows = [self.model(image[None].to(self._device)).image_embeds for image in inputs]
        return torch.cat(rows).float()

    def mean_norm(self, images: Sequence[Media]) -> float:
        """Return the mean length of the embeddings of images, before they are scaled to unit length."""
        return float(self._project([self.prepare(media) for media in images]).norm(dim=-1).mean())
