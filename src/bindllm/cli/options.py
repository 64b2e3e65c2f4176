"""Options that several commands share: media (``modality:path``), encoders (a class or a folder), the visual cache."""

from __future__ import annotations

import inspect
import math
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Any

import yaml
from jsonargparse.typing import ClosedUnitInterval, PositiveInt, restricted_number_type

from bindllm.atomic import read_object
from bindllm.errors import CheckpointError, InputError, MediaError, UsageError, did_you_mean
from bindllm.imports import name_module
from bindllm.media import MODALITIES, SUFFIXES, Media, is_modality
from bindllm.media.source import local_path, open_stream
from bindllm.model.checkpoint import MANIFEST, build_object, build_own

if TYPE_CHECKING:
    from rich.table import Table

    from bindllm.cache.visual_cache import VisualCache

PositiveNumber = restricted_number_type("PositiveNumber", float, [(">", 0), ("<", math.inf)])
Probability = restricted_number_type("Probability", float, [(">", 0), ("<=", 1)])

_ALIGNED = "bindllm.encoders.Aligned"

_OF_FOLDER = {
    "imagebind": "bindllm.encoders.ImageBind",
    "pointbind": "bindllm.encoders.PointBind",
    "efficientnet-lite0": "bindllm.encoders.EfficientNetLite",
}

# Pillow's modes of images with more than 8 bits per channel: they may be depth or thermal maps.
_WIDE = ("I", "F")


@dataclass(frozen=True)
class EncoderOptions:
    """Encoders."""

    encoder: tuple[str, ...] = ()
    """import path of a class, or folder of an encoder; may be repeated. Arguments of its constructor are given as
    --encoder.NAME VALUE"""
    checkpoint: str | None = None
    """use the encoders of this checkpoint folder"""
    allow: tuple[str, ...] = ()
    """import path of a class outside bindllm that a folder may name; may be repeated"""
    device: str | None = None
    """cpu, cuda, ... (default: the accelerator that torch finds)"""

    def load(self, overrides: Sequence[str]) -> list[Any]:
        """Build the encoders: those of the checkpoint, then the others.

        Raises:
            UsageError: overrides without exactly one ``--encoder`` that they belong to.
            CheckpointError: a folder or a class that cannot be used.
        """
        # Encoders of the checkpoint come first: with equal modalities the first one serves.
        others = build_encoders(self.encoder, overrides, allow=self.allow)
        if self.checkpoint is None:
            return others
        from bindllm.model.checkpoint import read_manifest
        from bindllm.model.pretrained import read_encoders

        return [*read_encoders(self.checkpoint, read_manifest(self.checkpoint), allow=self.allow), *others]

    def find_device(self) -> str:
        """Return the name of a device that torch can compute on: the chosen one, or the accelerator that it finds.

        Raises:
            UsageError: torch cannot compute there.
        """
        from bindllm.model.pretrained import find_device

        try:
            return find_device(self.device)
        except InputError as error:
            raise UsageError(f"--{error}") from error


@dataclass(frozen=True)
class CacheOptions:
    """Visual cache (docs/cache.md)."""

    cache: str | None = None
    """folder of a visual cache, or the address of a Milvus server, to blend embeddings with"""
    cache_weight: ClosedUnitInterval | None = None
    """share of the retrieved images in the blend, 0 to 1"""
    cache_top_k: PositiveInt | None = None
    """number of images to retrieve"""

    @property
    def settings(self) -> dict[str, Any]:
        """The settings that were given, by their names in `VisualCache`."""
        # Option names have a prefix that the settings do not have.
        settings = {"weight": self.cache_weight, "top_k": self.cache_top_k}
        return {name: value for name, value in settings.items() if value is not None}

    def open(self) -> VisualCache | None:
        """Open the chosen visual cache, if any.

        Raises:
            UsageError: settings without a cache, which would be ignored.
        """
        if self.cache is None:
            if self.settings:
                raise UsageError(
                    f"--cache_{next(iter(self.settings))} needs a visual cache: give --cache FOLDER"
                )
            return None

        from bindllm.cache.visual_cache import VisualCache, open_index

        return VisualCache(open_index(self.cache), **self.settings)


