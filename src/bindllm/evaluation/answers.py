"""How many questions a model answers right, by kind of question, beside what it would get without looking.

- ``test``: the model as it is.
- ``question_only``: no model, the most frequent training answer to the same question, else to questions of its type,
  else of all. What a data set gives away without its pictures.
- ``shuffled``: the same model, every picture exchanged for another held-out one.
- ``blind``: the same model, asked without the pictures.

An answer is right as `bindllm.data.answers.is_right` says: the words of a true one, or the letter of the right option.
"""

from __future__ import annotations

import random
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from rich.progress import Progress
from transformers import PreTrainedTokenizerBase

from bindllm.data.answers import answer_words, is_right
from bindllm.data.collate import Lookup
from bindllm.data.rows import Sample
from bindllm.errors import InputError
from bindllm.evaluation.baselines import blind, exchange, subject, subject_name
from bindllm.evaluation.measuring import Measuring, evaluating
from bindllm.model.bindllm import BindLLM

ANSWER_VARIANTS = ("test", "question_only", "shuffled", "blind")
UNTYPED = "other"
"""Type of questions that have none, where others of the same set have one."""

_MARGIN = 4
_LONGEST = 256
_LETTERED = 16
_SHUFFLE_SEED = 0


@dataclass
class AnswerRow:
    """One held-out question and what was answered; None where that was not measured.

    Attributes:
        question: the last one of the conversation.
        references: the true answers, each once.
        picture: path or row of the picture that it is about; None: it is about none.
        type: kind of question; empty where the row does not say.
        generated: the model's answer, greedily decoded.
        right: whether that is right.
        question_only: the most frequent training answer, for `right` likewise.
        shuffled: answer of the same model, shown another picture.
        blind: answer of the same model, shown nothing.
        modality: of the picture, or whatever else it is.
    """

    question: str
    references: list[str]
    picture: str | None = None
    type: str = ""
    generated: str | None = None
    right: bool = False
    question_only: str | None = None
    shuffled: str | None = None
    blind: str | None = None
    modality: str = "image"


@dataclass
class AnswerResult:
    """What an evaluation found.

    Attributes:
        metrics: for each of `ANSWER_VARIANTS` ``accuracy`` (0..1), ``by_type`` (the same for each type; empty where
            no question has one), ``count`` and ``count_by_type``. Of those that measure some of the questions alone
            (those with media, of these `shuffled_limit`), ``model_accuracy`` is that of ``test`` on the same ones.
            What could not be measured has the accuracy None.
        rows: one a question, in the order of the samples.
        problems: what could not be measured, and why.
        seconds: wall time.
    """

    metrics: dict[str, dict[str, Any]]
    rows: list[AnswerRow]
    problems: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0

    def answers(self) -> list[dict[str, Any]]:
        """Return the rows as JSON-able dicts."""
        return [asdict(row) for row in self.rows]


def evaluate_answers(
    model: BindLLM,
    samples: Sequence[Sample],
    *,
    train_samples: Sequence[Sample],
    lookup: Lookup,
    batch_size: int = 128,
    max_new_tokens: int | None = None,
    shuffled_limit: int | None = None,
    progress: bool = False,
) -> AnswerResult:
    """Let a model answer held-out questions greedily, and measure the baselines beside it.

    Equal inputs are run once, so the blind model is asked each wording once. The same inputs give the same numbers,
    and no global random state is touched. What fails in one measurement is logged and reported, and the others are
    still made.

    Args:
        model: the trained model; its mode is put back at the end.
        samples: held-out samples, with references.
        train_samples: where the most frequent answers are counted.
        lookup: gives the embeddings of media groups.
        batch_size: samples at a time.
        max_new_tokens: longest answer; None: a little more than the longest true one.
        shuffled_limit: show wrong pictures for this many questions at most, drawn by a fixed seed; None: for all.
        progress: show a bar with a time estimate.

    Raises:
        InputError: there are no samples, or one without a true answer.
    """
    started = time.perf_counter()
    if not samples:
        raise InputError("there are no held-out questions; give at least one")
    if silent := [sample.name for sample in samples if not sample.references]:
        raise InputError(f"{len(silent)} held-out questions have no true answer: {', '.join(silent[:5])}")
    shown = [n for n, sample in enumerate(samples) if sample.media]
    drawn = _draw(shown, shuffled_limit)
    length = longest_answer(samples, model.tokenizer) if max_new_tokens is None else max_new_tokens
    with evaluating(model), Progress(disable=not progress) as bar:
        task = bar.add_task("answering", total=len(samples) + len(drawn) + len(shown))
        run = Measuring(model, batch_size, length, lambda done: bar.advance(task, done))
        guesses = run.attempt("question_only answers", lambda: frequent_answers(samples, train_samples))
        said = {"question_only": _placed(guesses), **_answers(run, samples, shown, drawn, lookup)}
    return AnswerResult(
        metrics={name: _numbers(samples, said[name], said["test"]) for name in ANSWER_VARIANTS},
        rows=[
            _row(sample, {name: texts.get(n) for name, texts in said.items()})
            for n, sample in enumerate(samples)
        ],
        problems=run.problems,
        seconds=time.perf_counter() - started,
    )


