"""The evaluation loop: a task is items, a metric and a baseline; every task is measured in the same variants.

- ``model``: the model as it is.
- ``no_media``: the same model without the media, bit-equal to gates of zero.
- ``shuffled_media``: the same model, all media exchanged among the held-out items. If this is as good as ``model``, the
  model does not use its media.
- the task's baselines, which need no model, such as ``nearest_caption`` or ``majority_answer``.

Episodes and few-shot prompts add variants of their shots (docs/few-shot.md): ``blank_support``, ``shuffled_support``
and ``wrong_support`` alter them, ``copy_last`` and ``majority_shot`` copy an answer of them.
"""

from __future__ import annotations

import logging
import math
import random
import sys
import time
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from rich.progress import Progress
from torch import Tensor, nn

from bindllm import conversation
from bindllm.data.batches import sorted_batches
from bindllm.data.collate import Lookup, MediaGroup, answer_batch, records_of, tokens_of
from bindllm.data.rows import Sample
from bindllm.errors import BindLLMError, InputError
from bindllm.evaluation.answering import answer_batches
from bindllm.model.bindllm import BindLLM

logger = logging.getLogger(__name__)

T = TypeVar("T")
Item = TypeVar("Item", bound=Hashable)

MODEL, NO_MEDIA, SHUFFLED_MEDIA = "model", "no_media", "shuffled_media"
NEAREST_CAPTION, MAJORITY_ANSWER = "nearest_caption", "majority_answer"
SHUFFLED_SUPPORT, BLANK_SUPPORT, WRONG_SUPPORT = "shuffled_support", "blank_support", "wrong_support"
NEAREST_SHOT, COPY_LAST, MAJORITY_SHOT = "nearest_shot", "copy_last", "majority_shot"
VARIANTS = {
    "captions": (MODEL, NO_MEDIA, SHUFFLED_MEDIA, NEAREST_CAPTION),
    "answers": (MODEL, NO_MEDIA, SHUFFLED_MEDIA, MAJORITY_ANSWER),
    "episodes": (
        MODEL,
        NO_MEDIA,
        SHUFFLED_MEDIA,
        BLANK_SUPPORT,
        SHUFFLED_SUPPORT,
        WRONG_SUPPORT,
        NEAREST_SHOT,
        COPY_LAST,
        MAJORITY_SHOT,
    ),
    "conversations": (MODEL, NO_MEDIA, SHUFFLED_MEDIA),
}
"""The variants of each task of held-out rows, as the report shows them."""

MAIN_METRICS = ("accuracy", "cider")

OTHER = "other"
"""Type, subset or language of items without one, if other items have one."""
_LABELS = ("subset", "language")

BATCH_SIZE = 128
LOSS_BATCH_SIZE = 32
"""A loss needs the logits of all supervised tokens of a batch at the same time, so its batches are smaller."""

_SEED = 0


class BaselineAnswer(NamedTuple):
    """An answer without a model; if it was copied, also the training media that it was copied from.

    Args:
        similarity: cosine to the item's media, -1..1.
    """

    text: str
    media: str | None = None
    modality: str | None = None
    similarity: float | None = None


Metrics = dict[str, Any]
Metric = Callable[[Sequence[Sample], Sequence[str]], Metrics]
"""Compares one answer per item with the references. Without items it returns the same keys with empty values."""
MakeRow = Callable[[Sample, Mapping[str, str | None], BaselineAnswer | None], Mapping[str, Any]]
"""Makes the JSON-able row of an item from the text of each variant and the answer of the first baseline."""


@dataclass(frozen=True)
class Task:
    """Held-out items and how the answers to them are scored.

    Args:
        name: key in ``metrics.json``.
        items: samples whose last question is answered; each has references.
        metric: scores the answers; None: only the loss is measured.
        baselines: for each variant without a model, a function that returns one answer per item.
        altered: for each further variant of the model, a function that returns the changed item; None: it would stay
            the same, and is not measured in this variant.
        lookups: for variants of the model that differ in their embeddings or records, a lookup of their own; together
            with ``altered`` or without.
        make_row: makes a row for the report; None: the task has no rows.
        shuffled_limit: answer at most this many items with shuffled media, drawn with a fixed seed; None: all.
        counts: further numbers about the items, added to the metrics of ``model``.

    Examples:
        >>> Task("spelling", metric=lambda items, answers: {"accuracy": None}).variants
        ('model', 'no_media', 'shuffled_media')
    """

    name: str
    items: Sequence[Sample] = ()
    metric: Metric | None = None
    loss_items: Sequence[Sample] = ()
    baselines: Mapping[str, Callable[[], Sequence[BaselineAnswer]]] = field(default_factory=dict)
    altered: Mapping[str, Callable[[Sample], Sample | None]] = field(default_factory=dict)
    lookups: Mapping[str, Lookup] = field(default_factory=dict)
    make_row: MakeRow | None = None
    max_new_tokens: int = 32
    shuffled_limit: int | None = None
    counts: Mapping[str, int] = field(default_factory=dict)

    @property
    def variants(self) -> tuple[str, ...]:
        """Names of the variants, in the order of the report."""
        return (MODEL, NO_MEDIA, SHUFFLED_MEDIA, *({**self.lookups, **self.altered}), *self.baselines)


