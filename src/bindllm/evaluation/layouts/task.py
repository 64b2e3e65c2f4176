"""What a layout makes of a folder: media, and what belongs to each of them."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

from bindllm.data.report import Skipped
from bindllm.errors import InputError
from bindllm.media import Media

Kind = Literal["classify", "tag", "retrieve"]
"""One class for each media; several of them; or media of another modality that belong to it."""

NO_FILE = "the file is not there"
"""Why most media are left out: videos vanish, archives are unpacked in part."""


@dataclass(frozen=True)
class Column:
    """A modality, and the column of a table that holds its media."""

    modality: str
    name: str


@dataclass(frozen=True)
class Choice:
    """What of a data set is evaluated; a layout says which of these it knows, the others stay as they are here.

    Args:
        split: name of a split; None: the one that is usually reported.
        folds: numbers of the folds; none: all of them.
        modality: what the files are, where their endings do not tell.
        classes: a table of class names; see `bindllm.evaluation.layouts.classes`.
        source: the column of a table that holds the media.
        target: the column that holds what belongs to them.
        captions: use this many captions of each media, the first ones; None: all.
    """

    split: str | None = None
    folds: tuple[int, ...] = ()
    modality: str | None = None
    classes: Path | None = None
    source: Column | None = None
    target: Column | None = None
    captions: int | None = None


class Item(NamedTuple):
    """One media, and what is right for it.

    Args:
        media: what the encoder sees.
        labels: numbers of its classes.
        answers: what belongs to it, where something is retrieved: its captions, for example.
    """

    media: Media
    labels: tuple[int, ...] = ()
    answers: tuple[Media, ...] = ()


@dataclass
class Task:
    """A data set, read: nothing is opened yet.

    Args:
        kind: what is asked of the embeddings.
        modality: of the media.
        items: those whose file is there.
        num_listed: how many media the data set lists, missing ones too.
        classes: the names of each class, at least one of each.
        skipped: media and rows that were left out, and why.
        notes: what else a reader of the result must know.
    """

    kind: Kind
    modality: str
    items: list[Item] = field(default_factory=list)
    num_listed: int = 0
    classes: list[tuple[str, ...]] = field(default_factory=list)
    skipped: Skipped = field(default_factory=Skipped)
    notes: list[str] = field(default_factory=list)

    @property
    def answer(self) -> str:
        """The modality of what is retrieved, or of the prompts."""
        return self.items[0].answers[0].modality if self.kind == "retrieve" and self.items else "text"

    def add(self, file: str | None, name: str, *, labels: tuple[int, ...] = ()) -> None:
        """Add one classified file, or count it as missing where there is none.

        Args:
            file: its path.
            name: what the data set calls it, for the report.
            labels: numbers of its classes.
        """
        self.num_listed += 1
        if file is None:
            self.skipped.add(NO_FILE, name)
        else:
            self.items.append(Item(Media(self.modality, file), labels=labels))

    def require(self, where: Path) -> Task:
        """Return the task itself.

        Raises:
            InputError: nothing is left of it, or there is nothing to choose from; says why.
        """
        if not self.items:
            reasons = "; ".join(self.skipped.lines()) or "it is empty"
            raise InputError(f"{where}: nothing to evaluate here: {reasons}")
        if self.kind == "classify" and len(self.classes) < 2:
            raise InputError(
                f"{where}: the only class here is {self.classes[0][0]!r}; expected at least two to choose from"
            )
        return self

    def limit(self, count: int) -> Task:
        """Keep this many media, chosen by the hash of their names: the same ones every time, of all classes alike."""
        if count < len(self.items):
            self.notes.append(
                f"{count:,} of {len(self.items):,} media, chosen by hash (--limit): not the whole set"
            )
            names = [Path(item.media.name).name.encode("utf-8", "surrogateescape") for item in self.items]
            order = sorted(range(len(names)), key=lambda n: (hashlib.sha256(names[n]).digest(), n))
            self.items = [self.items[n] for n in sorted(order[:count])]
            self.num_listed = count
        return self


class Captioned:
    """Collects captions by media, in the order of their rows.

    Args:
        task: gets the items, and counts what is left out.
        most: captions that are kept of each media; None: all.
    """

    def __init__(self, task: Task, most: int | None = None) -> None:
        self._task, self._most = task, most
        self._captions: dict[str, list[str]] = {}
        self._files: dict[str, str | None] = {}

    def add(self, name: str, caption: object, row: str) -> None:
        """Note one caption.

        Args:
            name: what the data set calls the media.
            caption: a text, else it is counted and left out.
            row: where it stands, for messages.
        """
        captions = self._captions.setdefault(name, [])
        if not isinstance(caption, str) or not caption.strip():
            self._task.skipped.add("no caption", row)
        elif self._most is None or len(captions) < self._most:
            captions.append(" ".join(caption.split()))

    def place(self, name: str, file: str | None) -> None:
        """Note where the file of a media is; None: it is not there."""
        self._captions.setdefault(name, [])
        self._files[name] = file or self._files.get(name)

    def finish(self) -> None:
        """Hand the media over to the task."""
        for name, captions in self._captions.items():
            self._task.num_listed += 1
            if (file := self._files.get(name)) is None:
                self._task.skipped.add(NO_FILE, name)
            elif captions:
                answers = tuple(Media.text(caption) for caption in dict.fromkeys(captions))
                self._task.items.append(Item(Media(self._task.modality, file), answers=answers))
