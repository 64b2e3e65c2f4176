"""A data set as a layout reads it: media with labels or captions, its files, tables and names of classes.

Errors name file and line.
"""

from __future__ import annotations

import filecmp
import hashlib
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from bindllm.atomic import read_json
from bindllm.data.report import Skipped
from bindllm.errors import InputError, did_you_mean
from bindllm.media import SUFFIXES, Media

Kind = Literal["classify", "tag", "retrieve"]
"""One class per item; several classes per item; or media of another modality that belong to the item."""

NO_FILE = "the file does not exist"
"""Why most media are skipped: videos are removed, archives are only partly unpacked."""

_CHECK = "check the file"
# A WordNet id.
_WNID = re.compile(r"n\d{8}")


@dataclass(frozen=True)
class Column:
    """A modality, and the column of a table that contains its media."""

    modality: str
    name: str


@dataclass(frozen=True)
class Choice:
    """Selection of a part of a data set. Each layout supports some of these fields (see `LAYOUTS`).

    Args:
        split: name of a split; None: the split that is usually reported.
        folds: numbers of the folds; empty: all folds.
        modality: modality of the files, if their suffixes do not show it.
        classes: a table of class names; see `read_classes`.
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
        items: the media whose file exists.
        num_listed: number of media that the data set lists, missing ones included.
        classes: names of each class, at least one.
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

    def add(
        self, file: str | None, name: str, *, labels: tuple[int, ...] = (), targets: Sequence[Media] = ()
    ) -> None:
        """Add one file with its labels or targets, or count it as missing.

        Args:
            file: its path; None: it does not exist.
            targets: media or texts that belong to it; in retrieval, a file without any is listed only.
        """
        # Missing media are listed too, because the report gives their share.
        self.num_listed += 1
        if file is None:
            self.skipped.add(NO_FILE, name)
        elif targets or self.kind != "retrieve":
            self.items.append(Item(Media(self.modality, file), labels, tuple(targets)))

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


def suffixes_of(modality: str) -> frozenset[str]:
    """Return the suffixes of a modality's files; empty if they may have any suffix."""
    # Clips of AudioSet and AudioCaps are often kept as videos.
    extra = SUFFIXES["video"] if modality == "audio" else frozenset()
    return SUFFIXES.get(modality, frozenset()) | extra


class Files:
    """The files below a folder by name, as archives are unpacked into different folders.

    Files whose name starts with a dot are ignored (macOS adds one for each file of an archive).

    Args:
        folder: folder to search; it is read once, at the first lookup.

    Raises:
        InputError: `find` and `find_stem` find several files of one name that differ.
    """

    def __init__(self, folder: Path, modality: str) -> None:
        self._folder, self._suffixes = folder, suffixes_of(modality)
        self._names: dict[str, list[str]] | None = None
        self._stems: dict[str, str] = {}

    def find(self, name: str, *folders: str) -> str | None:
        """Return the path of a file: below one of these folders, else the one whose path ends with the name."""
        # Before the index is made, because walking through a large archive takes long.
        for folder in folders:
            if os.path.isfile(file := os.path.join(self._folder, folder, name)):
                return file
        files = self._index().get(os.path.basename(name), [])
        return self._only(
            [file for file in files if file.endswith(os.path.join(os.sep, os.path.normpath(name)))] or files
        )

    def find_stem(self, stems: Iterable[str]) -> str | None:
        """Return the path of the first file with one of these names, suffix excluded."""
        names = self._index()
        found = next((self._stems[stem] for stem in stems if stem in self._stems), None)
        return found and self._only(names[found])

    def _only(self, files: list[str]) -> str | None:
        """Return the first file; archives often have the same one twice."""
        if other := next(
            (file for file in files[1:] if not filecmp.cmp(files[0], file, shallow=False)), None
        ):
            raise InputError(
                f"{files[0]} and {other} have the same name and differ, and the table does not name the folder: keep "
                "only the one of this data set"
            )
        return files[0] if files else None

    def _index(self) -> dict[str, list[str]]:
        if self._names is None:
            self._names = {}
            # Sorted, so that the choice between files of one name does not depend on the file system.
            for file in sorted(walk(self._folder)):
                stem, suffix = os.path.splitext(os.path.basename(file))
                if not self._suffixes or suffix.lower() in self._suffixes:
                    self._names.setdefault(stem + suffix, []).append(file)
                    self._stems.setdefault(stem, stem + suffix)
        return self._names


