"""Reading pairs: what a row gives, what is left out and counted, and what is told apart by content."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch

from align_parts import BeatTower, LetterEncoder, radar_table, rewrite
from bindllm.data.report import Skipped
from bindllm.errors import InputError
from bindllm.evaluation.layouts import Choice, Column, read_layout
from bindllm.training.align.data import AlignData, PairSet, PairSource, read_pairs
from tiny import ColorEncoder, color_images


@pytest.fixture
def pictures(tmp_path):
    return color_images(tmp_path / "pictures", per_color=4)


def data_of(*sources: PairSource, folder, tower=None, **settings) -> AlignData:
    data = AlignData(
        list(sources),
        store=str(folder / "store"),
        tower=tower or LetterEncoder(),
        target=ColorEncoder(),
        **settings,
    )
    data.setup()
    return data


def test_a_row_gives_a_pair_for_each_text_of_its_columns(pictures):
    rewrite(pictures, lambda n, row: {**row, "caption": ["one", " two  words ", ""], "said": "three"})
    source = PairSource(str(pictures), columns=["caption", "said"])
    pairs = read_pairs(source, Skipped())
    assert [pair.media.source for pair in pairs[:3]] == ["one", "two words", "three"]
    assert {pair.target.source for pair in pairs[:3]} == {str(pictures / "images/red0.png")}
    assert [pair.split for pair in pairs[:7:3]] == ["test", "validation", "train"]


def test_what_cannot_be_used_is_counted_with_its_reason(pictures):
    def spoil(number, row):
        changes = {
            0: {"image": "images/none.png"},
            1: {"caption": 7},
            2: {"split": "trainx"},
            3: {"image": ""},
            4: {"caption": None},
            5: {"caption": "\u0007"},
            6: {"split": "val"},
        }
        return {**row, **changes.get(number, {})}

    rewrite(pictures, spoil)
    skipped = Skipped()
    pairs = read_pairs(PairSource(str(pictures)), skipped)
    assert skipped.counts == {
        "no such image file": 1,
        "no text": 1,
        "unknown split 'trainx'. Did you mean 'train'? Known: test, train, validation.": 1,
        "no path of image media": 1,
        "empty text": 1,
    }
    assert len([pair for pair in pairs if pair.media]) == 10
    assert pairs[1].split == "validation"
    # A row without a caption is still a picture to choose from.
    assert [pair.name for pair in pairs if pair.media is None] == ["captions.jsonl line 5"]


def test_a_target_is_in_one_split(pictures):
    rows = rewrite(pictures, lambda n, row: row)
    again = {**rows[0], "split": "train", "caption": "again"}
    rewrite(pictures, lambda n, row: again if n == 5 else row)
    skipped = Skipped()
    pairs = read_pairs(PairSource(str(pictures)), skipped)
    assert skipped.counts == {"this image is in another split already": 1}
    assert all(pair.media is None or pair.media.source != "again" for pair in pairs)


def test_without_a_split_column_the_hash_decides_and_a_fixed_split_is_obeyed(pictures):
    rewrite(pictures, lambda n, row: {key: row[key] for key in ("image", "caption")})
    found = read_pairs(PairSource(str(pictures), held_out=0.5), Skipped())
    assert {pair.split for pair in found} == {"train", "validation", "test"}
    assert [p.split for p in read_pairs(PairSource(str(pictures), held_out=0.5), Skipped())] == [
        p.split for p in found
    ]
    assert {p.split for p in read_pairs(PairSource(str(pictures), split="test"), Skipped())} == {"test"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"columns": ["captoin"]}, r"no column 'captoin'\. Did you mean 'caption'"),
        ({"modality": "Text"}, r"a modality is a lower-case word, not 'Text'\. Did you mean 'text'"),
        ({"split": "trainx"}, r"unknown split 'trainx'\. Did you mean 'train'"),
        ({"held_out": 1.0}, "held_out must be from 0 to below 1"),
        ({"path": "nowhere"}, "data source nowhere does not exist"),
    ],
)
def test_a_source_that_cannot_be_is_refused(pictures, changes, message):
    with pytest.raises(InputError, match=message):
        read_pairs(PairSource(**{"path": str(pictures), **changes}), Skipped())


def test_a_folder_without_a_table_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"holds no table captions\.\* "):
        read_pairs(PairSource(str(tmp_path)), Skipped())


def test_copies_count_once_and_are_no_test(pictures, tmp_path):
    images = pictures / "images"
    # red1 (validation) becomes a copy of red2 (train); blue3 one of blue2, both in train.
    shutil.copy(images / "red2.png", images / "red1.png")
    shutil.copy(images / "blue2.png", images / "blue3.png")
    rewrite(
        pictures, lambda n, row: {**row, "caption": row["image"]} if "green1" not in row["image"] else row
    )
    # The caption of a held-out picture is that of a training picture too: the picture stays to choose from.
    rewrite(
        pictures, lambda n, row: {**row, "caption": "images/red3.png"} if "green1" in row["image"] else row
    )
    data = data_of(PairSource(str(pictures)), folder=tmp_path)
    assert data.report.skipped.counts == {
        "its image is in the training split too": 1,
        "its text is in the training split too": 1,
    }
    train, validation = data.pairs("train"), data.pairs("validation")
    assert (len(train.targets), len(train.media), len(train.links)) == (7, 8, 8)
    assert (len(validation.targets), len(validation.media)) == (3, 2)
    assert data.report.without_media == 1
    assert sorted(map(len, train.media_of())) == [1] * 6 + [2]


def test_what_belongs_together_is_found_by_number():
    links = torch.tensor([[0, 0], [1, 0], [1, 2], [2, 1]])
    pairs = PairSet((None,) * 3, (None,) * 3, links)
    expected = torch.zeros(3, 3, dtype=torch.bool)
    expected[[0, 1, 1, 2], [0, 0, 2, 1]] = True
    assert torch.equal(pairs.belongs(torch.arange(3), torch.arange(3)), expected)
    chosen = pairs.belongs(torch.tensor([2, 1]), torch.tensor([2, 2, 1]))
    assert chosen.tolist() == [[False, False, True], [True, True, False]]


def test_batches_hold_frozen_vectors_targets_and_what_belongs_together(pictures, tmp_path):
    data = data_of(PairSource(str(pictures)), folder=tmp_path, batch_size=8)
    (batch,) = data.train_dataloader()
    # All pictures of a colour have the same caption, so each caption belongs to two pictures.
    assert batch["belongs"].sum(dim=1).tolist() == [2] * 8
    texts = LetterEncoder()
    caption = [media for media in data.pairs("train").media if media.source == "red square"]
    row = texts.embed("text", [texts.prepare(caption[0])])
    assert ((batch["inputs"] - row).abs().amax(dim=1) < 1e-6).sum() == 2
    assert batch["targets"].shape == (8, 16)


def test_media_that_cannot_be_opened_are_counted(tmp_path):
    folder = radar_table(tmp_path / "radar")
    (folder / "3.npy").write_bytes(b"no array")
    (folder / "images/green5.png").write_bytes(b"no picture")
    source = PairSource(str(folder), modality="radar")
    data = data_of(source, folder=tmp_path, tower=BeatTower())
    (line,) = data.report.skipped.lines()
    assert line.startswith("2 x cannot be read or embedded (captions.jsonl line 4: ")
    assert "3.npy" in line
    assert sum(data.report.pairs.values()) == 30


def test_augmentation_and_mixing_follow_the_seed(tmp_path):
    folder = radar_table(tmp_path / "radar")
    # Two signals to each picture.
    rows = rewrite(folder, lambda n, row: row)
    rewrite(folder, lambda n, row: {**row, "radar": [row["radar"], rows[n - 1]["radar"]]})
    source = PairSource(str(folder), modality="radar")
    first, again = (
        next(iter(data_of(source, folder=tmp_path, tower=BeatTower(), mix=1.0, seed=4).train_dataloader()))
        for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first["inputs"], again["inputs"], strict=True))
    other = data_of(source, folder=tmp_path, tower=BeatTower(), mix=0.0, seed=4)
    plain = next(iter(other.train_dataloader()))
    assert sum(map(len, first["inputs"])) > 1.5 * sum(map(len, plain["inputs"]))


@pytest.mark.parametrize(
    ("sources", "settings", "message"),
    [
        ([], {}, r"data\.sources is empty"),
        (
            [PairSource("a"), PairSource("b", modality="audio")],
            {},
            "must have the same modality; found audio, text",
        ),
        ([PairSource("a")], {"batch_size": 1}, r"data\.batch_size must be at least 2"),
        ([PairSource("a")], {"mix": 1.5}, r"data\.mix must be from 0 to 1"),
        ([PairSource("a")], {"mix": 0.3, "tower": LetterEncoder()}, "LetterEncoder has no method mix"),
    ],
)
def test_data_that_cannot_be_are_refused(sources, settings, message):
    with pytest.raises(InputError, match=message):
        AlignData(sources, **settings)


def test_an_encoder_that_does_not_serve_its_side_is_refused(pictures, tmp_path):
    with pytest.raises(
        InputError, match="the tower of the recipe serves text media, but the sources have audio"
    ):
        data_of(PairSource(str(pictures), modality="audio"), folder=tmp_path)
    with pytest.raises(
        InputError, match="the target of the recipe serves image media, but the sources have depth"
    ):
        data_of(PairSource(str(pictures), target="depth"), folder=tmp_path)


@pytest.mark.parametrize(
    ("change", "counts"),
    [
        (lambda n, row: {**row, "caption": "the same", "split": "train"}, "16 training pairs of 1 different"),
        (lambda n, row: {**row, "split": "train"} if n == 0 else None, "1 training pairs of 1 different"),
        (
            lambda n, row: {**row, "caption": ["one", "two"], "split": "train"} if n < 2 else None,
            "4 training pairs of 2 different text media and 2 different targets:",
        ),
    ],
    ids=["one caption", "one pair", "all of two"],
)
def test_pairs_without_a_negative_are_an_error(pictures, tmp_path, change, counts):
    rewrite(pictures, change)
    with pytest.raises(InputError, match=f"{counts}.*there are no negatives"):
        data_of(PairSource(str(pictures)), folder=tmp_path)


def test_media_that_are_not_finite_once_prepared_are_left_out(tmp_path):
    folder = radar_table(tmp_path / "radar")
    np.save(folder / "3.npy", np.array([1.0, np.nan, 2.0]))
    data = data_of(PairSource(str(folder), modality="radar"), folder=tmp_path, tower=BeatTower())
    (line,) = data.report.skipped.lines()
    assert "3.npy: the tower prepares values that are not finite" in line


def test_a_target_without_a_split_is_where_evaluation_looks_for_it(pictures):
    """What `bindllm align` trains with by the hash, `bindllm zero_shot table` does not take for a test."""
    rewrite(pictures, lambda n, row: {"image": f"images/../{row['image']}", "depth": row["image"]})
    trained = read_pairs(PairSource(str(pictures), modality="depth"), Skipped())
    expected = {(pair.media.source, pair.split) for pair in trained}
    assert len({split for _, split in expected}) > 1
    found = set()
    for split in ("train", "validation", "test"):
        columns = {"source": Column("depth", "depth"), "target": Column("image", "image")}
        try:
            task = read_layout("table", pictures, Choice(split=split, **columns))
        except InputError:
            continue
        found |= {(item.media.source, split) for item in task.items}
    assert found == expected


def test_no_pairs_is_an_error_that_says_what_was_left_out(pictures, tmp_path):
    rewrite(pictures, lambda n, row: {**row, "caption": 5})
    with pytest.raises(InputError, match="0 training pairs of 0 different text media .* 16 x no text"):
        data_of(PairSource(str(pictures)), folder=tmp_path)
