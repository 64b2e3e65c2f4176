"""From a conversation to a training sample: token ids, labels and the media index."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerBase

from bindllm.conversation import Conversation, render
from bindllm.errors import InputError
from bindllm.media import Media

IGNORE = -100
"""Label of a token that gives no loss; no token id, unlike 0, is negative."""


@dataclass(frozen=True, eq=False)
class Sample:
    """One row, ready for a batch. The arrays are int64 and have one entry per token, [T].

    Args:
        input_ids: token ids, up to the last one that gives a loss.
        labels: the id where the token is supervised, else `IGNORE`; not shifted.
        media_index: the media group that speaks to the token, or -1.
        conversation: what was tokenised.
        truncated: whether an answer was cut or left out to keep to the longest length.
        references: all true answers, for metrics that take several.
        name: where the row comes from, for messages.
        source: number of its source in the recipe, from 0.
    """

    input_ids: np.ndarray
    labels: np.ndarray
    media_index: np.ndarray
    conversation: Conversation
    truncated: bool = False
    references: tuple[str, ...] = ()
    name: str = ""
    source: int = 0

    @property
    def media(self) -> tuple[tuple[Media, ...], ...]:
        """The media groups that speak to these tokens."""
        return self.conversation.media_groups[: int(self.media_index.max()) + 1]

    @property
    def num_supervised(self) -> int:
        """Number of tokens that give a loss."""
        return int((self.labels != IGNORE).sum())

    @property
    def prompt_length(self) -> int:
        """Number of tokens ahead of the last answer: what the model is given to generate it."""
        unsupervised = np.flatnonzero(self.labels == IGNORE)
        return int(unsupervised[-1]) + 1


def tokenise(conversation: Conversation, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Sample:
    """Turn a conversation into a sample of at most ``max_length`` tokens.

    An answer that is too long is cut and still ends with its end token, so that the model learns to stop. Where
    not even the start of an answer fits, that turn and all after it are left out. Tokens after the last answer
    teach nothing and are left out without counting as truncation.

    Raises:
        InputError: no answer, a first answer that does not fit at all, or a text that spells a control token.

    Example:
        >>> tokenise(conversation, tokenizer, 128).input_ids.shape  # doctest: +SKIP
        (23,)
    """
    rendered = render(conversation, tokenizer)
    ids, length = list(rendered.input_ids), 0
    answers = _answers(rendered.supervised)
    if not answers:
        raise InputError("no answer: the conversation has no assistant message to learn from")
    for start, stop in answers:
        if stop <= max_length:
            length = stop
        # At least one token of the answer itself must stay beside its end token.
        elif start + 2 <= max_length:
            length = max_length
            ids[max_length - 1] = ids[stop - 1]
    if length == 0:
        raise InputError(
            f"the prompt leaves no room for an answer in max_length={max_length} tokens; shorten it or raise that"
        )
    input_ids = np.array(ids[:length], dtype=np.int64)
    supervised = np.array(rendered.supervised[:length])
    return Sample(
        input_ids=input_ids,
        labels=np.where(supervised, input_ids, IGNORE),
        media_index=np.array(rendered.media_index[:length], dtype=np.int64),
        conversation=conversation,
        truncated=length < answers[-1][1],
    )


def _answers(supervised: list[bool]) -> list[tuple[int, int]]:
    """First token and token after the last of each run of supervised tokens."""
    edges = np.flatnonzero(np.diff(np.array([False, *supervised, False])))
    return [(int(start), int(stop)) for start, stop in edges.reshape(-1, 2)]