class Captions:
    """Collects captions by media, in the order of their rows.

    Args:
        limit: number of captions kept per item; None: all.

    Attributes:
        dataset: gets the items and counts skipped rows.
        files: the files below the folder.
    """

    def __init__(self, folder: Path, modality: str, limit: int | None = None) -> None:
        self.dataset, self.files = Dataset("retrieve", modality), Files(folder, modality)
        self._limit = limit
        # By name, because tables have one row per caption, in any order.
        self._captions: dict[str, list[str]] = {}
        self._paths: dict[str, str | None] = {}

    def add(self, name: str, caption: object, row: str) -> None:
        """Add one caption."""
        # Even without a caption, so that the media are listed.
        captions = self._captions.setdefault(name, [])
        if not isinstance(caption, str) or not caption.strip():
            self.dataset.skipped.add("no caption", row)
        elif self._limit is None or len(captions) < self._limit:
            captions.append(" ".join(caption.split()))

    def set_file(self, name: str, file: str | None) -> None:
        """Set the path of the media; None: the file does not exist."""
        self._captions.setdefault(name, [])
        # A later row may have found the file that an earlier one lacks.
        self._paths[name] = file or self._paths.get(name)

    def finish(self) -> Dataset:
        """Return the data set with all items."""
        for name, captions in self._captions.items():
            # Repeated captions of one item count once.
            targets = [Media.text(caption) for caption in dict.fromkeys(captions)]
            self.dataset.add(self._paths.get(name), name, targets=targets)
        return self.dataset


def walk(folder: str | Path) -> Iterator[str]:
    """Yield the paths of all files below a folder except hidden ones."""
    for parent, folders, names in os.walk(folder):
        # In place, so that os.walk does not enter hidden folders.
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from (os.path.join(parent, name) for name in names if not name.startswith("."))


def list_files(folder: Path, modality: str) -> list[str]:
    """Return the files of a modality directly in a folder, sorted."""
    # scandir, because a folder of ImageNet has thousands of files.
    suffixes = suffixes_of(modality)
    return sorted(
        entry.path
        for entry in os.scandir(folder)
        if not entry.name.startswith(".")
        and (not suffixes or os.path.splitext(entry.name)[1].lower() in suffixes)
        and entry.is_file()
    )


def list_folders(folder: Path) -> list[Path]:
    """Return the folders directly in a folder, sorted by name."""
    return sorted(Path(entry.path) for entry in os.scandir(folder) if entry.is_dir() and entry.name[0] != ".")


def require(folder: Path, names: Sequence[str], *, purpose: str, is_folder: bool = False) -> Path:
    """Return the first of these files or folders that exists.

    Args:
        names: paths below it, best first.
        purpose: description of the file, for the error.

    Raises:
        InputError: none of them exists; gives the closest existing name.
    """
    # The releases of a data set differ in their folders.
    for path in (folder / name for name in names):
        if path.is_dir() if is_folder else path.is_file():
            return path
    present = [entry.name for entry in os.scandir(folder) if entry.is_dir() or not is_folder]
    raise InputError(
        f"{folder} has no {'folder ' * is_folder}{' and no '.join(names)} ({purpose}). "
        f"{did_you_mean(Path(names[0]).name, present[:50]).replace('Known:', 'It contains:')}"
    )


def read_lines(path: Path) -> Iterator[tuple[str, str]]:
    """Yield the lines of a text that are not blank, each with its position for messages.

    Raises:
        InputError: it cannot be read, or is not UTF-8.
    """
    try:
        # "utf-8-sig" also reads files that a spreadsheet has saved with a byte order mark.
        with path.open(encoding="utf-8-sig") as stream:
            for number, line in enumerate(stream, start=1):
                if line.strip():
                    yield f"{path} line {number}", line.strip("\r\n")
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error}); {_CHECK}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text ({error}); {_CHECK}") from error


def read_entries(path: Path, *keys: str) -> list[list[Any]]:
    """Return the lists under these keys of a JSON file.

    Raises:
        InputError: it has no such lists.
    """
    # The list is checked here, its entries by the layout, which counts those that it cannot use.
    content = read_json(path, InputError, _CHECK)
    lists = [content.get(key) if isinstance(content, dict) else None for key in keys]
    if any(not isinstance(entries, list) for entries in lists):
        wanted = " and ".join(repr(key) for key in keys)
        has = ", ".join(map(str, content)) if isinstance(content, dict) else type(content).__name__
        raise InputError(
            f"{path}: expected an object with lists under {wanted}; it contains {has[:100] or 'nothing'}"
        )
    return lists


