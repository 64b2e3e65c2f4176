"""``bindllm convert``: published weights become folders of ours, every tensor accounted for."""

from __future__ import annotations

import json
import os
import tempfile
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bindllm.errors import CheckpointError, UsageError, did_you_mean

if TYPE_CHECKING:
    from torch import Tensor

    from bindllm.convert.keymap import Accounting
    from bindllm.encoders import Encoder

KINDS = ("imagebind", "pointbind", "imagebind-llm")

_TOKENIZER = Path("checkpoints/clip-vocabulary/tokenizer.json")
_POINT_PARTS = (
    r"logit_scale|pc_projection|point_(?:encoder|trunk)[.].*|bind[.]modality_(?:head|postprocessor)_point[.].*"
    r"|modality_(?:heads|postprocessors)[.]point[.].*"
)
_POINT_LICENCE = (
    "Point-Bind's code is MIT; its weights derive from ImageBind's (CC-BY-NC 4.0, no commercial use)"
)


def convert(
    what: tuple[str, ...],
    *,
    output: str,
    tokenizer: str | None = None,
    base: str | None = None,
    encoder: tuple[str, ...] = (),
    accept_base: bool = False,
) -> int:
    """Convert published weights of ImageBind, Point-Bind or ImageBind-LLM.

    Every tensor is accounted for: converted, or dropped by a rule. The
    report is conversion.tsv in the output folder.

    Args:
        what: the published FILE; before it its kind (imagebind, pointbind or imagebind-llm), if the file holds several
        output: a folder that does not exist yet, or an empty one
        tokenizer: for imagebind: tokenizer.json of CLIP, or its packed list of merges, or none to convert without the
            text encoder (default: checkpoints/clip-vocabulary/tokenizer.json, from bindllm fetch clip-vocabulary)
        base: for imagebind-llm: Hugging Face folder of the LLaMA that it was trained on
        encoder: for imagebind-llm: folder of a converted ImageBind or Point-Bind, or import path of another encoder;
            may be repeated
        accept_base: for imagebind-llm: convert although the weights of the base differ from those in training

    Example:
        bindllm convert imagebind_huge.pth --output checkpoints/imagebind
    """
    *kinds, file = what
    if len(kinds) > 1:
        raise UsageError(f"one file at a time, not {len(kinds)}")
    if kinds and kinds[0] not in KINDS:
        raise UsageError(f"unknown kind {kinds[0]!r}. {did_you_mean(kinds[0], KINDS)}")
    chosen = Namespace(
        file=file, output=output, tokenizer=tokenizer, base=base, encoder=encoder, accept_base=accept_base
    )
    _check_output(Path(output))

    from bindllm.convert.foreign import read_foreign

    state = read_foreign(file)
    kind = kinds[0] if kinds else find_kind(state, file)
    print(f"{file}: {kind}, {len(state):,} tensors")
    accounting, licence = _CONVERTERS[kind](state, chosen)
    print(
        f"{output}: {len(accounting.mapped):,} tensors converted, {len(accounting.dropped):,} dropped by rule, "
        f"{len(accounting.unknown):,} unknown; each is listed in {Path(output) / 'conversion.tsv'}"
    )
    print(f"license: {licence}")
    return 0


def find_kind(state: Mapping[str, Tensor], file: str) -> str:
    """Return which of `KINDS` a published file is.

    Raises:
        CheckpointError: none of them, or a file with two encoders of which neither is the main one.
    """
    from bindllm.convert.imagebind_llm import is_imagebind_llm
    from bindllm.convert.pointbind import find_variant

    if is_imagebind_llm(state):
        return "imagebind-llm"
    has_imagebind = any(name.startswith("modality_trunks.") for name in state)
    if find_variant(state) is not None:
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