@dataclass
class Evaluation:
    """Results of the tasks.

    Attributes:
        metrics: metrics of each variant of each task. ``loss`` is in nats per supervised token and ``perplexity`` its
            exponential. If a variant was measured on a part of the items, ``model_accuracy`` or ``model_cider`` is that
            of ``model`` on the same part. ``by_subset`` has the metrics of each subset, if the items have subsets, and
            ``by_language`` those of each language; each subset has its languages too. A number that could not be
            measured is None.
        rows: one JSON-able row per item, for tasks that have rows.
        problems: why something could not be measured, by task and measurement.
        seconds: wall time.
    """

    metrics: dict[str, dict[str, Metrics]] = field(default_factory=dict)
    rows: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    problems: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0


def evaluate(
    model: BindLLM,
    tasks: Iterable[Task],
    *,
    lookup: Lookup,
    variants: Sequence[str] | None = None,
    batch_size: int = BATCH_SIZE,
    progress: bool = False,
) -> Evaluation:
    """Measure a model on tasks, in all variants.

    Decoding is greedy. The same inputs give the same numbers, and no global random state is touched. A measurement
    that fails (out of memory, for example) is logged and reported in `Evaluation.problems`; the others still run.

    Args:
        model: the trained model; its training mode is restored at the end.
        tasks: the tasks.
        lookup: returns the embeddings of media groups.
        variants: measure only these; None: all variants of each task.
        batch_size: answers generated at the same time. Losses use at most `LOSS_BATCH_SIZE`.
        progress: show a bar for each variant.
    """
    started, result = time.perf_counter(), Evaluation()
    with eval_mode(model), Progress(disable=not progress) as bar:
        for task in tasks:
            run = _Run(model, task, batch_size, bar, result.problems)
            chosen = [name for name in task.variants if variants is None or name in variants]
            result.metrics[task.name], rows = _evaluate_task(run, chosen, lookup)
            if task.make_row is not None:
                result.rows[task.name] = rows
    result.seconds = time.perf_counter() - started
    return result


class _View(NamedTuple):
    """A variant of the model: the items as it gets them, and their positions in the task."""

    positions: Sequence[int]
    items: Sequence[Sample]
    loss_items: Sequence[Sample]
    lookup: Lookup


def _evaluate_task(
    run: _Run, variants: Sequence[str], lookup: Lookup
) -> tuple[dict[str, Metrics], list[dict[str, Any]]]:
    """Return the metrics of each variant, and the rows."""
    # How to read this: the baselines, each variant of the model, their metrics, then the rows.
    task, losses = run.task, {}
    answers: dict[str, dict[int, str]] = {name: {} for name in task.variants}
    copied: dict[str, Sequence[BaselineAnswer]] = {}
    # First, as it is cheap: a missing training split is reported before hours of generation.
    for name in (name for name in task.baselines if name in variants):
        copied[name] = run.attempt(name, task.baselines[name]) or ()
        answers[name] = {n: answer.text for n, answer in enumerate(copied[name])}
    for name in variants:
        if name not in task.baselines and (view := _view(run, name, lookup)) is not None:
            losses[name], answers[name] = run.measure(name, view)
    # After all answers are known, because partial variants are compared with the model on the same items.
    metrics = {name: _metrics(run, name, losses.get(name), answers) for name in variants}
    if MODEL in metrics:
        metrics[MODEL] |= task.counts
    rows, first = [], next(iter(copied.values()), ())
    for n, item in enumerate(task.items if task.make_row is not None else ()):
        texts = {name: given.get(n) for name, given in answers.items()}
        rows.append(dict(task.make_row(item, texts, first[n] if first else None)))
    return metrics, rows


