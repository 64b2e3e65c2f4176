"""Media and encoders on a command line: ``modality:path``, endings of files, an encoder's class or folder."""

from __future__ import annotations

import inspect
import json
import os
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import yaml

from bindllm.cli.usage import UsageError
from bindllm.errors import CheckpointError, known_names
from bindllm.imports import name_module
from bindllm.media import MODALITIES, SUFFIXES, Media, is_modality
from bindllm.model.checkpoint import MANIFEST, build_object

RULES = "; ".join(
    f"{modality}: {' '.join(sorted(ending[1:] for ending in endings))}"
    for modality, endings in SUFFIXES.items()
)
"""The modality that a file ending means. Other endings (npy, npz, csv, txt) may be anything."""

_ALIGNED = "bindllm.encoders.Aligned"

_OF_FOLDER = {
    "imagebind": "bindllm.encoders.ImageBind",
    "pointbind": "bindllm.encoders.PointBind",
    "efficientnet-lite0": "bindllm.encoders.EfficientNetLite",
}

# Pillow's names of pictures with more than 8 bits: of such a file nobody can tell depth or heat from grey.
_WIDE = ("I", "F")


def read_media(text: str) -> Media:
    """Return the media that a word of a command line names.

    Args:
        text: ``modality:path`` or ``text:words``; a path alone where its ending tells what it is.

    Raises:
        UsageError: the ending does not tell, or it is a folder or nothing at all.

    Example:
        >>> read_media("dog.jpg"), read_media("depth:room.png"), read_media("text:a dog")
        (Media.image('dog.jpg'), Media.depth('room.png'), Media.text('a dog'))
    """
    modality, colon, source = text.partition(":")
    # A drive letter of Windows and an existing file called so are paths.
    if colon and len(modality) > 1 and is_modality(modality) and not os.path.exists(text):
        return Media(modality, source)
    ending = os.path.splitext(text)[1].lower()
    for name, endings in SUFFIXES.items():
        if ending in endings and not (name == "image" and _is_wide(text)):
            return Media(name, text)
    if os.path.isdir(text):
        raise UsageError(f"{text}: this is a folder; give its files, as in {os.path.join(text, '*')}")
    if not os.path.exists(text):
        raise UsageError(f"{text}: no such file; words are given as text:{text}")
    why = "may be a depth map or heat, with more than 8 bits" if _is_wide(text) else "may be anything"
    raise UsageError(
        f"{text}: such a file {why}; say what it is, as in depth:{text} ({', '.join(MODALITIES)}, or another that the "
        "encoder serves)"
    )


def _is_wide(file: str) -> bool:
    """Tell whether a file is a picture of more than 8 bits a channel."""
    from PIL import Image

    try:
        with Image.open(file) as picture:
            return picture.mode.startswith(_WIDE)
    # Whatever it is, the encoder that opens it will say it better.
    except Exception:
        return False


def build_encoder(path: str, options: Sequence[str], *, allow: Sequence[str] = ()) -> Any:
    """Build an encoder by its class or its folder, with ``--encoder.NAME VALUE`` as arguments of its constructor.

    Args:
        path: of the class, such as ``my_lab.RadarEncoder``, or a folder that tells its class (see `encoder_folder`).
        options: the words of the command line that belong to it; values are read as YAML.
        allow: classes outside bindllm that an aligned encoder's folder may stand on.

    Raises:
        UsageError: a folder of no encoder, options that are not of this form, or that the constructor does not know
            or cannot do without.
        CheckpointError: the class does not exist or cannot be built.
    """
    given: dict[str, str] = {}
    if os.path.isdir(path):
        path, given = _of_folder(path)
    elif {"/", os.sep} & set(path):
        raise UsageError(
            f"{path}: there is no such folder; give the folder of an encoder or the import path of one"
        )
    words = list(options)
    while words:
        name, equals, value = words.pop(0).partition("=")
        if not name.startswith("--encoder."):
            raise UsageError(
                f"unrecognized arguments: {name}. Arguments of the encoder are --encoder.NAME VALUE"
            )
        if not equals and not words:
            raise UsageError(f"{name} has no value behind it")
        given[name.removeprefix("--encoder.")] = value if equals else words.pop(0)
    parameters = _parameters(path)
    gathering = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    required = [
        name for name, one in parameters.items() if one.default is one.empty and one.kind not in gathering
    ]
    if missing := [name for name in required if name not in given]:
        wanted = " ".join(f"--encoder.{name} VALUE" for name in missing)
        raise UsageError(f"{path} cannot be built without {', '.join(missing)}: add {wanted}")
    arguments: dict[str, Any] = {}
    for name, text in given.items():
        takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
        if name not in parameters and not takes_any:
            raise UsageError(f"{path} has no argument {name!r}. {known_names(name, parameters)}")
        is_text = name in parameters and parameters[name].annotation in (str, "str", "str | None")
        arguments[name] = text if is_text else _read_yaml(name, text)
    return build_own({"class_path": path, "init_args": arguments}, allow=allow)


