"""Layouts of media with captions: AudioCaps, Clotho, COCO, Flickr30k."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bindllm.data.report import Skipped
from bindllm.data.tables import read_table
from bindllm.errors import InputError, did_you_mean
from bindllm.evaluation.layouts.files import Files, read_entries, read_lines, require_file
from bindllm.evaluation.layouts.sounds import clip_stems, read_seconds
from bindllm.evaluation.layouts.task import Captioned, Choice, Task

KARPATHY_SPLITS = ("train", "val", "test", "restval")
_FLICKR_FOLDERS = ("flickr30k-images", "flickr30k_images", "flickr30k_images/flickr30k_images", "images", "")


def read_audiocaps(folder: Path, choice: Choice) -> Task:
    """Read ``<split>.csv`` (audiocap_id, youtube_id, start_time, caption).

    The clips may lie anywhere below the folder, named ``<audiocap_id>`` or like those of AudioSet. Rows with the same
    video and start are captions of one clip.
    """
    split = choice.split or "test"
    table = require_file(
        folder, (f"{split}.csv", f"dataset/{split}.csv"), purpose="the captions of the split"
    )
    task = Task("retrieve", "audio")
    files, captions = Files(folder, "audio"), Captioned(task, choice.captions)
    columns = ("audiocap_id", "youtube_id", "start_time", "caption")
    for row, record in read_table(table, columns, task.skipped):
        number, video, start, caption = (str(record[column]).strip() for column in columns)
        try:
            seconds = read_seconds(start)
        except ValueError:
            task.skipped.add("start_time is not a number", row)
            continue
        name = f"{video} from {seconds:g} s"
        captions.add(name, caption, row)
        captions.place(name, files.find_stem((number, *clip_stems(video, seconds))))
    captions.finish()
    return task


def read_clotho(folder: Path, choice: Choice) -> Task:
    """Read ``clotho_captions_<split>.csv`` (file_name, caption_1 ... caption_5) and ``<split>/*.wav``."""
    split = choice.split or "evaluation"
    table = require_file(folder, (f"clotho_captions_{split}.csv",), purpose="the captions of the split")
    task = Task("retrieve", "audio")
    files, captions = Files(folder, "audio"), Captioned(task, choice.captions)
    columns = [f"caption_{number}" for number in range(1, 6)]
    for row, record in read_table(table, ("file_name", *columns), task.skipped):
        name = str(record["file_name"])
        for column in columns:
            captions.add(name, record[column], f"{row}, {column}")
        captions.place(name, files.find(name, split, f"clotho_audio_{split}"))
    captions.finish()
    return task


def read_coco(folder: Path, choice: Choice) -> Task:
    """Read ``annotations/captions_<split>.json`` and ``<split>/*.jpg``, or Karpathy's ``dataset_coco.json``.

    The splits ``train``, ``val``, ``test`` and ``restval`` are Karpathy's; all others, such as ``val2017``, COCO's
    own. Without one, Karpathy's test split where his file is there, else ``val2017``.
    """
    karpathy = ("dataset_coco.json", "annotations/dataset_coco.json", "karpathy/dataset_coco.json")
    has_karpathy = any((folder / name).is_file() for name in karpathy)
    split = choice.split or ("test" if has_karpathy else "val2017")
    if split in KARPATHY_SPLITS:
        table = require_file(
            folder, karpathy, purpose="Karpathy's splits; COCO's own are called val2017 and so on"
        )
        return _read_karpathy(table, folder, choice, split, places=())
    name = f"captions_{split}.json"
    table = require_file(folder, (f"annotations/{name}", name), purpose="the captions of the split")
    images, annotations = read_entries(table, "images", "annotations")
    task = Task("retrieve", "image")
    files, captions = Files(folder, "image"), Captioned(task, choice.captions)
    names: dict[Any, str] = {}
    for number, image in enumerate(images):
        row = f"{table} images[{number}]"
        match image:
            case {"id": int() | str() as key, "file_name": str() as name}:
                names[key] = name
                captions.place(name, files.find(name, split))
            case _:
                task.skipped.add("an image without id and file_name", row)
    for number, annotation in enumerate(annotations):
        row = f"{table} annotations[{number}]"
        match annotation:
            case {"image_id": int() | str() as key, "caption": caption} if key in names:
                captions.add(names[key], caption, row)
            case _:
                task.skipped.add("a caption without image_id and caption, or of an unknown image", row)
    captions.finish()
    return task


def read_flickr30k(folder: Path, choice: Choice) -> Task:
    """Read Karpathy's ``dataset_flickr30k.json``; or ``results.csv`` or ``results_20130124.token``, without splits."""
    tables = ("dataset_flickr30k.json", "results.csv", "results_20130124.token")
    table = require_file(
        folder,
        tables if choice.split in (None, "all") else tables[:1],
        purpose="captions, with splits in the first",
    )
    if table.suffix == ".json" and choice.split != "all":
        return _read_karpathy(table, folder, choice, choice.split or "test", places=_FLICKR_FOLDERS)
    if table.suffix == ".json":
        table = require_file(folder, tables[1:], purpose="all captions")
    task = Task("retrieve", "image")
    task.notes.append(
        f"{table.name} has no splits: all of it; the usual test split is in dataset_flickr30k.json"
    )
    files, captions = Files(folder, "image"), Captioned(task, choice.captions)
    for row, name, caption in _read_flickr_lines(table, task.skipped):
        captions.add(name, caption, row)
        captions.place(name, files.find(name, *_FLICKR_FOLDERS))
    captions.finish()
    return task


def _read_karpathy(table: Path, folder: Path, choice: Choice, split: str, *, places: tuple[str, ...]) -> Task:
    """Read a file of Karpathy's: images with ``filename``, ``split`` and ``sentences``."""
    (images,) = read_entries(table, "images")
    task = Task("retrieve", "image")
    files, captions = Files(folder, "image"), Captioned(task, choice.captions)
    seen: set[str] = set()
    for number, image in enumerate(images):
        row = f"{table} images[{number}]"
        match image:
            case {"filename": str() as name, "split": str() as its_split, "sentences": list() as sentences}:
                seen.add(its_split)
            case _:
                task.skipped.add("an image without filename, split and sentences", row)
                continue
        if its_split == split:
            for sentence in sentences:
                captions.add(name, sentence.get("raw") if isinstance(sentence, dict) else None, row)
            captions.place(name, _find_coco(files, name, str(image.get("filepath", "")), places))
    if seen and split not in seen:
        raise InputError(f"{table} has no split {split!r}. {did_you_mean(split, seen)}")
    captions.finish()
    return task


def _find_coco(files: Files, name: str, place: str, places: tuple[str, ...]) -> str | None:
    """Return the path of a picture; COCO's of 2014 go by their number alone since 2017."""
    number = name.rpartition("_")[2]
    return files.find(name, place, *places) or (
        files.find(number, "val2017", "train2017") if name.startswith("COCO_") else None
    )


def _read_flickr_lines(path: Path, skipped: Skipped) -> Iterator[tuple[str, str, str]]:
    """Yield row, picture and caption: ``name| number| caption``, or ``name#number``, tab, ``caption``."""
    lines = read_lines(path)
    if path.suffix == ".csv":
        row, header = next(lines, ("", ""))
        columns = [name.strip() for name in header.split("|")]
        if columns != ["image_name", "comment_number", "comment"]:
            raise InputError(
                f"{row or path}: expected image_name| comment_number| comment, not {header[:60]!r}"
            )
    for row, line in lines:
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
            skipped.add("not a picture, a number and a caption", row)