def print_whole(*tables: Table) -> None:
    """Print tables at their own width: a pipe has no width to fit, and names must not be cut."""
    from rich.console import Console

    console = Console(highlight=False, soft_wrap=True)
    unlimited = console.options.update(max_width=sys.maxsize)
    for table in tables:
        console.width = max(console.width, console.measure(table, options=unlimited).maximum)
        console.print(table)


def build_encoders(paths: Sequence[str], overrides: Sequence[str], *, allow: Sequence[str]) -> list[Any]:
    """Build encoders by their classes or folders, see `build_encoder`.

    Raises:
        UsageError: overrides without exactly one encoder that they belong to.
    """
    if overrides and len(paths) != 1:
        name = overrides[0].partition("=")[0]
        raise UsageError(f"{name} needs exactly one --encoder, to which it belongs")
    return [build_encoder(path, overrides, allow=allow) for path in paths]


def read_media(text: str) -> Media:
    """Return the media that an argument of a command line names.

    Args:
        text: ``modality:path`` or ``text:words``, or only a path if its ending determines the modality. A path may be
            a ``file:`` URL.

    Raises:
        UsageError: the ending does not determine the modality, the path is a folder or does not exist, or it is a web
            address.

    Example:
        >>> read_media("dog.jpg"), read_media("depth:room.png"), read_media("text:a dog")
        (Media.image('dog.jpg'), Media.depth('room.png'), Media.text('a dog'))
    """
    # An existing file whose name has a colon is a path; a URL names its file.
    text = text if os.path.exists(text) else _path(text)
    # Only the first colon: a text may have more of them.
    modality, colon, source = text.partition(":")
    # A drive letter of Windows is a part of a path.
    if colon and len(modality) > 1 and is_modality(modality) and not os.path.exists(text):
        return named_media(modality, source)
    # The ending decides if it can have only one meaning.
    ending = os.path.splitext(text)[1].lower()
    for name, endings in SUFFIXES.items():
        if ending in endings and not (name == "image" and _is_wide(text)):
            return Media(name, text)
    if os.path.isdir(text):
        raise UsageError(f"{text}: this is a folder; give its files, as in {os.path.join(text, '*')}")
    if not os.path.exists(text):
        raise UsageError(f"{text}: no such file; a text is given as text:{text}")
    # A guess would be silently wrong: a 16-bit PNG may be depth or thermal.
    why = "has more than 8 bits per channel" if _is_wide(text) else "may have any modality"
    raise UsageError(
        f"{text}: such a file {why}; name its modality, as in depth:{text} ({', '.join(MODALITIES)}, or another that "
        "the encoder serves)"
    )


def named_media(modality: str, source: str) -> Media:
    """Return media of a modality by their path, which may be a ``file:`` URL, or by their words.

    Raises:
        UsageError: a web address.
    """
    return Media(modality, source if modality == "text" else _path(source))


def _path(text: str) -> str:
    try:
        return local_path(text)
    except MediaError as error:
        raise UsageError(f"{text}: {error}") from error


def _is_wide(file: str) -> bool:
    """Return whether a file is an image with more than 8 bits per channel."""
    from bindllm.media.images import open_raster

    try:
        # Regular files only: a pipe would block.
        with open_stream(file) as stream, open_raster(stream) as image:
            return image.mode.startswith(_WIDE)
    # The encoder that opens the file reports the error.
    except Exception:
        return False


