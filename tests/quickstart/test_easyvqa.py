import json
import zipfile
from collections import Counter, defaultdict
from itertools import product

import pytest

from bindllm.errors import AssetError
from bindllm.quickstart import easyvqa
from bindllm.quickstart.easyvqa import COLORS, SHAPES, TYPES, type_of, wrong_answer
from bindllm.quickstart.tables import position_of


def read_rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def all_questions():
    """Every question that the published set has, with the type that a reader would give it."""
    kinds = [*((shape, "shape") for shape in SHAPES), *((f"{colour} shape", "color") for colour in COLORS)]
    for words, what in kinds:
        for template in ("is there a {}?", "is there a {} in the image?", "is a {} present?"):
            yield template.format(words), f"yes/no {what}"
        yield f"does the image contain a {words}?", f"yes/no {what}"
        for template in ("is there not a {}?", "is there not a {} in the image?", "is no {} present?"):
            yield template.format(words), f"yes/no not {what}"
        yield f"does the image not contain a {words}?", f"yes/no not {what}"
    for start, shape in product(("what color is the", "what is the color of the"), (*SHAPES, "shape")):
        yield f"{start} {shape}?", "color"
    for question in (
        "what shape does the image contain?",
        "what shape is in the image?",
        "what shape is present?",
    ):
        yield question, "shape"
    for colour in COLORS:
        yield f"what is the {colour} shape?", "shape"


def test_the_rule_gives_each_published_question_its_type():
    questions = dict(all_questions())
    assert len(questions) == 107
    assert {question: type_of(question) for question in questions} == questions
    assert set(questions.values()) == set(TYPES)


@pytest.mark.parametrize(
    "question", ["how many shapes are there?", "is there a star?", "is the circle red?", "what is the time?"]
)
def test_a_question_of_another_kind_is_refused(question):
    with pytest.raises(AssetError, match="is of an unknown kind"):
        type_of(question)


def test_a_wrong_answer_is_of_the_same_kind_and_each_is_chosen_about_as_often():
    assert wrong_answer("a.png", "is there no circle?", "no") == "yes"
    for question, answer, known in (
        ("what is the red shape?", "circle", SHAPES),
        ("what color is the shape?", "teal", COLORS),
    ):
        chosen = Counter(wrong_answer(f"{number}.png", question, answer) for number in range(3000))
        assert chosen.keys() == set(known) - {answer}
        assert min(chosen.values()) > 0.8 * 3000 / len(chosen)
    assert (
        len(
            {
                wrong_answer("a.png", question, "teal")
                for question in (
                    "what color is the shape?",
                    "what color is the circle?",
                    "what is the color of the shape?",
                    "what is the color of the circle?",
                    "what color is the triangle?",
                )
            }
        )
        > 1
    )


def write_wheel(path, questions):
    """A wheel with these questions of each published split, and images that hold their own name."""
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr("easy_vqa-1.0.dist-info/LICENSE", "MIT License")
        for split, rows in questions.items():
            wheel.writestr(f"easy_vqa/data/{split}/questions.json", json.dumps(rows))
            for number in {number for *_, number in rows}:
                wheel.writestr(f"easy_vqa/data/{split}/images/{number}.png", f"{split} {number}")
    return path


@pytest.fixture
def made(tmp_path):
    questions = {
        "train": [
            [question, answer, number]
            for number in range(400)
            for question, answer in (("what color is the shape?", "red"), ("is no circle present?", "yes"))
        ],
        "test": [["what shape is present?", "circle", number] for number in range(60)],
    }
    folder = tmp_path / "easyvqa"
    folder.mkdir()
    return folder, easyvqa.build([write_wheel(tmp_path / "easy.whl", questions)], folder)


def test_questions_keep_their_published_split_and_validation_is_held_out_by_image(made):
    folder, facts = made
    kept, tested = read_rows(folder / "train.jsonl"), read_rows(folder / "test.jsonl")
    assert tested[0] == {
        "image": "images/test/0.png",
        "question": "what shape is present?",
        "answer": "circle",
        "type": "shape",
        "split": "test",
    }
    assert len(tested) == 60
    assert {row["split"] for row in tested} == {"test"}
    splits = defaultdict(set)
    for row in kept:
        splits[row["image"]].add(row["split"])
    assert len(splits) == 400
    assert all(len(each) == 1 for each in splits.values())
    held_out = {image for image, each in splits.items() if each == {"validation"}}
    assert held_out == {
        f"images/train/{number}.png"
        for number in range(400)
        if position_of(f"train {number}".encode()) >= 0.98
    }
    assert 2 <= len(held_out) <= 16
    assert (folder / "images/train/7.png").read_text() == "train 7"
    assert (folder / "images/test/7.png").read_text() == "test 7"
    assert (folder / "LICENSE").read_text() == "MIT License"
    assert facts["questions"] == {
        "train": 2 * (400 - len(held_out)),
        "validation": 2 * len(held_out),
        "test": 60,
    }
    assert facts["types"]["yes/no not shape"] == 400


def test_preferences_pair_each_kept_answer_with_a_wrong_one(made):
    folder, _ = made
    pairs, kept = read_rows(folder / "preferences.jsonl"), read_rows(folder / "train.jsonl")
    assert [
        (pair["image"], pair["prompt"], pair["chosen"], pair["type"], pair["split"]) for pair in pairs
    ] == [tuple(row.values()) for row in kept]
    assert all(pair["rejected"] == "no" for pair in pairs if pair["chosen"] == "yes")
    assert all(pair["rejected"] in set(COLORS) - {"red"} for pair in pairs if pair["chosen"] == "red")


def test_an_answer_of_another_kind_is_refused(tmp_path):
    wheel = write_wheel(tmp_path / "easy.whl", {"train": [["what shape is present?", "red", 0]], "test": []})
    with pytest.raises(AssetError, match="'red' to 'what shape is present"):
        easyvqa.build([wheel], tmp_path)
