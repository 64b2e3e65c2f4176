"""The measures of zero-shot evaluation: accuracy, mean average precision, and recall in both directions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from bindllm.cache.recall import Places, chance, cosines, find_places, hit_rate, join_places
from bindllm.cache.visual_cache import VisualCache
from bindllm.data.collate import MediaGroup
from bindllm.data.embeddings import MediaEmbeddings
from bindllm.encoders import Encoder
from bindllm.evaluation.layouts import Kind, Task
from bindllm.evaluation.precision import average_precisions, chance_of_precision
from bindllm.evaluation.result import Measure, Result
from bindllm.media import Media

TOP = (1, 5, 10)
"""Places that a right answer may take, in retrieval; the first two in classification."""

BLOCK = 1 << 22
"""Scores that are in memory at the same time, about: 32 MiB."""

_CHUNK = 1024


class Row(NamedTuple):
    """One media that is embedded, with what is right for it.

    Args:
        media: what the encoder saw.
        labels: numbers of its classes.
        answers: what belongs to it; each is one media, or several sentences that are averaged.
    """

    media: Media
    labels: tuple[int, ...] = ()
    answers: tuple[MediaGroup, ...] = ()


class Scores:
    """Cosines of embeddings in the store; a part of them is in memory at a time.

    Args:
        embeddings: filled with all media that are asked for.
        encoders: all that are at hand; the cache may be that of another one of the same space.
        cache: queries are blended with it, except those of the modalities that it skips; None: as they are.

    Raises:
        StoreError: the cache was built with none of the encoders.
    """

    def __init__(
        self, embeddings: MediaEmbeddings, encoders: Sequence[Encoder], cache: VisualCache | None
    ) -> None:
        self._embeddings, self._encoders, self._cache = embeddings, encoders, cache
        if cache is not None:
            # A cache of another encoder is refused before hours of encoding, not after.
            cache.blend_groups(torch.empty(0, embeddings.embedding_size), [], encoders)

    def key(self, media: Media) -> str:
        """Return what media of equal content have in common."""
        return self._embeddings.key(media)

    def rows(self, groups: Sequence[MediaGroup]) -> Tensor:
        """Return the embeddings of groups, each fused into one: unit norm, [N, E]."""
        parts = [self._embeddings.lookup(groups[n : n + _CHUNK]) for n in range(0, len(groups), _CHUNK)]
        return torch.cat(parts)

    def blocks(self, queries: Sequence[MediaGroup], candidates: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Yield which queries, and their cosines with all candidates [C, E]: float64, [Q, C], rounded."""
        step = max(1, min(_CHUNK, BLOCK // len(candidates)))
        for start in range(0, len(queries), step):
            part = slice(start, min(start + step, len(queries)))
            rows = self.rows(queries[part])
            if self._cache is not None:
                rows = self._cache.blend_groups(rows, queries[part], self._encoders)
            yield part, cosines(rows, candidates)

    def places(
        self, queries: Sequence[MediaGroup], candidates: Tensor, right: Sequence[Sequence[int]]
    ) -> Places:
        """Return where the best right candidate of each query stands."""
        blocks = self.blocks(queries, candidates)
        return join_places([find_places(block, right[part]) for part, block in blocks])


def _classify(task: Task, rows: list[Row], prompts: list[MediaGroup], scores: Scores, result: Result) -> None:
    """Measure how often the class of the nearest prompt is right, over all media and as a mean over classes."""
    queries = [(row.media,) for row in rows]
    places = scores.places(queries, scores.rows(prompts), [row.labels for row in rows])
    labels = torch.tensor([row.labels[0] for row in rows])
    counts = torch.bincount(labels, minlength=len(prompts))
    first = hit_rate(places, 1)
    right = torch.zeros(len(prompts), dtype=torch.float64).index_add(0, labels, first)
    means = right[counts > 0] / counts[counts > 0]
    size = len(prompts)
    for k in [k for k in TOP[:2] if k == 1 or k < size]:
        rate = float(hit_rate(places, k).mean())
        result.measures.append(Measure(f"top-{k} accuracy", rate, min(k, size) / size, len(rows), size))
    result.measures.append(
        Measure("mean accuracy per class", float(means.mean()), 1 / size, len(means), size)
    )
    result.classes = [
        {"name": names[0], "num_items": count, "accuracy": hits / count if count else None}
        for names, count, hits in zip(task.classes, counts.tolist(), right.tolist(), strict=True)
    ]
    result.notes += _notes_on_classes(prompts, counts)


def _tag(task: Task, rows: list[Row], prompts: list[MediaGroup], scores: Scores, result: Result) -> None:
    """Measure the mean average precision: for each class, how far ahead its media stand among all media."""
    targets = torch.zeros(len(rows), len(prompts), dtype=torch.bool)
    for number, row in enumerate(rows):
        targets[number, list(row.labels)] = True
    counts = targets.sum(dim=0)
    kept = counts > 0
    cosine = torch.empty(len(rows), int(kept.sum()))
    for part, block in scores.blocks([(row.media,) for row in rows], scores.rows(prompts)[kept]):
        cosine[part] = block.float()
    precisions = average_precisions(cosine, targets[:, kept])
    by_chance = chance_of_precision(counts[kept], len(rows))
    result.measures.append(
        Measure("mAP", float(precisions.mean()), float(by_chance.mean()), int(kept.sum()), len(rows))
    )
    found = iter(precisions.tolist())
    result.classes = [
        {"name": names[0], "num_items": count, "average_precision": next(found) if count else None}
        for names, count in zip(task.classes, counts.tolist(), strict=True)
    ]
    result.notes += _notes_on_classes(prompts, counts)


def _retrieve(task: Task, rows: list[Row], prompts: list[MediaGroup], scores: Scores, result: Result) -> None:
    """Measure how often something right is among the first, from the media to their answers and back."""
    media, answers = _Distinct(scores.key), _Distinct(scores.key)
    pairs = {(media.number((row.media,)), answers.number(group)) for row in rows for group in row.answers}
    if (equal := len(rows) - len(media.groups)) > 0:
        result.notes.append(
            f"{equal:,} media have the content of another one: they count once, with all answers"
        )
    directions = (
        (task.modality, task.answer, media, answers, sorted(pairs)),
        (task.answer, task.modality, answers, media, sorted((answer, one) for one, answer in pairs)),
    )
    for source, target, queries, candidates, links in directions:
        right: list[list[int]] = [[] for _ in queries.groups]
        for query, candidate in links:
            right[query].append(candidate)
        places = scores.places(queries.groups, scores.rows(candidates.groups), right)
        counts, size = torch.tensor([len(numbers) for numbers in right]), len(candidates.groups)
        for k in [k for k in TOP if k == 1 or k < size]:
            rate, by_chance = float(hit_rate(places, k).mean()), chance(counts, size, k)
            result.measures.append(
                Measure(f"{source} to {target} recall@{k}", rate, by_chance, len(right), size)
            )


class _Distinct:
    """Media groups of which each content occurs once, numbered in their order."""

    def __init__(self, key: Callable[[Media], str]) -> None:
        self.groups: list[MediaGroup] = []
        self._key = key
        self._numbers: dict[tuple[str, ...], int] = {}

    def number(self, group: MediaGroup) -> int:
        """Return the number of a group."""
        key = tuple(map(self._key, group))
        if key not in self._numbers:
            self._numbers[key] = len(self.groups)
            self.groups.append(group)
        return self._numbers[key]


def _notes_on_classes(prompts: list[MediaGroup], counts: Tensor) -> list[str]:
    """Return what a reader must know about the classes: those without media, and those that no prompt tells apart."""
    notes = []
    if empty := int((counts == 0).sum()):
        notes.append(f"{empty:,} of {len(prompts):,} classes have no media here")
    repeated = sum(times for times in Counter(prompts).values() if times > 1)
    if repeated:
        notes.append(f"{repeated:,} classes share their name with another one, so nothing tells them apart")
    return notes


Measurement = Callable[[Task, list[Row], list[MediaGroup], Scores, Result], None]

MEASURES: Mapping[Kind, Measurement] = {"classify": _classify, "tag": _tag, "retrieve": _retrieve}
"""How each kind of task is measured: the numbers are added to the result."""
