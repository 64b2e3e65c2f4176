"""Draws episodes from labeled images: N-way, K-shot conversations, each a function of the seed and its number.

A source with ``episodes`` is read as images with captions (`bindllm.data.sources`), so that each image is embedded
once. `draw_episodes` then replaces its rows. Shots and query are these rows, with the name of the class as the answer.
Episodes of a published list (`bindllm.data.episodes.layouts`) are fixed, and stay as they are.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from functools import cache
from itertools import accumulate, islice, pairwise
from pathlib import Path
from random import Random
from typing import TypeVar

import torch

from bindllm.conversation import Conversation, Message
from bindllm.data.embeddings import MediaEmbeddings
from bindllm.data.report import Skipped, SourceReport
from bindllm.data.rows import Row
from bindllm.data.source_config import SPLITS, Names, SourceConfig, Split
from bindllm.data.stream.shards import is_stream
from bindllm.errors import InputError, listed
from bindllm.media import Media

logger = logging.getLogger(__name__)

NEIGHBORS = 100
"""Nearest classes from which hard negatives are drawn."""

PREVIEW = "hard negatives need embeddings; these episodes were drawn with random ones"
"""Remark on a source whose media are not embedded yet."""

# Two syllables: short, easy to spell for any tokenizer, 4,900 names.
_CONSONANTS, _VOWELS, _SYLLABLES = "bdfgklmnprstvz", "aeiou", 2

Classes = Mapping[str, Sequence[Row]]
"""The labeled images of each class, by its name, in the order of the table."""

Item = TypeVar("Item")


def check_episodes(sources: Sequence[SourceConfig]) -> None:
    """Refuse sources that cannot be combined.

    Raises:
        InputError: episodes from a stream, or the strategy ``mix`` without an ordinary source.
    """
    for config in sources:
        if config.episodes is not None and is_stream(config.path):
            raise InputError(
                f"{config.path}: episodes are drawn from a table, and tar shards are streamed; give a table of images "
                "and labels"
            )
    drawn = [config for config in sources if config.episodes is not None]
    mixed = [config.path for config in drawn if config.episodes.strategy == "mix"]
    if mixed and len(drawn) == len(sources):
        raise InputError(
            f"{mixed[0]}: episodes.strategy mix needs ordinary data next to the episodes: add a source without "
            "episodes, and give both a weight"
        )


def keep_classes(
    rows: Mapping[str, Sequence[Row]], config: SourceConfig, report: SourceReport
) -> dict[str, list[Row]]:
    """Return the labeled images of a source that its episodes can show, by split.

    Args:
        rows: the images of each split; the first reference of a row is its label.
        report: counts the other images, and gets the number of classes.

    Raises:
        InputError: a class in two splits, or a split with fewer classes than ways.
    """
    kept = {}
    for split in SPLITS:
        labeled, fixed = _labeled(rows[split])
        classes = find_classes(labeled, config, split, report.skipped)
        labeled = [row for images in classes.values() for row in images]
        kept[split] = [*labeled, *_without_copies(fixed, report.skipped)]
        report.classes += len(classes)
    _check_apart(rows, config.path)
    return kept


def _check_apart(rows: Mapping[str, Sequence[Row]], path: str) -> None:
    """Refuse labeled images of one class in several splits."""
    splits: dict[str, set[str]] = {}
    for split, found in rows.items():
        for row in _labeled(found)[0]:
            splits.setdefault(_label(row), set()).add(split)
    # A name that training has seen would measure memory, not learning from the shots.
    if both := [name for name, found in splits.items() if len(found) > 1]:
        raise InputError(
            f"{path}: {len(both):,} classes have images in several splits ({', '.join(both[:3])}); episodes "
            "need other classes in training than in the held-out splits. Give each class one split, or set "
            "columns: {split: null}, which splits classes by the hash of their name"
        )


def _compare_lists(rows: Mapping[str, Sequence[Row]]) -> None:
    """Warn about classes of published test lists that training shows."""
    trained = {_label(row) for row in _labeled(rows.get("train", ()))[0]}
    tested = dict.fromkeys(name for row in rows.get("test", ()) for name in row.classes)
    # Not refused: the common class of a pair of ISEKAI may be one of ImageNet.
    if both := [name for name in tested if name in trained]:
        logger.warning(
            "%s of %s classes of the test episodes have images in the training split (%s): their results may be memory",
            *(f"{len(both):,}", f"{len(tested):,}", listed(both)),
        )


def find_classes(
    rows: Sequence[Row],
    config: SourceConfig,
    split: Split,
    skipped: Skipped,
    key: Callable[[Media], Hashable] = lambda media: media,
) -> dict[str, list[Row]]:
    """Return the images of each class of a split that has enough of them; count the others.

    Args:
        key: equal for equal images, so that a query is never a copy of a shot.

    Raises:
        InputError: there are images, but fewer classes than ways.
    """
    episodes, classes, seen = config.episodes, {}, set()
    for row in rows:
        image = tuple(map(key, row.media))
        if image in seen:
            skipped.add("an image that has a label already, in this row or an earlier one", row.name)
            continue
        seen.add(image)
        classes.setdefault(_label(row), []).append(row)
    needed = _needed(config, split)
    for name, images in classes.items():
        for row in images if len(images) < needed else ():
            skipped.add(
                f"a class with fewer than {needed} images, the shots and the query", f"{row.name}: {name}"
            )
    found = {name: images for name, images in classes.items() if len(images) >= needed}
    if rows and len(found) < episodes.ways:
        option = "test_shots" if split == "test" else "shots"
        raise InputError(
            f"{config.path}: the {split} split has {len(found)} classes of at least {needed} images (of "
            f"{len(classes)} classes), and an episode needs {episodes.ways} (episodes.ways). Add images, put other "
            f"classes into this split (held_out, or the column split), or lower episodes.{option}, which is "
            f"{needed - 1}"
        )
    return found


def draw_episodes(
    rows: Mapping[str, Sequence[Row]],
    sources: Sequence[SourceConfig],
    skipped: Skipped,
    embeddings: MediaEmbeddings | None = None,
) -> dict[str, list[Row]]:
    """Replace the labeled images of sources with ``episodes`` by their episodes; other rows stay.

    Args:
        skipped: counts images that have the same content as another one, and images of classes that became too small.
        embeddings: embeddings of all media. Without them hard negatives are random, and copies of an image are not
            found.

    Raises:
        InputError: a split has fewer classes than ways, or a class is in two splits.
    """
    pool = {
        split: [row for row in found if sources[row.source].episodes is not None]
        for split, found in rows.items()
    }
    _check_apart(pool, ", ".join(config.path for config in sources if config.episodes is not None))
    _compare_lists(pool)
    drawn: dict[str, list[Row]] = {split: [] for split in rows}
    for split, found in rows.items():
        for number, config in enumerate(sources):
            own = [row for row in found if row.source == number]
            if config.episodes is None or not own:
                drawn[split] += own
                continue
            key = {} if embeddings is None else {"key": embeddings.key}
            labeled, fixed = _labeled(own)
            classes = find_classes(labeled, config, split, skipped, **key)
            drawn[split] += _draw(classes, config, split, embeddings) if labeled else []
            drawn[split] += _without_copies(fixed, skipped, **key)
    return drawn


def _without_copies(
    episodes: Sequence[Row], skipped: Skipped, key: Callable[[Media], Hashable] = lambda media: media
) -> list[Row]:
    """Return the fixed episodes whose query is not among its shots; ``key`` is equal for equal images."""
    shown = [[tuple(map(key, group)) for group in row.conversation.media_groups] for row in episodes]
    # With every number of shots, so that all numbers have the same queries.
    copied = {query for *shots, query in shown if query in shots}
    kept = []
    for row, (*_, query) in zip(episodes, shown, strict=True):
        if query in copied:
            skipped.add("the query is among its shots", row.name)
        else:
            kept.append(row)
    return kept


def _draw(
    classes: Classes, config: SourceConfig, split: Split, embeddings: MediaEmbeddings | None
) -> list[Row]:
    """Return the episodes of a source in one split."""
    episodes, nearest = config.episodes, None
    if episodes.negatives == "hard" and embeddings is not None:
        nearest = _nearest_classes(classes, embeddings)
    count = episodes.count if split == "train" else episodes.held_out_count
    shots = episodes.test_shots if split == "test" else [None]
    return [_episode(number, k, split, classes, config, nearest) for k in shots for number in range(count)]


def _episode(
    number: int,
    shots: int | None,
    split: Split,
    classes: Classes,
    config: SourceConfig,
    nearest: Callable[[str], list[str]] | None,
) -> Row:
    """Return an episode; None: the number of shots is drawn."""
    # How to read this: everything that episodes of different shots share is drawn first, then order and noise.
    episodes = config.episodes
    # Only `random()` of a generator is the same in every version of Python.
    rng = Random(f"{episodes.seed}/{split}/{number}")
    chosen = _choose(list(classes), episodes.ways, rng, nearest)
    names = name_classes(chosen, classes, episodes.names, rng)
    # As many as the largest number of shots, so that fewer shots are the first of them.
    needed = _needed(config, split)
    images = {name: [*islice(draw_in_turn(classes[name], rng), needed)] for name in chosen}
    target = chosen[int(rng.random() * len(chosen))]
    drawn = _draw_shots(config, rng)
    shots = drawn if shots is None else shots
    # The first image of a class is the query, if the class is asked for; so a query is never a shot.
    support = shuffled(((name, row) for name in chosen for row in images[name][1 : 1 + shots]), rng)
    given = [(names[name], row) for name, row in support]
    if split == "train":
        given = [
            (_with_noise(name, list(names.values()), episodes.label_noise, rng), row) for name, row in given
        ]
    title = f"{Path(config.path).name} {split} episode {number + 1}"
    return make_episode(
        given, (names[target], images[target][0]), list(names.values()), shots, title, config, split
    )


def make_episode(
    support: Sequence[tuple[str, Row]],
    query: tuple[str, Row],
    names: Sequence[str],
    shots: int,
    title: str,
    config: SourceConfig,
    split: Split,
) -> Row:
    """Return the conversation of an episode.

    Args:
        support: name and labeled image of each shot, in the order of the prompt.
        query: true name and image of the query.
    """
    name, row = query
    counted = f"{shots} shot{'s' * (shots != 1)}"
    return Row(
        Conversation(tuple(message for pair in (*support, query) for message in _turn(*pair))),
        references=(name,),
        name=f"{title}, {counted}",
        source=row.source,
        task="episode",
        subset=counted if split == "test" else "",
        options=tuple(names),
        # Only the query is measured, so only its answer must fit.
        query_only=config.episodes.loss == "query" or split == "test",
    )


def _with_noise(name: str, names: Sequence[str], probability: float, rng: Random) -> str:
    """Return the name of a shot or, with a probability, another name of the episode."""
    if rng.random() >= probability:
        return name
    others = [other for other in names if other != name]
    return others[int(rng.random() * len(others))]


def _turn(name: str, row: Row) -> tuple[Message, ...]:
    """Return the question about a labeled image, and a name as the answer."""
    return (*row.conversation.messages[:-1], Message("assistant", name))


def _label(row: Row) -> str:
    return row.references[0]


def _labeled(rows: Sequence[Row]) -> tuple[list[Row], list[Row]]:
    """Return the labeled images among rows, and the fixed episodes."""
    fixed = [row for row in rows if row.task == "episode"]
    return [row for row in rows if row.task != "episode"], fixed


def _needed(config: SourceConfig, split: Split) -> int:
    """Return the images that a class must have: all shots, and the query."""
    return max(config.episodes.test_shots if split == "test" else config.episodes.shot_range) + 1


def _choose(
    names: Sequence[str], ways: int, rng: Random, nearest: Callable[[str], list[str]] | None
) -> list[str]:
    """Return the classes of an episode."""
    chosen = [names[int(rng.random() * len(names))]]
    if nearest is None:
        left = [name for name in names if name != chosen[0]]
        weights = [1] * len(left)
    else:
        left = nearest(chosen[0])[: max(NEIGHBORS, ways - 1)]
        # The paper's weights: 100 for the nearest class, 99 for the next.
        weights = [max(1, NEIGHBORS - rank) for rank in range(len(left))]
    while len(chosen) < ways:
        index = _weighted(weights, rng)
        chosen.append(left.pop(index))
        del weights[index]
    # Otherwise the class with the true neighbors would always come first.
    return shuffled(chosen, rng)


def _nearest_classes(classes: Classes, embeddings: MediaEmbeddings) -> Callable[[str], list[str]]:
    """Return a function that lists the nearest classes of one: by the cosine of their mean embeddings."""
    names = list(classes)
    means = torch.stack(
        [embeddings.lookup([row.media for row in classes[name]]).mean(0) for name in names]
    )  # [C, E]
    means = torch.nn.functional.normalize(means, dim=-1)
    positions = {name: n for n, name in enumerate(names)}

    @cache
    def ranked(name: str) -> tuple[str, ...]:
        order = (means @ means[positions[name]]).argsort(descending=True, stable=True).tolist()
        return tuple(names[n] for n in order if n != positions[name])

    return lambda name: list(ranked(name))


def name_classes(chosen: Sequence[str], known: Collection[str], names: Names, rng: Random) -> dict[str, str]:
    """Return the name of each class in an episode; a made-up one is never the name of a known class."""
    if names == "true":
        return {name: name for name in chosen}
    made: dict[str, str] = {}
    for each in chosen:
        name = ""
        # All have the same length, so that none is a part of another one.
        while not name or name in known or name in made.values():
            name = "".join(
                letters[int(rng.random() * len(letters))] for letters in (_CONSONANTS, _VOWELS) * _SYLLABLES
            )
        made[each] = name
    return made


def _draw_shots(config: SourceConfig, rng: Random) -> int:
    """Return the number of shots of each class in a training episode."""
    episodes = config.episodes
    low, high = episodes.shot_range
    if episodes.strategy != "2-way-weight":
        return low + int(rng.random() * (high - low + 1))
    # Relative to the largest, whose exponential could overflow.
    weights = [math.exp(episodes.ways * (shots - high)) for shots in range(low, high + 1)]
    return low + _weighted(weights, rng)


def _weighted(weights: Sequence[float], rng: Random) -> int:
    """Return an index with a probability proportional to its weight."""
    edges = [0.0, *accumulate(weights)]
    position = rng.random() * edges[-1]
    return next(n for n, (_, high) in enumerate(pairwise(edges)) if position < high)


def draw_in_turn(items: Sequence[Item], rng: Random) -> Iterator[Item]:
    """Yield all items in random order, one after the other: more of them keep the first ones."""
    moved: dict[int, int] = {}
    for n in range(len(items)):
        # Fisher-Yates, which remembers only the positions that have moved: there may be a million items.
        other = n + int(rng.random() * (len(items) - n))
        yield items[moved.get(other, other)]
        moved[other] = moved.get(n, n)


def shuffled(items: Iterable[Item], rng: Random) -> list[Item]:
    """Return the items in random order."""
    return sorted(items, key=lambda _: rng.random())
