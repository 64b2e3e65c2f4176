"""LLaVA and ShareGPT: turns of from and value."""

import pytest

from bindllm.data.formats import read_row
from bindllm.data.formats.media import FolderResolver
from bindllm.data.source_config import Columns, SourceConfig
from bindllm.errors import InputError
from bindllm.media import Media


@pytest.fixture
def read(tmp_path):
    """Reads turns, said in turn by a human and the model, in a folder that holds the files named."""
    for name in ("a.png", "b.png", "bark.wav", "film.mp4", "chair.npy"):
        (tmp_path / name).touch()

    def read(*said, format="llava", modality="image", columns=None, **record):
        config = SourceConfig(
            str(tmp_path / "x.json"), format, modality=modality, columns=columns or Columns()
        )
        turns = [{"from": ("human", "gpt")[n % 2], "value": words} for n, words in enumerate(said)]
        row = read_row({"conversations": turns, **record}, config, FolderResolver.of(config))
        return row.conversation.messages

    return read


def content(message, folder) -> str:
    """The parts of a message, media by their names."""
    parts = (
        f"[{p.modality} {p.source.removeprefix(f'{folder}/')}]" if isinstance(p, Media) else p
        for p in message.content
    )
    return "".join(parts)


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ("<image>\nWhich?", "[image a.png]Which?"),
        ("Which?\n<image>", "Which?[image a.png]"),
        ("<image>Which?", "[image a.png]Which?"),
        ("<image>", "[image a.png]"),
        ("Look:\n<image>\nWhich?", "Look:\n[image a.png]Which?"),
        ("Look:\n\n<image>\nWhich?\n", "Look:\n\n[image a.png]Which?"),
        ("Is <image> red?", "Is [image a.png]red?"),
        ("Is<image>red?", "Is[image a.png]red?"),
        ("\n<image>\n\nWhich?", "[image a.png]Which?"),
    ],
)
def test_a_placeholder_goes_with_its_line_breaks(read, tmp_path, said, told):
    question, answer = read(said, "red", image="a.png")
    assert content(question, tmp_path) == told
    assert answer.text == "red"


def test_each_media_goes_to_the_turn_of_its_placeholder(read, tmp_path):
    said = (
        "<image>\n<image>\nWhich?",
        "red",
        "<audio>\nAnd this?",
        "a dog",
        "Sure?",
        "yes",
        "<image> this?",
        "no",
    )
    messages = read(*said, image=["a.png", "b.png", "a.png"], audio="bark.wav")
    assert [content(message, tmp_path) for message in messages[::2]] == [
        "[image a.png][image b.png]Which?",
        "[audio bark.wav]And this?",
        "Sure?",
        "[image a.png]this?",
    ]


def test_media_of_other_modalities_and_columns(read, tmp_path):
    (question, _) = read("<video>\n<point>\nWhich?", "red", video="film.mp4", point="chair.npy")
    assert content(question, tmp_path) == "[video film.mp4][point chair.npy]Which?"
    (question, _) = read("<image>\nWhich?", "red", picture="a.png", columns=Columns(image="picture"))
    assert content(question, tmp_path) == "[image a.png]Which?"
    (question, _) = read("<radar>\nWhich?", "red", radar="film.mp4", modality="radar")
    assert content(question, tmp_path) == "[radar film.mp4]Which?"


def test_answers_are_taken_as_they_are(read):
    (_, answer) = read("Write HTML", "<p><image></p>")
    assert answer.text == "<p><image></p>"


@pytest.mark.parametrize(
    ("said", "record", "reason"),
    [
        (("Which?", "red"), {"image": "a.png"}, "fewer placeholders <image> than media: 0 for 1"),
        (("Which?", "<image> red"), {"image": "a.png"}, "fewer placeholders <image> than media: 0 for 1"),
        (
            ("<image> ?", "red"),
            {"image": ["a.png", "b.png"]},
            "fewer placeholders <image> than media: 1 for 2",
        ),
        (("<image> ?", "red"), {"video": "film.mp4"}, "fewer placeholders <video> than media: 0 for 1"),
        (("<video> ?", "red"), {"image": "a.png"}, "fewer placeholders <image> than media: 0 for 1"),
        (("<image> ?", "red"), {"image": "gone.png"}, "no such image file: gone.png"),
        (("<image> ?", "red"), {"image": 7}, "no path to the image file"),
        (("Which?",), {}, "no answer"),
        (("", "red"), {}, "a question without text or media"),
        (("Which?", ""), {}, "empty answer"),
        ((7, "red"), {}, "a turn whose value is not a text"),
    ],
)
def test_bad_rows_of_llava(read, said, record, reason):
    with pytest.raises(InputError, match=reason):
        read(*said, **record)


def test_sharegpt_knows_many_names_of_the_roles(read):
    names = [
        "system",
        "human",
        "gpt",
        "user",
        "chatgpt",
        "human",
        "bing",
        "user",
        "bard",
        "user",
        "assistant",
    ]
    turns = [{"from": name, "value": f"{number}"} for number, name in enumerate(names)]
    roles = ["system", *["user", "assistant"] * 5]
    assert [m.role for m in read(format="sharegpt", conversations=turns)] == roles
    other = [{"role": turn["from"], "content": turn["value"]} for turn in turns]
    assert read(format="sharegpt", conversations=other) == read(format="sharegpt", conversations=turns)


def test_sharegpt_takes_a_placeholder_for_a_word(read):
    question, _ = read("What does <image> do in LLaVA?", "It marks a picture.", format="sharegpt")
    assert question.text == "What does <image> do in LLaVA?"


@pytest.mark.parametrize(
    ("turns", "reason"),
    [
        ([{"from": "narrator", "value": "?"}], "unknown role 'narrator'"),
        ([{"from": "function_call", "value": "?"}], "a tool call without the name of a function"),
        ([{"from": "gpt", "value": "red"}, {"from": "human", "value": "?"}], "it starts with an answer"),
        (["red"], "a turn that is not an object with 'from' and 'value'"),
        (
            [{"from": "human", "value": "?"}, {"from": "gpt", "value": "red", "weight": 0}],
            "no answer to learn",
        ),
        ({"human": "?"}, "column 'conversations' does not hold a list"),
    ],
)
def test_bad_rows_of_sharegpt(read, turns, reason):
    with pytest.raises(InputError, match=reason):
        read(format="sharegpt", conversations=turns)


def test_sharegpt_with_media_is_llava(read):
    with pytest.raises(
        InputError, match="sharegpt has no media. This row looks like llava; set format: llava"
    ):
        read("<image> ?", "red", format="sharegpt", image="a.png")
