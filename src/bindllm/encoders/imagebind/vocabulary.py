"""The byte-pair vocabulary of CLIP (https://arxiv.org/abs/2103.00020, section 2.4) as a ``tokenizer.json``."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bindllm.errors import AssetError

SHA256 = "924691ac288e54409236115652ad4aa250f48203de50a9e4722a6ecd48d6804a"
"""Digest of the packed list of merges."""

START, END = "<|startoftext|>", "<|endoftext|>"

NUM_MERGES = 48894
"""Merges of the list that CLIP uses; the published file goes on after them."""

_WORD_END = "</w>"
# Tried in this order at every place: a marker, an English suffix, letters, one digit, a run of anything else.
_PIECES = r"(?i:<[|]startoftext[|]>|<[|]endoftext[|]>|'s|'t|'re|'ve|'m|'ll|'d)|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"


def write_tokenizer(packed: bytes, file: Path) -> None:
    """Write a ``tokenizer.json`` from the packed list of merges as OpenAI and OpenCLIP publish it.

    Args:
        packed: content of their ``bpe_simple_vocab_16e6.txt.gz``.
        file: the file to write.

    Raises:
        AssetError: the list has another digest than `SHA256`.
    """
    found = hashlib.sha256(packed).hexdigest()
    if found != SHA256:
        raise AssetError(
            f"CLIP's list of merges has sha256 {found}, expected {SHA256}; fetch the package again"
        )
    lines = gzip.GzipFile(fileobj=io.BytesIO(packed)).read().decode("utf-8").split("\n")
    # The first line names the version; the file goes on after the merges that CLIP uses.
    pairs = (tuple(line.split()) for line in lines[1 : 1 + NUM_MERGES])
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
    markers = {START: 2 * len(symbols) + NUM_MERGES, END: 2 * len(symbols) + NUM_MERGES + 1}
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
