"""What a format makes of a record, and what it raises where it can make nothing of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from bindllm.conversation import Conversation
from bindllm.data.formats.place import Place, RowError
from bindllm.data.report import Skipped
from bindllm.data.rows import Row, Task
from bindllm.data.source_config import Split
from bindllm.data.tables import Record
from bindllm.errors import InputError


@dataclass(frozen=True)
class Parsed:
    """What a record says; `bindllm.data.rows.Row` explains the fields.

    Args:
        conversation: ends with an answer.
        references: all true answers to the last question.
        task: how it is measured where it is held out.
        type: kind of question.
        rejected: the conversation with the worse answer.
        desirable: whether the answer is a wanted one.
        options: the options of a multiple choice.
        split: what the record says; None where it says nothing.
    """

    conversation: Conversation
    references: tuple[str, ...]
    task: Task
    type: str = ""
    rejected: Conversation | None = None
    desirable: bool | None = None
    options: tuple[str, ...] = ()
    split: Split | None = None

    def row(self, name: str, source: int) -> Row:
        """Return this as a row.

        Args:
            name: of the record, for messages.
            source: number of the source in the recipe, from 0.
        """
        return Row(
            conversation=self.conversation,
            references=self.references,
            name=name,
            source=source,
            task=self.task,
            type=self.type,
            rejected=self.rejected,
            desirable=self.desirable,
            options=self.options,
        )


RowFormat = Callable[[Record, Place], Parsed]
"""Reads one record; raises InputError with the reason where it cannot be used. It keeps nothing between calls."""


def leave_out(error: InputError, name: str, skipped: Skipped) -> None:
    """Count a record that a format refused.

    Args:
        error: what the format raised.
        name: of the record.
        skipped: where it is counted. What differs from record to record, such as the path of a missing file, goes
            with the name, so that the same reason is counted as one.
    """
    if isinstance(error, RowError) and error.detail:
        skipped.add(error.reason, f"{name}: {error.detail}")
    else:
        skipped.add(str(error), name)
