"""Answers that follow a grammar, such as a JSON schema: which tokens may come next.

llguidance compiles the grammar and tracks the answer: https://github.com/guidance-ai/llguidance
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from bindllm.errors import InputError, needs_extra, printable
from bindllm.model.bindllm import BindLLM

if TYPE_CHECKING:
    from llguidance import LLMatcher

ANY_OBJECT = '{"type": "object"}'
"""The schema of any JSON object."""

# White space between the tokens of JSON, bounded: else a model may write spaces until its answer is cut.
_WHITE_SPACE = r"[ \t\n]{1,32}"
_MOST_SHOWN = 300


class Constraint:
    """The tokens that may follow in one answer.

    Args:
        matcher: of llguidance, at the beginning of the answer.

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
            self.error = _first_line(self._matcher.get_error()) or "no token can follow"
            found[:] = True
        return found

    def take(self, token: int) -> None:
        """Add a token to the answer."""
        self._matcher.consume_token(token)


class Grammars:
    """Compiles grammars for the tokens of a model.

    Args:
        model: its tokenizer and its end tokens count.
    """

    def __init__(self, model: BindLLM) -> None:
        self._model, self._lock, self._tokenizer = model, threading.Lock(), None

    def compile(self, schema: str) -> Constraint:
        """Return the constraint of a JSON schema.

        Raises:
            InputError: the schema cannot be followed; the message names the part that is not supported.
            MissingExtraError: llguidance is not installed.
        """
        with needs_extra("llguidance", extra="serve", purpose="answer in a JSON schema"):
            from llguidance import LLMatcher
        # Options inside the schema would let parts of it be ignored.
        options = {"whitespace_pattern": _WHITE_SPACE, "lenient": False, "coerce_one_of": False}
        grammar = LLMatcher.grammar_from_json_schema(schema, overrides=options)
        if error := LLMatcher.validate_grammar(grammar):
            raise InputError(f"the JSON schema cannot be followed: {_first_line(error)}")
        found = Constraint(LLMatcher(self._tokens(), grammar, log_level=0))
        # Some faults show first here, such as a schema that nothing satisfies.
        found.allowed(len(self._model.tokenizer))
        if found.error:
            raise InputError(f"no answer can follow the JSON schema: {found.error}")
        return found

    def _tokens(self) -> Any:
        """Return the tokenizer in the form of llguidance, made once: that takes a second."""
        from llguidance.hf import from_tokenizer

        with self._lock:
            if self._tokenizer is None:
                ends = list(self._model.settings.eos_token_id)
                self._tokenizer = from_tokenizer(self._model.tokenizer, eos_token=ends)
        return self._tokenizer


def _first_line(error: str) -> str:
    # Further lines show the state of the parser.
    return printable(error.strip().partition("\n<state>")[0].replace("\n", " "))[:_MOST_SHOWN]
