"""Data sets as their authors publish them: a folder becomes a task, without opening any of its media."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path

from bindllm.errors import InputError, did_you_mean
from bindllm.evaluation.layouts.captions import read_audiocaps, read_clotho, read_coco, read_flickr30k
from bindllm.evaluation.layouts.folders import read_folders, read_imagenet, read_modelnet
from bindllm.evaluation.layouts.sounds import read_audioset, read_esc50
from bindllm.evaluation.layouts.tables import read_pairs
from bindllm.evaluation.layouts.task import Choice, Column, Item, Kind, Task

__all__ = ["LAYOUTS", "Choice", "Column", "Item", "Kind", "Layout", "Task", "read_layout"]


@dataclass(frozen=True)
class Layout:
    """How one data set lies on the disk.

    Args:
        read: makes a task of a folder.
        purpose: what it is, for the help.
        uses: which fields of `Choice` it knows.
    """

    read: Callable[[Path, Choice], Task]
    purpose: str
    uses: tuple[str, ...] = ("split",)


LAYOUTS: dict[str, Layout] = {
    "imagenet": Layout(
        read_imagenet, "pictures, 1000 classes: val/<wnid>/*.JPEG or Kaggle's", ("split", "classes")
    ),
    "esc50": Layout(read_esc50, "sounds, 50 classes: meta/esc50.csv, audio/*.wav", ("folds", "classes")),
    "audioset": Layout(read_audioset, "sounds, 527 labels, several each: eval_segments.csv and clips"),
    "modelnet40": Layout(
        read_modelnet, "shapes, 40 classes: <class>/test/*.off or resampled", ("split", "classes")
    ),
    "folder": Layout(read_folders, "anything: a folder for each class", ("split", "classes", "modality")),
    "audiocaps": Layout(read_audiocaps, "sounds and captions: test.csv and clips", ("split", "captions")),
    "clotho": Layout(
        read_clotho,
        "sounds and captions: clotho_captions_evaluation.csv, evaluation/*.wav",
        ("split", "captions"),
    ),
    "coco": Layout(
        read_coco,
        "pictures and captions: annotations/captions_val2017.json or Karpathy's",
        ("split", "captions"),
    ),
    "flickr30k": Layout(
        read_flickr30k, "pictures and captions: dataset_flickr30k.json or results.csv", ("split", "captions")
    ),
    "table": Layout(
        read_pairs,
        "anything: captions.jsonl, or any table of pairs",
        ("split", "captions", "modality", "source", "target"),
    ),
}
"""The layouts by name; those with captions or pairs are for retrieval, the others for classification."""


def read_layout(name: str, folder: str | Path, choice: Choice | None = None) -> Task:
    """Read a data set.

    Args:
        name: one of `LAYOUTS`.
        folder: where it lies.
        choice: what of it is evaluated.

    Raises:
        InputError: an unknown layout, a choice that it does not know, or a folder that is not in this layout; names
            the file, and the line where there is one.
    """
    if name not in LAYOUTS:
        raise InputError(f"unknown layout {name!r}. {did_you_mean(name, LAYOUTS)}")
    layout, choice, folder = LAYOUTS[name], choice or Choice(), Path(folder)
    for field in fields(Choice):
        if getattr(choice, field.name) != field.default and field.name not in layout.uses:
            raise InputError(f"the layout {name} takes no {field.name}; it takes {', '.join(layout.uses)}")
    if not folder.exists():
        raise InputError(f"{folder} does not exist; give the folder of the data set")
    return layout.read(folder, choice).require(folder)
