"""Text input of ImageBind: 77 ids of CLIP's byte-pair vocabulary (https://arxiv.org/abs/2103.00020, section 2.4)."""

from __future__ import annotations

import gzip
import hashlib
import html
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bindllm.encoders import once
from bindllm.encoders.imagebind.network import CONTEXT
from bindllm.errors import AssetError, EncoderError, InputError, needs_extra
from bindllm.media.limits import warn

if TYPE_CHECKING:
    import tokenizers


SHA256 = "924691ac288e54409236115652ad4aa250f48203de50a9e4722a6ecd48d6804a"
"""Digest of the packed list of merges."""

START, END = "<|startoftext|>", "<|endoftext|>"

NUM_MERGES = 48894
"""Number of merges that CLIP uses; the published file contains more."""

# Their ids differ between vocabularies, so they identify one: two symbols for each of 256 bytes come before the merges.
_MARKERS = {START: 512 + NUM_MERGES, END: 513 + NUM_MERGES}
_WORD_END = "</w>"
# Tried in this order at every position: a marker, an English suffix, letters, one digit, a run of anything else.
_PIECES = r"(?i:<[|]startoftext[|]>|<[|]endoftext[|]>|'s|'t|'re|'ve|'m|'ll|'d)|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"


def write_tokenizer(packed: bytes, file: Path) -> None:
    """Write a ``tokenizer.json`` from the packed list of merges as OpenAI and OpenCLIP publish it.

    Args:
        packed: content of their ``bpe_simple_vocab_16e6.txt.gz``.

    Raises:
        AssetError: the list has another digest than `SHA256`.
    """
    found = hashlib.sha256(packed).hexdigest()
    if found != SHA256:
        raise AssetError(
            f"CLIP's list of merges has sha256 {found}, expected {SHA256}; fetch the package again"
        )
    lines = gzip.GzipFile(fileobj=io.BytesIO(packed)).read().decode("utf-8").split("\n")
    # The first line names the version; the file contains more merges than CLIP uses.
    pairs = (tuple(line.split()) for line in lines[1 : 1 + NUM_MERGES])
    tree = tokenizer_tree(dict(enumerate(pairs)))
    file.write_text(json.dumps(tree, ensure_ascii=False, indent=0) + "\n", encoding="utf-8")


def tokenizer_tree(merges: Mapping[int, tuple[str, str]]) -> dict[str, Any]:
    """Return the content of a ``tokenizer.json``.

    Args:
        merges: the pairs of symbols to join, by rank; ranks may be missing, ids follow from the rank.
    """
    symbols = _symbols()
    # Ids as published: bytes, bytes at the end of a word, merges by rank, then the two markers.
    vocabulary = {symbol: number for number, symbol in enumerate(symbols)}
    vocabulary |= {symbol + _WORD_END: number + len(symbols) for number, symbol in enumerate(symbols)}
    vocabulary |= {left + right: 2 * len(symbols) + rank for rank, (left, right) in sorted(merges.items())}
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": number, "content": marker, **plain} for marker, number in _MARKERS.items()],
        "normalizer": None,
        # Pieces first, then bytes: merges never cross the border of a piece.
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
            "vocab": vocabulary | _MARKERS,
            "merges": [list(pair) for _, pair in sorted(merges.items())],
        },
    }


def _symbols() -> list[str]:
    """Return one printable character for every byte, in the order of the vocabulary."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return [chr(byte) for byte in printable] + [chr(256 + number) for number in range(256 - len(printable))]


class Tokenizer:
    """CLIP's tokenizer (https://arxiv.org/abs/2103.00020, section 2.4) with its cleaning of texts.

    Args:
        file: a ``tokenizer.json``, as `bindllm fetch clip-vocabulary` makes it; read at the first text.

    Examples:
        >>> tokenizer = Tokenizer("checkpoints/clip-vocabulary/tokenizer.json")
    """

    def __init__(self, file: str | Path) -> None:
        self._file = Path(file)

    def encode(self, text: str, *, name: str = "a text") -> Tensor:
        """Return the ids of a text: start, text, end, then zeros.

        Of a text that is too long the first ids are kept and the end id follows them: the trunk reads its
        embedding there. A warning with ``name`` says so. The empty text is start and end. A marker written in the
        text, ``<|endoftext|>``, is that marker, so the text ends there for the trunk.

        Returns:
            [77], int64.

        Raises:
            InputError: not a str, or a lone surrogate in it, which no encoding has.
            EncoderError: the file of the tokenizer is missing or damaged.
            MissingExtraError: ftfy is not installed.
        """
        ids = self.ids(text)
        if len(ids) > CONTEXT:
            warn(
                name, f"{len(ids):,} tokens; the encoder reads the first {CONTEXT - 1} of a text", kind="text"
            )
            # The tokenizers inside Point-Bind and ImageBind-LLM drop the end id, and the trunk reads another vector.
            ids = [*ids[: CONTEXT - 1], ids[-1]]
        return torch.tensor(ids + [0] * (CONTEXT - len(ids)))

    def ids(self, text: str) -> list[int]:
        """Return all ids of a text, start and end included, however many there are; errors as `encode`."""
        tokenizer, ids = self._tokenizer, [_MARKERS[START]]
        # Piece by piece, since a marker counts only if the splitting makes it a piece of its own.
        for piece, _ in tokenizer.pre_tokenizer.pre_tokenize_str(clean(text)):
            if piece in _MARKERS:
                ids.append(_MARKERS[piece])
            else:
                ids += [token.id for token in tokenizer.model.tokenize(piece)]
        return [*ids, _MARKERS[END]]

    def check(self) -> None:
        """Raise an `EncoderError` if the file is missing, damaged or another vocabulary."""
        _ = self._tokenizer

    @once
    def _tokenizer(self) -> tokenizers.Tokenizer:
        import tokenizers

        if not self._file.is_file():
            raise EncoderError(
                f"{self._file}: no tokenizer here. Fetch it with `bindllm fetch clip-vocabulary`, or name another file"
            )
        try:
            tokenizer = tokenizers.Tokenizer.from_file(str(self._file))
        # The library raises Exception itself.
        except Exception as error:
            raise EncoderError(f"{self._file}: not a tokenizer.json that can be read ({error})") from error
        found = {marker: tokenizer.token_to_id(marker) for marker in _MARKERS}
        if found != _MARKERS or tokenizer.pre_tokenizer is None:
            raise EncoderError(
                f"{self._file}: not CLIP's vocabulary: the ids of its markers are {found}, expected {_MARKERS}, with a "
                "pre_tokenizer; `bindllm fetch clip-vocabulary` makes the right one"
            )
        return tokenizer


def clean(text: str) -> str:
    """Return a text as CLIP cleans it: mended by ftfy, HTML entities read twice, single spaces, lower case.

    Raises:
        InputError: not a str, or a lone surrogate in it.
        MissingExtraError: ftfy is not installed.
    """
    if not isinstance(text, str):
        raise InputError(f"a text must be str, not {type(text).__name__}")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(
            f"the text {text[:40]!r} holds a lone surrogate at character {error.start}, which is not a character; "
            "decode the text with its right encoding"
        ) from error
    with needs_extra("ftfy", extra="text", purpose="clean texts as CLIP does"):
        import ftfy
    # Twice, as published: web texts often have entities of entities.
    mended = html.unescape(html.unescape(ftfy.fix_text(text)))
    return " ".join(mended.split()).lower()
