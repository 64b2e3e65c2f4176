"""The tokens of a rendered conversation: none of them crosses a boundary between messages."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable
from itertools import pairwise
from typing import TYPE_CHECKING

from bindllm.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# How tokens of SentencePiece and of byte-level tokenizers write a leading space.
_SPACES = "\u2581\u0120"


def tokenize(
    tokenizer: PreTrainedTokenizerBase, text: str, boundaries: Iterable[int | None]
) -> tuple[list[int], list[int]]:
    """Return the ids of a text and the first character of each; no token crosses a boundary."""
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
    starts = _token_starts(offsets)
    # The last token that starts before a boundary is the only one that can cross it.
    before = {position: bisect_left(starts, position) - 1 for position in boundaries if position is not None}
    crossed = sorted(p for p, token in before.items() if token >= 0 and offsets[token][1] > p)
    if crossed:
        ids, starts = [], []
        for start, stop in pairwise([0, *crossed, len(text)]):
            found, offsets = _continuation(tokenizer, text[start:stop], at_start=start == 0)
            ids += found
            # Piece by piece: offsets may exclude the space that a header ends in.
            starts += [start + first for first in _token_starts(offsets)]
    return ids, starts


def _continuation(
    tokenizer: PreTrainedTokenizerBase, text: str, *, at_start: bool
) -> tuple[list[int], list[tuple[int, int]]]:
    """Return the ids and offsets of a text that follows another one, or starts the input.

    Raises:
        InputError: the tokenizer puts a space before every piece of text.
    """
    # Some tokenizers put a space before a text; most of them not after a control token.
    leads = [t.content for t in tokenizer.added_tokens_decoder.values() if t.special and not t.rstrip]
    for lead in ("", *leads[:1]):
        encoded = tokenizer(lead + text, add_special_tokens=False, return_offsets_mapping=True)
        skip = len(lead) > 0
        ids, offsets = encoded["input_ids"][skip:], encoded["offset_mapping"][skip:]
        added = tokenizer.convert_ids_to_tokens(ids[0])[0] in _SPACES and not text[0].isspace()
        if at_start or not added:
            return ids, [(first - len(lead), last - len(lead)) for first, last in offsets]
    raise InputError(
        f"the tokenizer {tokenizer.name_or_path!r} joins the header of an answer with the first characters of the "
        f"answer ({text[:10]!r}), and cannot write them apart; use a chat template whose headers do not end in a space"
    )


def _token_starts(offsets: list[tuple[int, int]]) -> list[int]:
    """Return the first character of each token, never decreasing.

    Byte-level tokenizers exclude a leading space from a token's offsets; it still belongs to the token, so a token
    starts no later than the previous one ends. The tokens of one multi-byte character share its start.
    """
    starts, end = [], 0
    for start, stop in offsets:
        starts.append(max(min(start, end), starts[-1] if starts else 0))
        end = max(end, stop)
    return starts
