"""Few-shot prompts: worked examples before a question, each with its own media.

Each shot becomes a user message and an assistant message, so its tokens listen to its own media and to no others.
"""

from __future__ import annotations

import logging
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from bindllm.conversation import Conversation, Message, render
from bindllm.errors import InputError
from bindllm.media import Media, check_media

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

ShotsBy = Literal["order", "random", "media", "text", "media_text"]
"""How the shots of a question are chosen from a table."""
RETRIEVED = ("media", "text", "media_text")
"""The ways that compare embeddings."""


@dataclass(frozen=True)
class Shot:
    """A worked example: a question, its answer, and the media that the question is about.

    Args:
        prompt: the question.
        answer: the answer of the example.
        media: media of the question, fused into one embedding; empty: the shot is only text.

    Raises:
        InputError: a prompt or an answer that is not a text, an empty answer, or media that are not `Media`.

    Examples:
        >>> Shot("Which animal is this?", "a cat", media=[Media.image("cat.png")]).media
        (Media.image('cat.png'),)
    """

    prompt: str
    answer: str
    media: Sequence[Media] = ()

    def __post_init__(self) -> None:
        for name, text in (("prompt", self.prompt), ("answer", self.answer)):
            if not isinstance(text, str):
                raise InputError(f"the {name} of a shot is a text, not {text!r}")
        if not self.answer.strip():
            raise InputError(f"the shot {self.prompt!r} has no answer: give one, or leave the shot out")
        # The way to set a field of a frozen dataclass.
        object.__setattr__(self, "media", check_media(self.media))

    @property
    def messages(self) -> tuple[Message, Message]:
        """The question with its media, and the answer."""
        return Message("user", [*self.media, self.prompt]), Message("assistant", self.answer)


def pair_shots(shots: Sequence[Any] | None, count: int) -> list[tuple[Shot, ...]]:
    """Return the shots of each prompt.

    Args:
        shots: one list of `Shot` for all prompts, or one list for each; None: no shots.

    Raises:
        InputError: not a list, an item that is not a `Shot`, or another number of lists than prompts.
    """
    if shots is not None and not isinstance(shots, list | tuple):
        raise InputError(f"shots takes a list of Shot, not {shots!r}")
    shots = shots or ()
    # A shared list has shots in it, a list for each prompt has lists.
    rows = shots if shots and all(isinstance(row, list | tuple) for row in shots) else [shots] * count
    if len(rows) != count:
        raise InputError(
            f"{count} prompts but {len(rows)} lists of shots: give one list for each, or one for all"
        )
    for item in (item for row in rows for item in row):
        if not isinstance(item, Shot):
            raise InputError(
                f"shots holds {item!r}, which is not a Shot; write Shot('Which animal is this?', 'a cat', media=[...])"
            )
    return [tuple(row) for row in rows]


def add_shots(conversation: Conversation, shots: Sequence[Shot]) -> Conversation:
    """Return a conversation with shots before its first message, but after a system message."""
    if not shots:
        return conversation
    messages = conversation.messages
    first = next((n for n, message in enumerate(messages) if message.role != "system"), len(messages))
    exchanges = [message for shot in shots for message in shot.messages]
    messages = (*messages[:first], *exchanges, *messages[first:])
    return replace(conversation, messages=messages, examples=len(shots) + conversation.examples)


def few_shot_prompts(
    conversations: Sequence[Conversation],
    shots: Sequence[Sequence[Shot]],
    tokenizer: PreTrainedTokenizerBase,
    limit: int | None,
) -> list[Conversation]:
    """Add to each conversation its shots, without those that do not fit: the furthest from the question.

    A warning reports the number of skipped shots.

    Args:
        limit: maximum number of tokens of a prompt; None: no limit.
    """
    fitting = [
        fit_shots(conversation, row, tokenizer, limit)
        for conversation, row in zip(conversations, shots, strict=True)
    ]
    given = sum(map(len, shots))
    if skipped := given - sum(map(len, fitting)):
        short = sum(len(kept) < len(row) for kept, row in zip(fitting, shots, strict=True))
        where = f", in {short:,} of {len(shots):,} prompts" if len(shots) > 1 else ""
        logger.warning(
            "%s of %s shots do not fit and were skipped, those furthest from the question%s: a prompt may have %s "
            "tokens, the positions of the decoder less max_new_tokens",
            *(f"{skipped:,}", f"{given:,}", where, f"{limit:,}"),
        )
    return [add_shots(conversation, row) for conversation, row in zip(conversations, fitting, strict=True)]


def fit_shots(
    conversation: Conversation, shots: Sequence[Shot], tokenizer: PreTrainedTokenizerBase, limit: int | None
) -> Sequence[Shot]:
    """Return the last shots: as many as fit into a number of tokens together with the conversation."""
    if limit is None or not shots:
        return shots

    def fits(skipped: int) -> bool:
        prompt = add_shots(conversation, shots[skipped:])
        rendered = render(prompt, tokenizer, add_generation_prompt=True, control_text="escape")
        return len(rendered.input_ids) <= limit

    # Nearly always all of them fit. Otherwise by bisection, since each further shot makes the prompt longer.
    return shots if fits(0) else shots[bisect_left(range(len(shots)), True, lo=1, key=fits) :]
