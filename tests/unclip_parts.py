"""A tiny unCLIP pipeline of random weights, as a folder of diffusers, and encoders that share its space or do not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tokenizers import pre_tokenizers
from transformers import (
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

from bindllm import Media
from bindllm.encoders import fingerprint
from bindllm.unclip.images import PipelineImages
from cache_parts import hashed

WIDTH = 32
SIDE = 32


def _tokenizer(folder: Path) -> CLIPTokenizer:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir()
    (folder / "vocab.json").write_text(json.dumps({word: n for n, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=77)


def save_tiny_pipeline(folder: Path, *, width: int = WIDTH, seed: int = 0) -> Path:
    """Write a `StableUnCLIPImg2ImgPipeline` that draws 32 x 32 pixels, with a card; return the folder."""
    pytest.importorskip("diffusers")
    from diffusers import (
        AutoencoderKL,
        DDIMScheduler,
        DDPMScheduler,
        StableUnCLIPImg2ImgPipeline,
        UNet2DConditionModel,
    )
    from diffusers.pipelines.stable_diffusion import StableUnCLIPImageNormalizer

    torch.manual_seed(seed)
    layers = {"hidden_size": 32, "intermediate_size": 37, "num_attention_heads": 4, "num_hidden_layers": 2}
    vision = CLIPVisionConfig(**layers, projection_dim=width, image_size=SIDE, patch_size=8)
    text = CLIPTextConfig(**layers, projection_dim=32, vocab_size=514, bos_token_id=512, eos_token_id=513)
    pipeline = StableUnCLIPImg2ImgPipeline(
        feature_extractor=CLIPImageProcessorPil(
            size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}
        ),
        image_encoder=CLIPVisionModelWithProjection(vision),
        image_normalizer=StableUnCLIPImageNormalizer(embedding_dim=width),
        image_noising_scheduler=DDPMScheduler(beta_schedule="squaredcos_cap_v2"),
        tokenizer=_tokenizer(folder.parent / f"{folder.name}-words"),
        text_encoder=CLIPTextModel(text),
        unet=UNet2DConditionModel(
            sample_size=SIDE,
            attention_head_dim=(2, 4),
            class_embed_type="projection",
            projection_class_embeddings_input_dim=2 * width,
            cross_attention_dim=32,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            block_out_channels=(32, 64),
            layers_per_block=1,
            use_linear_projection=True,
        ),
        scheduler=DDIMScheduler(
            beta_schedule="scaled_linear",
            beta_start=0.00085,
            beta_end=0.012,
            prediction_type="v_prediction",
            set_alpha_to_one=False,
            steps_offset=1,
        ),
        vae=AutoencoderKL(),
    )
    pipeline.save_pretrained(folder)
    (folder / "README.md").write_text("---\nlicense: openrail++\n---\n# Tiny\n")
    return folder


def save_tiny_clip(pipeline: Path, folder: Path) -> Path:
    """Write a CLIP whose vision tower is the image encoder of a pipeline; return its folder."""
    own = CLIPVisionModelWithProjection.from_pretrained(pipeline / "image_encoder")
    text = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CLIPConfig(
        vision_config=own.config.to_dict(), text_config=text, projection_dim=own.config.projection_dim
    )
    clip = CLIPModel(config)
    clip.vision_model.load_state_dict(own.vision_model.state_dict())
    clip.visual_projection.load_state_dict(own.visual_projection.state_dict())
    clip.save_pretrained(folder)
    CLIPImageProcessorPil.from_pretrained(pipeline / "feature_extractor").save_pretrained(folder)
    return folder


class JointEncoder(PipelineImages):
    """Serves audio, texts and point clouds in a pipeline's space: each content has a direction of its own."""

    modalities = ("image", "audio", "text", "point")
    space = "tiny unclip"

    def fingerprint(self) -> str:
        return fingerprint({}, "joint", super().fingerprint())

    def prepare(self, media: Media) -> torch.Tensor:
        return super().prepare(media) if media.modality == "image" else hashed(media, WIDTH)

    def embed(self, modality: str, inputs: list[torch.Tensor]) -> torch.Tensor:
        if modality == "image":
            return super().embed(modality, inputs)
        return torch.nn.functional.normalize(torch.stack(list(inputs)), dim=-1)


class Sounds(JointEncoder):
    """The same without images: its space can be told by its name only."""

    modalities = ("audio",)
