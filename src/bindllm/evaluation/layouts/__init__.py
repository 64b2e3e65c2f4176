"""Read published data sets in the layout of their authors, without opening any media."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path

from bindllm.errors import InputError, did_you_mean
from bindllm.evaluation.layouts.classification import (
    read_audioset,
    read_esc50,
    read_folders,
    read_imagenet,
    read_modelnet,
)
from bindllm.evaluation.layouts.dataset import Choice, Column, Dataset, Item, Kind
from bindllm.evaluation.layouts.retrieval import (
    read_audiocaps,
    read_clotho,
    read_coco,
    read_flickr30k,
    read_pairs,
)

__all__ = ["LAYOUTS", "Choice", "Column", "Dataset", "Item", "Kind", "Layout", "read_layout"]


@dataclass(frozen=True)
class Layout:
    """The files of one data set.

    Args:
        read: reads a folder.
        purpose: short description for the help.
        uses: supported fields of `Choice`.
    """

    read: Callable[[Path, Choice], Dataset]
    purpose: str
    uses: tuple[str, ...] = ("split",)


LAYOUTS: dict[str, Layout] = {
    "imagenet": Layout(
        read_imagenet, "images, 1000 classes: val/<wnid>/*.JPEG or Kaggle's", ("split", "classes")
    ),
    "esc50": Layout(read_esc50, "audio, 50 classes: meta/esc50.csv, audio/*.wav", ("folds", "classes")),
    "audioset": Layout(read_audioset, "audio, 527 labels, several per clip: eval_segments.csv and clips"),
    "modelnet40": Layout(
        read_modelnet, "point clouds, 40 classes: <class>/test/*.off or resampled", ("split", "classes")
    ),
    "folder": Layout(read_folders, "anything: a folder for each class", ("split", "classes", "modality")),
    "audiocaps": Layout(read_audiocaps, "audio and captions: test.csv and clips", ("split", "captions")),
    "clotho": Layout(
        read_clotho,
        "audio and captions: clotho_captions_evaluation.csv, evaluation/*.wav",
        ("split", "captions"),
    ),
    "coco": Layout(
        read_coco,
        "images and captions: annotations/captions_val2017.json or Karpathy's",
        ("split", "captions"),
    ),
    "flickr30k": Layout(
        read_flickr30k, "images and captions: dataset_flickr30k.json or results.csv", ("split", "captions")
    ),
    "table": Layout(
        read_pairs,
        "anything: captions.jsonl, or any table of pairs",
        ("split", "captions", "modality", "source", "target"),
    ),
}
"""The layouts by name. Layouts with captions or pairs are for retrieval, the others for classification."""


def read_layout(name: str, folder: str | Path, choice: Choice | None = None) -> Dataset:
    """Read a data set.

    Args:
        name: one of `LAYOUTS`.
        folder: folder of the data set.
        choice: the part to evaluate.

    Raises:
        InputError: an unknown layout, a choice that the layout does not support, or a folder that does not have this
            layout; names the file and, if there is one, the line.
    """
    if name not in LAYOUTS:
        raise InputError(f"unknown layout {name!r}. {did_you_mean(name, LAYOUTS)}")
    layout, choice, folder = LAYOUTS[name], choice or Choice(), Path(folder)
    for field in fields(Choice):
        # An option without effect would give numbers of another set than the user expects.
        if getattr(choice, field.name) != field.default and field.name not in layout.uses:
            raise InputError(f"the layout {name} takes no {field.name}; it takes {', '.join(layout.uses)}")
    if not folder.exists():
        raise InputError(f"{folder} does not exist; give the folder of the data set")
    # A folder without usable media is an error, not a result of 0.
    return layout.read(folder, choice).require(folder)
