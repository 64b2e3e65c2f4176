"""What ImageBind's text trunk sees of a text: 77 ids of CLIP's byte-pair vocabulary."""

from __future__ import annotations

import html
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from bindllm.encoders.imagebind.stems import CONTEXT
from bindllm.encoders.imagebind.vocabulary import END, START
from bindllm.errors import EncoderError, InputError, MissingExtraError

if TYPE_CHECKING:
    import tokenizers


class Tokenizer:
    """CLIP's tokenizer (https://arxiv.org/abs/2103.00020, section 2.4) with its cleaning of texts.

    Args:
        file: a ``tokenizer.json``, as `bindllm fetch clip-vocabulary` makes it; read at the first text.

    Example:
        >>> tokenizer = Tokenizer("checkpoints/clip-vocabulary/tokenizer.json")
    """

    def __init__(self, file: str | Path) -> None:
        self._file = Path(file)
        self._tokenizer: tokenizers.Tokenizer | None = None

    def encode(self, text: str) -> Tensor:
        """Return the ids of a text: start, text, end, then zeros.

        Of a text that is too long the first ids are kept and the end is put behind them: the trunk reads its
        embedding there. The empty text is start and end. A marker written in the text, ``<|endoftext|>``, is that
        marker, so the text ends there for the trunk.

        Returns:
            [77], int64.

        Raises:
            InputError: not a str, or a lone surrogate in it, which no encoding has.
            EncoderError: the file of the tokenizer is missing or damaged.
            MissingExtraError: ftfy is not installed.
        """
        ids = self.ids(text)
        if len(ids) > CONTEXT:
            ids = [*ids[: CONTEXT - 1], ids[-1]]
        return torch.tensor(ids + [0] * (CONTEXT - len(ids)))

    def ids(self, text: str) -> list[int]:
        """Return all ids of a text, start and end included, however many there are; errors as `encode`."""
        tokenizer = self._load()
        markers = {marker: tokenizer.token_to_id(marker) for marker in (START, END)}
        ids = [markers[START]]
        # Piece by piece, since a marker counts only where the splitting makes it a piece of its own.
        for piece, _ in tokenizer.pre_tokenizer.pre_tokenize_str(clean(text)):
            if piece in markers:
                ids.append(markers[piece])
            else:
                ids += [token.id for token in tokenizer.model.tokenize(piece)]
        return [*ids, markers[END]]

    def _load(self) -> tokenizers.Tokenizer:
        import tokenizers

        if self._tokenizer is None:
            if not self._file.is_file():
                raise EncoderError(
                    f"{self._file}: no tokenizer here. Fetch it with `bindllm fetch clip-vocabulary`, or name "
                    "another file"
                )
            try:
                tokenizer = tokenizers.Tokenizer.from_file(str(self._file))
            # The library raises Exception itself.
            except Exception as error:
                raise EncoderError(
                    f"{self._file}: not a tokenizer.json that can be read ({error})"
                ) from error
            if None in (tokenizer.token_to_id(START), tokenizer.token_to_id(END), tokenizer.pre_tokenizer):
                raise EncoderError(
                    f"{self._file}: not CLIP's vocabulary: it lacks {START}, {END} or the splitting"
                )
            self._tokenizer = tokenizer
        return self._tokenizer


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
            f"the text {text[:40]!r} holds a lone surrogate at character {error.start}, which is no character; decode "
            "the text with its right encoding"
        ) from error
    try:
        import ftfy
    except ImportError as error:
        raise MissingExtraError("ftfy", extra="text", purpose="clean texts as CLIP does") from error
    mended = html.unescape(html.unescape(ftfy.fix_text(text)))
    return " ".join(mended.split()).lower()
