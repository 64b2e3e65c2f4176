"""Read published data sets in the layout of their authors, without opening any media."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

from bindllm.errors import InputError, check_choice
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

__all__ = ["LAYOUTS", "Choice", "Column", "Dataset", "Item", "Kind", "read_layout"]


# The options of each layout are fields of `Choice`; the command's help describes the files.
LAYOUTS: dict[str, tuple[Callable[[Path, Choice], Dataset], tuple[str, ...]]] = {
    "imagenet": (read_imagenet, ("split", "classes")),
    "esc50": (read_esc50, ("folds", "classes")),
    "audioset": (read_audioset, ("split",)),
    "modelnet40": (read_modelnet, ("split", "classes")),
    "folder": (read_folders, ("split", "classes", "modality")),
    "audiocaps": (read_audiocaps, ("split", "captions")),
    "clotho": (read_clotho, ("split", "captions")),
    "coco": (read_coco, ("split", "captions")),
    "flickr30k": (read_flickr30k, ("split", "captions")),
    "table": (read_pairs, ("split", "captions", "modality", "source", "target")),
}
"""Reader and supported options of each layout. Layouts with captions or pairs are for retrieval, the others for
classification."""


def read_layout(name: str, folder: str | Path, choice: Choice | None = None) -> Dataset:
    """Read a data set.

    Args:
        name: name of the layout, a key of `LAYOUTS`.
        folder: folder of the data set.
        choice: the part to read; None: the part that is usually reported.

    Raises:
        InputError: an unknown layout, a choice that the layout does not support, or a folder that does not have this
            layout; names the file and, if there is one, the line.
    """
    check_choice("layout", name, LAYOUTS)
    (read, uses), choice, folder = LAYOUTS[name], choice or Choice(), Path(folder)
    for field in fields(Choice):
        # An option without effect would give numbers of another set than the user expects.
        if getattr(choice, field.name) != field.default and field.name not in uses:
            raise InputError(f"the layout {name} takes no {field.name}; it takes {', '.join(uses)}")
    # Only a table may be a file.
    if not folder.is_dir() and not (name == "table" and folder.exists()):
        problem = "is a file" if folder.exists() else "does not exist"
        raise InputError(f"{folder} {problem}; give the folder of the data set")
    # A folder without usable media is an error, not a result of 0.
    return read(folder, choice).require(folder)
