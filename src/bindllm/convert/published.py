"""Convert one published file, of whichever kind it is."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

from torch import Tensor

from bindllm.atomic import read_object
from bindllm.convert import KINDS, TOKENIZER, ConvertOptions, imagebind, imagebind_llm, pointbind
from bindllm.convert.adapter import convert_imagebind_llm
from bindllm.convert.foreign import read_foreign
from bindllm.convert.keymap import REPORT, ConversionReport, Rule
from bindllm.encoders import Encoder
from bindllm.encoders.imagebind.text import tokenizer_tree, write_tokenizer
from bindllm.errors import CheckpointError, InputError
from bindllm.model.checkpoint import build_object
from bindllm.model.decoder import DecoderConfig

# Options of one kind only, by their names in `ConvertOptions`.
_KIND_OF = {"tokenizer": "imagebind", **dict.fromkeys(("base", "encoders", "accept_base"), "imagebind-llm")}
_ENCODERS = {"imagebind": "ImageBind", "pointbind": "PointBind"}
# Tensors of Point-Bind in a file from which only the ImageBind is converted.
_POINT_PARTS = (
    r"logit_scale|pc_projection|point_(?:encoder|trunk)[.].*|bind[.]modality_(?:head|postprocessor)_point[.].*"
    r"|modality_(?:heads|postprocessors)[.]point[.].*"
)


def convert_published(
    file: str, output: str, options: ConvertOptions, *, say: Callable[[str], None] = print
) -> ConversionReport:
    """Convert a published file into a folder of ours, and print the outcome.

    Args:
        file: the published file.
        output: a folder that does not exist yet, or is empty.
        options: settings of the conversions.
        say: takes each line of the output.

    Raises:
        CheckpointError: the file cannot be read or converted, or the folder cannot be written.
        InputError: an ImageBind-LLM adapter without a base or an encoder, or an option of another kind.
    """
    folder = Path(output)
    check_output(folder)
    # The tensors stay on the disk, so finding the kind is cheap.
    state = read_foreign(file)
    kind = options.kind or find_kind(state, file)
    for name, owner in _KIND_OF.items():
        if vars(options)[name] and kind != owner:
            raise InputError(f"--{name.removesuffix('s')} is for {owner}, and {file} is {kind}; leave it out")
    say(f"{file}: {kind}, {len(state):,} tensors")
    if kind == "imagebind":
        report, license = _convert_imagebind(state, file, folder, options.tokenizer), imagebind.LICENSE
    elif kind == "pointbind":
        report, license = pointbind.convert_pointbind(state, folder, source=file), pointbind.LICENSE
        if pointbind.imagebind_part(state):
            say(f"it also holds an ImageBind: bindllm convert imagebind {file} --output FOLDER")
    else:
        report, license = _convert_adapter(state, folder, options, say), imagebind_llm.LICENSE
    say(
        f"{folder}: {len(report.mapped):,} tensors converted, {len(report.dropped):,} dropped by rule, "
        f"{len(report.unknown):,} unknown; each is listed in {folder / REPORT}"
    )
    say(f"license: {license}")
    return report


def find_kind(state: Mapping[str, Tensor], file: str) -> str:
    """Return which of `KINDS` a published file is.

    Raises:
        CheckpointError: none of them, or a file with two encoders.
    """
    if imagebind_llm.is_imagebind_llm(state):
        return "imagebind-llm"
    # Without the prefix ``bind.``: Point-Bind's own files hold an ImageBind too, but count as point encoders.
    has_imagebind = any(name.startswith("modality_trunks.") for name in state)
    if pointbind.find_variant(state) is not None:
        if has_imagebind:
            raise CheckpointError(
                f"{file} holds two encoders, and each gets a folder of its own: run bindllm convert imagebind {file} "
                f"--output FOLDER, then bindllm convert pointbind {file} --output FOLDER"
            )
        return "pointbind"
    if has_imagebind:
        return "imagebind"
    raise CheckpointError(
        f"{file} is none of {', '.join(KINDS)}: its first tensors are {', '.join(list(state)[:5])}"
    )


def check_output(folder: Path) -> None:
    """Raise if a folder cannot be written, before a large file is read.

    Raises:
        CheckpointError: it is not empty, it is the working directory, or it cannot be made.
    """
    if folder.resolve() == Path.cwd():
        raise CheckpointError(
            f"--output {folder} is the folder that this command runs in; name one inside it"
        )
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise CheckpointError(
            f"{folder} exists and is not empty; nothing was written. Choose another folder or empty it"
        )
    # The nearest parent that exists decides whether the folder can be made.
    parent = next(path for path in folder.absolute().parents if path.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        why = "not writable" if parent.is_dir() else "a file"
        raise CheckpointError(f"{folder} cannot be made: {parent} is {why}; choose another folder")


def _convert_imagebind(
    state: Mapping[str, Tensor], source: str, folder: Path, given: str | None
) -> ConversionReport:
    has_texts = any(name.removeprefix("bind.").startswith("modality_trunks.text.") for name in state)
    file = Path(given or TOKENIZER) if has_texts and given != "none" else None
    if file is not None and not file.is_file():
        raise CheckpointError(
            f"the tokenizer {file} does not exist, and texts need it: run bindllm fetch clip-vocabulary here, or give "
            "the file with --tokenizer, or --tokenizer none to convert without texts"
        )
    # The packed list of merges is turned into a tokenizer.json first, so both inputs take the same checks.
    with tempfile.TemporaryDirectory() as scratch:
        if file is not None and file.suffix == ".gz":
            packed, file = file.read_bytes(), Path(scratch) / "tokenizer.json"
            write_tokenizer(packed, file)
        if file is not None:
            _check_tokenizer(file)
        rules = [Rule(_POINT_PARTS, None, "the point encoder: bindllm convert pointbind")]
        return imagebind.convert_imagebind(state, folder, tokenizer_file=file, rules=rules, source=source)


def _check_tokenizer(file: Path) -> None:
    """Refuse a tokenizer that is not CLIP's: its ids would mean other words to the encoder."""
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(file))
    # The library raises Exception itself.
    except Exception as error:
        raise CheckpointError(
            f"{file} is not a tokenizer.json that can be read ({error}); bindllm fetch clip-vocabulary makes one"
        ) from error
    # The ids of the special tokens differ between vocabularies, so they identify one.
    for marker in tokenizer_tree({})["added_tokens"]:
        if (found := tokenizer.token_to_id(marker["content"])) != marker["id"]:
            raise CheckpointError(
                f"{file} is not CLIP's tokenizer: {marker['content']} has the id {found}, expected {marker['id']}; "
                "bindllm fetch clip-vocabulary makes the right one"
            )


