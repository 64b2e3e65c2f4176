"""Any encoder of the Hugging Face family with one vector for each media: joint models and single towers.

Joint models, whose modalities share a space: CLIP (https://arxiv.org/abs/2103.00020), SigLIP and SigLIP 2
(https://arxiv.org/abs/2502.14786), CLAP (https://arxiv.org/abs/2211.06687), ALIGN, Chinese-CLIP and others that have
one ``get_..._features`` per modality. Single towers: DINOv2, ViT, Swin, ConvNeXt; BERT-like sentence encoders;
wav2vec 2.0, HuBERT, AST. Each uses the processor of its own folder.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self, get_args

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bindllm.encoders import fingerprint
from bindllm.encoders.hub import (
    Design,
    find_folder,
    load_model,
    load_processor,
    read_design,
    settings_files,
    weight_files,
)
from bindllm.encoders.towers import batch_fields, batches, max_tokens, takes_patches, tower_vectors
from bindllm.errors import EncoderError, InputError, MediaError, did_you_mean
from bindllm.media import Media, open_image

if TYPE_CHECKING:
    from transformers import BatchFeature

Pooling = Literal["auto", "pooler", "first", "mean", "last"]

# Raise the number when other numbers come out for the same media: stored embeddings are then made anew.
_REVISION = "huggingface 1"

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_CPU_BATCH, _ACCELERATOR_BATCH = 8, 64
_WINDOW_SECONDS, _SHORTEST_SECONDS = 10.0, 0.1


class HuggingFace:
    """A model of transformers as an encoder: modalities, width and preprocessing come from its own folder.

    Pictures: opened as everywhere in bindllm, then its own image processor. Texts: its own tokenizer, cut to the
    model's length with the end token kept. Sounds: mono at the model's rate; up to one window (CLAP's own length, 10
    seconds elsewhere) as they are; longer ones are heard in three windows, at the start, in the middle and at the
    end, whose unit embeddings are averaged. Nothing is drawn by chance, so CLAP never uses its fusion of random crops.

    Args:
        name: a folder with ``config.json`` and ``model.safetensors``, or the id of a model on the hub.
        revision: commit of a model on the hub; needed for an id, so that each run gets the same weights.
        modalities: only these of what the model serves; by default all.
        pooling: how a single tower's states become one vector: "pooler" (the model's own), "first" token, "mean" (over
            tokens, frames or places) or "last" token. "auto": what a sentence-transformers folder says; else "mean"
            for text and sound, and for pictures "pooler" where the checkpoint has one, otherwise "first". Joint
            models have their own.
        dtype: in which the model runs, float32, bfloat16 or float16; embeddings are float32 always.
        space: name of the joint space, when it is that of other encoders; by default one of its own.

    Raises:
        InputError: an unknown pooling or dtype.

    Example:
        HuggingFace("openai/clip-vit-base-patch32", revision="3d74acf9a28c67741b2f4f2ea7635f0aaf6f0268")
    """

    _loading = threading.RLock()

    def __init__(
        self,
        name: str,
        *,
        revision: str | None = None,
        modalities: list[str] | None = None,
        pooling: Pooling = "auto",
        dtype: str = "float32",
        space: str | None = None,
    ) -> None:
        if pooling not in get_args(Pooling):
            raise InputError(
                f"pooling={pooling!r} is unknown. {did_you_mean(str(pooling), get_args(Pooling))}"
            )
        if dtype not in _DTYPES:
            raise InputError(f"dtype={dtype!r} is unknown. {did_you_mean(str(dtype), _DTYPES)}")
        self._chosen = None if modalities is None else list(modalities)
        self.config: dict[str, Any] = {
            "name": str(name),
            "revision": revision,
            "modalities": self._chosen,
            "pooling": pooling,
            "dtype": dtype,
            "space": space,
        }
        self.space = space or (f"{name}@{revision}" if revision else str(name))
        self._device = torch.device("cpu")
        self._found: Path | None = None
        self._read: Design | None = None
        self._model: nn.Module | None = None
        self._processors: dict[str, Any] = {}
        self._fingerprint: str | None = None

    @property
    def modalities(self) -> tuple[str, ...]:
        """What the model serves, or the part of it that was asked for; reads its config.

        Raises:
            EncoderError: no such model, or it does not serve what was asked for.
        """
        served = self._design.modalities
        for name in self._chosen or ():
            if name not in served:
                raise EncoderError(f"{self._name} does not serve {name!r}. {did_you_mean(str(name), served)}")
        return served if self._chosen is None else tuple(self._chosen)

    @property
    def embedding_size(self) -> int:
        """E; reads the model's config."""
        return self._design.width

    def fingerprint(self) -> str:
        """Return the sha256 of weights, config, processor files, settings and the revision of this code.

        Raises:
            EncoderError: files are missing.
        """
        if self._fingerprint is None:
            settings = {name: self.config[name] for name in ("pooling", "dtype")}
            parts: list[str | Path] = [_REVISION, *weight_files(self._folder)]
            for name, file in settings_files(self._folder):
                parts += [name, file]
            self._fingerprint = fingerprint(settings, *parts)
        return self._fingerprint

    def to(self, device: torch.device | str) -> Self:
        """Move the model, now or once it is loaded, to a device."""
        self._device = torch.device(device)
        if self._model is not None:
            self._model.to(self._device)
        return self

    def prepare(self, media: Media) -> Tensor:
        """Return one media as its processor gives it.

        Returns:
            a picture: float32 [C, H, W], or its patches [rows, columns, C * side * side] where the model takes any
            shape (SigLIP 2); a text: int64 ids [T]; a sound: float32 [S, ...], one or three windows.

        Raises:
            MediaError: it cannot be read; the message names it.
            InputError: a modality that this encoder does not serve.
        """
        match self._served(media.modality):
            case "image":
                return self._prepare_image(media)
            case "text":
                return self._prepare_text(media)
            case _:
                return self._prepare_audio(media)

    @torch.no_grad()
    def embed(self, modality: str, inputs: Sequence[Tensor]) -> Tensor:
        """Return the embeddings of prepared media: [B, E], float32, unit norm.

        Raises:
            InputError: a modality that this encoder does not serve.
            EncoderError: the weights are missing or do not fit.
        """
        self._served(modality)
        if modality != "audio":
            return self._embed_units(modality, list(inputs))
        windows = [window for sound in inputs for window in sound]
        rows = self._embed_units(modality, windows).split([len(sound) for sound in inputs])
        return torch.stack([F.normalize(row.mean(0), dim=0) for row in rows])

    @property
    def _name(self) -> str:
        return f"HuggingFace({self.config['name']!r})"

    @property
    def _folder(self) -> Path:
        if self._found is None:
            self._found = find_folder(self.config["name"], self.config["revision"])
        return self._found

    @property
    def _design(self) -> Design:
        with self._loading:
            if self._read is None:
                design = read_design(self._folder)
                if design.joint and self.config["pooling"] != "auto":
                    raise EncoderError(
                        f"{self._name} is a joint model with a pooling of its own; leave `pooling` out"
                    )
                self._read = design
        return self._read

    def _served(self, modality: str) -> str:
        if modality not in self.modalities:
            raise InputError(f"{self._name} embeds {', '.join(self.modalities)} media, not {modality!r}")
        return modality

    def _processor(self, modality: str) -> Any:
        with self._loading:
            if modality not in self._processors:
                self._processors[modality] = load_processor(self._folder, modality)
        return self._processors[modality]

    def _prepare_image(self, media: Media) -> Tensor:
        picture = open_image(media.source, size=None)
        processor = self._processor("image")
        try:
            made: BatchFeature = processor(images=picture, return_tensors="pt")
        except (ValueError, ZeroDivisionError, OverflowError) as error:
            raise MediaError(
                f"{media.name}: a picture of {picture.width} x {picture.height} pixels that the processor of "
                f"{self._name} cannot take ({error}); scale it first"
            ) from error
        if takes_patches(self._design, "image"):
            rows, columns = made["spatial_shapes"][0].tolist()
            return made["pixel_values"][0, : rows * columns].reshape(rows, columns, -1).float()
        if set(made.keys()) - {"pixel_mask"} != {"pixel_values"} or made["pixel_values"].dim() != 4:
            raise EncoderError(
                f"the image processor of {self._name} gives {', '.join(made.keys())}; expected one tensor per picture"
            )
        return made["pixel_values"][0].float()

    def _prepare_text(self, media: Media) -> Tensor:
        tokenizer = self._processor("text")
        limit = max_tokens(self._design, tokenizer)
        made = tokenizer(media.source, return_special_tokens_mask=True, verbose=False)
        ids, special = made["input_ids"], made["special_tokens_mask"]
        if not ids:
            raise MediaError(f"{media.name}: a text without tokens; expected at least one word")
        if len(ids) > limit:
            # The end token stays: joint models read the whole text from it.
            closing = next((n for n, mark in enumerate(reversed(special)) if not mark), 0)
            ids = ids[: limit - closing] + ids[len(ids) - closing :]
        return torch.tensor(ids, dtype=torch.int64)

    def _prepare_audio(self, media: Media) -> Tensor:
        from bindllm.media.audio import cut_audio

        extractor = self._processor("audio")
        rate = extractor.sampling_rate
        window = round(rate * extractor.to_dict().get("max_length_s", _WINDOW_SECONDS))

        def spread(length: int) -> list[tuple[int, int]]:
            if length <= window:
                return [(0, length)]
            return [(start, start + window) for start in (0, (length - window) // 2, length - window)]

        clips = []
        for sound in cut_audio(media.source, rate=rate, cut=spread):
            mono = sound.mean(axis=0, dtype=np.float32)
            mono = np.pad(mono, (0, max(0, round(_SHORTEST_SECONDS * rate) - len(mono))))
            made = extractor(mono, sampling_rate=rate, return_tensors="pt")
            clips.append(made[extractor.model_input_names[0]][0].float())
        return torch.stack(clips)

    def _embed_units(self, modality: str, inputs: list[Tensor]) -> Tensor:
        """Embed pictures, texts or single windows of sound: [N, E], unit norm."""
        model, processor = self._loaded(), self._processor(modality)
        rows = torch.empty(len(inputs), self.embedding_size, device=self._device)
        size = _CPU_BATCH if self._device.type == "cpu" else _ACCELERATOR_BATCH
        dtype, pooling = _DTYPES[self.config["dtype"]], self.config["pooling"]
        for places in batches(self._design, modality, inputs, size=size):
            fields = batch_fields(self._design, modality, [inputs[place] for place in places], processor)
            for name, value in fields.items():
                fields[name] = value.to(self._device, dtype if value.is_floating_point() else None)
            if self._design.joint:
                embedded = getattr(model, f"get_{modality}_features")(**fields).pooler_output
            else:
                embedded = tower_vectors(model, self._design, modality, fields, pooling)
            if embedded.shape != (len(places), self.embedding_size):
                raise EncoderError(
                    f"{self._name} gives {list(embedded.shape)} for {len(places)} media, its config says "
                    f"{self.embedding_size} numbers each; this model is not supported"
                )
            rows[places] = F.normalize(embedded.float(), dim=-1)
        return rows

    def _loaded(self) -> nn.Module:
        with self._loading:
            if self._model is None:
                model = load_model(
                    self._folder,
                    dtype=_DTYPES[self.config["dtype"]],
                    without_pooler=not self._design.joint and self.config["pooling"] != "pooler",
                )
                self._model = model.to(self._device)
        return self._model
