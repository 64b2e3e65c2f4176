"""Worked examples from a table: which rows are shots, and which shots a question gets."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from bindllm import Media, Shot
from bindllm.data.embeddings import MediaEmbeddings
from bindllm.data.source_config import SourceConfig
from bindllm.errors import InputError, MediaError
from bindllm.evaluation.support import POOL, Support, read_shots
from bindllm.parallel import RunContext
from cache_parts import Multimodal
from tiny import color_images


def write(folder: Path, rows: list[dict]) -> SourceConfig:
    table = folder / "shots.jsonl"
    table.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return SourceConfig(str(table))


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Four images of each of four colors."""
    return color_images(tmp_path_factory.mktemp("colors")) / "images"


@pytest.fixture
def shots(images):
    return [
        Shot(f"Is it {c}?", c, [Media.image(images / f"{c}{n}.png")]) for n in (1, 2) for c in ("red", "blue")
    ]


def embedded(shots, by, tmp_path, questions, **options) -> Support:
    support = Support(shots, by, **options)
    support.embed(questions, MediaEmbeddings([Multimodal()], tmp_path / "store"), RunContext())
    return support


def test_rows_of_a_format_are_shots(images):
    config = SourceConfig(str(images.parent / "captions.jsonl"), prompt="Color?")
    shots, report = read_shots(config)
    # All splits, in the order of the table.
    assert [shot.answer for shot in shots[::4]] == [
        "red square",
        "green square",
        "blue square",
        "white square",
    ]
    assert shots[0] == Shot("Color?", "red square", [Media.image(str(images / "red0.png"))])
    assert (len(shots), report.skipped.total) == (16, 0)


def test_an_image_with_several_captions_is_one_shot(images):
    config = write(images.parent, [{"image": "images/red0.png", "caption": ["red", "a red square"]}] * 2)
    assert [shot.answer for shot in read_shots(config)[0]] == ["red"]


def test_equal_rows_stay_equal_shots(tmp_path):
    row = {"messages": [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]}
    config = write(tmp_path, [row, row])
    config.format = "messages"
    assert read_shots(config)[0] == [Shot("2 + 2?", "4")] * 2


