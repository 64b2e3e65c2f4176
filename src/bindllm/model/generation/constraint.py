"""Answers that follow a grammar, such as a JSON schema: which tokens may come next.

llguidance compiles the grammar and tracks the answer: https://github.com/guidance-ai/llguidance
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from bindllm.conversation import control_tokens
from bindllm.errors import InputError, needs_extra, printable
from bindllm.model.bindllm import BindLLM

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer
    from transformers import PreTrainedTokenizerBase

# A small model may write spaces until its answer is cut, so only those of the usual layouts are allowed.
_SPACE = r"( |\n[ \t]{0,24})"
# These would let parts of a schema be ignored; a schema cannot set them, since they come last.
_OPTIONS = {
    "lenient": False,
    "coerce_one_of": False,
}
# A schema of this size takes up to a second to compile, and the time grows with the square of the size.
MOST_CHARACTERS = 65_536
_MOST_SHOWN = 300


def json_rule(schema: Mapping[str, Any], *, space: str = _SPACE) -> str:
    """Return the part of a grammar that is a JSON value of a schema, with white space by a regular expression."""
    return "%json " + json.dumps({**schema, "x-guidance": {"whitespace_pattern": space, **_OPTIONS}})


def json_grammar(schema: Mapping[str, Any]) -> str:
    """Return the grammar of a JSON value of a schema."""
    return f"start: {json_rule(schema)}"


class Constraint:
    """The tokens that may follow in one answer.

    Attributes:
        error: why the answer cannot be continued; empty if it can.
    """

    def __init__(self, matcher: LLMatcher) -> None:
        self._matcher = matcher
        self.error = ""

    @property
    def is_complete(self) -> bool:
        """Whether the answer is complete, and no text may follow."""
        return self._matcher.is_stopped() and not self._matcher.is_error()

    def copy(self) -> Constraint:
        """Return a constraint at the same place, for another answer."""
        return Constraint(self._matcher.deep_copy())

    def allowed(self, size: int) -> Tensor:
        """Return whether each of ``size`` tokens may follow, [V]; all of them after an error."""
        bits = np.unpackbits(np.frombuffer(self._matcher.compute_bitmask(), np.uint8), bitorder="little")
        # Decoders have rows for tokens that their tokenizer lacks, and rarely the other way round.
        found = torch.zeros(size, dtype=torch.bool)
        found[: len(bits)] = torch.from_numpy(bits[:size]).bool()
        # After an error only the end tokens are left, and the answer would look complete.
        if self._matcher.is_error() or not found.any():
            self.error = _reason(self._matcher.get_error()) or "no token can follow"
            found[:] = True
        return found

    def take(self, token: int) -> None:
        """Add a token to the answer."""
        self._matcher.consume_token(token)


class Grammars:
    """Compiles grammars for the tokens of a model."""

    def __init__(self, model: BindLLM) -> None:
        self._model, self._lock, self._tokenizer = model, threading.Lock(), None

    def compile(self, grammar: str) -> Constraint:
        """Return the constraint of a grammar.

        Raises:
            InputError: the grammar is too long, or cannot be followed; the message names the unsupported part.
            MissingExtraError: llguidance is not installed.
        """
        if len(grammar) > MOST_CHARACTERS:
            raise InputError(
                f"the schema has {len(grammar):,} characters, at most {MOST_CHARACTERS:,} are read"
            )
        with needs_extra("llguidance", extra="serve", purpose="answer in a JSON schema"):
            from llguidance import LLMatcher
        grammar = LLMatcher.grammar_from_lark(grammar)
        if error := LLMatcher.validate_grammar(grammar):
            raise InputError(f"the answer cannot follow its schema: {_reason(error)}")
        found = Constraint(LLMatcher(self._tokens(), grammar, log_level=0))
        # Some faults show first here, such as a schema that nothing satisfies.
        found.allowed(len(self._model.tokenizer))
        if found.error:
            raise InputError(f"no answer can follow the schema: {found.error}")
        return found

    def _tokens(self) -> LLTokenizer:
        """Return the tokenizer in the form of llguidance, made once: that takes a second."""
        from llguidance.hf import from_tokenizer

        with self._lock:
            if self._tokenizer is None:
                ends = list(self._model.settings.eos_token_id)
                found = from_tokenizer(self._model.tokenizer, eos_token=ends)
                self._tokenizer = _with_added_texts(found, self._model.tokenizer, ends)
        return self._tokenizer


class _Tokens:
    """Tokens for llguidance, of which only control tokens are no text."""

    def __init__(self, tokens: LLTokenizer, control: set[int], end: int) -> None:
        self.tokens = [tokens.decode_bytes([token]) for token in range(tokens.vocab_size)]
        self.special_token_ids, self.eos_token_id, self.bos_token_id = sorted(control), end, None
        self._split = tokens.tokenize_bytes

    def __call__(self, text: bytes) -> list[int]:
        return self._split(text)


def _with_added_texts(
    tokens: LLTokenizer, tokenizer: PreTrainedTokenizerBase, ends: list[int]
) -> LLTokenizer:
    """Return the tokens of a tokenizer, with those that are added texts as texts.

    llguidance takes every added token in angle brackets for a control token, which no text spells. Qwen writes the mark
    of a call as one such token: without it, the model would have to spell the mark in letters, which it never saw.
    """
    from llguidance import LLTokenizer, TokenizerWrapper

    control = {*control_tokens(tokenizer).values(), *ends}
    if not any(map(tokens.is_special_token, tokenizer.added_tokens_decoder.keys() - control)):
        return tokens
    return LLTokenizer(TokenizerWrapper(_Tokens(tokens, control, ends[0])), eos_token=ends)


def _reason(error: str) -> str:
    """Return an error of llguidance without its place in the grammar, and without the state of the parser."""
    error = re.sub(r"^at \d+\(\d+\): (failed to compile JSON schema: )?", "", error.strip())
    error = re.split(r"\n *\d+ \| |\n<state>", error)[0]
    return printable(" ".join(error.split()))[:_MOST_SHOWN]
