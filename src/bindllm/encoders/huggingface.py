"""Any Hugging Face encoder with one vector for each media: joint models and single towers.

Joint models have one space for all modalities: CLIP (https://arxiv.org/abs/2103.00020), SigLIP and SigLIP 2
(https://arxiv.org/abs/2502.14786), CLAP (https://arxiv.org/abs/2211.06687), ALIGN, Chinese-CLIP and others that have
one ``get_..._features`` per modality. Single towers: DINOv2, ViT, Swin, ConvNeXt; BERT-like sentence encoders;
wav2vec 2.0, HuBERT, AST. Each uses the processor of its own folder.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self, get_args, overload

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bindllm.encoders import Embedded, fingerprint, once
from bindllm.encoders.hub import (
    ModelSpec,
    find_folder,
    load_model,
    load_processor,
    read_spec,
    settings_files,
    weight_files,
)
from bindllm.errors import EncoderError, InputError, MediaError, check_choice, did_you_mean
from bindllm.media import Media, open_image
from bindllm.media.audio import cut_audio
from bindllm.media.limits import warn

if TYPE_CHECKING:
    from transformers import BatchFeature
    from transformers.utils import ModelOutput

Pooling = Literal["auto", "pooler", "first", "mean", "last"]

# Raise the number when other numbers come out for the same media: stored embeddings are then computed again.
_REVISION = "huggingface 1"

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Longest image that a processor scales by its short side, as a multiple of that side.
_MAX_ASPECT = 100
_CPU_BATCH, _ACCELERATOR_BATCH = 8, 64
# Most states of a tower that belong to no patch: a class token, a distillation token, registers.
_MOST_EXTRA = 16
_WINDOW_SECONDS, _SHORTEST_SECONDS = 10.0, 0.1

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


def _batch_fields(
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
    if modality == "image":
        return {"pixel_values": torch.stack(list(inputs))}
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
        spec: of the model.
        modality: of the media.
        inputs: the B prepared media; audio: single windows.
        processor: of the modality.

    Raises:
        EncoderError: the states of an image or a spectrogram fit no grid of patches.
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
    size = inputs[0].shape[-2:] if modality == "image" else inputs[0].shape[::-1]
    grid = [(side - (spec.patch or 1)) // step + 1 for side, step in zip(size, spec.strides, strict=True)]
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


def _tower_vectors(
    output: ModelOutput, spec: ModelSpec, modality: str, mask: Tensor | None, pooling: str
) -> Tensor:
    """Reduce the states of a single tower to one vector for each media of a batch: [B, E].

    Raises:
        EncoderError: the pooler was asked for, and the model has none.
    """
    states, pooled = output.last_hidden_state, output.get("pooler_output")
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
    mask = torch.ones(states.shape[:2], dtype=torch.long, device=states.device) if mask is None else mask
    return pool(states, mask, pooling)


def pool(states: Tensor, mask: Tensor, pooling: str) -> Tensor:
    """Reduce states [B, T, E] to [B, E] over the positions with mask 1, [B, T]; the padding is on the right.

    Args:
        states: [B, T, E].
        mask: 1 or 0, [B, T].
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


