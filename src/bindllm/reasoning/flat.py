"""Calls of tools with flat schemas, without llguidance: only tokens follow that continue a regular expression.

The package ``regex``, which transformers needs, matches the beginning of a text. Arguments are texts, numbers, truth
values, options, and lists of them. A call is checked by its whole schema afterwards, so a bound that is not in the
expression, such as a largest number, costs a repair and never a wrong call.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import regex
import torch
from torch import Tensor
from transformers import LogitsProcessor, PreTrainedTokenizerBase

from bindllm.errors import InputError
from bindllm.model.generation.calls import CallForm

# With sampling, so many of the most likely tokens are tried.
_TRIED = 64
_MOST_ITEMS = 16
_WHOLE_NUMBER = r"-?(?:0|[1-9][0-9]{0,14})"
_VALUES = {
    "string": r'"(?:[^"\\\x00-\x1f]|\\["\\/bfnrt])*"',
    "integer": _WHOLE_NUMBER,
    "number": rf"{_WHOLE_NUMBER}(?:\.[0-9]{{1,15}})?",
    "boolean": "true|false",
    "null": "null",
}
# Patterns that mean the same in a JSON text: those of handles and references.
_PLAIN = regex.compile(r"\^[\w()|\[\]{},-]*\$")


def calls_pattern(
    form: CallForm, functions: Sequence[Mapping[str, Any]], *, required: bool, most: int
) -> str:
    """Return the regular expression of an answer that may or must call some functions, as `CallForm.grammar`.

    Raises:
        InputError: a schema that is not flat.
    """
    rules = []
    for function in functions:
        before, after = map(regex.escape, form.around(function["name"]))
        rules.append(before + _object(function["name"], function["parameters"]) + after)
    call = f"(?:{'|'.join(rules)})"
    again = f"(?:{regex.escape(form.between)}{call}){{0,{most - 1}}}" if form.between else ""
    calls = f"{regex.escape(form.start.lstrip())}{call}{again}{regex.escape(form.end.rstrip())}"
    if required:
        return calls
    if mark := regex.escape(form.start.strip()):
        return f"(?:(?!{mark}).)*(?:{calls})?"
    # Without a mark, an answer that starts with a brace is a call.
    return rf"(?!\s*\{{).*|{calls}"


def _object(name: str, schema: Mapping[str, Any]) -> str:
    """Return the expression of an object: required members first, each of the others at most once."""
    members = {
        key: f"{regex.escape(json.dumps(key))}: {_value(name, one)}"
        for key, one in schema.get("properties", {}).items()
    }
    required = [members.pop(key) for key in [*members] if key in schema.get("required", ())]
    optional = [*members.values()]
    tails = ["".join(f"(?:, {one})?" for one in optional[first:]) for first in range(len(optional) + 1)]
    if required:
        return rf"\{{{', '.join(required)}{tails[0]}\}}"
    starts = "|".join(one + tail for one, tail in zip(optional, tails[1:], strict=True))
    return rf"\{{(?:{starts})?\}}"


def _value(name: str, schema: Any) -> str:
    """Return the expression of a value."""
    if not isinstance(schema, Mapping):
        schema = {}
    if "enum" in schema:
        return f"(?:{'|'.join(regex.escape(json.dumps(one)) for one in schema['enum'])})"
    if "anyOf" in schema:
        return f"(?:{'|'.join(_value(name, one) for one in schema['anyOf'])})"
    kinds = schema.get("type")
    kinds = kinds if isinstance(kinds, list) else [kinds]
    if kinds == ["array"]:
        item = _value(name, schema.get("items"))
        return rf"\[(?:{item}(?:, {item}){{0,{_MOST_ITEMS - 1}}})?\]"
    if kinds == ["string"] and _PLAIN.fullmatch(schema.get("pattern", "")):
        return f'"{schema["pattern"][1:-1]}"'
    if not all(kind in _VALUES for kind in kinds):
        raise InputError(
            f"the tool {name} has a parameter that is not a text, number, truth value, option or list of them; install "
            "llguidance for its calls (pip install 'bindllm[solve]')"
        )
    return f"(?:{'|'.join(_VALUES[kind] for kind in kinds)})"


class FlatMasker(LogitsProcessor):
    """Lets only tokens follow that continue a regular expression, in an answer of one row.

    Args:
        is_done: whether an answer [A] should end, if it may.
    """

    def __init__(
        self,
        pattern: str,
        tokenizer: PreTrainedTokenizerBase,
        width: int,
        ends: Sequence[int],
        is_done: Callable[[Tensor], bool],
    ) -> None:
        self._pattern, self._tokenizer = regex.compile(pattern, regex.DOTALL), tokenizer
        self._width, self._ends, self._is_done = width, list(ends), is_done

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return scores [1, V], minus infinity for tokens that may not follow ids [1, T]."""
        ids = input_ids[0, self._width :]
        text, kept = self._text(ids.tolist()), []
        may_end = self._pattern.fullmatch(text) is not None
        if may_end and self._is_done(ids):
            kept = self._ends
        else:
            # The most likely tokens are tried, not all of the vocabulary: nearly always one of them may follow.
            for number, token in enumerate(scores[0].argsort(descending=True).tolist()):
                if number >= _TRIED and kept:
                    break
                if may_end if token in self._ends else self._follows(text, [*ids.tolist(), token]):
                    kept.append(token)
        # If no token of the vocabulary may follow, the answer ends, and the check of its calls reports it.
        kept = kept or self._ends
        masked = torch.full_like(scores, -torch.inf)
        masked[0, kept] = scores[0, kept]
        return masked

    def _follows(self, text: str, ids: list[int]) -> bool:
        longer = self._text(ids)
        # Control tokens add no text.
        return longer != text and self._pattern.fullmatch(longer, partial=True) is not None

    def _text(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