def test_rows_that_are_no_worked_example_are_counted(tmp_path):
    question, answer = {"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}
    config = write(
        tmp_path,
        [
            {"messages": [question, answer]},
            {"messages": [question, answer, question, answer]},
            {"messages": [{"role": "system", "content": "Brief."}, question, answer]},
            {"messages": [question]},
            {"messages": [question, {"role": "assistant", "content": " "}]},
        ],
    )
    config.format = "messages"
    shots, report = read_shots(config)
    assert shots == [Shot("2 + 2?", "4")]
    assert report.skipped.total == 4
    assert any(
        line.startswith("2 x a shot is one question and one answer") for line in report.skipped.lines()
    )


def test_a_table_without_a_worked_example(tmp_path):
    question, answer = {"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}
    config = write(tmp_path, [{"messages": [question, answer, question, answer]}])
    config.format = "messages"
    with pytest.raises(InputError, match="no worked example: 1 x a shot is one question"):
        read_shots(config)


def test_an_unwanted_answer_is_not_shown(tmp_path):
    config = write(tmp_path, [{"prompt": "2 + 2?", "completion": n, "label": n == "4"} for n in ("4", "5")])
    config.format = "preference"
    shots, report = read_shots(config)
    assert [shot.answer for shot in shots] == ["4"]
    assert next(report.skipped.lines()).startswith("1 x the answer is an unwanted one")


def test_the_order_of_the_table(shots):
    assert Support(shots).choose("?", [], 3).shots == shots[:3]
    assert Support(shots).choose("?", [], 9).shots == shots
    assert Support(shots).choose("?", [], 0)[:2] == ([], 0)


def test_random_shots_depend_on_the_seed_and_the_question_only(shots):
    many = [Shot(str(n), "yes") for n in range(50)]
    first = Support(many, "random", seed=1).choose("?", [], 8).shots
    again = Support(many, "random", seed=1)
    again.choose("another", [], 8)
    assert again.choose("?", [], 8).shots == first
    # More shots keep the first ones.
    assert again.choose("?", [], 4).shots == first[:4]
    assert again.choose("another", [], 8).shots != first
    assert Support(many, "random", seed=2).choose("?", [], 8).shots != first


def test_the_nearest_by_media_comes_last(shots, images, tmp_path):
    asked = Shot("Color?", "?", [Media.image(images / "blue3.png")])
    support = embedded(shots, "media", tmp_path, [asked])
    assert [shot.answer for shot in support.choose(asked.prompt, asked.media, 2).shots] == ["blue", "blue"]
    assert [shot.answer for shot in support.choose(asked.prompt, asked.media, 4).shots] == ["red"] * 2 + [
        "blue"
    ] * 2
    support.nearest_first = True
    assert [shot.answer for shot in support.choose(asked.prompt, asked.media, 3).shots] == [
        "blue",
        "blue",
        "red",
    ]


def test_the_nearest_by_text(shots, images, tmp_path):
    asked = Shot("Is it red?", "?", [Media.image(images / "blue3.png")])
    support = embedded(shots, "text", tmp_path, [asked])
    assert [shot.answer for shot in support.choose(asked.prompt, asked.media, 2).shots] == ["red", "red"]


def test_equal_prompts_have_one_vector(shots, images, tmp_path):
    asked = Shot("Is it red?", "?", [Media.image(images / "blue3.png")])
    support, sizes = embedded(shots * 50, "media_text", tmp_path, [asked]), []
    lookup = support.lookup
    support.lookup = lambda groups: sizes.append(len(groups)) or lookup(groups)
    assert len(support.choose(asked.prompt, asked.media, 2).shots) == 2
    # Four images and the question's, two prompts and the question's.
    assert sizes == [4, 1, 2, 1]


def test_by_media_and_then_by_text(images, tmp_path):
    # The nearest by text are outside the nearest by media, but for one.
    red, blue = Media.image(images / "red1.png"), Media.image(images / "blue1.png")
    near = [Shot(f"near {n}", "no", [red]) for n in range(POOL)]
    shots = [*near, Shot("far", "outside", [red]), Shot("far", "right", [blue])]
    asked = Shot("far", "?", [Media.image(images / "blue2.png")])
    support = embedded(shots, "media_text", tmp_path, [asked])
    assert [shot.answer for shot in support.choose(asked.prompt, asked.media, 1).shots] == ["right"]
    # The pool of two shots holds the other one as well; the nearer by media is the last.
    assert [shot.answer for shot in support.choose(asked.prompt, asked.media, 2).shots] == [
        "outside",
        "right",
    ]


def test_the_question_is_never_among_its_shots(shots, images, tmp_path):
    # A copy under another name.
    copy = tmp_path / "copy.png"
    shutil.copy(images / "red1.png", copy)
    asked = Shot("Color?", "?", [Media.image(copy)])
    for by in ("order", "random", "media", "text", "media_text"):
        found = embedded(shots, by, tmp_path, [asked]).choose(asked.prompt, asked.media, 4)
        assert shots[0] not in found.shots
        assert (len(found.shots), found.num_excluded) == (3, 1), by


def test_a_question_of_text_is_excluded_by_its_words(tmp_path):
    shots = [Shot("2 + 2?", "4"), Shot("1 + 1?", "2")]
    assert Support(shots).choose(" 2 +  2?", [], 2)[:2] == ([shots[1]], 1)
    # A prompt of the command line may be written with combining marks.
    assert Support([Shot("Caf\u00e9?", "no")]).choose("Cafe\u0301?", [], 2).num_excluded == 1
    # With media, an equal prompt is the rule.
    asked = Media.text("a dog")
    assert Support(shots).choose("2 + 2?", [asked], 2).num_excluded == 0


def test_shots_that_are_all_the_question(images):
    red = Media.image(images / "red1.png")
    assert Support([Shot("Color?", "red", [red])] * 3).choose("Color?", [red], 2)[:2] == ([], 3)


def test_shots_without_media_are_not_the_nearest_by_media(shots, images, tmp_path):
    asked = Shot("Color?", "?", [Media.image(images / "blue3.png")])
    support = embedded([Shot("Sky?", "sky"), *shots], "media", tmp_path, [asked])
    assert len(support.choose(asked.prompt, asked.media, 9).shots) == len(shots)
    only_text = embedded([Shot("Sky?", "sky")], "media", tmp_path, [asked])
    with pytest.raises(InputError, match="none of the 1 shots has media"):
        only_text.choose(asked.prompt, asked.media, 1)
    with pytest.raises(InputError, match="the question has no media"):
        support.choose("Color?", [], 1)


def test_a_file_of_a_shot_is_missing(shots, images, tmp_path):
    asked, gone = Shot("Color?", "?", [Media.image(images / "blue3.png")]), Media.image(tmp_path / "gone.png")
    support = Support([Shot("Color?", "gone", [gone]), *shots], "media")
    failed = support.embed([asked], MediaEmbeddings([Multimodal()], tmp_path / "store"), RunContext())
    assert list(failed) == [gone]
    assert list(support.shots) == shots
    with pytest.raises(MediaError, match=r"gone\.png"):
        Support([Shot("Color?", "gone", [gone])]).choose("Color?", asked.media, 1)
    with pytest.raises(InputError, match="no shot can be embedded"):
        embedded([Shot("Color?", "gone", [gone])], "media", tmp_path, [asked])
    with pytest.raises(MediaError, match=r"gone\.png"):
        embedded(shots, "media", tmp_path, [Shot("Color?", "?", [gone])])
