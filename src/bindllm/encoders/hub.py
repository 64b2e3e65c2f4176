"""Hugging Face folders: finding or downloading one, reading a model's spec, and loading models and processors.

Only safetensors are read, nothing is unpickled, and no code from the folder ever runs. Images go through the
Pillow processors of transformers, so torchvision is not needed and results are the same on every machine.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from bindllm.atomic import read_json
from bindllm.encoders.families import FAMILIES, REFUSED, Family, family_of
from bindllm.errors import BindLLMError, CheckpointError, DecoderError, EncoderError, fetch_hint, listed

if TYPE_CHECKING:
    from torch import nn
    from transformers import PretrainedConfig

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
ADAPTER = "adapter_config.json"
MOST_LAYERS = 10_000
"""Largest number of layers in a config."""

SERVED = ("image", "text", "audio", "video")
"""Modalities for which transformers has processors that need nothing else, or that are prepared by settings."""

# The names of their towers in the config of a joint model.
_TOWERS = {"image": "vision", "text": "text", "audio": "audio", "video": "vision"}

# These take images of any shape, as patches under a mask.
_PATCH_FAMILIES = ("siglip2", "siglip2_vision_model")

# All files other than the weights that affect an embedding.
_SETTINGS = (
    *("config.json", "preprocessor_config.json", "video_preprocessor_config.json", "processor_config.json"),
    *(
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "added_tokens.json",
        "vocab.json",
    ),
    *("vocab.txt", "merges.txt", "spiece.model", "tokenizer.model", "sentencepiece.bpe.model"),
    *("modules.json", "sentence_bert_config.json", "1_Pooling/config.json"),
)
_IMPLEMENTATIONS = {
    f"{kind}_implementation{end}" for kind in ("attn", "_attn", "_experts") for end in ("", "_internal")
}
# Pickled weights are never downloaded, for either role. Modules of sentence-transformers have folders such as 2_Dense.
_FILES = ["*.json", "*.txt", "*.model", "*.jinja", "model*.safetensors", "*[0-9]_*/model*.safetensors"]
_DOWNLOADED = {"encoder": {"allow_patterns": _FILES}, "decoder": {"ignore_patterns": ["*.bin", "*.pth"]}}
# Without copies in half precision, and without single files that hold all parts again.
_DOWNLOADED["pipeline"] = {"allow_patterns": ["*.json", "*.txt", "README.md", "*/*model.safetensors"]}
# Processors of images that only resize, rescale and normalize, but need torchvision.
_PLAIN = ("DINOv3ViTImageProcessor", "DINOv3ViTImageProcessorFast")
_PIXELS = (
    *("do_resize", "size", "resample", "do_center_crop", "crop_size", "do_rescale", "rescale_factor"),
    *("do_normalize", "image_mean", "image_std"),
)
# Modules of sentence-transformers that can be computed here; any other would change the embedding.
_SENTENCE_MODULES = ("Transformer", "Pooling", "Normalize")


@dataclass(frozen=True)
class ModelSpec:
    """Properties of a model, read from its config.

    Args:
        family: its ``model_type``, such as "clip".
        joint: it has one projection per modality into one space; else it is a single tower.
        modalities: its input modalities, out of `SERVED`.
        width: E, the width of its output.
        pooling: the pooling of a sentence-transformers folder, else None.
        max_tokens: longest text in tokens, if its positions or its sentence settings limit it.
        state_widths: C, the width of the hidden states, for each modality whose config states it.
        patch: side of a square patch of an image or a spectrogram in pixels, if its config states it.
        strides: pixels from one patch to the next, down and across.
        frames: frames of a video.
        tubelet: frames of a patch of a video, if its config states it.
    """

    family: str
    joint: bool
    modalities: tuple[str, ...]
    width: int
    pooling: str | None
    max_tokens: int | None
    state_widths: dict[str, int]
    patch: int | None
    strides: tuple[int, int]
    frames: int | None = None
    tubelet: int | None = None

    @property
    def rules(self) -> Family:
        """The rules of its family."""
        return family_of(self.family, joint=self.joint)

    def takes_patches(self, modality: str) -> bool:
        """Return whether the model takes images of any shape, as a grid of patches each."""
        return modality == "image" and self.family in _PATCH_FAMILIES

    def longest_text(self, tokenizer: Any) -> int:
        """Return the most ids of a text that both the tokenizer and the model's positions allow."""
        return min(tokenizer.model_max_length, self.max_tokens or tokenizer.model_max_length)