def clip_stems(video: str, start: float, end: float | None = None) -> Iterator[str]:
    """Yield the usual file names of a clip of a video, without suffix, the most specific first.

    Args:
        start: start of the clip, in seconds.
        end: end of the clip, in seconds, if it is known.

    Examples:
        >>> list(clip_stems("r1nicOVtvkQ", 130))
        ['r1nicOVtvkQ_130', 'r1nicOVtvkQ_130000', 'r1nicOVtvkQ_130.000', 'r1nicOVtvkQ', 'Yr1nicOVtvkQ']
    """
    # Three common spellings: seconds, milliseconds, and seconds with three decimals.
    starts = (f"{start:g}", f"{round(start * 1000)}", f"{start:.3f}")
    if end is not None:
        ends = (f"{end:g}", f"{round(end * 1000)}", f"{end:.3f}")
        yield from (f"{video}_{first}_{last}" for first, last in zip(starts, ends, strict=True))
    yield from (f"{video}_{first}" for first in starts)
    # Some archives put a Y before the id, which may itself start with a dash.
    yield from (video, f"Y{video}")


def read_seconds(text: str) -> float:
    """Return a time in seconds.

    Raises:
        ValueError: it is not a finite number.
    """
    seconds = float(text)
    if not math.isfinite(seconds):
        raise ValueError(f"{text} is not a time")
    return seconds


def spell(name: str) -> str:
    """Return a class name with spaces instead of underscores.

    Examples:
        >>> spell("night_stand")
        'night stand'
    """
    return " ".join(name.replace("_", " ").split())


def read_classes(path: Path) -> dict[str, tuple[str, ...]]:
    """Return the names of each class, by its key (a WordNet id, the name of a folder, ...), in the order of the file.

    - ``.json``: ``{"key": "name"}``, or a list of synonyms, whose prompts are averaged. Keras'
      ``imagenet_class_index.json`` (``{"0": ["n01440764", "tench"]}``) is supported too.
    - ``.tsv``: key, tab, name; further names after further tabs.
    - ``.txt``: as ``LOC_synset_mapping.txt`` of ImageNet: key, space, names separated by commas. Only the first name
      counts.

    Raises:
        InputError: an unknown suffix, a table that cannot be read, a class without name or a repeated class; names
            file and line.
    """
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise InputError(f"{path}: not a table of class names. {did_you_mean(path.suffix.lower(), READERS)}")
    classes: dict[str, tuple[str, ...]] = {}
    for row, key, names in reader(path):
        # A class without a name has no prompt.
        if not key or not names or not all(names):
            raise InputError(f"{row}: expected the key of a class and at least one name")
        if key in classes:
            raise InputError(f"{row}: the class {key!r} occurs twice in this table")
        classes[key] = tuple(names)
    if not classes:
        raise InputError(f"{path}: contains no class")
    return classes


class Classes:
    """Names of classes by their key, and their indices.

    Args:
        source: the table or folder that they come from, for messages.
    """

    def __init__(self, names: Mapping[str, tuple[str, ...]], source: Path | str) -> None:
        self.names, self._source = list(names.values()), source
        self._indices = {key: index for index, key in enumerate(names)}

    def index(self, key: str, *, row: str) -> int:
        """Return the index of a class.

        Raises:
            InputError: the class is unknown; names the row that uses it.
        """
        if key not in self._indices:
            hint = did_you_mean(key, self._indices)
            # A thousand class names do not help; the closest one does.
            hint = hint.partition(" Known:")[0] if len(self._indices) > 50 else hint
            raise InputError(f"{row}: the class {key!r} is not in {self._source}. {hint}".rstrip())
        return self._indices[key]


def _read_json(path: Path) -> list[tuple[str, str, list[str]]]:
    content = read_json(path, InputError, _CHECK)
    if not isinstance(content, dict):
        raise InputError(f"{path}: expected an object of class names, not {type(content).__name__}")
    rows = []
    for key, names in content.items():
        # A single name is a list of one.
        names = [names] if isinstance(names, str) else names
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise InputError(f"{path}: the class {key!r} must have a name or a list of names, not {names!r}")
        # Keras: the key is an index, and the first name the WordNet id.
        if key.isdecimal() and len(names) == 2 and _WNID.fullmatch(names[0]):
            key, names = names[0], [spell(names[1])]
        rows.append((f"{path}, class {key!r}", key, [name.strip() for name in names]))
    return rows


def _read_tsv(path: Path) -> list[tuple[str, str, list[str]]]:
    rows = [(row, [cell.strip() for cell in line.split("\t")]) for row, line in read_lines(path)]
    return [(row, cells[0], cells[1:]) for row, cells in rows]


def _read_txt(path: Path) -> list[tuple[str, str, list[str]]]:
    rows = [(row, *line.strip().partition(" ")) for row, line in read_lines(path)]
    return [(row, key, [names.split(",")[0].strip()]) for row, key, _, names in rows]


READERS: Mapping[str, Callable[[Path], list[tuple[str, str, list[str]]]]] = {
    ".json": _read_json,
    ".tsv": _read_tsv,
    ".txt": _read_txt,
}
