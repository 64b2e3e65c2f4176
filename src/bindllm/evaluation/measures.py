"""Zero-shot metrics: accuracy, mean average precision, recall in both directions, ranks, and the chance level of each.

Equal scores do not rank: such answers count as if they were in random order. An encoder that gives every input the same
embedding therefore reaches exactly chance, whatever the order of the files.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bindllm.cache.visual_cache import VisualCache
from bindllm.data.collate import MediaGroup
from bindllm.data.embeddings import MediaEmbeddings
from bindllm.encoders import Encoder
from bindllm.errors import needs_extra
from bindllm.evaluation.layouts import Dataset, Kind
from bindllm.media import Media

RECALL_AT = (1, 5, 10)
"""The k of recall@k; the first two are also those of top-k accuracy."""

DECIMALS = 6
"""Cosines are rounded to this many decimals before they are compared, so that equal embeddings stay equal whatever the
order of summation."""

BLOCK = 1 << 22
"""Approximate number of scores in memory at the same time: 32 MiB."""

_CHUNK = 1024


@dataclass(frozen=True)
class Measure:
    """One number.

    Args:
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
        classes: name, number of items, and accuracy or average precision of each class; None if it has no item.
    """

    measures: list[Measure] = field(default_factory=list)
    classes: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


class Row(NamedTuple):
    """One media object that is embedded, and the right results for it.

    Args:
        targets: media that belong to it; each is one media object, or several sentences that are averaged.
    """

    media: Media
    labels: tuple[int, ...] = ()
    targets: tuple[MediaGroup, ...] = ()


class Scores:
    """Cosines of embeddings in the store, computed in blocks.

    Args:
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
            cache.check_encoders({encoder.fingerprint() for encoder in encoders})

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

    def positions(
        self, queries: Sequence[MediaGroup], candidates: Tensor, right: Sequence[Sequence[int]]
    ) -> Positions:
        """Return the position of the best right candidate of each query."""
        blocks = self.blocks(queries, candidates)
        return join_positions([find_positions(block, right[part]) for part, block in blocks])


def _classify(dataset: Dataset, rows: list[Row], prompts: list[MediaGroup], scores: Scores) -> Measured:
    """Return how often the class of the nearest prompt is right, over all media and as a mean over classes."""
    queries = [(row.media,) for row in rows]
    positions = scores.positions(queries, scores.rows(prompts), [row.labels for row in rows])
    labels = torch.tensor([row.labels[0] for row in rows])
    counts, size = torch.bincount(labels, minlength=len(prompts)), len(prompts)
    # A hit is a fraction if there are ties.
    right = torch.zeros(size, dtype=torch.float64).index_add(0, labels, hit_rate(positions, 1))
    # Classes without media have no accuracy, so the mean leaves them out.
    means = right[counts > 0] / counts[counts > 0]
    found = Measured(notes=_notes_on_classes(prompts, counts))
    # With k as large as the number of classes every answer would be right.
    for k in [k for k in RECALL_AT[:2] if k == 1 or k < size]:
        rate = float(hit_rate(positions, k).mean())
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


_Indexed = dict[tuple[str, ...], tuple[int, MediaGroup]]


