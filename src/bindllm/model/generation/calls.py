"""Calls of tools in answers: the form in which a chat template writes them, grammars, and reading them from a text.

Nothing is run. A call is a text of the model.
"""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from bindllm.conversation import control_tokens
from bindllm.model.generation.constraint import json_rule

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# A call that no client asks for, to see how a template writes one.
_NAME, _ARGUMENTS = "bindllm_tool", {"bindllm_argument": "value"}


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


STRICT_JSON = json.JSONDecoder(parse_constant=_no_constant)
"""Reads JSON without NaN and Infinity, which Python's own decoder accepts."""


@dataclass(frozen=True)
class Call:
    """A call in an answer.

    Args:
        stop: the character of the text after the call.
    """

    name: str
    arguments: dict[str, Any]
    stop: int
    id: str = field(default_factory=lambda: f"call_{uuid.uuid4().hex[:24]}")


@dataclass(frozen=True)
class CallForm:
    """How a chat template writes a call: ``start {"name": ..., "arguments": ...} end``.

    Args:
        between: between two of them; empty: an answer has one call only.
        keys: the keys of the object for the name and for the arguments.
        pieces: the text of the object before, between, and after name and arguments.
        has_name_first: whether the arguments follow the name.
    """

    start: str
    between: str
    end: str
    keys: tuple[str, str]
    pieces: tuple[str, str, str]
    has_name_first: bool

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> CallForm | None:
        """Return the form of a tokenizer, read from a call that its chat template writes.

        Returns:
            None if the template takes no tools, or writes calls in another form.
        """
        text, pair = (_written(tokenizer, count) for count in (1, 2))
        found, values = [*_objects(text)], [_NAME + "0", _ARGUMENTS]
        if len(found) != 1 or [*found[0][2].values()] not in (values, values[::-1]):
            return None
        ((first, stop, value),) = found
        has_name_first = [*value.values()] == values
        # The two values inside the object, in their order.
        name = text.index(values[0], first), text.index(values[0], first) + len(values[0])
        inner = text.index("{", first + 1)
        marks = sorted((name, (inner, STRICT_JSON.raw_decode(text, inner)[1])))
        pieces = text[first : marks[0][0]], text[marks[0][1] : marks[1][0]], text[marks[1][1] : stop]
        spans = [(start, end) for start, end, _ in _objects(pair)]
        between = pair[spans[0][1] : spans[1][0]] if len(spans) == 2 else ""
        # A list of calls, or another mark between them, would need a form of its own.
        repeats = "".join(between.split()) == "".join((text[stop:] + text[:first]).split())
        keys = tuple(value) if has_name_first else tuple(value)[::-1]
        return cls(text[:first], between if repeats else "", text[stop:], keys, pieces, has_name_first)

    def grammar(
        self,
        functions: Sequence[Mapping[str, Any]],
        *,
        several: bool,
        required: bool,
        most: int | None = None,
    ) -> str:
        """Return the grammar of an answer that may or must call some functions.

        Args:
            several: whether it may have several calls, if the template can write them.
            required: whether it is a call; else it is any text, up to the mark of a call, if there is one.
            most: largest number of calls, without line breaks inside: a small model may repeat calls and white space
                until its answer is cut. None: any number, in the usual layouts.
        """
        mark, rules, heads = self.start.strip(), [], []
        # Without a mark, only the first keys of the object show that an answer will be a call.
        has_heads = not required and not mark
        layout = {} if most is None else {"space": " ?"}
        for number, function in enumerate(functions):
            schema = _arguments(function.get("parameters") or {"properties": {}})
            start, end = self.around(function["name"])
            heads.append(_spaced(start))
            start = f"/{heads[-1]}/" if has_heads else _literal(start)
            rules.append(f"call{number}: {start} {json_rule(schema, **layout)} {_literal(end)}")
        times = "*" if most is None else f"{{0,{most - 1}}}"
        again = f"({_literal(self.between)} call){times}" if several and most != 1 and self.between else ""
        calls = f"call {again} {_literal(self.end.rstrip())}"
        names = " | ".join(f"call{number}" for number in range(len(functions)))
        if required:
            start = [f"start: {_literal(self.start.lstrip())} {calls}"]
        elif mark:
            # A lazy text ends with its first mark, so all that follows has to be a call.
            rest = _literal(self.start.lstrip().removeprefix(mark))
            start = [
                f"start: ANY | marked {rest} {calls}",
                f"marked[lazy]: ANY {_literal(mark)}",
                "ANY: /(?s:.*)/",
            ]
        else:
            start = [f"start: OTHER | {calls}", f"OTHER: /(?s:.*)/ & ~/({'|'.join(heads)})(?s:.*)/"]
        return "\n".join((*start, f"call: {names}", *rules))

    def has_begun(self, text: str, names: Iterable[str]) -> bool:
        """Return whether a text has the beginning of a call, after which the grammar lets only a whole one follow."""
        if mark := self.start.strip():
            return mark in text
        return any(re.match(_spaced(self.around(name)[0]), text) for name in names)

    def around(self, name: str) -> tuple[str, str]:
        """Return the texts before and after the arguments of a call."""
        before, middle, after = self.pieces
        return (before + name + middle, after) if self.has_name_first else (before, middle + name + after)

    def read(self, text: str, at: int) -> Call | None:
        """Return the call that starts at a character of a text, after white space, or None."""
        start, end = self.start.strip(), self.end.strip()
        at = _skip(text, at)
        if not text.startswith(start, at):
            return None
        try:
            value, at = STRICT_JSON.raw_decode(text, _skip(text, at + len(start)))
        except (ValueError, RecursionError):
            return None
        stop = _skip(text, at)
        # The end is missing if the model has ended the answer right after the object.
        if (
            not isinstance(value, dict)
            # In the order of the template, which the grammar waits for.
            or tuple(value) != self.keys[:: 1 if self.has_name_first else -1]
            or (text[stop:] and not text.startswith(end, stop))
        ):
            return None
        name, arguments = (value[key] for key in self.keys)
        if not isinstance(name, str) or not isinstance(arguments, dict):
            return None
        return Call(name, arguments, min(stop + len(end), len(text)))


