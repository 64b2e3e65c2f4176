"""Episodes: what a conversation shows, that classes and images stay apart, and the tables that cannot be used."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from bindllm.conversation import Conversation, Message, render
from bindllm.data.datamodule import BindData
from bindllm.data.episodes.draw import check_episodes, draw_episodes
from bindllm.data.report import Skipped
from bindllm.data.rows import Row, make_sample
from bindllm.data.source_config import Columns, EpisodeConfig, SourceConfig
from bindllm.data.sources import read_source
from bindllm.errors import InputError
from bindllm.media import Media
from bindllm.shots import Shot, add_shots
from episode_parts import SPLITS, label_table
from tiny import ColorEncoder, tiny_tokenizer
from tiny_run import run, tiny_recipe

SMALL = {"shots": 2, "count": 12, "held_out_count": 4, "test_shots": [0, 1, 3]}


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    return label_table(tmp_path_factory.mktemp("labels") / "set")


def source(table, *, columns=None, **options) -> SourceConfig:
    config = SourceConfig(str(table), prompt="What is this?", columns=columns or Columns())
    return replace(config, episodes=EpisodeConfig(**{**SMALL, **options}))


def draw(table, embeddings=None, **options):
    config = source(table, **options)
    return draw_episodes(read_source(config)[0], [config], Skipped(), embeddings)


def turns(row):
    """The images and the names of the shots, and those of the query."""
    users, answers = row.conversation.messages[::2], row.conversation.messages[1::2]
    pairs = [(user.media[0].name, answer.text) for user, answer in zip(users, answers, strict=True)]
    return pairs[:-1], pairs[-1]


def class_of(image: str) -> str:
    return f"class {Path(image).stem.split('-')[0]}"


def test_an_episode_shows_as_many_images_of_each_class(table):
    rows = draw(table)
    assert {split: len(found) for split, found in rows.items()} == {"train": 12, "validation": 4, "test": 12}
    for row in rows["train"]:
        shots, (query, answer) = turns(row)
        given = Counter(name for _, name in shots)
        assert sorted(given.values()) == [2, 2]
        assert given.keys() == set(row.options)
        assert {message.text for message in row.conversation.messages[::2]} == {"What is this?"}
        # Each name stands for one class, and the query's name for its class.
        classes = {
            name: {class_of(image) for image, each in [*shots, (query, answer)] if each == name}
            for name in given
        }
        assert all(len(found) == 1 for found in classes.values())
        assert row.references == (answer,)


def test_the_query_is_never_among_its_shots(table):
    for found in draw(table, shots=4, test_shots=[4]).values():
        for row in found:
            shots, (query, _) = turns(row)
            images = [image for image, _ in shots]
            assert len(images) == len(set(images)) == 8
            assert query not in images


def test_episodes_differ_by_number_and_are_equal_for_equal_seeds(table):
    rows, again, other = (draw(table, seed=seed)["train"] for seed in (0, 0, 1))
    assert rows == again
    assert len({turns(row)[1] for row in rows}) > 6
    assert all(one.conversation != two.conversation for one, two in zip(rows, other, strict=True))
    # More episodes change none of the earlier ones.
    assert draw(table, count=20)["train"][:12] == rows


def test_an_episode_is_the_few_shot_prompt_of_its_shots(table):
    row = draw(table)["train"][0]
    *shown, question, _ = row.conversation.messages
    shots = [Shot(one.text, two.text, one.media) for one, two in zip(shown[::2], shown[1::2], strict=True)]
    prompt = render(add_shots(Conversation((question,)), shots), tiny_tokenizer(), add_generation_prompt=True)
    sample = make_sample(row, tiny_tokenizer(), 400)
    assert sample.input_ids[: sample.prompt_length].tolist() == prompt.input_ids
    assert sample.media_index[: sample.prompt_length].tolist() == prompt.media_index


def test_made_up_names_are_drawn_for_each_episode(table):
    names = [name for row in draw(table)["train"] for name in row.options]
    assert len(set(names)) > 20
    assert all(len(name) == 4 and name.isalpha() for name in names)
    true = [name for row in draw(table, names="true")["train"] for name in row.options]
    assert set(true) <= {f"class {n}" for n in range(6)}


def test_classes_of_the_splits_are_disjoint(table):
    shown = {
        split: {class_of(media.name) for row in found for media in row.media}
        for split, found in draw(table, count=60, held_out_count=30).items()
    }
    assert {split: len(found) for split, found in shown.items()} == SPLITS
    assert len(set.union(*shown.values())) == sum(SPLITS.values())


def test_a_table_without_splits_is_split_by_class(table):
    config = replace(source(table, columns=Columns(split=None), test_shots=[1]), held_out=0.5)
    rows, report = read_source(config)
    labels = {split: {row.references[0] for row in found} for split, found in rows.items()}
    assert all(len(found) >= 2 for found in labels.values())
    assert sum(map(len, labels.values())) == report.classes == 11
    # A limit counts classes.
    rows, report = read_source(replace(config, limit=4, held_out=0.0))
    assert (report.classes, len(rows["train"])) == (4, 20)


def test_episodes_of_more_shots_begin_with_the_same_classes_names_and_query(table):
    rows = draw(table)["test"]
    assert [row.subset for row in rows] == ["0 shots"] * 4 + ["1 shot"] * 4 + ["3 shots"] * 4
    for none, one, three in zip(rows[:4], rows[4:8], rows[8:], strict=True):
        assert turns(none) == ([], turns(three)[1])
        assert turns(one)[1] == turns(three)[1]
        assert set(turns(one)[0]) < set(turns(three)[0])
        assert none.options == one.options == three.options


def test_strategies_draw_the_number_of_shots(table):
    def numbers(**options):
        return Counter(len(turns(row)[0]) // 2 for row in draw(table, count=300, **options)["train"])

    assert numbers(shots=3, strategy="2-way").keys() == {3}
    even = numbers(shots=(1, 4), strategy="2-way-random")
    assert even.keys() == {1, 2, 3, 4}
    assert min(even.values()) > 45
    assert even == numbers(shots=(1, 4)), "the default for a range"
    # e^2 times as likely with one more shot of each of two classes.
    weighted = numbers(shots=(1, 4), strategy="2-way-weight")
    assert weighted[4] / 300 == pytest.approx(1 / (1 + np.exp(-2) + np.exp(-4) + np.exp(-6)), abs=0.06)
    assert numbers(shots=(1, 4), strategy="mix") == even


def test_more_ways(table, tmp_path):
    three = draw(label_table(tmp_path / "set", splits={"train": 5, "test": 3}), ways=3)
    for row in three["train"] + three["test"]:
        assert len(set(row.options)) == 3
        assert {len(turns(row)[0]) % 3 for row in three["train"]} == {0}
    with pytest.raises(InputError, match=r"validation split has 2 classes .* needs 3 \(episodes.ways\)"):
        draw(table, ways=3)


class Circle:
    """Stands for the embeddings of 200 classes: class n is at the angle of n hundredths of a half turn."""

    key = staticmethod(lambda media: media)

    def lookup(self, groups):
        angles = [np.pi * int(class_of(media.name).split()[1]) / 100 for (media,) in groups]
        return torch.tensor([[np.cos(angle), np.sin(angle)] for angle in angles], dtype=torch.float32)


def test_hard_negatives_are_neighbors_in_the_space_of_the_encoder():
    rows = {"train": []}
    for number in range(200):
        for n in range(2):
            turns = Message("user", Media.image(f"{number}-{n}.png")), Message("assistant", f"class {number}")
            rows["train"].append(Row(Conversation(turns), (f"class {number}",), f"row {number}"))

    def distances(embeddings):
        config = source("labels.jsonl", shots=1, count=600, negatives="hard")
        for row in draw_episodes(rows, [config], Skipped(), embeddings)["train"]:
            one, other = {int(class_of(media.name).split()[1]) for media in row.media}
            yield min(abs(one - other), 200 - abs(one - other))

    near = list(distances(Circle()))
    # Two neighbors at each distance: the hundred nearest are those up to 50, and the mean of the weights is a third.
    assert max(near) <= 50
    assert np.mean(near) == pytest.approx(50 / 3, abs=2)
    assert np.mean(list(distances(None))) == pytest.approx(50, abs=3)


def test_label_noise_is_in_training_only(table):
    def wrong(rows):
        """Share of the shots whose name is not that of their class, by the query's name."""
        found = []
        for row in rows:
            shots, (query, answer) = turns(row)
            found += [(name == answer) != (class_of(image) == class_of(query)) for image, name in shots]
        return np.mean(found)

    rows = draw(table, label_noise=1.0)
    assert wrong(rows["train"]) == 1.0
    assert wrong(rows["test"]) == wrong(rows["validation"]) == 0
    assert 0.1 < wrong(draw(table, label_noise=0.3, count=60)["train"]) < 0.5