def find_folder(name: str, revision: str | None, *, role: str = "encoder") -> Path:
    """Return the local folder of a model. A hub id is looked up in the Hugging Face cache, then downloaded.

    Args:
        name: a folder, or the id of a model on the hub.
        revision: commit on the hub. An encoder's id needs one, since stored embeddings depend on its weights.
        role: "encoder", "decoder", or "pipeline" for images.

    Raises:
        EncoderError, DecoderError, CheckpointError: the folder does not exist, an encoder's hub id has no revision, or
            the model cannot be downloaded.
    """
    if Path(name).is_dir():
        return Path(name)
    # A local folder always wins, so that a run never depends on the network by accident.
    failure = {"encoder": EncoderError, "decoder": DecoderError}.get(role, CheckpointError)
    # How to read this: `organization/name` may be a hub id, anything else is a path. Paths that do not exist must
    # never turn into downloads.
    organization, slash, rest = name.partition("/")
    looks_local = not slash or "/" in rest or organization in ("", ".", "..", "~") or fetch_hint(name)
    is_folder = Path(organization).is_dir()
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    if not looks_local and is_folder:
        # A folder may have the name of an organization: models that were downloaded before are found, others may be
        # misspelled paths.
        with suppress(LocalEntryNotFoundError):
            return Path(
                snapshot_download(name, revision=revision, local_files_only=True, **_DOWNLOADED[role])
            )
    if looks_local or is_folder:
        where = "" if Path(name).is_absolute() else f" in {Path.cwd()}"
        raise failure(f"{role} folder {name!r} does not exist{where}.{fetch_hint(name)}")
    if role == "encoder" and revision is None:
        raise failure(
            f"encoder {name!r} is not a folder in {Path.cwd()}. If it is a model on the hub, give its revision too "
            "(the commit, as its page shows it), so that every run gets the same weights"
        )
    try:
        return Path(snapshot_download(name, revision=revision, **_DOWNLOADED[role]))
    except Exception as error:
        at, why = f" at revision {revision!r}" if revision else "", str(error).partition("\n")[0]
        raise failure(
            f"{role} {name!r}{at} is neither a folder here nor a model that could be downloaded "
            f"({type(error).__name__}: {why}). Give the path of a Hugging Face folder."
        ) from error


def weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files that hold the model, whole or in shards.

    Raises:
        EncoderError: there are none; pickled weights do not count.
    """
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if not (folder / INDEX).is_file():
        raise EncoderError(
            f"{folder} holds no {WEIGHTS}; other weights (*.bin, *.pt) are pickles, which are not read. Convert them: "
            "AutoModel.from_pretrained(...).save_pretrained(folder)"
        )
    # Many tensors share a shard, and the order decides the fingerprint.
    shards = set(_read_json(folder / INDEX).get("weight_map", {}).values())
    return [folder / shard for shard in sorted(shards)]


def settings_files(folder: Path) -> list[tuple[str, Path]]:
    """Return the small files that decide on an embedding, with their names: config, processors, tokenizer."""
    return [(name, folder / name) for name in _SETTINGS if (folder / name).is_file()]


def read_config(folder: str | Path) -> PretrainedConfig:
    """Read ``config.json`` without the keys by which transformers would run code for the model or a part of it.

    Raises:
        ValueError: transformers would take weights from files that a fingerprint does not cover, or a number of layers
            that no model has.
        Exception: any error of transformers about the files.
    """
    from transformers import AutoConfig

    never_ask()
    _check_sizes(_read_json(Path(folder) / "config.json"))
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    named = map(str, _read_json(Path(folder) / INDEX).get("weight_map", {}).values())
    other = {name for name in named if Path(name).name != name or not name.endswith(".safetensors")}
    other |= {name} if (name := vars(config).get("transformers_weights")) else set()
    if (Path(folder) / ADAPTER).exists():
        raise ValueError(
            f"it holds {ADAPTER}: merge the adapter into the model, or remove it from the folder"
        )
    if other:
        raise ValueError(
            f"it names weights in {', '.join(sorted(other))}; expected {WEIGHTS}, or *.safetensors next to {INDEX}"
        )
    _forget_code(config)
    return config


def _check_sizes(part: Any) -> None:
    """Refuse numbers of layers with which building even an empty model would take forever."""
    for name, value in part.items() if isinstance(part, dict) else ():
        _check_sizes(value)
        if "layer" in name and isinstance(value, int | float) and value > MOST_LAYERS:
            raise ValueError(f"its config has {name} {value:g}, expected at most {MOST_LAYERS}")


def never_ask() -> None:
    """Make transformers refuse code of a folder if it would ask: it loads parts without `trust_remote_code`."""
    from transformers import dynamic_module_utils

    # Seconds for an answer, in the whole process; with 0 it raises at once.
    dynamic_module_utils.TIME_OUT_REMOTE_CODE = 0


def _forget_code(part: Any) -> None:
    """Remove Python code (``auto_map``) and kernels of the hub (``org/kernel``) from a config and its parts."""
    from transformers import PretrainedConfig

    values = part if isinstance(part, dict) else vars(part)
    values.pop("auto_map", None)
    for name in values.keys() & _IMPLEMENTATIONS:
        values[name] = None if "/" in str(values[name]) else values[name]
    for value in values.values():
        for inner in value if isinstance(value, list | tuple) else [value]:
            if isinstance(inner, dict | PretrainedConfig):
                _forget_code(inner)


def read_spec(folder: Path) -> ModelSpec:
    """Read the spec of a model from its ``config.json``, without loading it.

    Raises:
        EncoderError: the model does not give one vector per media, or its config lacks the output width.
    """
    from transformers.models.auto.modeling_auto import MODEL_MAPPING

    with loading(folder):
        config = read_config(folder)
    if config.model_type in REFUSED:
        raise EncoderError(f"{folder}: {REFUSED[config.model_type]}")
    # How to read this: from the config's class to the model's class, then its inputs, then its limits. No weight is
    # read.
    if type(config) not in MODEL_MAPPING:
        raise EncoderError(f"{folder}: transformers has no AutoModel for the type {config.model_type!r}")
    model = MODEL_MAPPING[type(config)]
    values = config.to_dict()
    # Families rename standard fields, such as n_embd for hidden_size; the alias table undoes it.
    values |= {alias: values.get(name) for alias, name in type(config).attribute_map.items()}
    taken, special = model.input_modalities, FAMILIES.get(config.model_type)
    modalities = tuple(name for name in SERVED if name in ((taken,) if isinstance(taken, str) else taken))
    modalities = special.modalities if special else modalities
    joint = len(modalities) > 1
    # A joint model needs one feature method per modality.
    lacking = [name for name in modalities if joint and f"get_{name}_features" not in dir(model)]
    if not special and (not modalities or "video" in modalities or lacking or config.is_encoder_decoder):
        raise EncoderError(
            f"{folder}: {model.__name__} takes {taken} and is not an encoder with one vector for each media; expected "
            f"a joint model such as CLIP, SigLIP or CLAP, a single tower for one of {', '.join(SERVED[:3])}, or one of "
            f"{', '.join(FAMILIES)}"
        )
    frames = special.num_frames(values) if special else None
    if "video" in modalities and frames is None:
        raise EncoderError(f"{folder}: its config lacks the number of frames of a video")
    # A joint model has a config for each tower; a single tower is its own.
    towers = {name: values.get(f"{_TOWERS[name]}_config") or values for name in modalities}
    widths = {name: _state_width(tower) for name, tower in towers.items()}
    tubelet = values.get("tubelet_size")
    patches = towers.get("image") or towers.get("audio") or towers.get("video") or {}
    patch = patches.get("patch_size") if isinstance(patches.get("patch_size"), int) else None
    return ModelSpec(
        family=config.model_type,
        joint=joint,
        modalities=modalities,
        width=_width(values, joint=joint, folder=folder),
        # Without tubelets, the states of a video have no grid.
        state_widths={k: width for k, width in widths.items() if width and (k != "video" or tubelet)},
        frames=frames,
        tubelet=tubelet,
        patch=patch,
        # Only patches of spectrograms overlap.
        strides=(patches.get("frequency_stride") or patch or 1, patches.get("time_stride") or patch or 1),
        pooling=_sentence_pooling(folder),
        max_tokens=_longest_text(values.get("text_config") or values, model, folder),
    )


def _longest_text(text: dict[str, Any], model: type, folder: Path) -> int | None:
    """Return the most tokens of a text, from the config of its tower and the settings of sentence-transformers."""
    positions = text.get("max_position_embeddings")
    # The RoBERTa family counts its positions from the padding id + 1.
    is_roberta = "roberta" in str(text.get("model_type")) + model.__name__.lower()
    limits = [
        positions - (1 + text.get("pad_token_id", 0) if is_roberta else 0) if positions else None,
        _read_json(folder / "sentence_bert_config.json").get("max_seq_length"),
    ]
    return min((limit for limit in limits if limit), default=None)


def load_model(folder: Path, *, dtype: torch.dtype, without_pooler: bool) -> nn.Module:
    """Load a model, frozen and in eval mode.

    Args:
        without_pooler: whether a pooler without weights is removed instead of an error.

    Raises:
        EncoderError: the model cannot be loaded, or lacks weights, which would be random.
    """
    from transformers import AutoModel

    # Pickles are refused here, with advice, before transformers would look for them.
    weight_files(folder)
    with loading(folder):
        model, report = AutoModel.from_pretrained(
            folder,
            config=read_config(folder),
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
            output_loading_info=True,
        )
    # A pooler of random weights would give random embeddings.
    pooler = {name for name in report["missing_keys"] if without_pooler and name.startswith("pooler.")}
    report["missing_keys"] -= pooler
    if missing := missing_weights(report):
        raise EncoderError(
            f"{folder}: the checkpoint has no fitting weights for {missing} of {type(model).__name__}; they would be "
            "random"
        )
    if pooler:
        model.pooler = None
    model = family_of(model.config.model_type, joint=True).encoder(model)
    return model.eval().requires_grad_(False)


def missing_weights(report: dict[str, Any]) -> str:
    """Return the first weights that transformers has filled at random, or "", from the report about its loading."""
    # Position ids are constants, which newer versions do not save.
    names = {name for name in report["missing_keys"] if not name.endswith("position_ids")}
    return listed(sorted(names | {str(name) for name in report["mismatched_keys"]}))


def load_processor(folder: Path, modality: str) -> Any:
    """Load the processor that a folder brings: for images (Pillow), frames of videos, texts or audio.

    Raises:
        EncoderError: the folder has none, or it needs a package that is not installed.
    """
    from transformers import AutoFeatureExtractor, AutoImageProcessor, AutoTokenizer

    with loading(folder, part=f"processor for {modality} media"):
        if modality == "video" or (
            modality == "image" and _image_settings(folder)["image_processor_type"] in _PLAIN
        ):
            return _plain_processor(folder)
        if modality == "image":
            return AutoImageProcessor.from_pretrained(folder, backend="pil", trust_remote_code=False)
        if modality == "audio":
            return AutoFeatureExtractor.from_pretrained(folder, trust_remote_code=False)
        tokenizer = AutoTokenizer.from_pretrained(folder, use_fast=True, trust_remote_code=False)
        # Padding is masked, so the end token can serve as padding.
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        if tokenizer.is_fast:
            # Set once here: per-call settings would change the tokenizer while other threads use it.
            tokenizer.backend_tokenizer.no_truncation()
            tokenizer.backend_tokenizer.no_padding()
    return tokenizer


def _image_settings(folder: Path) -> dict[str, Any]:
    found = _read_json(folder / "video_preprocessor_config.json") or _read_json(
        folder / "preprocessor_config.json"
    )
    return {"image_processor_type": None, **found}


def _plain_processor(folder: Path) -> Any:
    """Return a processor that resizes, crops and normalizes by the settings of a folder.

    It stands for those that need torchvision, or take whole videos.

    Raises:
        EncoderError: the folder has no such settings.
    """
    from transformers import CLIPImageProcessorPil

    settings = _image_settings(folder)
    if lacking := [name for name in ("size", "image_mean", "image_std") if not settings.get(name)]:
        raise EncoderError(f"{folder}: its preprocessor_config.json lacks {', '.join(lacking)}")
    chosen = {name: settings[name] for name in _PIXELS if settings.get(name) is not None}
    # Those of CLIP are other defaults than the models have.
    return CLIPImageProcessorPil(**{"do_center_crop": "crop_size" in chosen, "resample": 2, **chosen})


@contextmanager
def loading(
    folder: str | Path, *, part: str = "model", failure: type[BindLLMError] = EncoderError
) -> Iterator[None]:
    """Turn exceptions of transformers about a folder into a ``failure``, and mute its log and progress bars."""
    from torch import OutOfMemoryError
    from transformers.utils import logging

    never_ask()
    # Restored afterwards: the caller's setting is not ours to change.
    verbosity, shows_bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    except (failure, OutOfMemoryError):
        raise
    # transformers raises many exception types about untrusted files; each means that the folder cannot be used.
    except Exception as error:
        raise failure(f"{folder}: no usable {part} here ({_loading_error(folder, error)})") from error
    finally:
        logging.set_verbosity(verbosity)
        (logging.enable_progress_bar if shows_bars else logging.disable_progress_bar)()


def _loading_error(folder: str | Path, error: Exception) -> str:
    """Describe an error of transformers; explain if the folder needs code of its own (``auto_map``), never run here."""
    if "trust_remote_code" not in str(error):
        return f"{type(error).__name__}: {error}"
    # The files that ask for remote code, so that the user finds the entry.
    found = sorted(file for file in Path(folder).glob("*.json") if file.is_file())
    files = [file for file in found if b'"auto_map"' in file.read_bytes()]
    names = ", ".join(file.name for file in files) or "its config"
    return (
        f"auto_map in {names} names Python code of the folder, and bindllm never runs code of a folder. Use a model "
        "of a type that transformers has built in, or upgrade transformers if it was added since"
    )


def _width(values: dict[str, Any], *, joint: bool, folder: Path) -> int:
    """Return E: of a joint model its projection's, of a tower its hidden states'."""
    if joint:
        text = values.get("text_config") or {}
        found = values.get("projection_dim") or text.get("projection_size") or text.get("hidden_size")
    else:
        found = _state_width(values)
    if not isinstance(found, int):
        raise EncoderError(f"{folder}: its config lacks the width of its output")
    return found


def _state_width(values: dict[str, Any]) -> int | None:
    """Return the width of a tower's last hidden states, or None if its config lacks it."""
    found = values.get("hidden_size") or (values.get("hidden_sizes") or [None])[-1]
    return found if isinstance(found, int) else None


