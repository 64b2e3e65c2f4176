"""Retrieval layouts: AudioCaps, Clotho, COCO, Flickr30k, and any table of pairs."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bindllm.data.formats.columns import read_split
from bindllm.data.formats.media import FolderResolver
from bindllm.data.report import Skipped
from bindllm.data.source_config import SPLITS, Columns, SourceConfig
from bindllm.data.sources import hashed_split, read_source, require_table
from bindllm.data.tables import read_table
from bindllm.errors import InputError, check_choice, did_you_mean
from bindllm.evaluation.layouts.dataset import (
    NO_FILE,
    Captions,
    Choice,
    Column,
    Dataset,
    Files,
    Item,
    clip_stems,
    read_entries,
    read_lines,
    read_seconds,
    require,
)
from bindllm.media import Media

KARPATHY_SPLITS = ("train", "val", "test", "restval")
# Folders of the images in the usual archives.
_FLICKR_FOLDERS = ("flickr30k-images", "flickr30k_images", "flickr30k_images/flickr30k_images", "images", "")

ALL = "all"
HELD_OUT = 0.1
"""Share of held-out media, chosen by hash, if a table has no column ``split``; as in a recipe."""


def read_audiocaps(folder: Path, choice: Choice) -> Dataset:
    """Read ``<split>.csv`` (audiocap_id, youtube_id, start_time, caption).

    The clips may be anywhere below the folder, named ``<audiocap_id>`` or as in `clip_stems`. Rows with the same video
    and start are captions of one clip.
    """
    split = choice.split or "test"
    table = require(folder, (f"{split}.csv", f"dataset/{split}.csv"), purpose="the captions of the split")
    captions = Captions(folder, "audio", choice.captions)
    columns = ("audiocap_id", "youtube_id", "start_time", "caption")
    for row, record in read_table(table, columns, captions.dataset.skipped):
        number, video, start, caption = (str(record[column]).strip() for column in columns)
        try:
            seconds = read_seconds(start)
        except ValueError:
            captions.dataset.skipped.add("start_time is not a number", row)
            continue
        # One name for all rows of a clip, so that their captions are joined.
        name = f"{video} from {seconds:g} s"
        captions.add(name, caption, row)
        # A row number of AudioCaps is more specific than the names of AudioSet's clips.
        captions.set_file(name, captions.files.find_stem((number, *clip_stems(video, seconds))))
    return captions.finish()


def read_clotho(folder: Path, choice: Choice) -> Dataset:
    """Read ``clotho_captions_<split>.csv`` (file_name, caption_1 ... caption_5) and ``<split>/*.wav``."""
    split = choice.split or "evaluation"
    table = require(folder, (f"clotho_captions_{split}.csv",), purpose="the captions of the split")
    captions = Captions(folder, "audio", choice.captions)
    # Five captions per clip, each a target of its own.
    columns = [f"caption_{number}" for number in range(1, 6)]
    for row, record in read_table(table, ("file_name", *columns), captions.dataset.skipped):
        name = str(record["file_name"])
        for column in columns:
            captions.add(name, record[column], f"{row}, {column}")
        captions.set_file(name, captions.files.find(name, split, f"clotho_audio_{split}"))
    return captions.finish()


def read_coco(folder: Path, choice: Choice) -> Dataset:
    """Read ``annotations/captions_<split>.json`` and ``<split>/*.jpg``, or Karpathy's ``dataset_coco.json``.

    The splits ``train``, ``val``, ``test`` and ``restval`` are Karpathy's; all others, such as ``val2017``, are COCO's
    own. The default is Karpathy's test split if his file exists, else ``val2017``.
    """
    karpathy = ("dataset_coco.json", "annotations/dataset_coco.json", "karpathy/dataset_coco.json")
    has_karpathy = any((folder / name).is_file() for name in karpathy)
    split = choice.split or ("test" if has_karpathy else "val2017")
    if split in KARPATHY_SPLITS:
        table = require(
            folder, karpathy, purpose="Karpathy's splits; COCO's own are called val2017 and so on"
        )
        return _read_karpathy(table, folder, choice, split, folders=())
    name = f"captions_{split}.json"
    table = require(folder, (f"annotations/{name}", name), purpose="the captions of the split")
    images, annotations = read_entries(table, "images", "annotations")
    captions = Captions(folder, "image", choice.captions)
    # The file name of each image by the id that its captions refer to.
    names: dict[Any, str] = {}
    for number, image in enumerate(images):
        row = f"{table} images[{number}]"
        match image:
            case {"id": int() | str() as key, "file_name": str() as name}:
                names[key] = name
                captions.set_file(name, captions.files.find(name, split))
            case _:
                captions.dataset.skipped.add("an image without id and file_name", row)
    for number, annotation in enumerate(annotations):
        row = f"{table} annotations[{number}]"
        match annotation:
            case {"image_id": int() | str() as key, "caption": caption} if key in names:
                captions.add(names[key], caption, row)
            case _:
                captions.dataset.skipped.add(
                    "a caption without image_id and caption, or of an unknown image", row
                )
    return captions.finish()


def read_flickr30k(folder: Path, choice: Choice) -> Dataset:
    """Read Karpathy's ``dataset_flickr30k.json``; or ``results.csv`` or ``results_20130124.token``, without splits."""
    tables = ("dataset_flickr30k.json", "results.csv", "results_20130124.token")
    # Only the first table has splits, so a split needs that one, and "all" one of the others.
    wanted = {None: tables, ALL: tables[1:]}.get(choice.split, tables[:1])
    table = require(folder, wanted, purpose="captions, with splits in dataset_flickr30k.json")
    if table.suffix == ".json":
        return _read_karpathy(table, folder, choice, choice.split or "test", folders=_FLICKR_FOLDERS)
    captions = Captions(folder, "image", choice.captions)
    captions.dataset.notes.append(
        f"{table.name} has no splits, so all of it is used; the usual test split is in dataset_flickr30k.json"
    )
    for row, name, caption in _read_flickr_lines(table, captions.dataset.skipped):
        captions.add(name, caption, row)
        captions.set_file(name, captions.files.find(name, *_FLICKR_FOLDERS))
    return captions.finish()


def _read_karpathy(
    table: Path, folder: Path, choice: Choice, split: str, *, folders: tuple[str, ...]
) -> Dataset:
    """Read a file by Karpathy: images with ``filename``, ``split`` and ``sentences``."""
    (images,) = read_entries(table, "images")
    captions = Captions(folder, "image", choice.captions)
    # The splits that occur, for the error message.
    seen: set[str] = set()
    for number, image in enumerate(images):
        row = f"{table} images[{number}]"
        match image:
            case {"filename": str() as name, "split": str() as its_split, "sentences": list() as sentences}:
                seen.add(its_split)
            case _:
                captions.dataset.skipped.add("an image without filename, split and sentences", row)
                continue
        if its_split == split:
            for sentence in sentences:
                captions.add(name, sentence.get("raw") if isinstance(sentence, dict) else None, row)
            captions.set_file(name, _find_coco(captions.files, name, str(image.get("filepath", "")), folders))
    if seen and split not in seen:
        raise InputError(f"{table} has no split {split!r}. {did_you_mean(split, seen)}")
    return captions.finish()


def _find_coco(files: Files, name: str, folder: str, folders: tuple[str, ...]) -> str | None:
    """Return the path of an image; COCO names the images of 2014 only by their number since 2017."""
    # COCO_val2014_000000000042.jpg is 000000000042.jpg in the folders of 2017.
    number = name.rpartition("_")[2]
    return files.find(name, folder, *folders) or (
        files.find(number, "val2017", "train2017") if name.startswith("COCO_") else None
    )


def _read_flickr_lines(path: Path, skipped: Skipped) -> Iterator[tuple[str, str, str]]:
    """Yield row, image and caption: ``name| number| caption``, or ``name#number``, tab, ``caption``."""
    # Neither file is valid CSV: captions contain commas and quotes.
    lines = read_lines(path)
    if path.suffix == ".csv":
        row, header = next(lines, ("", ""))
        columns = [name.strip() for name in header.split("|")]
        if columns != ["image_name", "comment_number", "comment"]:
            raise InputError(
                f"{row or path}: expected image_name| comment_number| comment, not {header[:60]!r}"
            )
    for row, line in lines:
        # One row of the published file lacks its second separator, so there a space separates.
        if path.suffix == ".csv":
            name, _, rest = line.partition("|")
            number, _, caption = (
                rest.strip().partition("|") if rest.count("|") else rest.strip().partition(" ")
            )
        else:
            key, _, caption = line.partition("\t")
            name, _, number = key.partition("#")
        if name.strip() and number.strip().isdecimal() and caption.strip():
            yield row, name.strip(), caption.strip()
        else:
            skipped.add("not an image, a number and a caption", row)


def read_pairs(folder: Path, choice: Choice) -> Dataset:
    """Read a table, a folder with a table ``captions.*``, or a folder of files, each with a ``.txt`` next to it.

    By default columns are named like their modality, and texts ``caption``. The split is the column ``split`` or, if a
    table has none, a hash, as in training.
    """
    split = choice.split or "test"
    check_choice("split", split, (*SPLITS, ALL))
    source = choice.source or Column(choice.modality or "image", choice.modality or "image")
    target = choice.target or Column("text", "caption")
    dataset = Dataset("retrieve", source.modality)
    # Media with captions are read as in training, and all other pairs column by column.
    read = _read_captions if target == Column("text", "caption") else _read_columns
    num_others = 0
    for media, targets, its_split in read(folder, source, target, dataset):
        if split in (ALL, its_split):
            dataset.items.append(Item(media, targets=targets[: choice.captions]))
        else:
            num_others += 1
    dataset.num_listed = len(dataset.items)
    if dataset.skipped.total:
        dataset.notes.append("skipped rows are those of the whole table, of all splits")
    if num_others:
        dataset.notes.append(f"split {split}; {num_others:,} media are in other splits")
    return dataset


_Pairs = Iterator[tuple[Media, tuple[Media, ...], str]]


def _read_captions(path: Path, source: Column, target: Column, dataset: Dataset) -> _Pairs:
    """Yield media with captions, read as in training."""
    columns = Columns(image=source.name, caption=target.name)
    config = SourceConfig(str(path), modality=source.modality, columns=columns, held_out=HELD_OUT)
    rows, report = read_source(config)
    dataset.skipped.update(report.skipped)
    for split, found in rows.items():
        # Each caption is a row of its own, and every such row has all captions of its media.
        for media, row in {row.media: row for row in found}.items():
            if len(media) == 1:
                yield media[0], tuple(map(Media.text, row.references)), split
            else:
                dataset.skipped.add(f"{len(media)} media in one row", row.name)


def _read_columns(path: Path, source: Column, target: Column, dataset: Dataset) -> _Pairs:
    """Yield the media of one column with the media of another; rows with the same media and split are joined."""
    path = require_table(path)
    resolve = FolderResolver(str(path.parent))
    # Split by the image, as training does, so that no pair that `bindllm align` was trained on is measured.
    split_by = target if target.modality == "image" else source
    found: dict[tuple[Media, str], dict[Media, None]] = {}
    for row, record in read_table(path, (source.name, target.name), dataset.skipped):
        try:
            split = read_split(record, "split")
        except InputError as error:
            dataset.skipped.add_error(error, row)
            continue
        # Both ends must exist: a pair with one end is not a pair.
        ends = [_media(column, record[column.name], path) for column in (source, target)]
        if not all(ends):
            names = [
                str(record[column.name])
                for column, end in zip((source, target), ends, strict=True)
                if not end
            ]
            dataset.skipped.add(NO_FILE, f"{row}: {', '.join(names)}")
            continue
        # The same key as in `bindllm fit` and `bindllm align`.
        cell, first = record[split_by.name], ends[split_by is target][0]
        key = (
            str(cell[0] if isinstance(cell, list) else cell)
            if first.modality == "text"
            else resolve.key(first)
        )
        its_split = split or hashed_split(key, HELD_OUT)
        # A cell may list several media; each has all targets of the row.
        for media in ends[0]:
            found.setdefault((media, its_split), {}).update(dict.fromkeys(ends[1]))
    for (media, its_split), targets in found.items():
        yield media, tuple(targets), its_split


def _media(column: Column, cell: object, table: Path) -> list[Media]:
    """Return the media of a cell (a path or text, or a list of them) that exist."""
    words = [
        word
        for word in (cell if isinstance(cell, list) else [cell])
        if isinstance(word, str) and word.strip()
    ]
    if column.modality == "text":
        return [Media.text(" ".join(word.split())) for word in words]
    files = [os.path.join(table.parent, word) for word in words]
    return [Media(column.modality, file) for file in files if os.path.isfile(file)]
