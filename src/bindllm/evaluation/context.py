"""Variants of a model with retrieved context: without records, with random ones, with their texts in the prompt.

- ``no_context``: the same model without records.
- ``random_context``: the same model with as many random records.
- ``context_as_text``: the same model without records; their texts are in the prompt.
- ``copied_context``: the text of the nearest record, for captions; for questions its answer to the same question.

Records of the media itself, and of exact duplicates, are excluded in all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from transformers import PreTrainedTokenizerBase

from bindllm.conversation import Message
from bindllm.data.embeddings import RetrievedRecords
from bindllm.data.rows import Sample, with_conversation
from bindllm.embeddings.datastore import Record
from bindllm.evaluation.task import BaselineAnswer, Task, media_of

NO_CONTEXT, RANDOM_CONTEXT = "no_context", "random_context"
CONTEXT_AS_TEXT, COPIED_CONTEXT = "context_as_text", "copied_context"
CONTEXT_VARIANTS = (NO_CONTEXT, RANDOM_CONTEXT, CONTEXT_AS_TEXT, COPIED_CONTEXT)

_SEED = 0
_PREFIX = "Similar examples: {}. "


def with_context_variants(task: Task, found: RetrievedRecords, tokenizer: PreTrainedTokenizerBase) -> Task:
    """Return a task that is also measured in the variants of this module."""
    plain = found.embeddings
    lookups = {NO_CONTEXT: plain, RANDOM_CONTEXT: found.drawn(_SEED), CONTEXT_AS_TEXT: plain}
    as_text = partial(_as_text, found=found, tokenizer=tokenizer)
    baselines = dict(task.baselines)
    if task.name in ("captions", "answers"):
        baselines[COPIED_CONTEXT] = partial(_copied, task, found)
    altered = {**task.altered, CONTEXT_AS_TEXT: as_text}
    return replace(task, lookups={**task.lookups, **lookups}, altered=altered, baselines=baselines)


def _records(sample: Sample, found: RetrievedRecords) -> list[Record]:
    """Return the records of the media of a sample's last answer, nearest first."""
    group = media_of(sample)
    ids = found.ids([group])[0].tolist() if group else []
    return [found.reader.datastore.records[n] for n in ids if n >= 0]


def _as_text(sample: Sample, *, found: RetrievedRecords, tokenizer: PreTrainedTokenizerBase) -> Sample | None:
    """Return the sample with the texts of its records before its last question; None without records."""
    records = _records(sample, found)
    if not records:
        return None
    messages = list(sample.conversation.messages)
    last = _last_question(messages)
    prefix = _PREFIX.format("; ".join(record.text for record in records))
    messages[last] = Message("user", [prefix, *messages[last].content])
    conversation = replace(sample.conversation, messages=tuple(messages))
    return with_conversation(sample, conversation, tokenizer)


def _last_question(messages: Sequence[Message]) -> int:
    """Number of the question whose answer is measured."""
    return max(n for n, message in enumerate(messages) if message.role == "user")


def _copied(task: Task, found: RetrievedRecords) -> list[BaselineAnswer]:
    """Return what the nearest record says of each item; an empty answer if it has no answer to the item's question."""
    answers = []
    for item in task.items:
        messages = item.conversation.messages
        # Texts that are no captions begin with their question, see `build_datastore`.
        question = "" if task.name == "captions" else f"{messages[_last_question(messages)].text} "
        answer = BaselineAnswer("")
        for record in _records(item, found)[:1]:
            said = [text.removeprefix(question) for text in record.texts if text.startswith(question)]
            answer = BaselineAnswer(said[0], record.name, record.modality) if said else answer
        answers.append(answer)
    return answers