def _view(run: _Run, variant: str, lookup: Lookup) -> _View | None:
    """Return a variant of the task's items, or None if there are no media, or none to exchange them for."""
    task, lookup = run.task, run.task.lookups.get(variant, lookup)
    if variant == MODEL or variant in task.lookups.keys() - task.altered.keys():
        return _View(range(len(task.items)), task.items, task.loss_items, lookup)
    if (alter := task.altered.get(variant)) is not None:
        made = run.attempt(variant, lambda: {n: alter(item) for n, item in enumerate(task.items)}) or {}
        changed = {n: item for n, item in made.items() if item is not None}
        return _View(list(changed), list(changed.values()), (), lookup)
    # Items without media get the same input in every variant, so their answers would only dilute the comparison.
    positions = [n for n, item in enumerate(task.items) if item.media]
    # The mean loss, in contrast, stays over all samples: the differences between variants come only from media.
    if not positions and not any(sample.media for sample in task.loss_items):
        return None
    if variant == NO_MEDIA:
        items = [task.items[n] for n in positions]
        return _View(positions, without_media(items), without_media(task.loss_items), lookup)
    if task.shuffled_limit is not None and task.shuffled_limit < len(positions):
        # A generator of its own, so that no global random state is touched.
        positions = sorted(random.Random(_SEED).sample(positions, task.shuffled_limit))
    items = [task.items[n] for n in positions]
    # One exchange for losses and answers, so that both describe the same wrong media.
    exchanged = run.attempt(variant, lambda: shuffle_media([*items, *task.loss_items], lookup))
    return exchanged and _View(positions, items, task.loss_items, exchanged)


def _metrics(run: _Run, variant: str, loss: float | None, answers: Mapping[str, dict[int, str]]) -> Metrics:
    """Return the metrics of one variant."""
    task, metric, given = run.task, run.task.metric, answers[variant]
    metrics: Metrics = loss_metrics(loss) if task.loss_items else {}
    if metric is None:
        return metrics
    items = [task.items[n] for n in given]
    # A metric may need an optional package; its absence must not cost the losses and the rows.
    scored = run.attempt(f"{variant} metrics", lambda: _scored(metric, items, list(given.values())))
    metrics |= metric([], []) if scored is None else scored
    # The metric of a part is comparable only with the model's on the same part.
    main = next((name for name in MAIN_METRICS if metrics.get(name) is not None), None)
    if main and 0 < len(items) < len(task.items) and (own := answers[MODEL]):
        metrics[f"model_{main}"] = metric(items, [own[n] for n in given])[main]
    return metrics


def _scored(
    metric: Metric, items: Sequence[Sample], texts: Sequence[str], labels: Sequence[str] = _LABELS
) -> Metrics:
    """Return the metrics of all items and, if the items have subsets or languages, those of each of them."""
    metrics = metric(items, texts)
    for n, label in enumerate(labels, start=1):
        parts: dict[str, tuple[list[Sample], list[str]]] = {}
        for item, text in zip(items, texts, strict=True):
            own_items, own_texts = parts.setdefault(getattr(item, label) or OTHER, ([], []))
            own_items.append(item)
            own_texts.append(text)
        if parts.keys() - {OTHER}:
            # A subset may have languages, but a language no subsets: each pair is measured once.
            by_name = {
                name: {"count": len(own[0]), **_scored(metric, *own, labels[n:])}
                for name, own in parts.items()
            }
            metrics = {**metrics, f"by_{label}": by_name}
    return metrics


@dataclass
class _Run:
    """A model in eval mode and the task that it is measured on."""

    model: BindLLM
    task: Task
    batch_size: int
    bar: Progress
    problems: dict[str, str]

    def attempt(self, name: str, work: Callable[[], T]) -> T | None:
        """Return the result of the work, or None with a problem noted: other measurements must not be lost."""
        try:
            return work()
        except Exception as error:
            name = f"{self.task.name}: {name}"
            self.problems[name] = f"{type(error).__name__}: {error}"
            logger.warning("no %s: %s", name, error, exc_info=not isinstance(error, BindLLMError))
            return None

    def measure(self, name: str, view: _View) -> tuple[float | None, dict[int, str]]:
        """Return the loss of a variant, and its answers by position."""
        total = len(view.items) + len(view.loss_items)
        advance = partial(self.bar.advance, self.bar.add_task(f"{self.task.name}: {name}", total=total))
        loss = texts = None
        if view.loss_items:
            loss = self.attempt(f"{name} loss", lambda: self._loss(view, advance))
        if view.items:
            texts = self.attempt(f"{name} answers", lambda: self._answers(view, advance))
        return loss, {} if texts is None else dict(zip(view.positions, texts, strict=True))

    def _loss(self, view: _View, advance: Callable[[int], None]) -> float:
        """Return the mean over all supervised tokens, in nats."""
        total, num_tokens, samples = 0.0, 0, view.loss_items
        # Sorted by length, so that a batch has little padding.
        lengths = [len(sample.input_ids) for sample in samples]
        for rows in sorted_batches(lengths, batch_size=min(self.batch_size, LOSS_BATCH_SIZE)):
            pad_id = self.model.tokenizer.pad_token_id
            batch = answer_batch([samples[n] for n in rows], view.lookup, pad_id=pad_id)
            output = self.model(**{key: value.to(self.model.device) for key, value in batch.items()})
            # Summed, not averaged: batches differ in their number of supervised tokens.
            logits = output.logits.float()
            total += nn.functional.cross_entropy(logits, output.targets, reduction="sum").item()
            num_tokens += output.targets.numel()
            advance(len(rows))
        if not math.isfinite(total):
            raise InputError("the loss is not finite; the weights or the embeddings contain NaN or infinity")
        return total / num_tokens

    def _answers(self, view: _View, advance: Callable[[int], None]) -> list[str]:
        """Return a greedy answer to the last question of each item; equal inputs are answered once."""
        texts: dict[int, str] = {}
        options = {"batch_size": self.batch_size, "max_new_tokens": self.task.max_new_tokens}
        for positions, answers in answer_batches(self.model, view.items, view.lookup, **options):
            texts.update(zip(positions, answers, strict=True))
            advance(len(positions))
        return [texts[n] for n in range(len(view.items))]


