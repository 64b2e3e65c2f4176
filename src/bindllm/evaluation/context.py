"""Variants of a model with retrieved context: without records, with random ones, with their texts in the prompt.

- ``no_context``: the same model without records.
- ``random_context``: the same model with as many random records.
- ``context_as_text``: the same model without records; their texts are in the prompt.
- ``copied_context``: the text of the nearest record, for captions.

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
    if task.name == "captions":
        baselines[COPIED_CONTEXT] = partial(_copied, task.items, found)
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
    # The last question: the answer after it is the one that is measured.
    last = max(n for n, message in enumerate(messages) if message.role == "user")
    prefix = _PREFIX.format("; ".join(record.text for record in records))
    messages[last] = Message("user", [prefix, *messages[last].content])
    conversation = replace(sample.conversation, messages=tuple(messages))
    return with_conversation(sample, conversation, tokenizer)


def _copied(items: Sequence[Sample], found: RetrievedRecords) -> list[BaselineAnswer]:
    """Return the first text of the nearest record of each item; an empty one without records."""
    nearest = [next(iter(_records(item, found)), None) for item in items]
    return [
        BaselineAnswer("")
        if record is None
        else BaselineAnswer(record.texts[0], record.name, record.modality)
        for record in nearest
    ]