def _written(tokenizer: PreTrainedTokenizerBase, count: int) -> str:
    """Return how a chat template writes an answer of some calls, up to its first control token; empty: it does not."""
    # jinja2 comes with every tokenizer that has a template.
    from jinja2 import TemplateError

    calls = [
        {
            "id": f"call{n:05}",
            "type": "function",
            "function": {"name": f"{_NAME}{n}", "arguments": _ARGUMENTS},
        }
        for n in range(count)
    ]
    question = {"role": "user", "content": "?"}
    answer = {"role": "assistant", "content": "", "tool_calls": calls}
    function = {"name": "other", "description": "none", "parameters": {"type": "object", "properties": {}}}
    apply = partial(
        tokenizer.apply_chat_template, tools=[{"type": "function", "function": function}], tokenize=False
    )
    try:
        text = apply([question, answer])
        # A header may end in an empty thought.
        headers = [
            apply([question], add_generation_prompt=True, enable_thinking=thinks) for thinks in (False, True)
        ]
    except (TemplateError, TypeError):
        return ""
    text = next((text[len(header) :] for header in headers if text.startswith(header)), "")
    ends = [at for token in control_tokens(tokenizer) if (at := text.find(token)) >= 0]
    return text[: min(ends, default=len(text))].strip()


def _objects(text: str) -> Iterator[tuple[int, int, dict[str, Any]]]:
    """Yield first character, end, and value of each JSON object in a text."""
    at = text.find("{")
    while at >= 0:
        try:
            value, stop = STRICT_JSON.raw_decode(text, at)
            yield at, stop, value
        except ValueError:
            stop = at + 1
        at = text.find("{", stop)


def _arguments(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Return the schema of the arguments of a function: those of its properties, and no others unless it says so.

    In JSON Schema any other property may follow, and a small model would invent them until its answer is cut.
    """
    # The parts of a schema may have further properties, which the whole does not list.
    is_list = "properties" in parameters and not {"$ref", "allOf", "anyOf", "oneOf", "if"} & {*parameters}
    return {"type": "object", **({"additionalProperties": False} if is_list else {}), **parameters}


def _spaced(text: str) -> str:
    """Return a regular expression of the beginning of a JSON object, with any white space between its signs."""
    return r"\s*".join(("", *map(re.escape, re.findall(r'[{}:,]|"[^"]*"', text)), ""))


def _literal(text: str) -> str:
    return json.dumps(text, ensure_ascii=False) if text else ""


def _skip(text: str, at: int) -> int:
    """Return the position after white space."""
    return len(text) - len(text[at:].lstrip())
