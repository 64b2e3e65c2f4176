"""The folder of an unCLIP pipeline, as diffusers writes it: checked before a weight is read, then loaded part by part.

Only safetensors are read, and the class of each part is named here and not by the folder, so no code of a folder runs.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bindllm.atomic import not_finite, read_json
from bindllm.encoders import hub
from bindllm.errors import CheckpointError, needs_extra
from bindllm.model.card import license_of

PIPELINE = "StableUnCLIPImg2ImgPipeline"
"""The one pipeline of diffusers that takes an image embedding."""

INDEX = "model_index.json"

# The models of a pipeline, by the names of their folders.
_MODELS = {
    "image_encoder": "CLIPVisionModelWithProjection",
    "text_encoder": "CLIPTextModel",
    "unet": "UNet2DConditionModel",
    "vae": "AutoencoderKL",
    "image_normalizer": "StableUnCLIPImageNormalizer",
}
_SCHEDULERS = ("scheduler", "image_noising_scheduler")
_ADVICE = "copy the whole folder of the pipeline again"


@dataclass(frozen=True)
class PipelineSpec:
    """Facts about a pipeline, from its JSON files.

    Args:
        name: its id on the hub, or the name of the folder without its path.
        width: D, width of its image embeddings.
    """

    folder: Path
    name: str
    width: int
    license: str


def read_pipeline(name: str, revision: str | None = None) -> PipelineSpec:
    """Read and check the JSON files of a pipeline.

    Args:
        name: a folder, or the id of a pipeline on the hub, which is downloaded. A folder never uses the network.

    Raises:
        CheckpointError: the folder does not exist, holds another kind of pipeline, lacks a part or its safetensors, or
            its parts do not fit each other.
    """
    folder = hub.find_folder(name, revision, role="pipeline")
    _check_index(folder)
    with hub.loading(folder, part="pipeline", failure=CheckpointError):
        width = hub.read_config(folder / "image_encoder").projection_dim
        words = hub.read_config(folder / "text_encoder").hidden_size
    unet = read_json(folder / "unet/config.json", CheckpointError, _ADVICE)
    normalizer = read_json(folder / "image_normalizer/config.json", CheckpointError, _ADVICE)
    # diffusers finds these only in the middle of an image, as a product of matrices that do not fit.
    for part, key, found, expected in (
        ("image_normalizer", "embedding_dim", normalizer.get("embedding_dim"), width),
        # The embedding, and next to it that of the noise level.
        (
            "unet",
            "projection_class_embeddings_input_dim",
            unet.get("projection_class_embeddings_input_dim"),
            2 * width,
        ),
        ("unet", "cross_attention_dim", unet.get("cross_attention_dim"), words),
    ):
        if found != expected:
            raise CheckpointError(
                f"{folder}: its {part} has {key} {found}, and its encoders need {expected}: the parts are of different "
                f"pipelines; {_ADVICE}"
            )
    return PipelineSpec(folder, folder.name if Path(name).is_dir() else name, width, license_of(str(folder)))


def _check_index(folder: Path) -> None:
    """Refuse another kind of pipeline, and missing parts."""
    index = read_json(folder / INDEX, CheckpointError, f"give the folder of a {PIPELINE} of diffusers")
    index = index if isinstance(index, dict) else {}
    kind = index.get("_class_name")
    if kind != PIPELINE:
        why = (
            "it makes its own embedding of a text, through a prior"
            if any(name.startswith("prior") for name in index)
            else "it takes no image embedding"
        )
        raise CheckpointError(
            f"{folder} holds a {kind} ({why}); expected a {PIPELINE}, which draws an image embedding"
        )
    for name in (*_MODELS, *_SCHEDULERS, "tokenizer", "feature_extractor"):
        entry = index.get(name)
        class_name = entry[1] if isinstance(entry, list) and len(entry) == 2 else None
        if class_name is None or not (folder / name).is_dir():
            raise CheckpointError(f"{folder} has no {name}, which a {PIPELINE} needs; {_ADVICE}")
        if class_name != _MODELS.get(name, class_name):
            raise CheckpointError(
                f"{folder}: its {name} is a {class_name}, expected a {_MODELS[name]}; other classes, and code of a "
                "folder, are never loaded"
            )
    for name in _MODELS:
        if not any((folder / name).glob("*.safetensors")):
            raise CheckpointError(
                f"{folder / name} holds no *.safetensors; other weights (*.bin, *.ckpt) are pickles, which are not "
                "read. Convert them: DiffusionPipeline.from_pretrained(...).save_pretrained(folder)"
            )


def load_part(folder: Path, name: str, *, dtype: torch.dtype) -> nn.Module:
    """Load a model of a pipeline, frozen and in eval mode.

    Raises:
        CheckpointError: it cannot be loaded, lacks weights, which would be random, or has weights that are not finite.
        MissingExtraError: diffusers is not installed.
    """
    with hub.loading(folder / name, failure=CheckpointError):
        model, report = _class_of(_MODELS[name]).from_pretrained(
            folder / name,
            dtype=dtype,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
        )
    if missing := hub.missing_weights(report):
        raise CheckpointError(
            f"{folder / name}: no fitting weights for {missing}; they would be random. {_ADVICE}"
        )
    if wrong := not_finite(dict(model.named_parameters())):
        raise CheckpointError(
            f"{folder / name} has weights that are not finite in {str(dtype).removeprefix('torch.')}: {wrong}. Choose "
            "another dtype (bfloat16 has the range of float32); if these are infinite in every dtype, the files are "
            "damaged"
        )
    return model.eval().requires_grad_(False)


def _class_of(name: str) -> Any:
    import transformers

    if hasattr(transformers, name):
        return getattr(transformers, name)
    diffusers = import_diffusers()
    if name == _MODELS["image_normalizer"]:
        from diffusers.pipelines.stable_diffusion import StableUnCLIPImageNormalizer

        return StableUnCLIPImageNormalizer
    return getattr(diffusers, name)


def import_diffusers() -> Any:
    """Return the module diffusers.

    Raises:
        MissingExtraError: it is not installed.
    """
    # Its import makes transformers and bitsandbytes warn about packages that are not needed here.
    earlier = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with needs_extra("diffusers", extra="imagine", purpose="draw images"):
            import diffusers

            # Modules of diffusers are imported when a name is asked for.
            getattr(diffusers, PIPELINE)
    finally:
        logging.disable(earlier)
    return diffusers


def load_pipeline(
    spec: PipelineSpec, image_encoder: nn.Module, *, device: str | torch.device, dtype: torch.dtype
) -> Any:
    """Load a pipeline onto a device.

    Args:
        image_encoder: its image encoder. The pipeline calls for one, and does not run it for an embedding.

    Raises:
        CheckpointError: as for `load_part`, or a scheduler or the tokenizer cannot be loaded.
        MissingExtraError: diffusers is not installed.
    """
    from transformers import CLIPTokenizer

    diffusers = import_diffusers()
    models = {name: load_part(spec.folder, name, dtype=dtype) for name in _MODELS if name != "image_encoder"}
    with hub.loading(spec.folder, part="tokenizer", failure=CheckpointError):
        tokenizer = CLIPTokenizer.from_pretrained(spec.folder / "tokenizer", trust_remote_code=False)
    # Prompts are padded to this length, and some copies of the tokenizer do not name one.
    positions = models["text_encoder"].config.max_position_embeddings
    tokenizer.model_max_length = min(tokenizer.model_max_length, positions)
    _check_normalizer(spec, models["image_normalizer"])
    pipeline = getattr(diffusers, PIPELINE)(
        **models,
        **{name: _load_scheduler(spec.folder, name) for name in _SCHEDULERS},
        tokenizer=tokenizer,
        image_encoder=image_encoder,
        feature_extractor=None,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device)


def _load_scheduler(folder: Path, name: str) -> Any:
    diffusers = import_diffusers()
    # The file names one of many classes, and only schedulers of diffusers count.
    kind = read_json(folder / name / "scheduler_config.json", CheckpointError, _ADVICE).get("_class_name")
    found = getattr(diffusers, str(kind), None)
    if not (isinstance(found, type) and issubclass(found, diffusers.SchedulerMixin)):
        raise CheckpointError(f"{folder / name}: {kind!r} is not a scheduler of diffusers")
    with hub.loading(folder / name, part="scheduler", failure=CheckpointError):
        return found.from_pretrained(folder / name, local_files_only=True)


def _check_normalizer(spec: PipelineSpec, normalizer: Any) -> None:
    """Refuse deviations by which nothing can be divided."""
    if not bool((normalizer.std > 0).all()):
        raise CheckpointError(
            f"{spec.folder}/image_normalizer has deviations that are not above 0; {_ADVICE}"
        )


def token_counts(pipeline: Any, texts: Iterable[str]) -> list[int]:
    """Return the number of tokens of each text, with its first and last one."""
    return [len(pipeline.tokenizer(text, verbose=False)["input_ids"]) for text in texts]