def _convert_adapter(
    state: Mapping[str, Tensor], folder: Path, options: ConvertOptions, say: Callable[[str], None]
) -> ConversionReport:
    if not options.base or not options.encoders:
        raise InputError(
            "an ImageBind-LLM adapter needs the models that it was trained on: give --base FOLDER, a Hugging Face "
            "copy of its LLaMA, and --encoder FOLDER, the converted ImageBind (and again for Point-Bind)"
        )
    adapted = convert_imagebind_llm(
        state,
        folder,
        base=DecoderConfig(_as_path(options.base)),
        encoders=[_load_encoder(value) for value in options.encoders],
        accept_base=options.accept_base,
    )
    shape = adapted.shape
    bridge = "the older bridge" if shape.legacy else "the bridge of the paper"
    say(f"{shape.phase} phase, {bridge}, {shape.served} of {shape.num_layers} layers served")
    return adapted.report


def _load_encoder(value: str) -> Encoder:
    """Return the encoder of a converted folder, or of an import path."""
    if Path(value).is_dir():
        name = _ENCODERS.get(str(read_object(Path(value) / "config.json").get("model")))
        if name is None:
            raise CheckpointError(f"{value} is not a folder of bindllm convert imagebind or pointbind")
        entry = {"class_path": f"bindllm.encoders.{name}", "init_args": {"weights": _as_path(value)}}
        return build_object(entry)
    # A name with dots and without slashes is an import path.
    if "/" in value or "." not in value:
        raise CheckpointError(f"encoder folder {value!r} does not exist; bindllm convert imagebind makes one")
    # The user has typed this path, so the class may be imported.
    return build_object({"class_path": value}, allow=[value])


def _as_path(value: str) -> str:
    """Return a folder's name as a path, so that a checkpoint can tell it from a setting and find it from anywhere."""
    return os.path.join(".", value) if Path(value).is_dir() and Path(value).name == value else value
