"""One row of training data: a conversation with facts about its last answer (`Row`), and its tokens (`Sample`)."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import numpy as np

from bindllm.conversation import Conversation, Message, Rendered, render
from bindllm.data.source_config import Split
from bindllm.errors import InputError
from bindllm.media import Media

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Item = TypeVar("Item")

IGNORE = -100
"""Label of a token without a loss; no token id is negative, while 0 is one."""

Task = Literal["caption", "answer", "episode", "chat"]
"""How held-out rows are measured: by metrics of captions, by exact answers (of episodes next to further baselines), or
only by their loss."""


class _WithOptions:
    """What `Row` and `Sample` share."""

    task: Task
    options: tuple[str, ...]

    @property
    def choices(self) -> tuple[str, ...]:
        """The options that an answer may choose by their letter; the names of an episode have no letters."""
        return () if self.task == "episode" else self.options


@dataclass(frozen=True)
class Row(_WithOptions):
    """One conversation of a source.

    Args:
        conversation: its last message is the answer to learn.
        references: all true answers to the last question.
        name: where the row comes from, for messages.
        source: index of the source in the recipe, from 0.
        task: how it is measured if it is held out.
        type: kind of question, for accuracy by type; empty if the row does not give one.
        subset: part of the held-out rows, for metrics by subset; empty if the row does not give one.
        language: its language, for metrics by language; empty if the row does not give one.
        rejected: in a preference pair, the conversation with the worse answer; only its last message differs.
        desirable: whether the answer is a wanted one; None if the row does not say so.
        options: in a multiple choice, the texts of the options in the order of their letters in the prompt; in an
            episode, the names of its classes.
        query_only: learn only the last answer; pairs and judged rows do so in any case.
        classes: of a test episode of a published list, their names in the list, in the order of the options.
        split: the split that the row itself names, if any.
        remarks: faults of a row that is used all the same; they are counted.
    """

    conversation: Conversation
    references: tuple[str, ...]
    name: str
    source: int = 0
    task: Task = "caption"
    type: str = ""
    subset: str = ""
    language: str = ""
    rejected: Conversation | None = None
    desirable: bool | None = None
    options: tuple[str, ...] = ()
    query_only: bool = False
    classes: tuple[str, ...] = ()
    split: Split | None = None
    remarks: tuple[str, ...] = ()

    @property
    def media(self) -> tuple[Media, ...]:
        """All media of the conversation."""
        return tuple(item for group in self.conversation.media_groups for item in group)


@dataclass(frozen=True, eq=False)
class Sample(_WithOptions):
    """One row, ready for a batch. The arrays are int64 and have one entry per token, [T].

    Args:
        input_ids: token ids, up to the last one with a loss.
        labels: the id if the token is supervised, else `IGNORE`; not shifted.
        media_index: the media group that the token listens to, or -1.
        conversation: the tokenized conversation.
        truncated: whether an answer was cut or dropped to keep to the maximum length.
        references, name, source, task, type, subset, language, desirable, options, query_only: as in `Row`.
        rejected: the worse answer to the same prompt, tokenized in the same way.
        number: index among the samples of its split; -1 if it has none.
    """

    input_ids: np.ndarray
    labels: np.ndarray
    media_index: np.ndarray
    conversation: Conversation
    truncated: bool = False
    references: tuple[str, ...] = ()
    name: str = ""
    source: int = 0
    task: Task = "caption"
    type: str = ""
    subset: str = ""
    language: str = ""
    rejected: Sample | None = None
    desirable: bool | None = None
    options: tuple[str, ...] = ()
    query_only: bool = False
    number: int = -1

    @property
    def media(self) -> tuple[tuple[Media, ...], ...]:
        """The media groups that these tokens listen to."""
        # Groups of turns that were dropped are not needed.
        return self.conversation.media_groups[: int(self.media_index.max()) + 1]

    @property
    def length(self) -> int:
        """Number of tokens in a batch; for a pair, those of the longer side."""
        # Both sides of a pair are in one batch.
        return max(len(self.input_ids), 0 if self.rejected is None else len(self.rejected.input_ids))

    @property
    def num_supervised(self) -> int:
        """Number of tokens with a loss."""
        return int((self.labels != IGNORE).sum())

    @property
    def num_answers(self) -> int:
        """Number of answers with a loss."""
        # Each run of learned tokens is one answer, so their starts are counted.
        learned = self.labels != IGNORE
        return int(learned[0]) + int((learned[1:] & ~learned[:-1]).sum())

    @property
    def prompt_length(self) -> int:
        """Number of tokens before the last answer: the input for generating it."""
        # A sample ends with an answer, so the last token without a loss ends the header of that answer.
        unsupervised = np.flatnonzero(self.labels == IGNORE)
        return int(unsupervised[-1]) + 1


def make_sample(row: Row, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Sample:
    """Turn a row into a sample of at most ``max_length`` tokens; for a pair, each side separately.

    In a row of ``query_only``, and in one that says how good its answer is, only the last answer is learned. If the
    last turns do not fit, the last question is no longer the one that the references answer: the references are
    dropped, and the row is measured by its loss. An episode is never cut.

    Raises:
        InputError: the row cannot be used; it is counted by this message.
    """
    last_only = row.query_only or row.rejected is not None or row.desirable is not None
    sample = tokenize(row.conversation, tokenizer, max_length, last_only=last_only)
    if row.task == "episode" and sample.truncated:
        # A part of a name is a wrong answer, and the shots without their query teach made-up names.
        raise InputError(f"an episode longer than max_length={max_length} tokens")
    # If an answer was dropped, the question that the references answer is gone.
    whole = sample.num_answers == (1 if last_only else sum(map(_is_learned, row.conversation.messages)))
    rejected = None
    if row.rejected is not None:
        rejected = tokenize(row.rejected, tokenizer, max_length, last_only=True)
        # Once both sides are cut they may be equal; such a pair teaches nothing.
        if np.array_equal(rejected.input_ids, sample.input_ids):
            raise InputError("the answers of a pair differ only beyond max_length; raise max_length")
        rejected = replace(rejected, name=row.name, source=row.source)
    return replace(
        sample,
        truncated=sample.truncated or (rejected is not None and rejected.truncated),
        references=row.references if whole else (),
        name=row.name,
        source=row.source,
        task=row.task if whole else "chat",
        type=row.type,
        subset=row.subset,
        language=row.language,
        rejected=rejected,
        desirable=row.desirable,
        options=row.options,
        query_only=last_only,
    )


def tokenize(
    conversation: Conversation,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    *,
    last_only: bool = False,
) -> Sample:
    """Turn a conversation into a sample of at most ``max_length`` tokens.

    Every answer is learned, unless it says otherwise (`Message.learned`). One that is too long is cut and still ends
    with its end token, so that the model learns to stop. If not even the start of an answer fits, that turn and all
    turns after it are dropped. Tokens after the last answer teach nothing; they are dropped without counting as
    truncation.

    Args:
        last_only: learn only the last answer; earlier ones are part of the prompt.

    Raises:
        InputError: no answer, one without text, one that does not fit at all (the first, or the only one that
            would be learned), one whose text the template does not keep, a text that spells a control token, or
            more tokens than the decoder has positions.

    Examples:
        >>> tokenize(conversation, tokenizer, 128).input_ids.shape  # doctest: +SKIP
        (23,)
    """
    _check_answers(conversation, last_only=last_only)
    rendered = render(conversation, tokenizer)
    answers = rendered.answers[-1:] if last_only else rendered.answers
    if not all(rendered.whole[-1:] if last_only else rendered.whole):
        raise InputError(
            "the decoder's chat template puts control tokens into the answer or changes its text, so only a part of it "
            "would be learned"
        )
    ids = _cut(rendered, answers, max_length)
    length = len(ids)
    if length > tokenizer.model_max_length:
        raise InputError(
            f"the row is longer than the {tokenizer.model_max_length:,} positions of the decoder; a lower "
            "data.max_length cuts it"
        )
    input_ids = np.array(ids, dtype=np.int64)
    labels = np.full(length, IGNORE, dtype=np.int64)
    # Slices past the end are empty: answers that were dropped get no labels.
    for start, stop in answers:
        labels[start:stop] = input_ids[start:stop]
    return Sample(
        input_ids=input_ids,
        labels=labels,
        media_index=np.array(rendered.media_index[:length], dtype=np.int64),
        conversation=conversation,
        truncated=length < answers[-1][1],
    )


def with_conversation(
    sample: Sample, conversation: Conversation, tokenizer: PreTrainedTokenizerBase, **changes: Any
) -> Sample:
    """Return a held-out sample with another conversation before the same answer, which is not cut.

    Raises:
        InputError: the conversation cannot be used, or is longer than the decoder reads.
    """
    made = tokenize(conversation, tokenizer, sys.maxsize, last_only=True)
    own = {name: getattr(made, name) for name in ("input_ids", "labels", "media_index", "conversation")}
    return replace(sample, **own, **changes)


def _cut(rendered: Rendered, answers: list[tuple[int, int]], max_length: int) -> list[int]:
    """Return the ids up to the last answer that fits, in full or cut."""
    ids, starts, length = list(rendered.input_ids), rendered.starts, 0
    for start, stop in answers:
        if stop <= max_length:
            length = stop
            continue
        # The end token takes the last position, so that the model learns to stop; not inside a character.
        last = max_length - 1
        while start < last and starts[last] == starts[last - 1]:
            last -= 1
        # At least one token of the answer itself must stay in addition to its end token.
        if start < last:
            ids[last], length = ids[stop - 1], last + 1
        break
    if length == 0:
        raise InputError(
            f"the prompt leaves no room for an answer in max_length={max_length} tokens; shorten it or raise max_length"
        )
    return ids[:length]


def _check_answers(conversation: Conversation, *, last_only: bool) -> None:
    learned = [message for message in conversation.messages if _is_learned(message)]
    if not learned:
        raise InputError("no answer: the conversation has no assistant message to learn from")
    learned = learned[-1:] if last_only else learned
    if not all(message.text.strip() or "tool_calls" in message.fields for message in learned):
        raise InputError("an answer is empty")


def _is_learned(message: Message) -> bool:
    return message.role == "assistant" and message.learned != "none"


def spread(items: Sequence[Item], count: int) -> list[Item]:
    """Return up to ``count`` items, evenly spread, so that they are not all of one source.

    Examples:
        >>> spread("abcdefg", 3), spread("ab", 3)
        (['a', 'c', 'e'], ['a', 'b'])
    """
    count = min(count, len(items))
    return [items[n * len(items) // count] for n in range(count)]
