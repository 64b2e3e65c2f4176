"""A row of training data: one conversation, what is true of its last answer, and how a held-out one is measured."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from bindllm.conversation import Conversation
from bindllm.media import Media

Task = Literal["caption", "answer", "chat"]
"""How held-out rows are measured: by metrics of captions, by exact answers, or by their loss alone."""


@dataclass(frozen=True)
class Row:
    """One conversation of a source.

    Args:
        conversation: with the answer to learn as last message.
        references: all true answers to the last question.
        name: where the row comes from, for messages.
        source: number of the source in the recipe, from 0.
        task: how it is measured where it is held out.
        type: kind of question, for accuracy by type; empty where the row does not say.
        rejected: in a preference pair, the conversation with the worse answer; it differs in its last message alone.
        desirable: whether the answer is a wanted one; None where the row does not say.
        options: in a multiple choice, the texts of the options in the order of their letters in the prompt.
    """

    conversation: Conversation
    references: tuple[str, ...]
    name: str
    source: int = 0
    task: Task = "caption"
    type: str = ""
    rejected: Conversation | None = None
    desirable: bool | None = None
    options: tuple[str, ...] = ()

    @property
    def media(self) -> tuple[Media, ...]:
        """All media of the conversation."""
        return tuple(item for group in self.conversation.media_groups for item in group)
