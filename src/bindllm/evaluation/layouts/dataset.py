"""A data set as a layout reads it: media and their labels or captions."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

from bindllm.data.report import Skipped
from bindllm.errors import InputError
from bindllm.media import Media

Kind = Literal["classify", "tag", "retrieve"]
"""One class per item; several classes per item; or media of another modality that belong to the item."""

NO_FILE = "the file does not exist"
"""Why most media are skipped: videos are removed, archives are only partly unpacked."""


@dataclass(frozen=True)
class Column:
    """A modality, and the column of a table that contains its media."""

    modality: str
    name: str


@dataclass(frozen=True)
class Choice:
    """Selection of a part of a data set. Each layout supports some of these fields (`Layout.uses`).

    Args:
        split: name of a split; None: the split that is usually reported.
        folds: numbers of the folds; empty: all folds.
        modality: modality of the files, if their suffixes do not show it.
        classes: a table of class names; see `bindllm.evaluation.layouts.files.read_classes`.
        source: column of a table that contains the media.
        target: column that contains the media or texts that belong to them.
        captions: use only this many captions of each item, the first ones; None: all.
    """

    split: str | None = None
    folds: tuple[int, ...] = ()
    modality: str | None = None
    classes: Path | None = None
    source: Column | None = None
    target: Column | None = None
    captions: int | None = None


class Item(NamedTuple):
    """One media object and the right results for it.

    Args:
        media: input of the encoder.
        labels: indices of its classes.
        targets: media or texts that belong to it in retrieval, its captions for example.
    """

    media: Media
    labels: tuple[int, ...] = ()
    targets: tuple[Media, ...] = ()


@dataclass
class Dataset:
    """A data set; none of its media has been opened yet.

    Args:
        kind: how it is measured.
        modality: modality of the media.
        items: the media whose file exists.
        num_listed: number of media that the data set lists, missing ones included.
        classes: names of each class, at least one.
        skipped: skipped media and rows, and why.
        notes: remarks for the reader of the result.
    """

    kind: Kind
    modality: str
    items: list[Item] = field(default_factory=list)
    num_listed: int = 0
    classes: list[tuple[str, ...]] = field(default_factory=list)
    skipped: Skipped = field(default_factory=Skipped)
    notes: list[str] = field(default_factory=list)

    @property
    def target_modality(self) -> str:
        """Modality of the retrieved media, or of the prompts."""
        return self.items[0].targets[0].modality if self.kind == "retrieve" and self.items else "text"

    def add(self, file: str | None, name: str, *, labels: tuple[int, ...] = ()) -> None:
        """Add one labeled file, or count it as missing.

        Args:
            file: its path; None: it does not exist.
            name: its name in the data set, for the report.
            labels: indices of its classes.
        """
        # Missing media are listed too, because the report gives their share.
        self.num_listed += 1
        if file is None:
            self.skipped.add(NO_FILE, name)
        else:
            self.items.append(Item(Media(self.modality, file), labels=labels))

    def require(self, where: Path) -> Dataset:
        """Return the data set itself.

        Raises:
            InputError: it has no items, or only one class to choose from.
        """
        # Chance would be 1 with a single class, and the mean over no items is undefined.
        if not self.items:
            reasons = "; ".join(self.skipped.lines()) or "it is empty"
            raise InputError(f"{where}: nothing to evaluate here: {reasons}")
        if self.kind == "classify" and len(self.classes) < 2:
            raise InputError(
                f"{where}: the only class here is {self.classes[0][0]!r}; expected at least two to choose from"
            )
        return self

    def limit(self, count: int) -> Dataset:
        """Keep this many items, chosen by the hash of their names: the same every time, from all classes."""
        if count < len(self.items):
            self.notes.append(
                f"{count:,} of {len(self.items):,} media, chosen by hash (--limit), not the whole set"
            )
            # By file name, so that the choice does not depend on the folder; bytes, as names may not be UTF-8.
            names = [Path(item.media.name).name.encode("utf-8", "surrogateescape") for item in self.items]
            order = sorted(range(len(names)), key=lambda n: (hashlib.sha256(names[n]).digest(), n))
            # Back in the order of the data set.
            self.items = [self.items[n] for n in sorted(order[:count])]
            self.num_listed = count
        return self


class Captions:
    """Collects captions by media, in the order of their rows.

    Args:
        dataset: receives the items and counts skipped rows.
        limit: number of captions kept per item; None: all.
    """

    def __init__(self, dataset: Dataset, limit: int | None = None) -> None:
        self._dataset, self._limit = dataset, limit
        # By name, because tables have one row per caption, in any order.
        self._captions: dict[str, list[str]] = {}
        self._files: dict[str, str | None] = {}

    def add(self, name: str, caption: object, row: str) -> None:
        """Add one caption.

        Args:
            name: name of the media in the data set.
            caption: a text; anything else is skipped and counted.
            row: its position in the table, for messages.
        """
        # Even without a caption, so that the media are listed.
        captions = self._captions.setdefault(name, [])
        if not isinstance(caption, str) or not caption.strip():
            self._dataset.skipped.add("no caption", row)
        elif self._limit is None or len(captions) < self._limit:
            captions.append(" ".join(caption.split()))

    def set_file(self, name: str, file: str | None) -> None:
        """Set the path of the media; None: the file does not exist."""
        self._captions.setdefault(name, [])
        # A later row may have found the file that an earlier one lacks.
        self._files[name] = file or self._files.get(name)

    def finish(self) -> None:
        """Add the items to the data set."""
        for name, captions in self._captions.items():
            # Listed even if the file is missing, as the share of missing media is reported.
            self._dataset.num_listed += 1
            if (file := self._files.get(name)) is None:
                self._dataset.skipped.add(NO_FILE, name)
            elif captions:
                # Repeated captions of one item count once.
                targets = tuple(Media.text(caption) for caption in dict.fromkeys(captions))
                self._dataset.items.append(Item(Media(self._dataset.modality, file), targets=targets))