def make_data(config, tmp_path, *others, max_length=400):
    return BindData(
        [config, *others],
        str(tmp_path / "store"),
        tokenizer=tiny_tokenizer(),
        encoders=[ColorEncoder()],
        max_length=max_length,
    )


def test_only_the_answer_about_the_query_is_learned(table, tmp_path):
    data = make_data(source(table), tmp_path)
    sample = data.samples("train")[0]
    assert (sample.num_answers, len(sample.media), sample.task) == (1, 5, "episode")
    # The name and the end token.
    assert sample.num_supervised == 5
    everything = make_data(source(table, loss="all"), tmp_path)
    assert everything.samples("train")[0].num_answers == 5
    assert everything.samples("test")[-1].num_answers == 1, "only the query is measured"


def test_episodes_that_do_not_fit_are_counted(table, tmp_path):
    data = make_data(source(table), tmp_path, max_length=150)
    assert not data.samples("train")
    assert "the prompt leaves no room for an answer in max_length=150 tokens" in "".join(
        data.report.skipped.lines()
    )
    # A name is never cut, and the query is never lost: not even with a loss on all answers.
    length = make_data(source(table), tmp_path).samples("train")[0].length
    for loss in ("query", "all"):
        data = make_data(source(table, loss=loss), tmp_path, max_length=length - 1)
        assert not data.samples("train")
        assert data.report.skipped.counts[f"an episode longer than max_length={length - 1} tokens"] >= 12
        assert data.report.truncated == 0


