"""Any Hugging Face encoder with one vector for each media: joint models and single towers.

Joint models have one space for all modalities: CLIP (https://arxiv.org/abs/2103.00020), SigLIP and SigLIP 2
(https://arxiv.org/abs/2502.14786), CLAP (https://arxiv.org/abs/2211.06687), ALIGN, Chinese-CLIP and others that have
one ``get_..._features`` per modality, also AIMv2, PE-Audio and X-CLIP. Single towers: DINOv2 and v3, ViT, AIMv2, Swin,
ConvNeXt; BERT-like sentence encoders; wav2vec 2.0, HuBERT, AST, Whisper's encoder; VideoMAE, V-JEPA 2. Each uses the
processor of its own folder.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self, get_args, overload

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from bindllm.encoders import Embedded, fingerprint, once
from bindllm.encoders.families import find_blocks
from bindllm.encoders.hub import (
    ModelSpec,
    find_folder,
    load_model,
    load_processor,
    read_spec,
    settings_files,
    weight_files,
)
from bindllm.encoders.states import batch_fields, batches, token_grids, tower_vectors
from bindllm.errors import EncoderError, InputError, MediaError, check_choice, did_you_mean
from bindllm.media import Media, open_image
from bindllm.media.audio import cut_audio
from bindllm.media.limits import warn
from bindllm.media.video import read_frames

if TYPE_CHECKING:
    from transformers import BatchFeature

Pooling = Literal["auto", "pooler", "first", "mean", "last"]

# Raise the number when other numbers come out for the same media: stored embeddings are then computed again.
_REVISION = "huggingface 1"

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Longest image that a processor scales by its short side, as a multiple of that side.
_MAX_ASPECT = 100
_CPU_BATCH, _ACCELERATOR_BATCH = 8, 64
_WINDOW_SECONDS, _SHORTEST_SECONDS = 10.0, 0.1


class HuggingFace:
    """A model of transformers as an encoder: modalities, width and preprocessing come from its own folder.

    Images: opened as everywhere in bindllm, then the model's image processor. Texts: the model's tokenizer, cut to the
    model's length with the end token kept. Audio: mono at the model's rate. Audio up to one window (CLAP's own length,
    10 seconds elsewhere) is used whole. Longer audio gives three windows, at the start, in the middle and at the end;
    their unit embeddings are averaged. Videos: as many frames as the model reads, from the middles of equal parts.
    Everything is deterministic, so CLAP never uses its fusion of random crops.

    Args:
        name: a folder with ``config.json`` and ``model.safetensors``, or the id of a model on the hub.
        revision: commit of a model on the hub; needed for an id, so that each run gets the same weights.
        modalities: the modalities to serve, out of the model's; by default all.
        pooling: how a single tower's states become one vector: "pooler" (the model's own), "first" token, "mean" (over
            tokens, frames or positions) or "last" token. "auto": the setting of a sentence-transformers folder; else
            "mean" for text and audio, and for images "pooler" if the checkpoint has one, otherwise "first". Joint
            models have their own.
        dtype: dtype of the model, float32, bfloat16 or float16; embeddings are float32 always.
        space: name of the joint space, when it is that of other encoders; by default one of its own.
        dimensions: keep only the first numbers of a vector, for models that were trained for it (Matryoshka,
            https://arxiv.org/abs/2205.13147); None: all.

    Raises:
        InputError: an unknown pooling or dtype, or dimensions below 1.

    Example:
        HuggingFace("openai/clip-vit-base-patch32", revision="3d74acf9a28c67741b2f4f2ea7635f0aaf6f0268")
    """

    def __init__(
        self,
        name: str,
        *,
        revision: str | None = None,
        modalities: list[str] | None = None,
        pooling: Pooling = "auto",
        dtype: str = "float32",
        space: str | None = None,
        dimensions: int | None = None,
    ) -> None:
        check_choice("pooling", pooling, get_args(Pooling))
        check_choice("dtype", dtype, _DTYPES)
        if dimensions is not None and dimensions < 1:
            raise InputError(f"dimensions is {dimensions}, expected at least 1, or null for all")
        self._chosen = None if modalities is None else list(modalities)
        # Plain settings only: config and fingerprint are read at the first use.
        self.config: dict[str, Any] = {
            "name": str(name),
            "revision": revision,
            "modalities": self._chosen,
            "pooling": pooling,
            "dtype": dtype,
            "space": space,
            # Left out by default: checkpoints and stores of before stay valid.
            **({} if dimensions is None else {"dimensions": dimensions}),
        }
        self._dimensions = dimensions
        # Models at one revision share a space by default, also when they serve different modalities.
        self.space = space or (f"{name}@{revision}" if revision else str(name))
        self._device = torch.device("cpu")
        self._processors: dict[str, Any] = {}
        self._fingerprint: str | None = None

    @property
    def modalities(self) -> tuple[str, ...]:
        """The model's modalities, or the requested part of them; reads its config.

        Raises:
            EncoderError: the model does not exist, or does not serve a requested modality.
        """
        served = self._spec.modalities
        for name in self._chosen or ():
            if name not in served:
                raise EncoderError(f"{self._name} does not serve {name!r}. {did_you_mean(str(name), served)}")
        return served if self._chosen is None else tuple(self._chosen)

    @property
    def embedding_size(self) -> int:
        """E; reads the model's config.

        Raises:
            EncoderError: more dimensions than the model has.
        """
        if (self._dimensions or 0) > self._spec.width:
            raise EncoderError(f"{self._name} has {self._spec.width} dimensions, not {self._dimensions}")
        return self._dimensions or self._spec.width

    @property
    def token_sizes(self) -> dict[str, int]:
        """The width of the hidden states for each modality, where the model's config states it."""
        widths = self._spec.state_widths
        return {name: widths[name] for name in self.modalities if name in widths}

    def fingerprint(self) -> str:
        """Return the sha256 of weights, config, processor files, settings and the revision of this code.

        Raises:
            EncoderError: files are missing.
        """
        if self._fingerprint is None:
            settings = {
                name: self.config[name] for name in ("pooling", "dtype", "dimensions") if name in self.config
            }
            parts: list[str | Path] = [_REVISION, *weight_files(self._folder)]
            # Names and contents: a renamed file is another setting.
            for name, file in settings_files(self._folder):
                parts += [name, file]
            self._fingerprint = fingerprint(settings, *parts)
        return self._fingerprint

    def to(self, device: torch.device | str) -> Self:
        """Move the model, now or once it is loaded, to a device."""
        self._device = torch.device(device)
        if "_model" in vars(self):
            self._model.to(self._device)
        return self

    def prepare(self, media: Media) -> Tensor:
        """Return one media as its processor gives it.

        Returns:
            an image: float32 [C, H, W], or its patches [rows, columns, C * side * side] if the model takes any
            shape (SigLIP 2); a text: int64 ids [T]; audio: float32 [S, ...], one or three windows; a video: float32
            [frames, C, H, W].

        Raises:
            MediaError: it cannot be read; the message names it.
            InputError: a modality that this encoder does not serve.
        """
        match self._served(media.modality):
            case "image":
                image = open_image(media.source, size=None)
                return self._pixels(image, media, self._processor("image"))
            case "text":
                return self._prepare_text(media)
            case "video":
                return self._prepare_video(media)
            case _:
                return self._prepare_audio(media)

    # jsonargparse compares the last annotation with `Encoder`; the two overloads describe both results.
    @overload
    def embed(self, modality: str, inputs: Sequence[Tensor], *, tokens: Literal[False] = False) -> Tensor: ...

    @overload
    def embed(self, modality: str, inputs: Sequence[Tensor], *, tokens: Literal[True]) -> Embedded: ...

    def embed(self, modality: str, inputs: Sequence[Tensor], *, tokens: bool = False) -> Tensor:
        """Return the embeddings of prepared media: [B, E], float32, unit norm.

        Args:
            modality: one of ``modalities``.
            inputs: B prepared media.
            tokens: also return the last hidden states, in the dtype of the model: the patches of an image
                [rows, columns, C]; tubelets of a video [frames, rows, columns, C]; all ids of a text, special ones
                included, [T, C]; audio [S, T, C] or, for spectrograms, [S, bands, frames, C] with S windows.

        Raises:
            InputError: a modality that this encoder does not serve.
            EncoderError: the weights are missing or do not fit, or the model's tokens are on no known grid.
        """
        self._served(modality)
        if modality != "audio":
            rows, grids = self._embed_units(modality, list(inputs), tokens=tokens)
        else:
            # Windows of all media in one batch; each media then averages its own unit embeddings.
            counts = [len(audio) for audio in inputs]
            windows = [window for audio in inputs for window in audio]
            units, waiting = self._embed_units(modality, windows, tokens=tokens)
            rows = torch.stack([F.normalize(row.mean(0), dim=0) for row in units.split(counts)])
            left = iter(waiting)
            grids = [torch.stack([next(left) for _ in range(count)]) for count in counts if tokens]
        return Embedded(rows, grids) if tokens else rows

    def blocks(self, modality: str) -> list[nn.Module]:
        """Return the blocks of the model for a modality, in order; of a model in stages, such as Swin, the stages."""
        return find_blocks(self._model, self._served(modality), joint=self._spec.joint)

    @property
    def _name(self) -> str:
        return f"HuggingFace({self.config['name']!r})"

    @once
    def _folder(self) -> Path:
        return find_folder(self.config["name"], self.config["revision"])

    @once
    def _spec(self) -> ModelSpec:
        spec = read_spec(self._folder)
        if spec.joint and self.config["pooling"] != "auto":
            raise EncoderError(
                f"{self._name} is a joint model with a pooling of its own; leave `pooling` out"
            )
        return spec

    @once
    def _model(self) -> nn.Module:
        # A pooler that is not used may lack its weights.
        without_pooler = not self._spec.joint and self.config["pooling"] != "pooler"
        dtype = _DTYPES[self.config["dtype"]]
        return load_model(self._folder, dtype=dtype, without_pooler=without_pooler).to(self._device)

    def _served(self, modality: str) -> str:
        if modality not in self.modalities:
            raise InputError(f"{self._name} embeds {', '.join(self.modalities)} media, not {modality!r}")
        return modality

    def _processor(self, modality: str) -> Any:
        with once.lock:
            if modality not in self._processors:
                self._processors[modality] = load_processor(self._folder, modality)
        return self._processors[modality]

    def _prepare_video(self, media: Media) -> Tensor:
        wanted, processor = self._spec.frames, self._processor("video")
        places: list[int] = []

        def pick(count: int, rate: Any) -> list[int]:
            # A short video gives some frames several times.
            places[:] = [(2 * n + 1) * count // (2 * wanted) for n in range(wanted)]
            return sorted(set(places))

        frames = {
            number: self._pixels(Image.fromarray(frame), media, processor)
            for number, frame in read_frames(media.source, pick=pick)
        }
        return torch.stack([frames[number] for number in places])

    def _pixels(self, image: Image.Image, media: Media, processor: Any) -> Tensor:
        """Return an image, or a frame of a video, as its processor gives it."""
        made = run_processor(processor, image, media, owner=self._name)
        if media.modality == "image" and self._spec.takes_patches("image"):
            rows, columns = made["spatial_shapes"][0].tolist()
            return made["pixel_values"][0, : rows * columns].reshape(rows, columns, -1).float()
        # Tiles and other extra tensors would need a model with several vectors per image.
        if set(made.keys()) - {"pixel_mask"} != {"pixel_values"} or made["pixel_values"].dim() != 4:
            raise EncoderError(
                f"the image processor of {self._name} gives {', '.join(made.keys())}; expected one tensor per image"
            )
        return made["pixel_values"][0].float()

    def _prepare_text(self, media: Media) -> Tensor:
        tokenizer = self._processor("text")
        limit = self._spec.longest_text(tokenizer)
        # Without truncation: every tokenizer would cut in its own way.
        made = tokenizer(media.source, return_special_tokens_mask=True, verbose=False)
        ids, special = made["input_ids"], made["special_tokens_mask"]
        if not ids:
            raise MediaError(f"{media.name}: a text without tokens; expected at least one word")
        if len(ids) > limit:
            warn(
                media.name,
                f"{len(ids):,} tokens; the encoder reads the first {limit:,} of a text",
                kind="text",
            )
            # The end token stays: joint models read the whole text from it.
            closing = next((n for n, mark in enumerate(reversed(special)) if not mark), 0)
            ids = ids[: limit - closing] + ids[len(ids) - closing :]
        return torch.tensor(ids, dtype=torch.int64)

    def _prepare_audio(self, media: Media) -> Tensor:
        # The file is cut at the model's own rate, so that no window is resampled on its own.
        extractor = self._processor("audio")
        rate = extractor.sampling_rate
        # CLAP's and Whisper's extractors name their own windows.
        settings = extractor.to_dict()
        window = round(
            rate * (settings.get("max_length_s") or settings.get("chunk_length") or _WINDOW_SECONDS)
        )

        def spread(length: int) -> list[tuple[int, int]]:
            if length <= window:
                return [(0, length)]
            return [(start, start + window) for start in (0, (length - window) // 2, length - window)]

        clips = []
        for audio in cut_audio(media.source, rate=rate, cut=spread):
            mono = audio.mean(axis=0, dtype=np.float32)
            # Convolutional front ends fail on audio shorter than their kernel.
            mono = np.pad(mono, (0, max(0, round(_SHORTEST_SECONDS * rate) - len(mono))))
            made = extractor(mono, sampling_rate=rate, return_tensors="pt")
            clips.append(made[extractor.model_input_names[0]][0].float())
        return torch.stack(clips)

    def _embed_units(self, modality: str, inputs: list[Tensor], *, tokens: bool) -> Embedded:
        """Embed N images, texts or single audio windows; without ``tokens`` the list of their tokens is empty."""
        model, processor = self._model, self._processor(modality)
        # Batches come in another order than the inputs, so rows are written by position.
        rows = torch.empty(len(inputs), self.embedding_size, device=self._device)
        grids: dict[int, Tensor] = {}
        size = _CPU_BATCH if self._device.type == "cpu" else _ACCELERATOR_BATCH
        dtype, pooling = _DTYPES[self.config["dtype"]], self.config["pooling"]
        for positions in batches(self._spec, modality, inputs, size=size):
            batch = [inputs[position] for position in positions]
            fields = batch_fields(self._spec, modality, batch, processor)
            # Ids and masks keep their integer type; everything else takes the model's.
            for name, value in fields.items():
                fields[name] = value.to(self._device, dtype if value.is_floating_point() else None)
            output = self._spec.rules.run(model, modality, fields)
            embedded = output.pooler_output
            if not self._spec.joint:
                embedded = tower_vectors(output, self._spec, modality, fields, pooling)
            # A config that lies about its width would give a store of wrong rows.
            if embedded.shape != (len(positions), self._spec.width):
                raise EncoderError(
                    f"{self._name} gives {list(embedded.shape)} for {len(positions)} media, its config says "
                    f"{self._spec.width} numbers each; this model is not supported"
                )
            rows[positions] = F.normalize(embedded[:, : self.embedding_size].float(), dim=-1)
            if tokens:
                states = output.last_hidden_state
                found = token_grids(states, self._spec, modality, batch, processor)
                grids.update(zip(positions, found, strict=True))
        return Embedded(rows, [grids[position] for position in sorted(grids)])


def run_processor(processor: Any, image: Image.Image, media: Media, *, owner: str) -> BatchFeature:
    """Return the output of an image processor of transformers for an image of media.

    Raises:
        MediaError: the image has proportions that the processor of ``owner`` cannot take.
    """
    # CLIP's processor scales the short side to 224 before it cuts out the middle: 1 x 20,000 pixels take gigabytes.
    size = processor.to_dict().get("size") or {}
    if "shortest_edge" in size and max(image.size) > _MAX_ASPECT * min(image.size):
        raise MediaError(
            f"{media.name}: {image.width} x {image.height} pixels, longer than {_MAX_ASPECT} times the short side; "
            "crop the image first"
        )
    try:
        return processor(images=image, return_tensors="pt")
    except (ValueError, ZeroDivisionError, OverflowError) as error:
        raise MediaError(
            f"{media.name}: an image of {image.width} x {image.height} pixels that the processor of "
            f"{owner} cannot take ({error}); scale it first"
        ) from error