def _answers(
    run: Measuring, samples: Sequence[Sample], shown: list[int], drawn: list[int], lookup: Lookup
) -> dict[str, dict[int, str]]:
    """What the model answers, by the place of the sample: to all, without the picture, and with a wrong one."""
    seen, wrong = [samples[n] for n in shown], [samples[n] for n in drawn]
    own = run.attempt("test answers", lambda: run.answers(samples, lookup))
    exchanged = unseen = None
    if wrong:
        exchanged = run.attempt("shuffled answers", lambda: run.answers(wrong, exchange(wrong, lookup)))
    if seen:
        unseen = run.attempt("blind answers", lambda: run.answers(blind(seen), lookup))
    return {"test": _placed(own), "shuffled": _placed(exchanged, drawn), "blind": _placed(unseen, shown)}


def longest_answer(samples: Sequence[Sample], tokenizer: PreTrainedTokenizerBase) -> int:
    """Return how many tokens an answer may have: a few more than the longest true one, its end token included."""
    texts = list({text for sample in samples for text in sample.references})
    longest = max(len(ids) for ids in tokenizer(texts, add_special_tokens=False).input_ids) + 1
    longest = max(longest, *(len(sample.input_ids) - sample.prompt_length for sample in samples))
    if any(sample.options for sample in samples):
        longest = max(longest, _LETTERED)
    return min(longest + _MARGIN, _LONGEST)


def frequent_answers(samples: Sequence[Sample], train_samples: Iterable[Sample]) -> list[str]:
    """Return for each sample the most frequent training answer to its question, else to its type, else to all.

    Answers with the same words are one, and the first of equally frequent ones counts. A row with several true
    answers counts each of them; of preferences the wanted answers count.

    Raises:
        InputError: there are no training answers.
    """
    counts: dict[tuple[str, ...], Counter[str]] = defaultdict(Counter)
    spelt: dict[str, str] = {}
    for sample in train_samples:
        if sample.desirable is False or (sample.task != "answer" and not _judged(sample)):
            continue
        for text in sample.references:
            words = " ".join(answer_words(text))
            spelt.setdefault(words, text)
            for key in _keys(sample):
                counts[key][words] += 1
    if not counts:
        raise InputError("there are no training answers to find the most frequent one among")
    best = {key: spelt[found.most_common(1)[0][0]] for key, found in counts.items()}
    return [next(best[key] for key in _keys(sample) if key in best) for sample in samples]


def _judged(sample: Sample) -> bool:
    """Whether a row teaches which answers are wanted."""
    return sample.rejected is not None or sample.desirable is not None


def _keys(sample: Sample) -> tuple[tuple[str, ...], ...]:
    """Under what the answer to a question is counted, the closest first."""
    return ("question", question_of(sample).lower()), ("type", sample.type), ("all",)


def question_of(sample: Sample) -> str:
    """Return the last question of a sample, as its row writes it."""
    asked = [message.text for message in sample.conversation.messages if message.role == "user"]
    return " ".join(asked[-1].split()) if asked else ""


def _draw(places: list[int], limit: int | None) -> list[int]:
    """A fixed sample of the places, in their order."""
    if limit is None or limit >= len(places):
        return places
    return sorted(random.Random(_SHUFFLE_SEED).sample(places, limit))


def _placed(answers: list[str] | None, places: Sequence[int] | None = None) -> dict[int, str]:
    """Answers by the place of their sample."""
    if answers is None:
        return {}
    return dict(zip(range(len(answers)) if places is None else places, answers, strict=True))


def _numbers(samples: Sequence[Sample], said: dict[int, str], model: dict[int, str]) -> dict[str, Any]:
    """Shares of right answers; ``said`` and ``model`` are answers by the place of their sample."""
    right = {n: _is_right(samples[n], text) for n, text in said.items()}
    types: dict[str, list[bool]] = defaultdict(list)
    for n, hit in right.items():
        types[samples[n].type or UNTYPED].append(hit)
    if set(types) == {UNTYPED}:
        types.clear()
    numbers = {
        "accuracy": sum(right.values()) / len(right) if right else None,
        "by_type": {name: sum(hits) / len(hits) for name, hits in sorted(types.items())},
        "count": len(right),
        "count_by_type": {name: len(hits) for name, hits in sorted(types.items())},
    }
    if 0 < len(right) < len(samples) and model:
        numbers["model_accuracy"] = sum(_is_right(samples[n], model[n]) for n in right) / len(right)
    return numbers


def _is_right(sample: Sample, text: str) -> bool:
    return is_right(text, sample.references, sample.options)


def _row(sample: Sample, said: dict[str, str | None]) -> AnswerRow:
    group = subject(sample) if sample.media and sample.media_index[-1] >= 0 else ()
    row = AnswerRow(
        question=question_of(sample),
        references=list(dict.fromkeys(sample.references)),
        type=sample.type,
        generated=said["test"],
        right=said["test"] is not None and _is_right(sample, said["test"]),
        question_only=said["question_only"],
        shuffled=said["shuffled"],
        blind=said["blind"],
    )
    if group:
        row.picture, row.modality = subject_name(sample), group[0].modality
    return row