@contextmanager
def eval_mode(model: BindLLM) -> Iterator[None]:
    """Switch to eval mode without gradients, and restore the training mode afterwards."""
    mode = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(mode)


def loss_metrics(loss: float | None) -> Metrics:
    """Return a loss and its perplexity, which is None if it exceeds the largest float."""
    # `math.exp` raises OverflowError above this.
    finite = loss is not None and loss < math.log(sys.float_info.max)
    return {"loss": loss, "perplexity": math.exp(loss) if finite else None}


def without_media(samples: Sequence[Sample]) -> list[Sample]:
    """Return the samples without media: nothing is added to any token."""
    none = conversation.NO_MEDIA
    return [replace(sample, media_index=np.full_like(sample.media_index, none)) for sample in samples]


def shuffle_media(samples: Sequence[Sample], lookup: Lookup) -> Lookup:
    """Return a lookup that gives each media group of the samples the embedding and the tokens of another one.

    Two files with the same embedding count as one. The distinct embeddings form one cycle, in an order drawn with a
    fixed seed, and each is exchanged for the next. So none stays the same, and media that occur several times are
    exchanged for the same ones everywhere.

    Raises:
        InputError: all samples show the same media.
    """
    groups = list(dict.fromkeys(group for sample in samples for group in sample.media))
    vectors = dict(zip(groups, lookup(groups), strict=True))  # group -> [E]
    # By their bytes: files with the same embedding count once.
    partners = exchange({group: vector.numpy().tobytes() for group, vector in vectors.items()})
    if partners is None:
        raise InputError("all held-out media are the same, so they cannot be exchanged; hold out more media")
    return _ExchangedMedia(partners, vectors, lookup)


def exchange(keys: Mapping[Item, Hashable]) -> dict[Item, Item] | None:
    """Return another item for each, with another key; None if all keys are equal.

    The distinct keys form one cycle, in an order drawn with a fixed seed. So items with equal keys are exchanged for
    the same one.
    """
    distinct = list({key: item for item, key in keys.items()}.items())
    if len(distinct) < 2:
        return None
    # A cycle has no fixed point, unlike a random permutation.
    random.Random(_SEED).shuffle(distinct)
    following = distinct[1:] + distinct[:1]
    other = {key: item for (key, _), (_, item) in zip(distinct, following, strict=True)}
    return {item: other[key] for item, key in keys.items()}


@dataclass(frozen=True)
class _ExchangedMedia:
    """A lookup that returns the embedding and the tokens of the partner of each media group."""

    partners: Mapping[MediaGroup, MediaGroup]
    vectors: Mapping[MediaGroup, Tensor]
    lookup: Lookup

    def __call__(self, groups: Sequence[MediaGroup]) -> Tensor:
        return torch.stack([self.vectors[self.partners[group]] for group in groups])

    def tokens(self, groups: Sequence[MediaGroup]) -> Tensor | None:
        return tokens_of(self.lookup, [self.partners[group] for group in groups])

    def records(self, groups: Sequence[MediaGroup]) -> tuple[Tensor, Tensor, Tensor] | None:
        # Retrieved for the media that are shown, as in a request.
        return records_of(self.lookup, [self.partners[group] for group in groups])


def media_of(sample: Sample) -> MediaGroup:
    """Return the media group that the last answer of a sample listens to; empty: it listens to none."""
    # The last token belongs to the last answer; a negative index means no media.
    index = int(sample.media_index[-1])
    return sample.media[index] if index >= 0 else ()


def media_name(sample: Sample) -> str | None:
    """Return the path of these media, or the name of the row if a table or a shard contains them."""
    group = media_of(sample)
    if not group:
        return None
    # Media in memory have no name of their own, only a size.
    return (isinstance(group[0].source, bytes) and sample.name) or group[0].name