def _sentence_pooling(folder: Path) -> str | None:
    """Return the pooling of a sentence-transformers folder, or None.

    Raises:
        EncoderError: its modules or its pooling are not supported.
    """
    # An ordinary model has neither of both files, and is pooled as its architecture does.
    listed = _read_json(folder / "modules.json") or []
    kinds = [str(module.get("type", "")).rpartition(".")[2] for module in listed]
    # A dense layer or another module would change every embedding.
    if strange := [kind for kind in kinds if kind not in _SENTENCE_MODULES]:
        raise EncoderError(f"{folder}: its sentence-transformers modules {strange} are not supported")
    settings = _read_json(folder / "1_Pooling/config.json")
    if not settings:
        return None
    names = {"cls": "first", "mean": "mean", "lasttoken": "last"}
    # Old folders have one flag per pooling, newer ones a single name.
    chosen = [name for name in settings if name.startswith("pooling_mode_") and settings[name] is True]
    chosen = [
        name.removeprefix("pooling_mode_").removesuffix("_token").removesuffix("_tokens") for name in chosen
    ]
    chosen = chosen or [settings.get("pooling_mode")]
    if len(chosen) != 1 or chosen[0] not in names:
        raise EncoderError(f"{folder}: its pooling {chosen} is not supported; choose one: pooling='mean'")
    return names[chosen[0]]


def _read_json(file: Path) -> Any:
    """Return the content of a JSON file, or an empty dict if it does not exist."""
    return read_json(file, EncoderError) if file.exists() else {}
