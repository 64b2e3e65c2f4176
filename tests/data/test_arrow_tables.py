"""Datasets of the library `datasets`, from folders and as from the hub: rows as they are stored, nothing decoded."""

import sys

import pyarrow as pa
import pytest

from bindllm.data.report import Skipped
from bindllm.data.tables import is_table, parse_hub, read_table
from bindllm.errors import InputError, MissingExtraError

datasets = pytest.importorskip("datasets")

PICTURE = {"bytes": b"no picture at all", "path": "a.png"}
MESSAGES = [{"role": "user", "content": "Hi"}]


def records(path, required=()) -> list[tuple[str, dict]]:
    return list(read_table(path, required, Skipped()))


@pytest.fixture(scope="module")
def dataset():
    # Put together without the encoders of the library, which want a package of their own for sounds.
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "sounds": datasets.List(datasets.Audio()),
            "label": datasets.ClassLabel(names=["cat", "dog"]),
            "labels": datasets.List(datasets.ClassLabel(names=["red", "blue"])),
            "messages": datasets.List(
                {"role": datasets.Value("string"), "content": datasets.Value("string")}
            ),
        }
    )
    rows = [
        {"image": PICTURE, "sounds": [PICTURE], "label": label, "labels": [1, -1], "messages": MESSAGES}
        for label in (1, 0, -1)
    ]
    table = pa.Table.from_pylist(rows, schema=features.arrow_schema)
    return datasets.Dataset(table, info=datasets.DatasetInfo(features=features))


def test_rows_are_what_is_stored_and_classes_are_named(tmp_path, dataset):
    dataset.save_to_disk(tmp_path / "d")
    assert is_table(tmp_path / "d")
    stored = {"image": PICTURE, "sounds": [PICTURE], "labels": ["blue", None], "messages": MESSAGES}
    assert records(tmp_path / "d", ("image",)) == [
        (f"d row {n}", {**stored, "label": label}) for n, label in enumerate(("dog", "cat", None), start=1)
    ]


def test_rows_come_in_the_order_of_a_selection(tmp_path, dataset):
    dataset.select([2, 0]).save_to_disk(tmp_path / "d")
    assert [row["label"] for _, row in records(tmp_path / "d")] == [None, "dog"]


def test_splits_are_a_column_under_our_names(tmp_path, dataset):
    parts = {"train": dataset.select([0]), "dev": dataset.select([1])}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "d")
    found = [(name, row["split"], row["label"]) for name, row in records(tmp_path / "d", ("split", "image"))]
    assert found == [("d train row 1", "train", "dog"), ("d validation row 1", "validation", "cat")]
    assert [set(row) for _, row in records(tmp_path / "d" / "dev")] == [set(dataset.column_names)]


def test_a_dataset_for_training_alone_says_nothing_about_splits(tmp_path, dataset):
    datasets.DatasetDict({"train": dataset}).save_to_disk(tmp_path / "train")
    datasets.DatasetDict({"test": dataset}).save_to_disk(tmp_path / "test")
    assert "split" not in records(tmp_path / "train")[0][1]
    assert records(tmp_path / "test")[0][1]["split"] == "test"


def test_splits_of_other_names_must_be_chosen(tmp_path, dataset):
    datasets.DatasetDict({"train_sft": dataset, "test_sft": dataset}).save_to_disk(tmp_path / "d")
    with pytest.raises(
        InputError, match=r"splits train_sft, test_sft, and 'train_sft' is none of .*d/train_sft, split"
    ):
        records(tmp_path / "d")
    assert len(records(tmp_path / "d" / "train_sft")) == 3


def test_hub_names_are_handed_to_the_library(monkeypatch, dataset):
    asked = []

    def load_dataset(name, config=None, split=None):
        asked.append((name, config, split))
        return dataset if split else datasets.DatasetDict({"train": dataset, "val": dataset})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert len(records("hf://lab/pets")) == 6
    assert records("hf://lab/pets/small@test")[0][0] == "lab/pets/small@test row 1"
    assert asked == [("lab/pets", None, None), ("lab/pets", "small", "test")]
    assert is_table("hf://lab/pets")


def test_hub_names_of_other_forms_are_refused(tmp_path):
    assert parse_hub(f"hf://{tmp_path}@train") == (str(tmp_path), None, "train")
    for name in ("hf://", "hf://a/b/c/d", "hf://a//b", "hf://@train"):
        with pytest.raises(InputError, match="expected hf://ORGANIZATION/DATASET"):
            records(name)


def test_datasets_that_cannot_be_opened_say_why(tmp_path, dataset, monkeypatch):
    dataset.save_to_disk(tmp_path / "d")
    with pytest.raises(InputError, match="no column 'picture'. .*Known: image"):
        records(tmp_path / "d", ("picture",))
    next((tmp_path / "d").glob("*.arrow")).write_bytes(b"damaged")
    with pytest.raises(InputError, match="d cannot be opened by the library datasets"):
        records(tmp_path / "d")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingExtraError, match=r"bindllm\[datasets\]"):
        records("hf://lab/pets")


def test_a_damaged_row_among_sound_ones_is_counted(tmp_path):
    text = pa.array([b"x", b"\xff", b"z"]).view(pa.string())
    datasets.Dataset(pa.table({"text": text})).save_to_disk(tmp_path / "d")
    skipped = Skipped()
    rows = list(read_table(tmp_path / "d", ("text",), skipped))
    assert rows == [("d row 1", {"text": "x"}), ("d row 3", {"text": "z"})]
    assert skipped.counts == {"not UTF-8 text": 1}
