"""The published lists of link-context learning, read from made-up files of the same form."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from bindllm.data.datamodule import BindData
from bindllm.data.episodes.draw import draw_episodes
from bindllm.data.report import Skipped
from bindllm.data.source_config import EpisodeConfig, SourceConfig
from bindllm.data.sources import read_source
from bindllm.errors import InputError
from tiny import ColorEncoder, tiny_tokenizer


def images(folder: Path, name: str, count: int) -> list[str]:
    """Write images of different colors; return their names."""
    names = [f"{name}/{n}.png" for n in range(count)]
    (folder / name).mkdir(parents=True)
    for n, file in enumerate(names):
        color = (sum(map(ord, name)) * 7 % 256, 40 * n, len(name) * 9)
        Image.new("RGB", (4, 4), color).save(folder / file)
    return names


def write(file: Path, rows: list[dict]) -> SourceConfig:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return SourceConfig(str(file), media=str(file.parent / "images"), prompt="What?")


@pytest.fixture
def isekai(tmp_path):
    pos, neg = (images(tmp_path / "images", f"{kind}-vacuum", 4) for kind in ("pos", "neg"))
    labels = "octopus vacuum", "robot vacuum"
    row = dict(zip(("positive_promt", "negative_promt"), labels, strict=True))
    lists = {"positive_list": pos[1:], "negative_list": neg[1:]}
    queries = zip((pos[0], neg[0]), labels, strict=True)
    rows = [row | lists | {"image_name": image, "label_name": label} for image, label in queries]
    return rows, write(tmp_path / "ISEKAI-10.json", rows)


@pytest.fixture
def imagenet(tmp_path):
    def row(name, train):
        found = images(tmp_path / "images", name, 6)
        head = {"class_id": name, "class_name": name}
        if train:
            return head | {"samples": found, "neighbors": [["n1", "other", "other/1.png"]]}
        return head | {"context_samples": found[:3], "test_samples": found[3:]}

    train = [row(f"train{n}", True) for n in range(3)]
    test = [row(f"test{n}", False) for n in range(5)]
    return write(tmp_path / "train900.jsonl", train), write(tmp_path / "test100.jsonl", test)


def with_episodes(config, layout, **options):
    return replace(
        config, episodes=EpisodeConfig(**{"layout": layout, "test_shots": [1, 2], "shots": 2, **options})
    )


def shown(row):
    users, answers = row.conversation.messages[::2], row.conversation.messages[1::2]
    return [
        (Path(user.media[0].name).parent.name, answer.text)
        for user, answer in zip(users, answers, strict=True)
    ]


def test_isekai(isekai):
    _, config = isekai
    rows, report = read_source(with_episodes(config, "isekai", names="true"))
    assert report.counted == "4 rows (episodes), 16 answers, 6 images"
    assert [row.subset for row in rows["test"]] == ["1 shot", "2 shots"] * 2
    one, two, other, _ = map(shown, rows["test"])
    names = {"pos-vacuum": "octopus vacuum", "neg-vacuum": "robot vacuum"}
    assert all(name == names[image] for image, name in one + two)
    assert (len(one), len(two), one[-1][0], other[-1][0]) == (3, 5, "pos-vacuum", "neg-vacuum")
    assert rows["test"][0].options == ("octopus vacuum", "robot vacuum")
    assert rows["test"][0].references == ("octopus vacuum",)
    made_up, _ = read_source(with_episodes(config, "isekai"))
    assert {len(name) for name in made_up["test"][0].options} == {4}
    assert made_up["test"][0].options == made_up["test"][1].options


def test_imagenet(imagenet, tmp_path):
    train, test = (
        with_episodes(config, "imagenet", names="true", held_out_count=2, count=5) for config in imagenet
    )
    rows, report = read_source(test)
    # Two pairs, two queries of each class, two numbers of shots.
    assert len(rows["test"]) == 16
    assert report.skipped.counts == {"a class of the test without a partner": 1}
    assert {row.options for row in rows["test"]} == {("test0", "test1"), ("test2", "test3")}
    for row in rows["test"]:
        assert all(image == name for image, name in shown(row))
        assert {Path(media.name).stem for media in row.media[:-1]} <= {"0", "1", "2"}
        assert Path(row.media[-1].name).stem in "34"
    parts = {"tokenizer": tiny_tokenizer(), "encoders": [ColorEncoder()]}
    data = BindData([train, test], str(tmp_path / "store"), max_length=400, **parts)
    assert (len(data.samples("train")), len(data.samples("test"))) == (5, 16)
    assert {name for sample in data.samples("train") for name in sample.options} <= {
        "train0",
        "train1",
        "train2",
    }


@pytest.mark.parametrize("names", ["true", "made-up"])
def test_test_classes_that_training_shows_are_reported(imagenet, names, caplog):
    train, test = (
        with_episodes(config, "imagenet", names=names, held_out_count=1, count=2) for config in imagenet
    )
    file = Path(train.path)
    sources = [train, test]
    rows = [read_source(source, number)[0] for number, source in enumerate(sources)]
    draw_episodes({split: rows[0][split] + rows[1][split] for split in rows[0]}, sources, Skipped())
    assert not caplog.text
    file.write_text(file.read_text().replace('"class_name": "train1"', '"class_name": "test2"'))
    rows[0] = read_source(train, 0)[0]
    draw_episodes({split: rows[0][split] + rows[1][split] for split in rows[0]}, sources, Skipped())
    assert "1 of 4 classes of the test episodes have images in the training split (test2)" in caplog.text


def test_a_class_of_another_source_may_not_be_in_training_either(imagenet):
    train = with_episodes(imagenet[0], "imagenet", test_shots=[2])
    sources = [train, replace(train, split="test")]
    rows = {"train": read_source(train, 0)[0]["train"], "test": read_source(sources[1], 1)[0]["test"]}
    with pytest.raises(InputError, match="3 classes have images in several splits"):
        draw_episodes(rows, sources, Skipped())


def test_a_copy_of_the_query_is_never_a_shot(isekai, tmp_path):
    rows, config = isekai
    images = Path(config.media)
    (images / rows[0]["image_name"]).write_bytes((images / rows[0]["positive_list"][1]).read_bytes())
    parts = {"tokenizer": tiny_tokenizer(), "encoders": [ColorEncoder()]}
    config = with_episodes(config, "isekai")
    data = BindData([config], str(tmp_path / "store"), max_length=400, **parts)
    # Also the episode whose only positive shot is another image: all numbers of shots have the same queries.
    assert [sample.media[-1][0].name for sample in data.samples("test")] == [
        str(images / rows[1]["image_name"])
    ] * 2
    assert data.report.skipped.counts["the query is among its shots"] == 2


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"label_name": "vacuum"}, "label_name is neither positive_promt nor negative_promt"),
        ({"negative_promt": "octopus vacuum"}, "or these are the same"),
        ({"positive_list": ["pos-vacuum/0.png", "pos-vacuum/1.png"]}, "the query is among its shots"),
        (
            {"negative_list": ["neg-vacuum/1.png"]},
            "a class with fewer than 2 images; lower episodes.test_shots",
        ),
        ({"negative_list": ["neg-vacuum/1.png", "neg-vacuum/9.png"]}, "no such image file"),
        ({"positive_promt": None}, "nothing in 'positive_promt'"),
    ],
)
def test_records_that_cannot_be_used_are_counted(isekai, change, reason):
    rows, config = isekai
    Path(config.path).write_text(json.dumps(rows[1]) + "\n" + json.dumps(rows[0] | change) + "\n")
    found, report = read_source(with_episodes(config, "isekai"))
    assert len(found["test"]) == 2
    assert reason in "".join(report.skipped.lines())


def test_lists_of_another_form(isekai, imagenet):
    _, config = isekai
    with pytest.raises(InputError, match="no list 'context_samples'|nothing in 'class_name'"):
        read_source(with_episodes(config, "imagenet"))
    with pytest.raises(InputError, match="nothing in 'positive_promt'"):
        read_source(with_episodes(imagenet[1], "isekai"))
    with pytest.raises(InputError, match="layout isekai has two classes in an episode, not 3 ways"):
        EpisodeConfig(layout="isekai", ways=3)
