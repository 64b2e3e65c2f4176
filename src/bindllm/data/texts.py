"""Texts of rows: which have anything to see in them, and captions put into one form."""

from __future__ import annotations

import unicodedata

_BYTE_ORDER_MARK = "\ufeff"


def clean_caption(text: str) -> tuple[str, bool]:
    """Return a caption in Unicode form NFC, on one line, without control characters, and whether it had any.

    Joiners stay: emoji sequences and several scripts are spelled with them.

    Example:
        >>> clean_caption(" a red  square ")
        ('a red square', False)
    """
    kept = "".join(letter for letter in text if letter.isspace() or not _is_control(letter))
    words = " ".join(unicodedata.normalize("NFC", kept).split())
    return words, len(kept) < len(text)


def is_visible(text: str) -> bool:
    r"""Tell whether there is anything to see in a text.

    Example:
        >>> is_visible(" \u200b"), is_visible(".")
        (False, True)
    """
    return any(not letter.isspace() and unicodedata.category(letter) not in ("Cf", "Cc") for letter in text)


def _is_control(letter: str) -> bool:
    return letter == _BYTE_ORDER_MARK or unicodedata.category(letter) in ("Cc", "Cs")
