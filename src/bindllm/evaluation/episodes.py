"""The episodes task: whether a model learns the names of classes from a few shots, next to controls that tell how.

A model that reads the names from the images of the shots must fall when these are blank or wrong, and must give the
other name when the names are exchanged. Else it copies text.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from bindllm.conversation import NO_MEDIA, Message
from bindllm.data.answers import answer_words, is_right, same_answer
from bindllm.data.collate import Lookup, MediaGroup
from bindllm.data.rows import Sample, with_conversation
from bindllm.errors import InputError
from bindllm.evaluation import task
from bindllm.evaluation.answers import accuracy_metrics, last_question, longest_answer
from bindllm.evaluation.task import BaselineAnswer, Metrics, Task, media_name, media_of


@dataclass
class EpisodeRow:
    """One held-out episode and its answers; an answer that was not measured is None.

    Attributes:
        question: the question about the query.
        references: the name of its class.
        names: the names of all classes of the episode.
        subset: number of shots.
        media: path of the query.
        blank_support: answer of the same model without the media of the shots.
        shuffled_support: answer of the same model if the media of the shots are exchanged among all shots.
        wrong_support: answer of the same model if the names of the shots are exchanged between the classes.
        nearest_shot: the name of the shot whose media are nearest to those of the query.
        copy_last: the name of the last shot.
        majority_shot: the most frequent name of the shots, of equally frequent ones the last.
    """

    question: str
    references: list[str]
    names: list[str]
    subset: str
    media: str | None
    modality: str | None
    model: str | None
    right: bool
    no_media: str | None
    shuffled_media: str | None
    blank_support: str | None
    shuffled_support: str | None
    wrong_support: str | None
    nearest_shot: str | None
    copy_last: str | None
    majority_shot: str | None


def episodes_task(
    samples: Sequence[Sample],
    *,
    tokenizer: PreTrainedTokenizerBase,
    lookup: Lookup,
    shuffled_limit: int | None = None,
) -> Task:
    """Return the episodes task: accuracy over all queries, and by number of shots.

    Raises:
        InputError: there are no samples.
    """
    if not samples:
        raise InputError(
            "there are no held-out episodes; set episodes.held_out_count, or give classes the split test"
        )
    return Task(
        "episodes",
        samples,
        episode_metrics,
        baselines={
            task.NEAREST_SHOT: lambda: [BaselineAnswer(_nearest(sample, lookup)) for sample in samples],
            **copied_answers(samples),
        },
        altered={
            **altered_media(samples, lookup),
            task.WRONG_SUPPORT: partial(exchange_names, tokenizer=tokenizer),
        },
        make_row=_row,
        max_new_tokens=longest_answer(samples, tokenizer),
        shuffled_limit=shuffled_limit,
    )


def episode_metrics(items: Sequence[Sample], answers: Sequence[str]) -> Metrics:
    """Return the share of right answers, by the strict metric of questions and by the published one.

    Returns:
        The metrics of `accuracy_metrics`, ``published`` (0..1, see `is_published_right`) and ``named``, the share of
        answers that are the name of any class of the episode; None without items. Chance is ``named`` divided by the
        number of classes.
    """
    pairs = list(zip(items, answers, strict=True))
    published = [is_published_right(answer, item.references[0], item.options) for item, answer in pairs]
    named = [same_answer(answer, item.options) for item, answer in pairs]
    shares = {"published": published, "named": named}
    return accuracy_metrics(items, answers) | {
        name: sum(found) / len(found) if found else None for name, found in shares.items()
    }


def is_published_right(answer: str, name: str, names: Sequence[str]) -> bool:
    """Return whether an answer is right by the metric of arXiv 2308.07891.

    The answer contains the name in lower case and, once this is deleted, no other name of the episode. Upper case in
    the answer is kept, as in the released code, so "Dax" does not contain "dax".

    Examples:
        >>> names = ("octopus", "dax")
        >>> [is_published_right(text, "octopus", names) for text in ("an octopus vacuum", "dax or octopus", "Octopus")]
        [True, False, False]
    """
    name = name.lower()
    rest = answer.replace(name, "")
    return name in answer and not any(other.lower() in rest for other in names if other.lower() != name)


def exchange_names(sample: Sample, *, tokenizer: PreTrainedTokenizerBase) -> Sample | None:
    """Return an episode whose shots have the names of other classes, each class that of the next; None without shots.

    The query and its true name stay. A model that learns from the images then gives the other name.
    """
    if not _shot_answers(sample):
        return None
    following = dict(zip(sample.options, (*sample.options[1:], sample.options[0]), strict=True))
    *shots, answer = sample.conversation.messages
    # Noisy labels are exchanged like any other.
    changed = [
        Message("assistant", following[message.text]) if message.role == "assistant" else message
        for message in shots
    ]
    conversation = replace(sample.conversation, messages=(*changed, answer))
    return with_conversation(sample, conversation, tokenizer)


def copied_answers(samples: Sequence[Sample]) -> dict[str, Callable[[], list[BaselineAnswer]]]:
    """Return the baselines that copy an answer of the shots, of episodes and of few-shot prompts."""
    answers = [_shot_answers(sample) for sample in samples]
    return {
        task.COPY_LAST: lambda: [BaselineAnswer((row or [""])[-1]) for row in answers],
        task.MAJORITY_SHOT: lambda: [BaselineAnswer(majority_shot(row)) for row in answers],
    }


def majority_shot(answers: Sequence[str]) -> str:
    """Return the most frequent answer of the shots, of equally frequent ones the last; empty without shots.

    Examples:
        >>> majority_shot(["a cat", "a dog", "Cat."])
        'Cat.'
    """
    # By their words, as "No." and "no" are the same answer.
    spelling = {" ".join(answer_words(answer)): answer for answer in answers}
    counts = Counter(" ".join(answer_words(answer)) for answer in reversed(answers))
    # most_common keeps the order of equal counts: from the last shot to the first.
    return spelling[counts.most_common(1)[0][0]] if answers else ""


def altered_media(samples: Sequence[Sample], lookup: Lookup) -> dict[str, Callable[[Sample], Sample | None]]:
    """Return the variants that change only the media of the shots, of episodes and of few-shot prompts."""
    return {task.BLANK_SUPPORT: blank_support, task.SHUFFLED_SUPPORT: _MediaExchange(samples, lookup)}


def blank_support(sample: Sample) -> Sample | None:
    """Return a sample whose shots have no media; None if they have none."""
    if not _shows_media(sample):
        return None
    index = sample.media_index
    # The last token listens to the question.
    return replace(sample, media_index=np.where(index == index[-1], index, NO_MEDIA))


class _MediaExchange:
    """Gives the shots of a sample the media of other shots."""

    def __init__(self, samples: Sequence[Sample], lookup: Lookup) -> None:
        self._samples, self._lookup = samples, lookup

    def __call__(self, sample: Sample) -> Sample | None:
        """Return the sample; None if its shots have no media.

        Raises:
            InputError: all shots show the same media.
        """
        if not _shows_media(sample):
            return None
        if self._partners is None:
            raise InputError("all shots show the same media, so these cannot be exchanged; use more shots")
        *shots, question, answer = sample.conversation.messages
        # Media add no text, so the tokens and their media index stay.
        changed = [
            replace(message, content=(*self._partners[message.media], message.text))
            if message.media
            else message
            for message in shots
        ]
        messages = (*changed, question, answer)
        return replace(sample, conversation=replace(sample.conversation, messages=messages))

    @cached_property
    def _partners(self) -> dict[MediaGroup, MediaGroup] | None:
        shots = [message for sample in self._samples for message in sample.conversation.messages[:-2]]
        groups = list(dict.fromkeys(message.media for message in shots if message.media))
        # By the bytes of their embeddings: files with the same content count once.
        keys = [vector.numpy().tobytes() for vector in self._lookup(groups)]
        return task.exchange(dict(zip(groups, keys, strict=True)))


def _shot_answers(sample: Sample) -> list[str]:
    """Return the answers of the shots, in their order."""
    return [message.text for message in sample.conversation.messages[:-1] if message.role == "assistant"]


def _shows_media(sample: Sample) -> bool:
    """Return whether a shot has media. If not, a variant of them is the same prompt, and would only dilute a mean."""
    return any(message.media for message in sample.conversation.messages[:-2])


def _nearest(sample: Sample, lookup: Lookup) -> str:
    """Return the name of the shot with the highest cosine to the query, the first of equal ones."""
    names = _shot_answers(sample)
    # Every turn of an episode has media, so groups and names are in the same order.
    vectors = lookup(sample.conversation.media_groups)  # [shots + 1, E], unit norm
    return names[int((vectors[:-1] @ vectors[-1]).argmax())] if names else ""


def _row(item: Sample, texts: Mapping[str, str | None], _: BaselineAnswer | None) -> dict[str, Any]:
    group, answer = media_of(item), texts[task.MODEL]
    variants = {name: texts[name] for name in task.VARIANTS["episodes"]}
    row = EpisodeRow(
        question=last_question(item),
        references=list(item.references),
        names=list(item.options),
        subset=item.subset,
        media=media_name(item),
        modality=group[0].modality if group else None,
        right=answer is not None and is_right(answer, item.references),
        **variants,
    )
    return asdict(row)
