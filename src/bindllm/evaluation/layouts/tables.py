"""Anybody's own table: media of one modality in one column, what belongs to them in another."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from bindllm.data.captions import SPLITS, Columns, read_captions, require_table
from bindllm.data.report import SourceReport
from bindllm.data.sources import hashed_split
from bindllm.data.tables import read_table
from bindllm.errors import InputError, did_you_mean
from bindllm.evaluation.layouts.task import NO_FILE, Choice, Column, Item, Task
from bindllm.media import Media

HELD_OUT = 0.1
"""Share of the media that the hash holds out where a table has no column ``split``; as in a recipe."""

ALL = "all"


def read_pairs(folder: Path, choice: Choice) -> Task:
    """Read a table, a folder with a table ``captions.*``, or a folder of files with a ``.txt`` beside each.

    Columns are called like their modality, texts ``caption``, unless the choice says otherwise. The split is that of
    the column ``split``, else of the hash, as in training.
    """
    split = choice.split or "test"
    if split not in (*SPLITS, ALL):
        raise InputError(f"unknown split {split!r}. {did_you_mean(split, (*SPLITS, ALL))}")
    if not folder.exists():
        raise InputError(f"{folder} does not exist; give a table, or a folder with one")
    source = choice.source or Column(choice.modality or "image", choice.modality or "image")
    target = choice.target or Column("text", "caption")
    task = Task("retrieve", source.modality)
    pairs = _read_captions if target == Column("text", "caption") else _read_columns
    num_others = 0
    for media, answers, its_split in pairs(folder, source, target, task):
        if split in (ALL, its_split):
            task.items.append(Item(media, answers=answers[: choice.captions]))
        else:
            num_others += 1
    task.num_listed = len(task.items)
    if task.skipped.total:
        task.notes.append("what was left out are rows of the whole table, whatever their split")
    if num_others:
        task.notes.append(f"split {split}; {num_others:,} media are in other splits")
    return task


_Pairs = Iterator[tuple[Media, tuple[Media, ...], str]]


def _read_captions(path: Path, source: Column, target: Column, task: Task) -> _Pairs:
    """Yield media with captions, read as training does."""
    report = SourceReport(str(path), modality=source.modality, skipped=task.skipped)
    columns = Columns(image=source.name, caption=target.name)
    for picture in read_captions(path, report, columns, source.modality):
        captions = tuple(map(Media.text, picture.captions))
        split = picture.split or hashed_split(picture.key, HELD_OUT)
        yield Media(source.modality, picture.file), captions, split


def _read_columns(path: Path, source: Column, target: Column, task: Task) -> _Pairs:
    """Yield the media of one column with those of another; rows of one media and split are joined."""
    path = require_table(path)
    # As training splits: by the picture, so that no pair that `bindllm align` has learnt from is measured.
    decides = target if target.modality == "image" else source
    found: dict[tuple[Media, str], dict[Media, None]] = {}
    for row, record in read_table(path, (source.name, target.name), task.skipped):
        split = record.get("split") or None
        if split is not None and split not in SPLITS:
            task.skipped.add(f"unknown split {split!r}. {did_you_mean(str(split), SPLITS)}", row)
            continue
        ends = [_media(column, record[column.name], path) for column in (source, target)]
        if not all(ends):
            names = [
                str(record[column.name])
                for column, end in zip((source, target), ends, strict=True)
                if not end
            ]
            task.skipped.add(NO_FILE, f"{row}: {', '.join(names)}")
            continue
        key = _split_key(decides, record[decides.name])
        its_split = split or hashed_split(key, HELD_OUT)
        for media in ends[0]:
            found.setdefault((media, its_split), {}).update(dict.fromkeys(ends[1]))
    for (media, its_split), answers in found.items():
        yield media, tuple(answers), its_split


def _split_key(column: Column, cell: object) -> str:
    """Return what is hashed where a table has no splits: as `bindllm fit` and `bindllm align` do."""
    first = str(cell[0] if isinstance(cell, list) else cell)
    return first if column.modality == "text" else os.path.normpath(first)


def _media(column: Column, cell: object, table: Path) -> list[Media]:
    """Return the media that a cell names, those that are there: a path or text, or a list of them."""
    words = [
        word
        for word in (cell if isinstance(cell, list) else [cell])
        if isinstance(word, str) and word.strip()
    ]
    if column.modality == "text":
        return [Media.text(" ".join(word.split())) for word in words]
    files = [os.path.join(table.parent, word) for word in words]
    return [Media(column.modality, file) for file in files if os.path.isfile(file)]
