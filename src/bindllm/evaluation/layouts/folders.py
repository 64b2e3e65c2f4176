"""Layouts in which the folder of a file is its class: ImageNet, ModelNet, and anybody's own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from bindllm.data.tables import read_table
from bindllm.errors import InputError, did_you_mean
from bindllm.evaluation.layouts.classes import number_of, read_classes, spell
from bindllm.evaluation.layouts.files import (
    ENDINGS,
    Files,
    endings_of,
    list_files,
    list_folders,
    read_lines,
    require_file,
    walk,
)
from bindllm.evaluation.layouts.task import Choice, Task

IMAGENET_NAMES = ("LOC_synset_mapping.txt", "classes.json", "classes.tsv", "imagenet_class_index.json")
IMAGENET_SOLUTION = "LOC_{split}_solution.csv"
MODELNET_SPLITS = ("train", "test")
_KAGGLE = "ILSVRC/Data/CLS-LOC"


def read_imagenet(folder: Path, choice: Choice) -> Task:
    """Read ``<split>/<WordNet id>/*.JPEG``, or a flat ``val`` with ``LOC_val_solution.csv``, with or without Kaggle's
    folders ``ILSVRC/Data/CLS-LOC`` above them.

    Class names come from ``--classes``, else from ``LOC_synset_mapping.txt`` or ``classes.json`` in the folder. All
    classes of that table are offered as answers, also those of which there is no picture.
    """  # noqa: D205
    split = choice.split or "val"
    if folder.is_dir() and choice.classes is None:
        purpose = "names of the classes; or give a table of your own with --classes"
        table = require_file(folder, IMAGENET_NAMES, purpose=purpose)
    else:
        table = choice.classes or folder
    place = _split_folder(folder, (split, f"{_KAGGLE}/{split}"))
    classes = read_classes(table)
    numbers = {key: number for number, key in enumerate(classes)}
    task = Task("classify", "image", classes=list(classes.values()))
    if list_folders(place):
        for below in list_folders(place):
            label = number_of(below.name, numbers, row=str(below), table=table)
            for file in list_files(below, "image"):
                task.add(file, file, labels=(label,))
        return task
    solution = require_file(
        folder,
        (IMAGENET_SOLUTION.format(split=split),),
        purpose=f"which class each picture has, since {place} holds no folder for each class",
    )
    files = Files(place, "image")
    for row, record in read_table(solution, ("ImageId", "PredictionString"), task.skipped):
        # The class and four numbers of a box, once for each thing of that class in the picture.
        words = str(record["PredictionString"]).split()
        if not words:
            task.skipped.add("no class", row)
            continue
        name = f"{record['ImageId']}.JPEG"
        label = number_of(words[0], numbers, row=f"{solution.parent}/{row}", table=table)
        task.add(files.find(name, ""), name, labels=(label,))
    return task


def read_modelnet(folder: Path, choice: Choice) -> Task:
    """Read ``<class>/<split>/*.off``, or ``modelnet40_normal_resampled``: ``modelnet40_shape_names.txt``,
    ``modelnet40_test.txt`` and ``<class>/<class>_0001.txt``.
    """  # noqa: D205
    split = choice.split or "test"
    kinds = [kind for kind in ("modelnet40", "modelnet10") if (folder / f"{kind}_shape_names.txt").is_file()]
    if kinds:
        return _read_resampled(folder, choice, kinds[0], split)
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder; give the folder of the data set")
    shapes = [
        place for place in list_folders(folder) if any((place / name).is_dir() for name in MODELNET_SPLITS)
    ]
    if not shapes:
        raise InputError(
            f"{folder} holds neither <class>/test/*.off nor modelnet40_shape_names.txt; give the folder that holds one "
            "folder for each class"
        )
    if not any((place / split).is_dir() for place in shapes):
        raise InputError(f"{folder} has no split {split!r}. {did_you_mean(split, MODELNET_SPLITS)}")
    names, table = _names(choice, [place.name for place in shapes])
    numbers = {key: number for number, key in enumerate(names)}
    task = Task("classify", "point", classes=list(names.values()))
    for place in shapes:
        label = number_of(place.name, numbers, row=str(place), table=table)
        for file in list_files(place / split, "point") if (place / split).is_dir() else ():
            task.add(file, file, labels=(label,))
    return task


def _read_resampled(folder: Path, choice: Choice, kind: str, split: str) -> Task:
    listed = folder / f"{kind}_shape_names.txt"
    names, table = _names(choice, [line.strip() for _, line in read_lines(listed)], listed)
    numbers = {key: number for number, key in enumerate(names)}
    task = Task("classify", "point", classes=list(names.values()))
    for row, line in read_lines(
        require_file(folder, (f"{kind}_{split}.txt",), purpose="the shapes of the split")
    ):
        shape = line.strip()
        key = shape.rpartition("_")[0]
        label = number_of(key, numbers, row=row, table=table)
        file = folder / key / f"{shape}.txt"
        task.add(str(file) if file.is_file() else None, f"{key}/{shape}.txt", labels=(label,))
    return task


def read_folders(folder: Path, choice: Choice) -> Task:
    """Read ``<class>/<files>`` or, where a split is named, ``<split>/<class>/<files>``; at any depth below a class."""
    place = _split_folder(folder, (choice.split or ".",))
    below = list_folders(place)
    if not below:
        raise InputError(f"{place} holds no folders; expected one for each class, with its files in it")
    names, table = _names(choice, [one.name for one in below])
    numbers = {key: number for number, key in enumerate(names)}
    found = {one.name: sorted(walk(one)) for one in below}
    modality = choice.modality or _guess_modality(place, [file for files in found.values() for file in files])
    task = Task("classify", modality, classes=list(names.values()))
    endings = endings_of(modality)
    for key, files in found.items():
        label = number_of(key, numbers, row=str(place / key), table=table)
        for file in files:
            if endings and not file.lower().endswith(tuple(endings)):
                task.skipped.add(f"not called like a file of {modality}", file)
            else:
                task.add(file, file, labels=(label,))
    return task


def _split_folder(folder: Path, places: Sequence[str]) -> Path:
    """Return the first of these folders that exists."""
    found = next((folder / place for place in places if (folder / place).is_dir()), None)
    if found is not None:
        return found
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder; give the folder of the data set")
    present = did_you_mean(places[0], [place.name for place in list_folders(folder)])
    raise InputError(
        f"{folder} has no folder {' and no '.join(places)}. {present.replace('Known:', 'It holds:')}"
    )


def _names(
    choice: Choice, keys: Sequence[str], listed: Path | str = "the folder"
) -> tuple[dict[str, tuple[str, ...]], Path | str]:
    """Return the names of each class by its key, and where they are from."""
    if choice.classes is not None:
        return read_classes(choice.classes), choice.classes
    return {key: (spell(key),) for key in keys}, listed


def _guess_modality(folder: Path, files: Sequence[str]) -> str:
    """Return what most of the files are, by their endings."""
    counts = {
        modality: sum(file.lower().endswith(tuple(endings)) for file in files)
        for modality, endings in ENDINGS.items()
    }
    if not any(counts.values()):
        raise InputError(
            f"{folder}: the endings of these files do not tell what they are; say it with --modality, as in "
            "--modality depth"
        )
    return max(counts, key=lambda modality: counts[modality])
