"""Zero-shot metrics: accuracy, mean average precision, and recall in both directions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bindllm.cache.recall import Positions, chance, cosines, find_positions, hit_rate, join_positions
from bindllm.cache.visual_cache import VisualCache
from bindllm.data.collate import MediaGroup
from bindllm.data.embeddings import MediaEmbeddings
from bindllm.encoders import Encoder
from bindllm.errors import needs_extra
from bindllm.evaluation.layouts import Dataset, Kind
from bindllm.media import Media

TOP = (1, 5, 10)
"""The k of recall@k; the first two are also those of top-k accuracy."""

BLOCK = 1 << 22
"""Approximate number of scores in memory at the same time: 32 MiB."""

_CHUNK = 1024


@dataclass(frozen=True)
class Measure:
    """One number.

    Args:
        name: name of the metric.
        value: 0..1.
        chance: expected value for a random order, 0..1.
        num_queries: number of media, texts or classes that it is averaged over.
        num_candidates: number of candidates that each query is compared with.
    """

    name: str
    value: float
    chance: float
    num_queries: int
    num_candidates: int


@dataclass
class Measured:
    """The numbers of a data set.

    Args:
        measures: the numbers.
        classes: name, number of items, and accuracy or average precision of each class; None if it has no item.
        notes: remarks for the reader of the result.
    """

    measures: list[Measure] = field(default_factory=list)
    classes: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


class Row(NamedTuple):
    """One media object that is embedded, and the right results for it.

    Args:
        media: input of the encoder.
        labels: indices of its classes.
        targets: media that belong to it; each is one media object, or several sentences that are averaged.
    """

    media: Media
    labels: tuple[int, ...] = ()
    targets: tuple[MediaGroup, ...] = ()


class Scores:
    """Cosines of embeddings in the store, computed in blocks.

    Args:
        embeddings: contains all media that are compared.
        encoders: all available encoders; the cache may have been built with another one of the same space.
        cache: queries are blended with it, except those of the modalities that it skips; None: no blending.

    Raises:
        StoreError: the cache was not built with one of the encoders.
    """

    def __init__(
        self, embeddings: MediaEmbeddings, encoders: Sequence[Encoder], cache: VisualCache | None
    ) -> None:
        self._embeddings, self._encoders, self._cache = embeddings, encoders, cache
        if cache is not None:
            # Fail before hours of encoding if the cache belongs to another encoder.
            cache.blend_groups(torch.empty(0, embeddings.embedding_size), [], encoders)

    def key(self, media: Media) -> str:
        """Return the content key of media; equal for equal content."""
        return self._embeddings.key(media)

    def rows(self, groups: Sequence[MediaGroup]) -> Tensor:
        """Return the embeddings of groups, each fused into one: unit norm, [N, E]."""
        # In parts, because a lookup copies its embeddings into memory.
        parts = [self._embeddings.lookup(groups[n : n + _CHUNK]) for n in range(0, len(groups), _CHUNK)]
        return torch.cat(parts)

    def blocks(self, queries: Sequence[MediaGroup], candidates: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Yield a slice of the queries and their rounded cosines with all candidates [C, E]: float64, [Q, C]."""
        # Memory does not depend on the number of queries.
        step = max(1, min(_CHUNK, BLOCK // len(candidates)))
        for start in range(0, len(queries), step):
            part = slice(start, min(start + step, len(queries)))
            rows = self.rows(queries[part])
            # Only queries are blended; candidates stay as the encoder made them.
            if self._cache is not None:
                rows = self._cache.blend_groups(rows, queries[part], self._encoders)
            yield part, cosines(rows, candidates)

    def places(
        self, queries: Sequence[MediaGroup], candidates: Tensor, right: Sequence[Sequence[int]]
    ) -> Positions:
        """Return the position of the best right candidate of each query."""
        blocks = self.blocks(queries, candidates)
        return join_positions([find_positions(block, right[part]) for part, block in blocks])


def _classify(dataset: Dataset, rows: list[Row], prompts: list[MediaGroup], scores: Scores) -> Measured:
    """Return how often the class of the nearest prompt is right, over all media and as a mean over classes."""
    queries = [(row.media,) for row in rows]
    places = scores.places(queries, scores.rows(prompts), [row.labels for row in rows])
    labels = torch.tensor([row.labels[0] for row in rows])
    counts, size = torch.bincount(labels, minlength=len(prompts)), len(prompts)
    # A hit is a fraction if there are ties.
    right = torch.zeros(size, dtype=torch.float64).index_add(0, labels, hit_rate(places, 1))
    # Classes without media have no accuracy, so the mean leaves them out.
    means = right[counts > 0] / counts[counts > 0]
    found = Measured(notes=_notes_on_classes(prompts, counts))
    # With k as large as the number of classes every answer would be right.
    for k in [k for k in TOP[:2] if k == 1 or k < size]:
        rate = float(hit_rate(places, k).mean())
        found.measures.append(Measure(f"top-{k} accuracy", rate, min(k, size) / size, len(rows), size))
    mean = float(means.mean())
    found.measures.append(Measure("mean accuracy per class", mean, 1 / size, len(means), size))
    found.classes = [
        {"name": names[0], "num_items": count, "accuracy": hits / count if count else None}
        for names, count, hits in zip(dataset.classes, counts.tolist(), right.tolist(), strict=True)
    ]
    return found


def _tag(dataset: Dataset, rows: list[Row], prompts: list[MediaGroup], scores: Scores) -> Measured:
    """Return the mean average precision: for each class, all media are ranked."""
    targets = torch.zeros(len(rows), len(prompts), dtype=torch.bool)  # [N, C]
    for number, row in enumerate(rows):
        targets[number, list(row.labels)] = True
    counts = targets.sum(dim=0)
    # The ranking of a class needs the scores of all media, so this matrix is held as float32.
    kept = counts > 0
    cosine = torch.empty(len(rows), int(kept.sum()))  # [N, classes with media]
    for part, block in scores.blocks([(row.media,) for row in rows], scores.rows(prompts)[kept]):
        cosine[part] = block.float()
    precisions = average_precisions(cosine, targets[:, kept])
    by_chance = chance_of_precision(counts[kept], len(rows))
    found = Measured(notes=_notes_on_classes(prompts, counts))
    mean = (float(precisions.mean()), float(by_chance.mean()))
    found.measures.append(Measure("mAP", *mean, int(kept.sum()), len(rows)))
    values = iter(precisions.tolist())
    found.classes = [
        {"name": names[0], "num_items": count, "average_precision": next(values) if count else None}
        for names, count in zip(dataset.classes, counts.tolist(), strict=True)
    ]
    return found


def _retrieve(dataset: Dataset, rows: list[Row], prompts: list[MediaGroup], scores: Scores) -> Measured:
    """Return how often a right result is among the first k, from the media to their targets and back."""
    media, targets, found = _Distinct(scores.key), _Distinct(scores.key), Measured()
    # Grouped by content: a caption of two files with the same image is right for both of them.
    pairs = {(media.number((row.media,)), targets.number(group)) for row in rows for group in row.targets}
    if (equal := len(rows) - len(media.groups)) > 0:
        found.notes.append(
            f"{equal:,} media have the same content as another one: they count once, with all their targets"
        )
    names = (dataset.modality, dataset.target_modality)
    directions = (
        (names, media, targets, sorted(pairs)),
        (names[::-1], targets, media, sorted((target, one) for one, target in pairs)),
    )
    # The same links in both directions; a query may have several right candidates.
    for (source, target), queries, candidates, links in directions:
        right: list[list[int]] = [[] for _ in queries.groups]
        for query, candidate in links:
            right[query].append(candidate)
        places = scores.places(queries.groups, scores.rows(candidates.groups), right)
        counts, size = torch.tensor([len(numbers) for numbers in right]), len(candidates.groups)
        for k in [k for k in TOP if k == 1 or k < size]:
            rate, by_chance = float(hit_rate(places, k).mean()), chance(counts, size, k)
            name = f"{source} to {target} recall@{k}"
            found.measures.append(Measure(name, rate, by_chance, len(right), size))
    return found


class _Distinct:
    """Media groups with distinct content, numbered in their order."""

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
    """Return remarks on classes without media, and on classes with equal prompts."""
    notes = []
    if empty := int((counts == 0).sum()):
        notes.append(f"{empty:,} of {len(prompts):,} classes have no media here")
    # Equal prompts tie, and a tie counts as a random order.
    repeated = sum(times for times in Counter(prompts).values() if times > 1)
    if repeated:
        notes.append(f"{repeated:,} classes have the same name as another one and cannot be distinguished")
    return notes


Measurement = Callable[[Dataset, list[Row], list[MediaGroup], Scores], Measured]

MEASURES: Mapping[Kind, Measurement] = {"classify": _classify, "tag": _tag, "retrieve": _retrieve}
"""The measurement of each kind of data set."""


def average_precisions(scores: Tensor, targets: Tensor) -> Tensor:
    """Return the average precision of each class: float64, [C].

    Args:
        scores: cosine of each item with each class, -1..1, [N, C].
        targets: whether the class is right, bool [N, C]; each class is right for at least one item, as the
            number is undefined otherwise.

    Raises:
        MissingExtraError: torchmetrics is not installed.
    """
    with needs_extra("torchmetrics", extra="report", purpose="compute average precision"):
        from torchmetrics.functional.classification import binary_average_precision
    # Outside of 0..1 torchmetrics treats scores as logits, and its sigmoid would create new ties.
    shares = ((scores.double() + 1) / 2).clamp(0, 1)
    # Class by class, as its mean over classes counts a class without a right item as 0.
    parts = zip(shares.unbind(dim=1), targets.long().unbind(dim=1), strict=True)
    return torch.stack([binary_average_precision(share, target).double() for share, target in parts])


def chance_of_precision(num_right: Tensor, num_items: int) -> Tensor:
    """Return the expected average precision of items in random order: float64, [C].

    Args:
        num_right: number of items for which the class is right, at least 1, [C].
        num_items: number of all items.

    Examples:
        >>> chance_of_precision(torch.tensor([1]), 2)
        tensor([0.7500], dtype=torch.float64)
    """
    # The right item at rank r has precision (1 + (r - 1) * (right - 1) / (items - 1)) / r; averaged over all ranks.
    harmonic = float((1 / torch.arange(1, num_items + 1, dtype=torch.float64)).sum())
    others = (num_right.double() - 1) / max(num_items - 1, 1)
    return (harmonic + others * (num_items - harmonic)) / num_items
