"""Convert one published file, of whichever kind it is."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from bindllm.convert import KINDS, TOKENIZER, imagebind, imagebind_llm, pointbind
from bindllm.convert.foreign import read_foreign
from bindllm.convert.keymap import REPORT, ConversionReport, Rule
from bindllm.encoders import Encoder
from bindllm.encoders.imagebind.text import Tokenizer, write_tokenizer
from bindllm.errors import CheckpointError, UsageError
from bindllm.model.decoder import DecoderConfig

# Tensors of Point-Bind in a file from which only the ImageBind is converted.
_POINT_PARTS = (
    r"logit_scale|pc_projection|point_(?:encoder|trunk)[.].*|bind[.]modality_(?:head|postprocessor)_point[.].*"
    r"|modality_(?:heads|postprocessors)[.]point[.].*"
)


def convert_published(
    file: str,
    output: str,
    *,
    kind: str | None = None,
    tokenizer: str | None = None,
    base: str | None = None,
    encoders: Sequence[Encoder] = (),
    accept_base: bool = False,
) -> None:
    """Convert a published file into a folder of ours, and print the outcome.

    Args:
        output: a folder that does not exist yet, or is empty.
        kind: one of `KINDS`; None: found from the names of the tensors.
        tokenizer: for imagebind: CLIP's ``tokenizer.json`` or its packed list of merges (``.gz``); "none" to convert
            without texts; None: `TOKENIZER`.
        base: for imagebind-llm: Hugging Face folder of the LLaMA that the adapter was trained on.
        encoders: for imagebind-llm: the encoders that the adapter was trained with.
        accept_base: for imagebind-llm: convert although the base's weights differ from those in training.

    Raises:
        CheckpointError: the file cannot be read or converted, or the folder cannot be written.
        UsageError: an ImageBind-LLM adapter without a base or an encoder, or an option of another kind.
    """
    folder = Path(output)
    check_output(folder)
    # The tensors stay on the disk, so finding the kind is cheap.
    state = read_foreign(file)
    kind = kind or find_kind(state, file)
    adapter = {"base": base, "encoder": encoders, "accept_base": accept_base}
    for owner, given in (("imagebind", {"tokenizer": tokenizer}), ("imagebind-llm", adapter)):
        if kind != owner and (names := [f"--{name}" for name, value in given.items() if value]):
            raise UsageError(f"{names[0]} is for {owner}, and {file} is {kind}; leave it out")
    print(f"{file}: {kind}, {len(state):,} tensors")
    if kind == "imagebind":
        report, license = _convert_imagebind(state, file, folder, tokenizer), imagebind.LICENSE
    elif kind == "pointbind":
        report, license = pointbind.convert_pointbind(state, folder, source=file), pointbind.LICENSE
        if pointbind.imagebind_part(state):
            print(f"it also holds an ImageBind: bindllm convert imagebind {file} --output FOLDER")
    else:
        if not base or not encoders:
            raise UsageError(
                "an ImageBind-LLM adapter needs the models that it was trained on: give --base FOLDER, a Hugging Face "
                "copy of its LLaMA, and --encoder FOLDER, the converted ImageBind (and again for Point-Bind)"
            )
        decoder = DecoderConfig(as_path(base))
        adapted = imagebind_llm.convert_imagebind_llm(
            state, folder, base=decoder, encoders=encoders, accept_base=accept_base
        )
        report, license, shape = adapted.report, imagebind_llm.LICENSE, adapted.shape
        bridge = "the older bridge" if shape.legacy else "the bridge of the paper"
        print(f"{shape.phase} phase, {bridge}, {shape.served} of {shape.num_layers} layers served")
    print(
        f"{folder}: {len(report.mapped):,} tensors converted, {len(report.dropped):,} dropped by rule, "
        f"{len(report.unknown):,} unknown; each is listed in {folder / REPORT}"
    )
    print(f"license: {license}")


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
            # The ids of another tokenizer would mean other words to the encoder.
            Tokenizer(file).check()
        rules = [Rule(_POINT_PARTS, None, "the point encoder: bindllm convert pointbind")]
        return imagebind.convert_imagebind(state, folder, tokenizer_file=file, rules=rules, source=source)


def as_path(value: str) -> str:
    """Return a folder's name as a path, so that a checkpoint can tell it from a setting and find it from anywhere."""
    return os.path.join(".", value) if Path(value).is_dir() and Path(value).name == value else value
