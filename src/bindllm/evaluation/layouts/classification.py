"""Classification layouts: ImageNet, ModelNet, ESC-50, AudioSet, and a folder for each class."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from pathlib import Path

from bindllm.data.tables import read_table
from bindllm.errors import InputError, did_you_mean
from bindllm.evaluation.layouts.dataset import (
    Choice,
    Classes,
    Dataset,
    Files,
    clip_stems,
    list_files,
    list_folders,
    read_classes,
    read_lines,
    read_seconds,
    require,
    spell,
    suffixes_of,
    walk,
)
from bindllm.media import SUFFIXES

IMAGENET_NAMES = ("LOC_synset_mapping.txt", "classes.json", "classes.tsv", "imagenet_class_index.json")
IMAGENET_SOLUTION = "LOC_{split}_solution.csv"
MODELNET_SPLITS = ("train", "test")
AUDIOSET_SPLITS = {
    "eval": "eval_segments.csv",
    "balanced_train": "balanced_train_segments.csv",
    "unbalanced_train": "unbalanced_train_segments.csv",
}
_KAGGLE = "ILSVRC/Data/CLS-LOC"


def read_imagenet(folder: Path, choice: Choice) -> Dataset:
    """Read ``<split>/<WordNet id>/*.JPEG``, or a flat ``val`` with ``LOC_val_solution.csv``.

    Both may be below Kaggle's folders ``ILSVRC/Data/CLS-LOC``. Class names come from ``--classes``, else from
    ``LOC_synset_mapping.txt`` or ``classes.json`` in the folder. All classes of that table are candidates, also those
    without images.
    """
    split = choice.split or "val"
    purpose = "names of the classes; or give your own table with --classes"
    table = choice.classes or require(folder, IMAGENET_NAMES, purpose=purpose)
    folders = (split, f"{_KAGGLE}/{split}")
    images = require(folder, folders, purpose="the images of the split", is_folder=True)
    # All classes of the table compete, so that a part of the images is as hard as the whole set.
    classes = Classes(read_classes(table), table)
    dataset = Dataset("classify", "image", classes=classes.names)
    # Either a folder for each class, or one folder and a table of labels.
    if below := list_folders(images):
        for one in below:
            label = classes.index(one.name, row=str(one))
            for file in list_files(one, "image"):
                dataset.add(file, file, labels=(label,))
        return dataset
    purpose = f"the class of each image, as {images} has no folder for each class"
    solution = require(folder, (IMAGENET_SOLUTION.format(split=split),), purpose=purpose)
    files = Files(images, "image")
    for row, record in read_table(solution, ("ImageId", "PredictionString"), dataset.skipped):
        # The class and the four numbers of a box, once for each object of that class in the image.
        words = str(record["PredictionString"]).split()
        if not words:
            dataset.skipped.add("no class", row)
            continue
        name = f"{record['ImageId']}.JPEG"
        label = classes.index(words[0], row=f"{solution.parent}/{row}")
        dataset.add(files.find(name, ""), name, labels=(label,))
    return dataset


def read_modelnet(folder: Path, choice: Choice) -> Dataset:
    """Read ``<class>/<split>/*.off``, or ``modelnet40_normal_resampled``.

    The latter has ``modelnet40_shape_names.txt``, ``modelnet40_test.txt`` and ``<class>/<class>_0001.txt``.
    """
    split = choice.split or "test"
    # The resampled release is recognized by its list of shapes.
    kinds = [kind for kind in ("modelnet40", "modelnet10") if (folder / f"{kind}_shape_names.txt").is_file()]
    if kinds:
        return _read_resampled(folder, choice, kinds[0], split)
    # Only folders with a split inside are classes.
    shapes = [
        below for below in list_folders(folder) if any((below / name).is_dir() for name in MODELNET_SPLITS)
    ]
    if not shapes:
        raise InputError(
            f"{folder} has neither <class>/test/*.off nor modelnet40_shape_names.txt; give the folder that has one "
            "folder for each class"
        )
    if not any((shape / split).is_dir() for shape in shapes):
        raise InputError(f"{folder} has no split {split!r}. {did_you_mean(split, MODELNET_SPLITS)}")
    classes = _classes(choice, [shape.name for shape in shapes])
    dataset = Dataset("classify", "point", classes=classes.names)
    for shape in shapes:
        label = classes.index(shape.name, row=str(shape))
        for file in list_files(shape / split, "point") if (shape / split).is_dir() else ():
            dataset.add(file, file, labels=(label,))
    return dataset


def _read_resampled(folder: Path, choice: Choice, kind: str, split: str) -> Dataset:
    listed = folder / f"{kind}_shape_names.txt"
    classes = _classes(choice, [line.strip() for _, line in read_lines(listed)], listed)
    dataset = Dataset("classify", "point", classes=classes.names)
    table = require(folder, (f"{kind}_{split}.txt",), purpose="the shapes of the split")
    for row, line in read_lines(table):
        shape = line.strip()
        # Class names contain underscores themselves: night_stand_0001.
        key = shape.rpartition("_")[0]
        label = classes.index(key, row=row)
        file = folder / key / f"{shape}.txt"
        # A file that does not exist is counted as missing.
        dataset.add(str(file) if file.is_file() else None, f"{key}/{shape}.txt", labels=(label,))
    return dataset


def read_folders(folder: Path, choice: Choice) -> Dataset:
    """Read ``<class>/<files>`` or, if a split is given, ``<split>/<class>/<files>``, at any depth below a class."""
    parent = require(folder, (choice.split or ".",), purpose="the folders of the classes", is_folder=True)
    # The folders name the classes; their order is alphabetical on every file system.
    below = list_folders(parent)
    if not below:
        raise InputError(f"{parent} has no folders; expected one for each class, with its files in it")
    classes = _classes(choice, [one.name for one in below])
    found = {one.name: sorted(walk(one)) for one in below}
    modality = choice.modality or _guess_modality(
        parent, [file for files in found.values() for file in files]
    )
    dataset = Dataset("classify", modality, classes=classes.names)
    suffixes = tuple(suffixes_of(modality))
    for key, files in found.items():
        label = classes.index(key, row=str(parent / key))
        for file in files:
            if suffixes and not file.lower().endswith(suffixes):
                dataset.skipped.add(f"not a file suffix of {modality}", file)
            else:
                dataset.add(file, file, labels=(label,))
    return dataset


def _classes(choice: Choice, keys: Sequence[str], source: Path | str = "the folder") -> Classes:
    """Return the classes of the user's table, else those of the data set, named like their keys."""
    if choice.classes is not None:
        return Classes(read_classes(choice.classes), choice.classes)
    return Classes({key: (spell(key),) for key in keys}, source)


def _guess_modality(folder: Path, files: Sequence[str]) -> str:
    """Return the modality of most of the files, by their suffixes."""
    counts = {
        modality: sum(file.lower().endswith(tuple(suffixes)) for file in files)
        for modality, suffixes in SUFFIXES.items()
    }
    if not any(counts.values()):
        raise InputError(
            f"{folder}: the modality of these files cannot be guessed from their suffixes; give it with --modality, as "
            "in --modality depth"
        )
    return max(counts, key=lambda modality: counts[modality])


def read_esc50(folder: Path, choice: Choice) -> Dataset:
    """Read ``meta/esc50.csv`` (filename, fold, target, category) and ``audio/*.wav``; all five folds by default."""
    table = require(folder, ("meta/esc50.csv", "esc50.csv"), purpose="the table of clips")
    dataset = Dataset("classify", "audio")
    clips = []
    for row, record in read_table(table, ("filename", "fold", "target", "category"), dataset.skipped):
        fold, target = str(record["fold"]), str(record["target"])
        if not (fold.isdecimal() and target.isdecimal()):
            dataset.skipped.add("fold or target is not a number", row)
        else:
            clips.append((row, str(record["filename"]), int(fold), int(target), str(record["category"])))
    # The classes are those of all folds, so that every fold has the same candidates.
    categories: dict[int, str] = {}
    for row, _, _, target, category in clips:
        # One number with two names means a damaged table.
        if categories.setdefault(target, category) != category:
            raise InputError(
                f"{table.parent}/{row}: the target {target} is called {category!r} here, {categories[target]!r} above"
            )
    classes = _classes(choice, [categories[target] for target in sorted(categories)], table)
    dataset.classes = classes.names
    folds = {fold for _, _, fold, _, _ in clips}
    for fold in choice.folds:
        if fold not in folds:
            known = did_you_mean(str(fold), map(str, sorted(folds)))
            raise InputError(f"{table} has no fold {fold}. {known}")
    files = Files(folder, "audio")
    for row, name, fold, _, category in clips:
        # Without a choice, all folds.
        if not choice.folds or fold in choice.folds:
            label = classes.index(category, row=f"{table.parent}/{row}")
            dataset.add(files.find(name, "audio"), name, labels=(label,))
    return dataset


def read_audioset(folder: Path, choice: Choice) -> Dataset:
    """Read a table of segments (YTID, start, end, "label,label,...") and ``class_labels_indices.csv``.

    The clips may be anywhere below the folder, as audio or video files with one of the names in `clip_stems`.
    """
    split = choice.split or "eval"
    if split not in AUDIOSET_SPLITS:
        raise InputError(f"audioset has no split {split!r}. {did_you_mean(split, AUDIOSET_SPLITS)}")
    # The table of the authors has comment lines before its header, so it is not read as a usual table.
    segments = require(folder, (AUDIOSET_SPLITS[split],), purpose="the table of clips")
    table = require(folder, ("class_labels_indices.csv",), purpose="the names of the classes")
    dataset = Dataset("tag", "audio")
    names: dict[str, tuple[str, ...]] = {}
    for row, record in read_table(table, ("index", "mid", "display_name"), dataset.skipped):
        mid, name = str(record["mid"]), str(record["display_name"])
        if mid in names or not name.strip():
            raise InputError(f"{folder}/{row}: the class {mid!r} occurs twice or has no name")
        names[mid] = (name,)
    classes = Classes(names, table)
    dataset.classes = classes.names
    files = Files(folder, "audio")
    for row, video, start, end, keys in _read_segments(segments, dataset):
        # A clip may repeat a label.
        labels = tuple(sorted({classes.index(key, row=row) for key in keys}))
        if labels:
            file = files.find_stem(clip_stems(video, start, end))
            dataset.add(file, f"{video} from {start:g} s", labels=labels)
        else:
            dataset.skipped.add("no label", row)
    return dataset


def _read_segments(path: Path, dataset: Dataset) -> Iterator[tuple[str, str, float, float, list[str]]]:
    """Yield row, video, start, end and label keys of each segment; comments start with #."""
    for row, line in read_lines(path):
        if line.startswith("#"):
            continue
        try:
            # A space follows each comma, also before a quotation mark.
            cells = next(csv.reader([line], skipinitialspace=True))
            video, start, end = cells[0], read_seconds(cells[1]), read_seconds(cells[2])
            keys = [key.strip() for key in cells[3].split(",") if key.strip()]
        except (IndexError, ValueError, csv.Error):
            dataset.skipped.add('not YTID, start, end, "labels"', row)
            continue
        yield row, video, start, end, keys
