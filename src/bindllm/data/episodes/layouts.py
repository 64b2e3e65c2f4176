"""Published lists of link-context learning: ISEKAI-10, ISEKAI-pair and ImageNet (arXiv 2308.07891).

A list has one JSON object per line, also if its name ends in .json. Its images are in a folder of their own
(`SourceConfig.media`). Lists for training give labeled images; those for the test give fixed episodes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from random import Random

from bindllm.conversation import Conversation, Message
from bindllm.conversation.messages import MediaResolver, RowError
from bindllm.data.episodes.draw import make_episode, name_classes, shuffled
from bindllm.data.formats.columns import as_list, as_text
from bindllm.data.report import Skipped
from bindllm.data.rows import Row
from bindllm.data.source_config import SourceConfig, Split
from bindllm.data.tables import Record, read_json_lines
from bindllm.errors import did_you_mean

Named = tuple[str, Record]
"""A record, after its name for messages."""


def read_layout(
    config: SourceConfig, number: int, resolve: MediaResolver, skipped: Skipped
) -> Iterator[tuple[Row, Split]]:
    """Yield the rows of a published list, each with its split."""
    reader = _Reader(config, number, resolve)
    first: Named | None = None
    for name, record in read_json_lines(Path(config.path), (), skipped):
        try:
            if config.episodes.layout == "isekai":
                rows = reader.isekai(name, record)
            elif "samples" in record:
                rows = reader.labeled(name, record)
            elif first is None:
                # Two successive classes are a pair.
                first, rows = (name, record), []
            else:
                pair, first = (first, (name, record)), None
                rows = reader.pair(pair)
        except RowError as error:
            skipped.add_error(error, name)
        else:
            yield from ((row, config.split or ("test" if row.task == "episode" else "train")) for row in rows)
    if first is not None:
        skipped.add("a class of the test without a partner", first[0])


class _Reader:
    """Makes the rows of a source."""

    def __init__(self, config: SourceConfig, number: int, resolve: MediaResolver) -> None:
        self._config, self._episodes = config, config.episodes
        self._number, self._resolve = number, resolve

    def isekai(self, name: str, record: Record) -> list[Row]:
        """Return the episodes of a query of ISEKAI, one for each number of shots.

        The keys ``positive_promt`` and ``negative_promt`` are spelled like this in the files.
        """
        classes = [_text(record, f"{kind}_promt") for kind in ("positive", "negative")]
        label = _text(record, "label_name")
        if label not in classes or classes[0] == classes[1]:
            raise RowError("label_name is neither positive_promt nor negative_promt, or these are the same")
        pools = [_list(record, f"{kind}_list") for kind in ("positive", "negative")]
        return self._fixed(classes, pools, record.get("image_name"), label, name)

    def labeled(self, name: str, record: Record) -> list[Row]:
        """Return the images of a training class of ImageNet.

        Its ``neighbors`` are not read: hard negatives are neighbors in the space of the model's own encoder.
        """
        label = _text(record, "class_name")
        return [self._image(image, label, name) for image in _list(record, "samples")]

    def pair(self, pair: Sequence[Named]) -> list[Row]:
        """Return the episodes of two test classes of ImageNet, for the first test samples of both."""
        classes = [_text(record, "class_name") for _, record in pair]
        rows = []
        for label, (name, record) in zip(classes, pair, strict=True):
            for image in _list(record, "test_samples")[: self._episodes.held_out_count]:
                title = f"{name} {image}"
                # Other shots for each query.
                rng = Random(f"{self._episodes.seed}/{title}")
                pools = [shuffled(_list(each, "context_samples"), rng) for _, each in pair]
                rows += self._fixed(classes, pools, image, label, title)
        return rows

    def _fixed(
        self, classes: Sequence[str], pools: Sequence[list], image: object, label: str, title: str
    ) -> list[Row]:
        """Return the episodes of a query: with the first images of each class, for each number of shots."""
        rng, most = Random(f"{self._episodes.seed}/{title}"), max(self._episodes.test_shots)
        if short := [name for name, pool in zip(classes, pools, strict=True) if len(pool) < most]:
            raise RowError(f"a class with fewer than {most} images; lower episodes.test_shots", short[0])
        names = name_classes(classes, classes, self._episodes.names, rng)
        query = self._image(image, label, title)
        shown = [
            [(names[name], self._image(value, name, title)) for value in pool[:most]]
            for name, pool in zip(classes, pools, strict=True)
        ]
        rows = []
        for count in self._episodes.test_shots:
            support = shuffled((pair for pool in shown for pair in pool[:count]), rng)
            asked = names[label], query
            row = make_episode(support, asked, list(names.values()), count, title, self._config, "test")
            rows.append(replace(row, classes=tuple(classes)))
        return rows

    def _image(self, value: object, label: str, name: str) -> Row:
        messages = (
            Message("user", (self._resolve("image", value), self._config.prompt)),
            Message("assistant", label),
        )
        return Row(Conversation(messages), (label,), name, source=self._number)


def _text(record: Record, column: str) -> str:
    if text := as_text(record.get(column), column):
        return text
    raise RowError(f"nothing in {column!r}. {did_you_mean(column, record)}")


def _list(record: Record, column: str) -> list:
    if column not in record:
        raise RowError(f"no list {column!r}. {did_you_mean(column, record)}")
    return as_list(record[column], column)