def _retrieve(dataset: Dataset, rows: list[Row], prompts: list[MediaGroup], scores: Scores) -> Measured:
    """Return how often a right result is among the first k, from the media to their targets and back."""
    media: _Indexed = {}
    targets: _Indexed = {}
    found = Measured()

    def index_of(known: _Indexed, group: MediaGroup) -> int:
        # By content: a caption of two files with the same image is right for both of them.
        return known.setdefault(tuple(map(scores.key, group)), (len(known), group))[0]

    pairs = {
        (index_of(media, (row.media,)), index_of(targets, group)) for row in rows for group in row.targets
    }
    if (equal := len(rows) - len(media)) > 0:
        found.notes.append(
            f"{equal:,} media have the same content as another one: they count once, with all their targets"
        )
    names = (dataset.modality, dataset.target_modality)
    sides = [[group for _, group in known.values()] for known in (media, targets)]
    directions = (
        (names, *sides, sorted(pairs)),
        (names[::-1], *sides[::-1], sorted((target, one) for one, target in pairs)),
    )
    # The same links in both directions; a query may have several right candidates.
    for (source, target), queries, candidates, links in directions:
        right: list[list[int]] = [[] for _ in queries]
        for query, candidate in links:
            right[query].append(candidate)
        positions = scores.positions(queries, scores.rows(candidates), right)
        counts, size = torch.tensor([len(indices) for indices in right]), len(candidates)
        for k in [k for k in RECALL_AT if k == 1 or k < size]:
            rate, by_chance = float(hit_rate(positions, k).mean()), chance(counts, size, k)
            name = f"{source} to {target} recall@{k}"
            found.measures.append(Measure(name, rate, by_chance, len(right), size))
    return found


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

    Examples:
        >>> chance_of_precision(torch.tensor([1]), 2)
        tensor([0.7500], dtype=torch.float64)
    """
    # The right item at rank r has precision (1 + (r - 1) * (right - 1) / (items - 1)) / r; averaged over all ranks.
    harmonic = float((1 / torch.arange(1, num_items + 1, dtype=torch.float64)).sum())
    others = (num_right.double() - 1) / max(num_items - 1, 1)
    return (harmonic + others * (num_items - harmonic)) / num_items


class Positions(NamedTuple):
    """The position of the best right answer of each query, three times int64 [Q].

    Args:
        above: Wrong answers with a higher score.
        tied: Wrong answers with the same score.
        equals: Right answers with that score, including itself.
    """

    above: Tensor
    tied: Tensor
    equals: Tensor


def cosines(queries: Tensor, candidates: Tensor) -> Tensor:
    """Return the rounded cosines of unit embeddings [Q, E] and [C, E]: float64, [Q, C]."""
    return (queries.double() @ candidates.double().T).round(decimals=DECIMALS)


def find_positions(scores: Tensor, right: Sequence[Sequence[int]]) -> Positions:
    """Find the best right answer of each query. If its score is NaN, all other answers are above it.

    Args:
        scores: Of each candidate, [Q, C].
        right: Indices of the right candidates of each query, at least one each.
    """
    # A flat list of pairs, because queries have different numbers of right answers.
    counts = torch.tensor([len(indices) for indices in right])
    rows = torch.arange(len(right)).repeat_interleave(counts)
    columns = torch.tensor([index for indices in right for index in indices])
    values = scores[rows, columns]
    best = torch.full((len(right),), -torch.inf, dtype=scores.dtype).scatter_reduce(0, rows, values, "amax")
    equals = torch.zeros(len(right), dtype=torch.long).index_add(0, rows, (values == best[rows]).long())
    # Not `scores > best`: with NaN on either side that would be False.
    above = (~(scores <= best[:, None])).sum(dim=1)
    return Positions(above, (scores == best[:, None]).sum(dim=1) - equals, equals)


def join_positions(parts: Sequence[Positions]) -> Positions:
    """Return the positions of all parts of the queries."""
    return Positions(*(torch.cat(columns) for columns in zip(*parts, strict=True)))


def hit_rate(positions: Positions, k: int) -> Tensor:
    """Return for each query the probability that a right answer is among the first k: float64, [Q].

    It is 0 or 1 without ties; tied answers count as being in random order.

    Examples:
        >>> hit_rate(find_positions(torch.tensor([[0.9, 0.5, 0.5]]), [[1]]), 2)
        tensor([0.5000], dtype=torch.float64)
    """
    # Positions among the first k that the tied answers share.
    free = (k - positions.above).clamp(min=0)
    miss = torch.ones(len(free), dtype=torch.float64)
    # Drawing without replacement: the probability that every free position goes to a wrong answer.
    for drawn in range(k):
        wrong = (positions.tied - drawn).clamp(min=0).double()
        left = (positions.tied + positions.equals - drawn).clamp(min=1)
        miss = torch.where(drawn < free, miss * wrong / left, miss)
    return 1 - miss


def mean_ranks(positions: Positions) -> Tensor:
    """Return the rank, from 1, of the best right answer of each query, a mean over the orders of ties: float64, [Q].

    Other right answers do not count against the best.

    Examples:
        >>> mean_ranks(find_positions(torch.tensor([[0.9, 0.5, 0.5]]), [[1]]))
        tensor([2.5000], dtype=torch.float64)
    """
    # The first of r right answers among r + w tied ones has the mean rank (r + w + 1) / (r + 1).
    return positions.above + (positions.tied + positions.equals + 1).double() / (positions.equals + 1)


def chance(num_right: Tensor, num_candidates: int, k: int) -> float:
    """Return the mean hit rate of a random order.

    Args:
        num_right: Number of right answers of each query, int64 [Q].

    Examples:
        >>> round(chance(torch.tensor([1]), 50, 5), 6)
        0.1
    """
    # Equal scores count as a random order, so chance is the hit rate of a complete tie.
    everything_tied = Positions(torch.zeros_like(num_right), num_candidates - num_right, num_right)
    return float(hit_rate(everything_tied, k).mean())