def test_copies_of_an_image_count_once(tmp_path):
    table = label_table(tmp_path / "set")
    images = tmp_path / "set/images"
    (images / "0-1.png").write_bytes((images / "0-0.png").read_bytes())
    (images / "0-2.png").write_text("not an image")
    data = make_data(source(table), tmp_path)
    # Three of five images are left: two shots and the query.
    assert any(
        class_of(media.name) == "class 0"
        for row in data.samples("train")
        for group in row.media
        for media in group
    )
    assert data.report.skipped.counts.keys() >= {
        "an image that has a label already, in this row or an earlier one"
    }
    for row in data.samples("train"):
        content = [data._embeddings.key(media) for group in row.media for media in group]
        assert len(content) == len(set(content))


def test_a_source_of_episodes_next_to_an_ordinary_one(table, tmp_path):
    captions = SourceConfig(str(table), columns=Columns(caption="label"))
    data = make_data(source(table, strategy="mix"), tmp_path, captions)
    tasks = Counter(sample.task for sample in data.samples("train"))
    assert tasks == {"episode": 12, "caption": 30}
    assert [sample.source for sample in data.samples("train")] == [0] * 12 + [1] * 30
    with pytest.raises(InputError, match="mix needs ordinary data next to the episodes"):
        check_episodes([source(table, strategy="mix")])


def test_labels_may_be_captions_or_names_of_files(tmp_path):
    table = label_table(tmp_path / "captions", column="caption")
    rows = draw(table, names="true")
    assert set(rows["train"][0].options) <= {f"class {n}" for n in range(6)}
    table = label_table(tmp_path / "renamed", column="species")
    assert len(draw(table, columns=Columns(label="species"))["train"]) == 12


def respelled(tmp_path, change):
    """The table of labels with the label of each row changed."""
    table = label_table(tmp_path / "set")
    rows = [json.loads(line) for line in table.read_text().splitlines()]
    for number, row in enumerate(rows):
        row["label"] = change(row["label"], number)
    table.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return table


def test_labels_may_be_numbers(tmp_path):
    table = respelled(tmp_path, lambda label, _: int(label.split()[1]))
    assert set(draw(table, names="true")["train"][0].options) <= {str(n) for n in range(6)}


def test_upper_and_lower_case_make_no_further_class(tmp_path):
    table = respelled(tmp_path, lambda label, number: label.title() if number % 2 else label)
    rows, report = read_source(source(table))
    assert report.classes == 11
    assert {row.references[0].casefold() for row in rows["test"]} == {f"class {n}" for n in (8, 9, 10)}
    assert "22 x a label that an earlier row has in another case" in next(report.remarks.lines())
    # Also between the splits: a name that training has seen would measure memory.
    table = respelled(tmp_path / "apart", lambda label, _: "Class 8" if label == "class 0" else label)
    with pytest.raises(InputError, match=r"1 classes have images in several splits \(Class 8\)"):
        read_source(source(table))


