"""Few-shot evaluation: held-out questions with worked examples before them, next to controls of these examples.

A model may copy the answers of its shots without looking at their media (https://arxiv.org/abs/2404.15736), so each
number of shots is measured with the variants of episodes in addition to those of the task. In ``wrong_support`` each
shot has another answer to the same prompt, or to any prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Self

from transformers import PreTrainedTokenizerBase

from bindllm.conversation import Conversation
from bindllm.data.answers import answer_words
from bindllm.data.embeddings import MediaEmbeddings
from bindllm.data.formats import answer_of
from bindllm.data.report import Skipped
from bindllm.data.rows import Row, Sample, make_sample, with_conversation
from bindllm.errors import InputError
from bindllm.evaluation.answers import answers_task
from bindllm.evaluation.captions import captions_task
from bindllm.evaluation.episodes import altered_media, copied_answers
from bindllm.evaluation.support import Support, one_per_caption, shot_of
from bindllm.evaluation.task import WRONG_SUPPORT, BaselineAnswer, MakeRow, Task, exchange
from bindllm.media import Media
from bindllm.model.bindllm import BindLLM
from bindllm.model.decoder import num_positions
from bindllm.model.generation import shots_limit
from bindllm.parallel import RunContext
from bindllm.shots import Shot, add_shots, fit_shots


@dataclass(frozen=True)
class _Question:
    """A held-out question, tokenized without shots, and its row."""

    row: Row
    sample: Sample

    @property
    def prompt(self) -> Conversation:
        """The conversation without its answer."""
        conversation = self.row.conversation
        return replace(conversation, messages=conversation.messages[:-1])

    def with_shots(self, shots: Sequence[Shot], model: BindLLM, number: int) -> Sample:
        """Return the sample of the question after some shots; only its own answer counts."""
        conversation = add_shots(self.row.conversation, shots)
        return with_conversation(self.sample, conversation, model.tokenizer, number=number)


@dataclass(frozen=True)
class FewShotData:
    """Held-out questions and the support that their shots are chosen from, tokenized and embedded.

    Attributes:
        train: samples of the support, for the baselines of the task.
        support: chooses the shots.
        embeddings: embeddings of all media.
    """

    questions: Sequence[_Question]
    train: Sequence[Sample]
    support: Support
    embeddings: MediaEmbeddings

    @classmethod
    def prepare(
        cls,
        rows: Sequence[Row],
        support_rows: Sequence[Row],
        support: Support,
        *,
        model: BindLLM,
        store: str | Path,
        context: RunContext,
        skipped: Skipped,
    ) -> Self:
        """Tokenize all rows, and embed their media.

        Args:
            rows: held-out captions, or questions with true answers.
            support: how shots are chosen; gets its shots here.
            skipped: rows that cannot be used are counted here.

        Raises:
            InputError: rows of several kinds or without true answers, or none of them can be used.
        """
        kinds = {row.task for row in (*rows, *support_rows)}
        if len(kinds) != 1 or "chat" in kinds:
            raise InputError(
                "few-shot evaluation needs captions, or questions with true answers, in both tables; these are "
                f"{', '.join(sorted(kinds)) or 'empty'}"
            )
        modalities = model.bind_config.token_modalities if model.bind.num_tokens > 1 else ()
        embeddings = MediaEmbeddings(model.encoders, store, token_modalities=modalities)
        totals = embeddings.precompute(
            (item for row in (*rows, *support_rows) for item in row.media), context
        )
        usable = partial(_usable, tokenizer=model.tokenizer, failed=totals.failed, skipped=skipped)
        questions, examples = usable(rows), usable(support_rows)
        if not (questions and examples):
            what = "question" if examples else "shot"
            raise InputError(f"no {what} is left: {'; '.join(skipped.lines()) or 'the split has no row'}")
        support.shots = [shot_of(row) for row in one_per_caption(example.row for example in examples)]
        # Their media are embedded already; texts may be compared too.
        support.embed([shot_of(question.row) for question in questions], embeddings, context)
        support.knows_media = True
        return cls(questions, [example.sample for example in examples], support, embeddings)

    def task(self, count: int, model: BindLLM) -> Task:
        """Return the task of a number of shots, such as ``answers_4_shots``.

        In the metrics of ``model``, ``shots`` counts those of all prompts together, ``excluded`` those that would have
        been chosen, but are the question itself, ``not_fitting`` those without room in the decoder, and ``not_found``
        those that the support does not have.
        """
        samples = [question.sample for question in self.questions]
        known = {"train_samples": self.train, "tokenizer": model.tokenizer}
        make: Callable[..., Task] = partial(captions_task, lookup=self.embeddings, **known)
        if samples[0].task == "answer":
            make = partial(answers_task, **known)
        # The questions without shots set the room for an answer, so it is the same for every number of shots.
        room = make(samples).max_new_tokens
        limit = shots_limit({"max_new_tokens": room}, num_positions(model.decoder.config))
        chosen = [self.support.choose(q.prompt.messages[-1].text, q.row.media, count) for q in self.questions]
        shots = [
            fit_shots(question.prompt, found.shots, model.tokenizer, limit)
            for question, found in zip(self.questions, chosen, strict=True)
        ]
        asked = [
            question.with_shots(row, model, number)
            for number, (question, row) in enumerate(zip(self.questions, shots, strict=True))
        ]
        task = make(asked, max_new_tokens=room)
        # The number of an item is the position of its question: captions of one image are one prompt.
        numbers = [item.number for item in task.items]
        total = sum(len(shots[n]) for n in numbers)
        counts = {
            "shots": total,
            "excluded": sum(chosen[n].num_excluded for n in numbers),
            "not_fitting": (found := sum(len(chosen[n].shots) for n in numbers)) - total,
            "not_found": count * len(numbers) - found,
        }
        variants = {
            "altered": {
                **altered_media(task.items, self.embeddings),
                WRONG_SUPPORT: _WrongAnswers(self.questions, shots, model, limit, _choices(self.train)),
            },
            "baselines": {**task.baselines, **copied_answers(task.items)},
        }
        return replace(
            task,
            name=f"{task.name}_{count}_shots",
            # The loss of a caption would be over other tokens than its metrics: every caption of an image.
            loss_items=(),
            counts={**task.counts, **counts},
            make_row=partial(_row, task.make_row, shots),
            **(variants if count else {}),
        )


def _usable(
    rows: Sequence[Row], *, tokenizer: PreTrainedTokenizerBase, failed: Mapping[Media, str], skipped: Skipped
) -> list[_Question]:
    """Return the rows that can be embedded and tokenized; the others are counted."""
    found = []
    for row in rows:
        try:
            if reasons := [failed[item] for item in row.media if item in failed]:
                raise InputError(reasons[0])
            # One question and one answer, as a shot too.
            shot_of(row)
            found.append(_Question(row, make_sample(row, tokenizer, tokenizer.model_max_length)))
        except InputError as error:
            skipped.add_error(error, row.name)
    return found


@dataclass(frozen=True)
class _WrongAnswers:
    """Gives the shots of an item wrong answers, in a prompt of at most ``limit`` tokens."""

    questions: Sequence[_Question]
    shots: Sequence[Sequence[Shot]]
    model: BindLLM
    limit: int | None
    choices: Mapping[str, Sequence[str]]

    def __call__(self, item: Sample) -> Sample | None:
        """Return the item; None without shots, or if they do not fit with their wrong answers.

        Raises:
            InputError: all shots have the same answer.
        """
        shots, question = [self._wrong(shot) for shot in self.shots[item.number]], self.questions[item.number]
        # Fewer shots, or a shorter answer, could not be compared with the model's.
        fits = len(fit_shots(question.prompt, shots, self.model.tokenizer, self.limit)) == len(shots)
        return question.with_shots(shots, self.model, item.number) if shots and fits else None

    @cached_property
    def _wrong(self) -> Callable[[Shot], Shot]:
        return wrong_answers((shot for row in self.shots for shot in row), self.choices)


def _choices(samples: Iterable[Sample]) -> dict[str, list[str]]:
    """Return the answers of each multiple choice, one for each of its options, by its prompt."""
    return {
        sample.conversation.messages[0].text: [
            answer_of(sample.options, n) for n in range(len(sample.options))
        ]
        for sample in samples
        if sample.options
    }


def wrong_answers(
    shots: Iterable[Shot], choices: Mapping[str, Sequence[str]] | None = None
) -> Callable[[Shot], Shot]:
    """Return a function that gives a shot a wrong answer: another one to the same prompt, else to any prompt.

    The distinct answers form a cycle, see `exchange`, so a wrong answer is as frequent as the true one that it stands
    for.

    Args:
        choices: further answers to a prompt: those of the options of a multiple choice.

    Raises:
        InputError: all shots have the same answer.
    """
    by_prompt: dict[str, dict[str, str]] = {}
    for shot in shots:
        options = (choices or {}).get(shot.prompt, ())
        # An answer with its explanation is none of the options.
        for answer in options if shot.answer in options else [shot.answer]:
            # By their words, as "No." is not a wrong answer for "no".
            by_prompt.setdefault(shot.prompt, {})[answer] = " ".join(answer_words(answer))
    anywhere = exchange(
        {answer: words for answers in by_prompt.values() for answer, words in answers.items()}
    )
    if anywhere is None:
        raise InputError("all shots have the same answer, so none is wrong; use more shots")
    partners = {prompt: exchange(answers) or anywhere for prompt, answers in by_prompt.items()}
    return lambda shot: replace(shot, answer=partners[shot.prompt][shot.answer])


def _row(
    make_row: MakeRow,
    shots: Sequence[Sequence[Shot]],
    item: Sample,
    texts: Mapping[str, str | None],
    copied: BaselineAnswer | None,
) -> dict[str, Any]:
    """Return the row of an item of the task with the answers of all variants, and its shots."""
    shown = [
        {"prompt": shot.prompt, "media": [media.name for media in shot.media], "answer": shot.answer}
        for shot in shots[item.number]
    ]
    return {**texts, **make_row(item, texts, copied), "shots": shown}
