"""The answers task: how many held-out questions a model answers right, compared with the most frequent answers.

An answer is right according to `bindllm.data.answers.is_right`: it has the words of a true answer, or chooses the
right option.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from transformers import PreTrainedTokenizerBase

from bindllm.data.answers import answer_words, is_right
from bindllm.data.rows import Sample
from bindllm.errors import InputError
from bindllm.evaluation.task import (
    MAJORITY_ANSWER,
    MODEL,
    NO_MEDIA,
    OTHER,
    SHUFFLED_MEDIA,
    BaselineAnswer,
    Metrics,
    Task,
    media_name,
    media_of,
)

# Tokens beyond the longest true answer, the limit of any answer, and the room for "The answer is (B).".
_MARGIN = 4
_LONGEST = 256
_LETTERED = 16


@dataclass
class AnswerRow:
    """One held-out question and its answers; an answer that was not measured is None.

    Attributes:
        question: last question of the conversation.
        references: the true answers, each once.
        type: type of the question; empty if the row has none.
        media: path of the media that the question is about, or name of the row that contains them.
        subset: part of the held-out rows that it belongs to; empty if the row has none.
        language: its language; empty if the row has none.
    """

    question: str
    references: list[str]
    type: str = ""
    media: str | None = None
    modality: str | None = None
    model: str | None = None
    right: bool = False
    no_media: str | None = None
    shuffled_media: str | None = None
    majority_answer: str | None = None
    subset: str = ""
    language: str = ""


def answers_task(
    samples: Sequence[Sample],
    *,
    train_samples: Iterable[Sample],
    tokenizer: PreTrainedTokenizerBase,
    max_new_tokens: int | None = None,
    shuffled_limit: int | None = None,
) -> Task:
    """Return the answers task: accuracy over all questions and by type.

    Args:
        max_new_tokens: longest answer; None: a little more than the longest true one.
        shuffled_limit: answer at most this many questions with shuffled media; None: all.

    Raises:
        InputError: there are no samples, or one has no true answer.
    """
    if not samples:
        raise InputError("there are no held-out questions; give at least one")
    if unanswered := [sample.name for sample in samples if not sample.references]:
        raise InputError(
            f"{len(unanswered)} held-out questions have no true answer: {', '.join(unanswered[:5])}"
        )
    return Task(
        "answers",
        samples,
        accuracy_metrics,
        baselines={MAJORITY_ANSWER: partial(majority_answers, samples, train_samples)},
        make_row=_row,
        max_new_tokens=max_new_tokens or longest_answer(samples, tokenizer),
        shuffled_limit=shuffled_limit,
    )


def accuracy_metrics(items: Sequence[Sample], answers: Sequence[str]) -> Metrics:
    """Return the share of right answers.

    Returns:
        ``accuracy`` (0..1; None without items), ``by_type`` (the same for each type; empty if no question has one),
        ``count`` and ``count_by_type``.
    """
    right = [
        is_right(answer, item.references, item.choices) for item, answer in zip(items, answers, strict=True)
    ]
    types: dict[str, list[bool]] = defaultdict(list)
    for item, hit in zip(items, right, strict=True):
        types[item.type or OTHER].append(hit)
    # A set without types has no table by type.
    if set(types) == {OTHER}:
        types.clear()
    return {
        "accuracy": sum(right) / len(right) if right else None,
        "by_type": {name: sum(hits) / len(hits) for name, hits in sorted(types.items())},
        "count": len(right),
        "count_by_type": {name: len(hits) for name, hits in sorted(types.items())},
    }


def longest_answer(samples: Sequence[Sample], tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the token limit of an answer: a few more than the longest true answer and its end token."""
    texts = list({text for sample in samples for text in sample.references})
    # One more for the end token.
    longest = max(len(ids) for ids in tokenizer(texts, add_special_tokens=False).input_ids) + 1
    # The row's own answer may be longer than its references, with a rationale for example.
    longest = max(longest, *(len(sample.input_ids) - sample.prompt_length for sample in samples))
    if any(sample.options for sample in samples):
        # Room for "The answer is (B)." even if the true answer is only the letter.
        longest = max(longest, _LETTERED)
    return min(longest + _MARGIN, _LONGEST)


def majority_answers(samples: Sequence[Sample], train_samples: Iterable[Sample]) -> list[BaselineAnswer]:
    """Return for each sample the most frequent training answer to its question, else to its type in its language.

    Without such a type it is the most frequent one in its language, and without that of all.

    Answers with the same words are one, and the first of equally frequent ones counts. A row with several true
    answers counts each of them. Of preference rows the wanted answers count.

    Raises:
        InputError: there are no training answers.
    """
    counts: dict[tuple[str, ...], Counter[str]] = defaultdict(Counter)
    spelling: dict[str, str] = {}
    for sample in train_samples:
        # Preference rows are conversations, but they mark the answers that are wanted.
        has_preference = sample.rejected is not None or sample.desirable is not None
        if sample.desirable is False or (sample.task != "answer" and not has_preference):
            continue
        for text in sample.references:
            # Counted by words, as "No." and "no" are the same answer; shown in the first spelling.
            words = " ".join(answer_words(text))
            spelling.setdefault(words, text)
            for key in _keys(sample):
                counts[key][words] += 1
    if not counts:
        raise InputError("there are no training answers, so the most frequent one is not defined")
    # most_common keeps the order of equal counts, so the first one wins.
    best = {key: spelling[found.most_common(1)[0][0]] for key, found in counts.items()}
    # The most specific key that occurs in training; "all" always does.
    return [BaselineAnswer(next(best[key] for key in _keys(sample) if key in best)) for sample in samples]


def _keys(sample: Sample) -> tuple[tuple[str, ...], ...]:
    """Return the keys under which answers to a question are counted, the most specific first."""
    own = ("type", sample.type, sample.language), ("language", sample.language)
    return ("question", last_question(sample).lower()), *own, ("all",)


def last_question(sample: Sample) -> str:
    """Return the last question of a sample, as its row writes it."""
    questions = [message.text for message in sample.conversation.messages if message.role == "user"]
    # Wordings that differ only in white space are one question.
    return " ".join(questions[-1].split()) if questions else ""


def _row(item: Sample, texts: Mapping[str, str | None], majority: BaselineAnswer | None) -> dict[str, Any]:
    group = media_of(item)
    row = AnswerRow(
        question=last_question(item),
        references=list(dict.fromkeys(item.references)),
        type=item.type,
        subset=item.subset,
        language=item.language,
        media=media_name(item),
        modality=group[0].modality if group else None,
        model=texts[MODEL],
        right=texts[MODEL] is not None and is_right(texts[MODEL], item.references, item.choices),
        no_media=texts[NO_MEDIA],
        shuffled_media=texts[SHUFFLED_MEDIA],
        majority_answer=majority and majority.text,
    )
    return asdict(row)