def test_check_shows_episodes(table, tmp_path, monkeypatch, capsys, parts):
    monkeypatch.chdir(tmp_path)
    episodes = {"shots": [1, 2], "count": 8, "held_out_count": 2, "test_shots": [0, 2], "negatives": "hard"}
    data = {
        "sources": [{"path": str(table), "prompt": "What is this?", "episodes": episodes}],
        "max_length": 400,
    }
    assert run("check", tiny_recipe(parts, data=data)) == 0
    shown = capsys.readouterr().out
    assert "55 images of 11 classes, for episodes; 8 train, 2 validation, 4 test" in shown
    assert "hard negatives need embeddings; these episodes were drawn with random ones" in shown
    assert "labels.jsonl train episode 1, " in shown
    assert "media 2  given" in shown


def test_check_reports_every_wrong_option(table, tmp_path, monkeypatch, capsys, parts):
    monkeypatch.chdir(tmp_path)
    wrong = [{"ways": 1}, {"shots": [3, 1]}, {"shots": 20}]
    sources = [{"path": str(table), "episodes": episodes} for episodes in wrong]
    assert run("check", tiny_recipe(parts, data={"sources": sources})) == 1
    shown = capsys.readouterr().out
    assert "episodes.ways must be at least 2, not 1" in shown
    assert "the smallest number comes first" in shown
    assert "0 classes of at least 21 images" in shown
    assert "3 problems" in shown
    assert run("fit", tiny_recipe(parts, data={"sources": sources[:1]})) == 1
    assert "error: episodes.ways must be at least 2, not 1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ways": 1}, "episodes.ways must be at least 2, not 1"),
        ({"strategy": "3-way"}, "episodes.strategy '3-way' is unknown.*2-way-random"),
        (
            {"strategy": "2-way-random"},
            r"shots is 2, and strategy 2-way-random needs a range, such as \[1, 8\]",
        ),
        ({"strategy": "2-way", "shots": (1, 2)}, r"shots is \(1, 2\), and strategy 2-way needs one number"),
        ({"shots": (3, 1)}, "the smallest number comes first"),
        ({"shots": -1}, "episodes.shots must be at least 0, not -1"),
        ({"test_shots": []}, "episodes.test_shots is empty: give at least one number"),
        ({"count": 0}, "episodes.count must be at least 1, not 0"),
        ({"label_noise": 1.5}, "episodes.label_noise must be from 0 to 1, not 1.5"),
        ({"negatives": "near"}, "episodes.negatives 'near' is unknown"),
        ({"loss": "last"}, "episodes.loss must be query or all, not 'last'"),
    ],
)
def test_options_that_cannot_be_used(options, message):
    with pytest.raises(InputError, match=message):
        EpisodeConfig(**{**SMALL, **options})


def test_tables_that_cannot_be_used(table, tmp_path):
    with pytest.raises(
        InputError,
        match=r"test split has 0 classes of at least 9 images \(of 3 classes\).*test_shots, which is 8",
    ):
        draw(table, test_shots=[8])
    with pytest.raises(InputError, match="train split has 1 classes"):
        draw(label_table(tmp_path / "one", splits={"train": 1, "test": 2}))
    with pytest.raises(InputError, match="no column 'label' or 'caption'"):
        draw(label_table(tmp_path / "none", column="kind"))
    mixed = tmp_path / "mixed.jsonl"
    mixed.write_text(table.read_text().replace('"test"', '"train"', 1))
    config = replace(source(mixed), media=str(table.parent))
    with pytest.raises(InputError, match=r"1 classes have images in several splits \(class 8\)"):
        read_source(config)
    with pytest.raises(InputError, match="episodes belong to format: caption, not to vqa"):
        SourceConfig("a.jsonl", format="vqa", episodes=EpisodeConfig())
    with pytest.raises(InputError, match="tar shards are streamed"):
        check_episodes([replace(source(table), path="data/{000..003}.tar")])


def test_small_classes_are_counted(tmp_path):
    table = label_table(tmp_path / "set")
    # Three images are left of the first class.
    lines = table.read_text().splitlines()[2:]
    table.write_text("\n".join(lines))
    _, report = read_source(source(table, shots=3))
    assert report.classes == 10
    assert report.skipped.counts == {"a class with fewer than 4 images, the shots and the query": 3}
    assert "class 0" in "".join(report.skipped.lines())


def test_a_run_resumes_only_with_the_same_episodes(table, tmp_path):
    data = [make_data(source(table, seed=seed), tmp_path) for seed in (0, 0, 1)]
    states = [each.train_dataloader().state_dict() for each in data]
    assert states[0] == states[1] != states[2]
    batch = next(iter(data[0].train_dataloader()))
    assert batch["embeddings"].shape == torch.Size([12, 5, 16])