class HuggingFace:
    """A model of transformers as an encoder: modalities, width and preprocessing come from its own folder.

    Images: opened as everywhere in bindllm, then the model's image processor. Texts: the model's tokenizer, cut to the
    model's length with the end token kept. Audio: mono at the model's rate. Audio up to one window (CLAP's own length,
    10 seconds elsewhere) is used whole. Longer audio gives three windows, at the start, in the middle and at the end;
    their unit embeddings are averaged. Everything is deterministic, so CLAP never uses its fusion of random crops.

    Args:
        name: a folder with ``config.json`` and ``model.safetensors``, or the id of a model on the hub.
        revision: commit of a model on the hub; needed for an id, so that each run gets the same weights.
        modalities: the modalities to serve, out of the model's; by default all.
        pooling: how a single tower's states become one vector: "pooler" (the model's own), "first" token, "mean" (over
            tokens, frames or positions) or "last" token. "auto": the setting of a sentence-transformers folder; else
            "mean" for text and audio, and for images "pooler" if the checkpoint has one, otherwise "first". Joint
            models have their own.
        dtype: in which the model runs, float32, bfloat16 or float16; embeddings are float32 always.
        space: name of the joint space, when it is that of other encoders; by default one of its own.

    Raises:
        InputError: an unknown pooling or dtype.

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
    ) -> None:
        check_choice("pooling", pooling, get_args(Pooling))
        check_choice("dtype", dtype, _DTYPES)
        self._chosen = None if modalities is None else list(modalities)
        # Plain settings only: config and fingerprint are read at the first use.
        self.config: dict[str, Any] = {
            "name": str(name),
            "revision": revision,
            "modalities": self._chosen,
            "pooling": pooling,
            "dtype": dtype,
            "space": space,
        }
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
        """E; reads the model's config."""
        return self._spec.width

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
            settings = {name: self.config[name] for name in ("pooling", "dtype")}
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
            shape (SigLIP 2); a text: int64 ids [T]; audio: float32 [S, ...], one or three windows.

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

    # jsonargparse compares the last annotation with `Encoder`; the two overloads describe both results.
    @overload
    def embed(self, modality: str, inputs: Sequence[Tensor], *, tokens: Literal[False] = False) -> Tensor: ...

    @overload
    def embed(self, modality: str, inputs: Sequence[Tensor], *, tokens: Literal[True]) -> Embedded: ...

    @torch.no_grad()
    def embed(self, modality: str, inputs: Sequence[Tensor], *, tokens: bool = False) -> Tensor:
        """Return the embeddings of prepared media: [B, E], float32, unit norm.

        Args:
            modality: one of ``modalities``.
            inputs: B prepared media.
            tokens: also return the last hidden states, in the dtype of the model: the patches of an image
                [rows, columns, C]; all ids of a text, special ones included, [T, C]; audio [S, T, C] or, for
                spectrograms, [S, bands, frames, C] with S windows.

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

    def _prepare_image(self, media: Media) -> Tensor:
        image = open_image(media.source, size=None)
        processor = self._processor("image")
        # CLIP's processor scales the short side to 224 before it cuts out the middle: 1 x 20,000 pixels take gigabytes.
        size = processor.to_dict().get("size") or {}
        if "shortest_edge" in size and max(image.size) > _MAX_ASPECT * min(image.size):
            raise MediaError(
                f"{media.name}: {image.width} x {image.height} pixels, longer than {_MAX_ASPECT} times the short side; "
                "crop the image first"
            )
        try:
            made: BatchFeature = processor(images=image, return_tensors="pt")
        except (ValueError, ZeroDivisionError, OverflowError) as error:
            raise MediaError(
                f"{media.name}: an image of {image.width} x {image.height} pixels that the processor of "
                f"{self._name} cannot take ({error}); scale it first"
            ) from error
        if self._spec.takes_patches("image"):
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
        # CLAP's extractor names its own window.
        window = round(rate * extractor.to_dict().get("max_length_s", _WINDOW_SECONDS))

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
            fields = _batch_fields(self._spec, modality, batch, processor)
            # Ids and masks keep their integer type; everything else takes the model's.
            for name, value in fields.items():
                fields[name] = value.to(self._device, dtype if value.is_floating_point() else None)
            if self._spec.joint:
                output = getattr(model, f"get_{modality}_features")(**fields)
                embedded = output.pooler_output
            else:
                output = model(**fields)
                mask = fields.get("attention_mask")
                embedded = _tower_vectors(output, self._spec, modality, mask, pooling)
            # A config that lies about its width would give a store of wrong rows.
            if embedded.shape != (len(positions), self.embedding_size):
                raise EncoderError(
                    f"{self._name} gives {list(embedded.shape)} for {len(positions)} media, its config says "
                    f"{self.embedding_size} numbers each; this model is not supported"
                )
            rows[positions] = F.normalize(embedded.float(), dim=-1)
            if tokens:
                states = output.last_hidden_state
                found = token_grids(states, self._spec, modality, batch, processor)
                grids.update(zip(positions, found, strict=True))
        return Embedded(rows, [grids[position] for position in sorted(grids)])
