"""`Imagine`: any media, drawn by an unCLIP pipeline.

media -> Encoder -> embedding [E] -> (VisualCache) -> (LinearMap) -> image embedding [D] -> unCLIP pipeline -> image

After the demo of ImageBind-LLM (https://arxiv.org/abs/2309.03905). The language model takes no part. The pipeline is
described in Hierarchical Text-Conditional Image Generation with CLIP Latents (https://arxiv.org/abs/2204.06125).
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from bindllm import __version__
from bindllm.atomic import atomic_file
from bindllm.cache.visual_cache import VisualCache, open_index
from bindllm.embeddings.embedder import Embedder, embed_groups
from bindllm.encoders import Encoder, alignment_warnings, once
from bindllm.encoders.fusion import common_size
from bindllm.errors import CheckpointError, InputError, check_choice
from bindllm.media import Media, check_media
from bindllm.model.card import encoder_folder, license_of
from bindllm.model.decoder import DTYPES, choose_dtype, default_device
from bindllm.testing import synthetic_media
from bindllm.unclip.folder import import_diffusers, load_pipeline, token_counts
from bindllm.unclip.images import PipelineImages
from bindllm.unclip.linear_map import LinearMap
from bindllm.unclip.settings import DrawSettings, check_output

# Encoders of one space give an image nearly the same vector, up to rounding and resizing; those of different spaces
# give vectors without relation.
_LEAST_COSINE = 0.9


@dataclass(frozen=True)
class GeneratedImage:
    """An image with the facts that it was made from.

    Args:
        image: the pixels.
        facts: plain JSON: hashes of the media, pipeline, license, seed and all settings.
    """

    image: Image.Image
    facts: dict[str, Any]

    def save(self, path: str | Path, *, overwrite: bool = False) -> None:
        """Write a PNG file in one step, with the facts as JSON in its text chunk ``bindllm``.

        Raises:
            InputError: the name does not end in .png, the file exists, or its folder cannot be made.
        """
        check_output(Path(path), overwrite=overwrite)
        chunks = PngInfo()
        chunks.add_text("bindllm", json.dumps(self.facts))
        with atomic_file(path) as part:
            self.image.save(part, format="PNG", pnginfo=chunks)


class Imagine:
    """Draws media: their embedding, mixed from several items, is the image embedding of an unCLIP pipeline.

    An encoder whose space the pipeline shares is used directly; this is measured on a few images when the object is
    built. For any other encoder, `LinearMap.fit` trains a map. Images are not filtered: the pipeline has no safety
    checker.

    Args:
        pipeline: folder of a ``StableUnCLIPImg2ImgPipeline`` of diffusers, or its id on the hub.
        encoders: the first encoder that serves a modality embeds it. Without a map, one of them must serve images.
        revision: commit on the hub.
        linear_map: a map from the encoders' space to that of the pipeline, or its folder.
        cache: mixes the nearest images into each embedding (by default, of media without an image), or its folder.
        norm: length of the image embedding; None: the mean length of the pipeline's own embeddings, of the images of
            the map or of a few synthetic images.
        device: device of the pipeline; by default the accelerator that torch finds, else the CPU.
        dtype: dtype of the pipeline: ``float32``, ``bfloat16``, ``float16``, or ``auto``, as for a decoder.

    Attributes:
        license: license in the pipeline's card.
        norm: length of the image embedding.

    Raises:
        CheckpointError: the folder is not such a pipeline, its width or its space is not that of the encoders, or the
            map was fitted for another encoder or pipeline.
        StoreError: the cache was built with another encoder.
        MissingExtraError: diffusers is not installed.

    Example:
        imagine = Imagine("checkpoints/stable-unclip", [ImageBind()])
        for image in imagine([Media.audio("rain.wav"), Media.image("street.jpg", weight=2)], seed=1):
            image.save("rain.png")
    """

    def __init__(
        self,
        pipeline: str | Path,
        encoders: Sequence[Encoder],
        *,
        revision: str | None = None,
        linear_map: LinearMap | str | Path | None = None,
        cache: VisualCache | str | Path | None = None,
        norm: float | None = None,
        device: str | torch.device | None = None,
        dtype: str = "auto",
    ) -> None:
        # How to read this: checks from the cheapest to the dearest. Weights of the pipeline load for the first image.
        check_choice("dtype", dtype, ("auto", *DTYPES))
        self._dtype = dtype
        if norm is not None and not 0 < norm < float("inf"):
            raise InputError(f"norm is {norm}, expected a finite number above 0")
        import_diffusers()
        self.encoders, self.device = tuple(encoders), torch.device(device or default_device())
        self._images = PipelineImages(str(pipeline), revision=revision)
        self.license = self._images.spec.license
        self.linear_map = LinearMap.load(linear_map) if isinstance(linear_map, str | Path) else linear_map
        size = common_size(self.encoders)
        first = self._mapped() if self.linear_map else self._same_width(size)
        others = [encoder for encoder in self.encoders if encoder is not first]
        if warnings := alignment_warnings([first, *others]):
            raise CheckpointError(warnings[0])
        fingerprints = {encoder.fingerprint() for encoder in self.encoders}
        self.cache = VisualCache(open_index(str(cache))) if isinstance(cache, str | Path) else cache
        if self.cache is not None:
            self.cache.check_encoders(fingerprints)
        self._images.to(self.device)
        if self.linear_map is None:
            self._check_space(first)
        self.norm = norm or self._mean_norm()

    @once
    def _pipeline(self) -> Any:
        """The pipeline, loaded for the first image: media that cannot be read are found before that."""
        dtype = choose_dtype(self.device) if self._dtype == "auto" else DTYPES[self._dtype]
        return load_pipeline(self._images.spec, self._images.model, device=self.device, dtype=dtype)

    def _mapped(self) -> Encoder:
        """Return the encoder of the map, which must be of this encoder and this pipeline."""
        facts = self.linear_map.facts
        found = [one for one in self.encoders if one.fingerprint() == facts.encoder_fingerprint]
        if not found:
            raise CheckpointError(
                f"the map was fitted for the encoder {facts.encoder} {facts.encoder_fingerprint[:16]}, and those here "
                f"are {', '.join(f'{type(e).__name__} {e.fingerprint()[:16]}' for e in self.encoders)}. "
                f"{self._how_to_fit()}"
            )
        if facts.pipeline_fingerprint != self._images.fingerprint():
            raise CheckpointError(
                f"the map was fitted for the pipeline {facts.pipeline} {facts.pipeline_fingerprint[:16]}, and the "
                f"image encoder of {self._images.spec.name} is {self._images.fingerprint()[:16]}. {self._how_to_fit()}"
            )
        return found[0]

    def _same_width(self, size: int) -> Encoder:
        """Return the first encoder that serves images, as the pipeline's own does."""
        name, width = self._images.spec.name, self._images.spec.width
        if size != width:
            raise CheckpointError(
                f"{type(self.encoders[0]).__name__} embeds in {size} numbers and {name} draws embeddings of {width}: "
                f"their spaces differ. {self._how_to_fit()}"
            )
        for encoder in self.encoders:
            if "image" in encoder.modalities:
                return encoder
        raise CheckpointError(
            f"no encoder here serves images, so that their space cannot be compared with that of {name}: give the "
            f"encoder of images in the same space too, or a map. {self._how_to_fit()}"
        )

    def _check_space(self, encoder: Encoder) -> None:
        """Compare the embeddings of a few images with those of the pipeline's own image encoder."""
        rows = []
        for one in (encoder, self._images):
            with Embedder([one], device=self.device, reported=()) as embedder:
                results = embedder.embed_in_order(synthetic_media("image"))
            rows.append(torch.stack([result.embedding for result in results]))
        cosine = float((rows[0] * rows[1]).sum(-1).mean())
        if cosine < _LEAST_COSINE:
            raise CheckpointError(
                f"{type(encoder).__name__} embeds images in another space than {self._images.spec.name}: the cosine of "
                f"their embeddings of the same images is {cosine:.3f}, expected at least {_LEAST_COSINE}. "
                f"{self._how_to_fit()}"
            )

    def _how_to_fit(self) -> str:
        return (
            "Fit a map on images, and give it as linear_map, on the command line --map: bindllm fit_map MAP "
            f"{self._images.config['pipeline']} --images FOLDER --encoder ENCODER"
        )

    def _mean_norm(self) -> float:
        if self.linear_map:
            return self.linear_map.facts.norm
        return self._images.mean_norm(synthetic_media("image"))

    @torch.no_grad()
    def embed(self, groups: Sequence[Sequence[Media]]) -> Tensor:
        """Return the image embedding of each group of media, [N, D], of the length that the pipeline expects.

        Several media are mixed by the mean of their unit embeddings, with shares ``weight / sum of weights``. The mean
        is scaled to unit length again, and then mixed with images of the cache.

        Raises:
            InputError: a group without media, or a modality that no encoder serves.
            MediaError: a file that cannot be read.
        """
        groups = [check_media(group) for group in groups]
        if not all(groups):
            raise InputError(
                "no media to draw: the image is drawn from their embedding. For a prompt only, use a pipeline that "
                "makes images from texts"
            )
        embeddings = embed_groups(groups, self.encoders, device=self.device).embeddings
        if self.cache:
            embeddings = self.cache.blend_groups(embeddings, groups, self.encoders)
        if self.linear_map:
            embeddings = self.linear_map(embeddings)
        return embeddings * self.norm

    def __call__(
        self, media: Sequence[Media], *, num_images: int = 1, **settings: Any
    ) -> Iterator[GeneratedImage]:
        """Draw media. Each image is drawn when the iterator reaches it, and depends on its own seed only.

        Args:
            media: mixed into one embedding by their weights, see `embed`.
            num_images: number of images; the seed of each counts up.
            **settings: as for `DrawSettings`: ``prompt``, ``negative_prompt``, ``seed``, ``steps``, ``guidance``,
                ``noise_level``, ``height``, ``width``.

        Raises:
            InputError: no media, or a setting that the pipeline cannot take.
            MediaError: a file that cannot be read.
        """
        chosen = DrawSettings(**settings)
        if num_images < 1:
            raise InputError(f"num_images is {num_images}, expected at least 1")
        embedding = self.embed([media])
        self._check_settings(chosen)
        if self.cache is None and all(item.modality == "text" for item in media):
            logging.getLogger("bindllm").warning(
                "only texts are drawn: their embeddings lie apart from those of images; a visual cache moves them there"
            )
        facts = self._facts(media)
        return (self._draw(embedding, chosen, chosen.seed + n, facts) for n in range(num_images))

    def _check_settings(self, settings: DrawSettings) -> None:
        """Refuse settings that the pipeline would ignore, or at which it would fail."""
        pipeline = self._pipeline
        limits = {
            "noise_level": (0, pipeline.image_noising_scheduler.config.num_train_timesteps - 1),
            "steps": (1, pipeline.scheduler.config.num_train_timesteps),
        }
        for name, (least, most) in limits.items():
            if not least <= getattr(settings, name) <= most:
                raise InputError(f"{name} is {getattr(settings, name)}, expected {least} to {most}")
        texts = {"prompt": settings.prompt, "negative_prompt": settings.negative_prompt}
        most = pipeline.tokenizer.model_max_length
        for name, count in zip(texts, token_counts(pipeline, texts.values()), strict=True):
            # The pipeline would cut the rest off.
            if count > most:
                raise InputError(f"{name} has {count} tokens, and the pipeline reads {most}: shorten it")

    def _draw(
        self, embedding: Tensor, settings: DrawSettings, seed: int, facts: dict[str, Any]
    ) -> GeneratedImage:
        drawn = self._pipeline(
            prompt=settings.prompt,
            negative_prompt=settings.negative_prompt,
            # The pipeline neither moves nor casts an embedding.
            image_embeds=embedding.to(self.device, self._pipeline.unet.dtype),
            num_inference_steps=settings.steps,
            guidance_scale=settings.guidance,
            noise_level=settings.noise_level,
            height=settings.height,
            width=settings.width,
            # Of the CPU on any device, so that a seed names the same noise everywhere.
            generator=torch.Generator().manual_seed(seed),
            output_type="pt",
        ).images[0]  # [3, H, W], 0 to 1
        if not bool(drawn.isfinite().all()):
            raise InputError(
                f"the pipeline gave numbers that are not finite in {self._pipeline.unet.dtype}: choose another dtype, "
                "such as float32, or less guidance"
            )
        pixels = (drawn.float() * 255).round().to("cpu", torch.uint8).permute(1, 2, 0)
        own = {**asdict(settings), "seed": seed, "height": drawn.shape[1], "width": drawn.shape[2]}
        return GeneratedImage(Image.fromarray(pixels.numpy()), {**facts, **own})

    def _facts(self, media: Sequence[Media]) -> dict[str, Any]:
        """Return the facts that all images of a call share. They name no path: images are passed on."""
        folders = [encoder_folder(encoder.config) for encoder in self.encoders]
        cache = self.cache
        return {
            "bindllm": __version__,
            "pipeline": self._images.spec.name,
            "license": {"pipeline": self.license, "encoders": [license_of(folder) for folder in folders]},
            "media": [
                {"modality": item.modality, "sha256": item.content_hash(), "weight": item.weight}
                for item in media
            ],
            "encoders": [encoder.fingerprint() for encoder in self.encoders],
            "map": asdict(self.linear_map.facts) if self.linear_map else None,
            "cache": {"images": len(cache), **asdict(cache.settings)} if cache else None,
            "norm": self.norm,
        }
