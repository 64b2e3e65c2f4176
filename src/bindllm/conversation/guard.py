"""Texts from outside cannot open or close messages: control tokens in them are refused or escaped."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from bindllm.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Invisible and without width: a text with it looks unchanged but spells no control token.
WORD_JOINER = "\u2060"


def guard(value: Any, control: dict[str, int], *, escape: bool) -> Any:
    """Keep the texts in a value of JSON from opening or closing messages."""
    if isinstance(value, Mapping):
        pairs = (guard(pair, control, escape=escape) for pair in value.items())
        return dict(pairs)
    if isinstance(value, list | tuple):
        return [guard(one, control, escape=escape) for one in value]
    if not isinstance(value, str):
        return value
    for token in control:
        while token in value:
            # A token of one character cannot be taken apart.
            if not escape or len(token) == 1:
                raise InputError(
                    f"a message spells the control token {token!r} of the decoder; remove it"
                    + (", or render it with control_text='escape'" if len(token) > 1 else "")
                )
            # Inside the token, so that the tokenizer does not recognize it.
            value = value.replace(token, token[0] + WORD_JOINER + token[1:])
    return value


def in_nfc(value: Any) -> Any:
    """Return a value of JSON whose texts are in Unicode form NFC."""
    if isinstance(value, Mapping):
        return {key: in_nfc(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [in_nfc(one) for one in value]
    return unicodedata.normalize("NFC", value) if isinstance(value, str) else value


def strings(value: Any) -> Iterator[str]:
    """Yield all texts in a value of JSON."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for one in (*value.keys(), *value.values()) if isinstance(value, dict) else value:
            yield from strings(one)


def check_texts(texts: Iterable[str], tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse texts that are no Unicode, or spell a control token in other characters, such as full-width ones."""
    # Only some tokenizers look control tokens up in the normalized text.
    tokens = tokenizer.added_tokens_decoder
    normalized = {i for i, token in tokens.items() if token.special and token.normalized}
    for text in texts:
        check_unicode(text)
        if not normalized:
            continue
        if spelled := normalized.intersection(tokenizer(text, add_special_tokens=False)["input_ids"]):
            raise InputError(
                f"a message spells the control token {tokens[min(spelled)].content!r} of the decoder in other "
                "characters; remove it"
            )


def check_unicode(text: str) -> None:
    """Refuse a text that is not valid Unicode."""
    # Python's texts may hold half of a surrogate pair, UTF-8 cannot.
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"the text {text!r} is not valid Unicode (half of a surrogate pair)") from error