def build_own(entry: Mapping[str, Any], *, allow: Sequence[str] = ()) -> Any:
    """Build an encoder that the user names, on the command line or in a recipe; its own ``allow`` counts.

    Args:
        entry: ``{"class_path": ..., "init_args": {...}}``.
        allow: further classes outside bindllm that may be imported.

    Raises:
        CheckpointError: the class does not exist or cannot be built.
        UsageError: ``allow`` is not a list of import paths.
    """
    own = entry.get("init_args", {}).get("allow") or []
    if not isinstance(own, list) or not all(isinstance(path, str) for path in own):
        raise UsageError(f"allow must be a list of import paths, such as [my_lab.RadarTower], not {own!r}")
    return build_object(dict(entry), allow=[entry["class_path"], *allow, *own])


def encoder_folder(folder: str | Path) -> tuple[str, str] | None:
    """Return which encoder a folder holds: the import path of its class and the argument that takes the folder.

    Returns:
        None where the folder does not tell.

    Raises:
        UsageError: it is a checkpoint, which may have several.
    """
    folder = Path(folder)
    if (folder / MANIFEST).is_file():
        raise UsageError(
            f"{folder} is a checkpoint, not the folder of an encoder: give it as --checkpoint {folder}"
        )
    if (folder / "align.json").is_file():
        return _ALIGNED, "weights"
    config, source = _read_object(folder / "config.json"), _read_object(folder / "SOURCE.json")
    if "model_type" in config:
        return "bindllm.encoders.HuggingFace", "name"
    kind = _OF_FOLDER.get(str(config.get("model") or source.get("asset")))
    return None if kind is None else (kind, "weights")


def _of_folder(folder: str) -> tuple[str, dict[str, str]]:
    found = encoder_folder(folder)
    if found is None:
        raise UsageError(
            f"{folder} does not tell which encoder it holds; name the class, and the folder as its argument: --encoder "
            f"my_lab.RadarEncoder --encoder.weights {folder}"
        )
    return found[0], {found[1]: folder}


def _read_object(file: Path) -> Mapping[str, Any]:
    """Return the object in a JSON file, empty where there is none: the encoder itself will say what is wrong."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _parameters(path: str) -> Mapping[str, inspect.Parameter]:
    """Return what the constructor of a class takes; classes that are not written in Python do not tell."""
    try:
        return inspect.signature(_find_class(path)).parameters
    except (TypeError, ValueError):
        return {}


def _find_class(path: str) -> Any:
    """Return a class by its import path; `build_object` says what is wrong with a path that leads nowhere."""
    module, _, name = path.rpartition(".")
    name_module(path)
    try:
        # Names of a package may be made when they are asked for, so its dictionary is not enough.
        return getattr(import_module(module), name)
    # A stranger's module may raise anything when it is imported.
    except Exception as error:
        build_object({"class_path": path}, allow=[path])
        raise CheckpointError(f"{path} cannot be imported ({error})") from error


def _read_yaml(name: str, text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UsageError(f"--encoder.{name} {text!r} cannot be read as a value ({error})") from error