def _check_output(output: Path) -> None:
    """Refuse a folder that cannot be written, before a large file is read.

    Raises:
        CheckpointError: it holds something, it is where the command runs, or it cannot be made.
    """
    if output.resolve() == Path.cwd():
        raise CheckpointError(
            f"--output {output} is the folder that this command runs in; name one inside it"
        )
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise CheckpointError(
            f"{output} exists and is not empty; nothing was written. Choose another folder or empty it"
        )
    there = next(place for place in output.absolute().parents if place.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        why = "not writable" if there.is_dir() else "a file"
        raise CheckpointError(f"{output} cannot be made: {there} is {why}; choose another place")


def _imagebind(state: Mapping[str, Tensor], chosen: Namespace) -> tuple[Accounting, str]:
    from bindllm.convert.imagebind import LICENCE, convert_imagebind
    from bindllm.convert.keymap import Rule
    from bindllm.quickstart.clip_vocabulary import write_tokenizer

    given = chosen.tokenizer or str(_TOKENIZER)
    has_texts = any(name.removeprefix("bind.").startswith("modality_trunks.text.") for name in state)
    file = Path(given) if has_texts and given != "none" else None
    if file is not None and not file.is_file():
        raise CheckpointError(
            f"the tokenizer {given} does not exist, and texts need it: run bindllm fetch clip-vocabulary here, or give "
            "the file with --tokenizer, or --tokenizer none to do without texts"
        )
    with tempfile.TemporaryDirectory() as scratch:
        if file is not None and file.suffix == ".gz":
            write_tokenizer(file, Path(scratch) / "tokenizer.json")
            file = Path(scratch) / "tokenizer.json"
        if file is not None:
            _check_tokenizer(file)
        rules = [Rule(_POINT_PARTS, None, "the point encoder: bindllm convert pointbind")]
        accounting = convert_imagebind(
            state, chosen.output, tokenizer_file=file, rules=rules, source=chosen.file
        )
    return accounting, LICENCE


def _check_tokenizer(file: Path) -> None:
    """Refuse a tokenizer that is not CLIP's: its ids would mean other words to the encoder.

    Raises:
        CheckpointError: it cannot be read, or its markers have other ids.
    """
    from tokenizers import Tokenizer

    from bindllm.quickstart.clip_vocabulary import tokenizer_tree

    try:
        tokenizer = Tokenizer.from_file(str(file))
    # The library raises Exception itself.
    except Exception as error:
        raise CheckpointError(
            f"{file} is not a tokenizer.json that can be read ({error}); bindllm fetch clip-vocabulary makes one"
        ) from error
    for marker in tokenizer_tree({})["added_tokens"]:
        if (found := tokenizer.token_to_id(marker["content"])) != marker["id"]:
            raise CheckpointError(
                f"{file} is not CLIP's tokenizer: {marker['content']} has the id {found}, expected {marker['id']}; "
                "bindllm fetch clip-vocabulary makes the right one"
            )


def _pointbind(state: Mapping[str, Tensor], chosen: Namespace) -> tuple[Accounting, str]:
    from bindllm.convert.pointbind import convert_pointbind, imagebind_part

    accounting = convert_pointbind(state, chosen.output, source=chosen.file)
    if imagebind_part(state):
        print(f"the ImageBind in it: bindllm convert imagebind {chosen.file} --output FOLDER")
    return accounting, _POINT_LICENCE


def _imagebind_llm(state: Mapping[str, Tensor], chosen: Namespace) -> tuple[Accounting, str]:
    if not chosen.base or not chosen.encoder:
        raise UsageError(
            "an ImageBind-LLM adapter is nothing without what it was trained on: give --base FOLDER, a Hugging "
            "Face copy of its LLaMA, and --encoder FOLDER, the converted ImageBind (and again for Point-Bind)"
        )
    from bindllm.convert.conversion import LICENCE, convert_imagebind_llm
    from bindllm.model.decoder import DecoderConfig

    done = convert_imagebind_llm(
        state,
        chosen.output,
        base=DecoderConfig(_as_path(chosen.base)),
        encoders=[_load_encoder(value) for value in chosen.encoder],
        accept_base=chosen.accept_base,
    )
    bridge = "the older bridge" if done.shape.legacy else "the bridge of the paper"
    print(f"{done.shape.phase} phase, {bridge}, {done.shape.served} of {done.shape.num_layers} layers served")
    return done.accounting, LICENCE


_ENCODERS = {"imagebind": "ImageBind", "pointbind": "PointBind"}
_CONVERTERS = {"imagebind": _imagebind, "pointbind": _pointbind, "imagebind-llm": _imagebind_llm}


def _load_encoder(value: str) -> Encoder:
    """Return the encoder of a converted folder, or of an import path."""
    from bindllm.model.checkpoint import build_object

    if Path(value).is_dir():
        config = _read_config(Path(value))
        name = _ENCODERS.get(str(config.get("model")))
        if name is None:
            raise CheckpointError(f"{value} is not a folder of bindllm convert imagebind or pointbind")
        arguments = {"weights": _as_path(value)}
        return build_object({"class_path": f"bindllm.encoders.{name}", "init_args": arguments})
    if "/" in value or "." not in value:
        raise CheckpointError(f"encoder folder {value!r} does not exist; bindllm convert imagebind makes one")
    return build_object({"class_path": value}, allow=[value])


def _as_path(value: str) -> str:
    """Return the name of a folder so that a checkpoint tells it from a setting, and finds it from anywhere."""
    return os.path.join(".", value) if Path(value).is_dir() and Path(value).name == value else value


def _read_config(folder: Path) -> dict[str, Any]:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return config if isinstance(config, dict) else {}
