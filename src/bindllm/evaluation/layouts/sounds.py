"""Layouts of labelled sounds: ESC-50 (one class each) and AudioSet (several)."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator
from pathlib import Path

from bindllm.data.tables import read_table
from bindllm.errors import InputError, did_you_mean
from bindllm.evaluation.layouts.classes import number_of, read_classes, spell
from bindllm.evaluation.layouts.files import Files, read_lines, require_file
from bindllm.evaluation.layouts.task import Choice, Task

AUDIOSET_SPLITS = {
    "eval": "eval_segments.csv",
    "balanced_train": "balanced_train_segments.csv",
    "unbalanced_train": "unbalanced_train_segments.csv",
}


def read_esc50(folder: Path, choice: Choice) -> Task:
    """Read ``meta/esc50.csv`` (filename, fold, target, category) and ``audio/*.wav``; all five folds by default."""
    table = require_file(folder, ("meta/esc50.csv", "esc50.csv"), purpose="the table of clips")
    task = Task("classify", "audio")
    rows = list(read_table(table, ("filename", "fold", "target", "category"), task.skipped))
    clips = []
    for row, record in rows:
        fold, target = str(record["fold"]), str(record["target"])
        if not (fold.isdecimal() and target.isdecimal()):
            task.skipped.add("fold or target is not a number", row)
        else:
            clips.append((row, str(record["filename"]), int(fold), int(target), str(record["category"])))
    categories: dict[int, str] = {}
    for row, _, _, target, category in clips:
        if categories.setdefault(target, category) != category:
            raise InputError(
                f"{table.parent}/{row}: the target {target} is called {category!r} here, {categories[target]!r} above"
            )
    keys = [categories[target] for target in sorted(categories)]
    names = read_classes(choice.classes) if choice.classes else {key: (spell(key),) for key in keys}
    numbers = {key: number for number, key in enumerate(names)}
    task.classes = list(names.values())
    _check_folds(table, choice.folds, {fold for _, _, fold, _, _ in clips})
    files = Files(folder, "audio")
    for row, name, fold, _, category in clips:
        if not choice.folds or fold in choice.folds:
            label = number_of(category, numbers, row=f"{table.parent}/{row}", table=choice.classes or table)
            task.add(files.find(name, "audio"), name, labels=(label,))
    return task


def _check_folds(table: Path, asked: tuple[int, ...], present: set[int]) -> None:
    for fold in asked:
        if fold not in present:
            raise InputError(
                f"{table} has no fold {fold}. {did_you_mean(str(fold), map(str, sorted(present)))}"
            )


def read_audioset(folder: Path, choice: Choice) -> Task:
    """Read a table of segments (YTID, start, end, "label,label,...") and ``class_labels_indices.csv``.

    The clips may lie anywhere below the folder, as sounds or videos, named ``<YTID>``, ``Y<YTID>`` or
    ``<YTID>_<start>``, the start in seconds or milliseconds, with or without ``_<end>`` behind it.
    """
    split = choice.split or "eval"
    if split not in AUDIOSET_SPLITS:
        raise InputError(f"audioset has no split {split!r}. {did_you_mean(split, AUDIOSET_SPLITS)}")
    segments = require_file(folder, (AUDIOSET_SPLITS[split],), purpose="the table of clips")
    names = require_file(folder, ("class_labels_indices.csv",), purpose="the names of the classes")
    task = Task("tag", "audio")
    numbers: dict[str, int] = {}
    for row, record in read_table(names, ("index", "mid", "display_name"), task.skipped):
        mid, name = str(record["mid"]), str(record["display_name"])
        if mid in numbers or not name.strip():
            raise InputError(f"{folder}/{row}: the class {mid!r} stands here twice, or without a name")
        numbers[mid] = len(task.classes)
        task.classes.append((name,))
    files = Files(folder, "audio")
    for row, video, start, end, labels in _read_segments(segments, task):
        known = tuple(sorted({number_of(label, numbers, row=row, table=names) for label in labels}))
        if known:
            task.add(
                files.find_stem(clip_stems(video, start, end)), f"{video} from {start:g} s", labels=known
            )
        else:
            task.skipped.add("no label", row)
    return task


def clip_stems(video: str, start: float, end: float | None = None) -> Iterator[str]:
    """Yield how a clip of a video is called by those who cut and share them, the most exact names first.

    Args:
        video: its id at YouTube.
        start: of the clip, in seconds.
        end: of the clip, in seconds, where it is known.

    Example:
        >>> list(clip_stems("r1nicOVtvkQ", 130))
        ['r1nicOVtvkQ_130', 'r1nicOVtvkQ_130000', 'r1nicOVtvkQ_130.000', 'r1nicOVtvkQ', 'Yr1nicOVtvkQ']
    """
    spelt = (f"{start:g}", f"{round(start * 1000)}", f"{start:.3f}")
    if end is not None:
        ends = (f"{end:g}", f"{round(end * 1000)}", f"{end:.3f}")
        yield from (f"{video}_{first}_{last}" for first, last in zip(spelt, ends, strict=True))
    yield from (f"{video}_{first}" for first in spelt)
    yield from (video, f"Y{video}")


def read_seconds(text: str) -> float:
    """Return a time.

    Raises:
        ValueError: it is no finite number.
    """
    seconds = float(text)
    if not math.isfinite(seconds):
        raise ValueError(f"{text} is no time")
    return seconds


def _read_segments(path: Path, task: Task) -> Iterator[tuple[str, str, float, float, list[str]]]:
    """Yield row, video, start, end and labels of each segment; comments start with #."""
    for row, line in read_lines(path):
        if line.startswith("#"):
            continue
        try:
            # A blank follows each comma, also ahead of a quotation mark.
            cells = next(csv.reader([line], skipinitialspace=True))
            video, start, end = cells[0], read_seconds(cells[1]), read_seconds(cells[2])
            labels = [label.strip() for label in cells[3].split(",") if label.strip()]
        except (IndexError, ValueError, csv.Error):
            task.skipped.add('not YTID, start, end, "labels"', row)
            continue
        yield row, video, start, end, labels