def build_encoder(path: str, options: Sequence[str], *, allow: Sequence[str] = ()) -> Any:
    """Build an encoder by its class or its folder, with ``--encoder.NAME VALUE`` as arguments of its constructor.

    Args:
        path: import path of the class, such as ``my_lab.RadarEncoder``, or a folder (see `encoder_folder`).
        options: the options that belong to it; values are read as YAML.
        allow: classes outside bindllm that an aligned encoder's folder may name.

    Raises:
        UsageError: not the folder of an encoder, options of another form, unknown arguments, or missing ones.
        CheckpointError: the class does not exist or cannot be built.
    """
    given: dict[str, str] = {}
    # A folder stands for a class and its argument.
    if os.path.isdir(path):
        found = encoder_folder(path)
        if found is None:
            raise UsageError(
                f"{path} does not name its encoder; give the class, and the folder as its argument: --encoder "
                f"my_lab.RadarEncoder --encoder.weights {path}"
            )
        path, given = found[0], {found[1]: path}
    elif {"/", os.sep} & set(path):
        raise UsageError(
            f"{path}: the folder does not exist; give the folder of an encoder or the import path of one"
        )
    # Both `--encoder.grid 2` and `--encoder.grid=2`.
    words = list(options)
    while words:
        name, equals, value = words.pop(0).partition("=")
        if not name.startswith("--encoder."):
            raise UsageError(
                f"unrecognized arguments: {name}. Arguments of the encoder are --encoder.NAME VALUE"
            )
        if not equals and not words:
            raise UsageError(f"{name} has no value")
        given[name.removeprefix("--encoder.")] = value if equals else words.pop(0)
    parameters = _parameters(path)
    gathering = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    # Asked for by name before the class fails with a TypeError of its own.
    required = [
        name for name, one in parameters.items() if one.default is one.empty and one.kind not in gathering
    ]
    if missing := [name for name in required if name not in given]:
        wanted = " ".join(f"--encoder.{name} VALUE" for name in missing)
        raise UsageError(f"{path} cannot be built without {', '.join(missing)}: add {wanted}")
    arguments: dict[str, Any] = {}
    for name, text in given.items():
        # A class with **kwargs passes arguments on that its signature does not show.
        takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
        if name not in parameters and not takes_any:
            raise UsageError(f"{path} has no argument {name!r}. {did_you_mean(name, parameters)}")
        # A parameter that is a string stays one: YAML would read 7 as a number and 0e1 as 0.
        is_text = name in parameters and parameters[name].annotation in (str, "str", "str | None")
        arguments[name] = text if is_text else _read_yaml(name, text)
    return build_own({"class_path": path, "init_args": arguments}, allow=allow)


def encoder_folder(folder: str | Path) -> tuple[str, str] | None:
    """Return the encoder of a folder: the import path of its class and the argument that takes the folder.

    Returns:
        None if the folder does not name an encoder.

    Raises:
        UsageError: it is a checkpoint, which may have several encoders.
    """
    folder = Path(folder)
    if (folder / MANIFEST).is_file():
        raise UsageError(
            f"{folder} is a checkpoint, not the folder of an encoder: give it as --checkpoint {folder}"
        )
    if (folder / "align.json").is_file():
        return _ALIGNED, "weights"
    # Our folders name their model; fetched ones have the asset they come from. The encoder reports damaged files.
    config, source = read_object(folder / "config.json"), read_object(folder / "SOURCE.json")
    if "model_type" in config:
        return "bindllm.encoders.HuggingFace", "name"
    kind = _OF_FOLDER.get(str(config.get("model") or source.get("asset")))
    return None if kind is None else (kind, "weights")


def _parameters(path: str) -> Mapping[str, inspect.Parameter]:
    """Return the parameters of a class; classes that are not written in Python may have no signature."""
    try:
        return inspect.signature(_find_class(path)).parameters
    except (TypeError, ValueError):
        return {}


def _find_class(path: str) -> Any:
    """Return a class by its import path; `build_object` reports an error in the path."""
    name_module(path)
    try:
        return resolve_name(path)
    # An untrusted module may raise anything when it is imported.
    except Exception as error:
        build_object({"class_path": path}, allow=[path])
        raise CheckpointError(f"{path} cannot be imported ({error})") from error


def _read_yaml(name: str, text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UsageError(f"--encoder.{name} {text!r} cannot be read as a value ({error})") from error
