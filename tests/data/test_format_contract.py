"""What holds for every format: a true row is read, a bad one is refused with its reason, and nothing is kept."""

import copy
import json
from typing import get_args

import pytest

from bindllm.data.formats import FORMATS, read_row
from bindllm.data.formats.columns import looks_like
from bindllm.data.formats.media import FolderResolver
from bindllm.data.report import Skipped
from bindllm.data.rows import Row
from bindllm.data.source_config import Columns, Format, SourceConfig
from bindllm.errors import InputError
from format_rows import TRUE_ROWS

TASKS = {"caption": "caption", "minigpt4": "caption", "vqa": "answer", "choice": "answer"}
JUNK = (
    None,
    "",
    " ",
    7,
    -1.5,
    True,
    [],
    [None],
    [[]],
    [{}],
    {},
    {"a": []},
    b"",
    b"x",
    "\ud83d",
    "x" * 999,
    "[1]",
    float("nan"),
)


@pytest.fixture
def place(tmp_path):
    """Gives the place of a source of a format, with the images a.png and image/7.jpg."""
    (tmp_path / "image").mkdir()
    for name in ("a.png", "image/7.jpg"):
        (tmp_path / name).touch()
    return lambda format, **options: SourceConfig(str(tmp_path / "rows.json"), format, **options)


def parse(format: Format, record: dict, place, **options) -> Row:
    config = place(format, **options)
    return read_row(record, config, FolderResolver.of(config))


def reason(format: Format, record: dict, place) -> str:
    """What a row that cannot be used is counted by."""
    with pytest.raises(InputError) as caught:
        parse(format, record, place)
    skipped = Skipped()
    skipped.add_error(caught.value, "row")
    (counted,) = skipped.counts
    return counted


def test_formats_are_those_that_a_recipe_can_name():
    assert tuple(FORMATS) == get_args(Format) == tuple(TRUE_ROWS)


@pytest.mark.parametrize("format", FORMATS)
def test_a_true_row_ends_with_its_answer(format, place):
    parsed = parse(format, TRUE_ROWS[format], place)
    answer = "The answer is (B)." if format == "choice" else "red"
    assert parsed.conversation.messages[-1].role == "assistant"
    assert parsed.conversation.messages[-1].text == parsed.references[0] == answer
    assert "Which?" in parsed.conversation.messages[0].text or TASKS.get(format) == "caption"
    assert parsed.task == TASKS.get(format, "chat")
    assert parsed.type == ("color" if format == "vqa" else "")
    has_media = format in ("caption", "llava", "minigpt4", "vqa")
    assert sum(map(len, parsed.conversation.media_groups)) == has_media
    assert parsed.split is None


@pytest.mark.parametrize("format", FORMATS)
def test_a_format_keeps_nothing_and_changes_nothing(format, place):
    record = copy.deepcopy(TRUE_ROWS[format])
    assert parse(format, record, place) == parse(format, record, place)
    assert record == TRUE_ROWS[format]


@pytest.mark.parametrize("format", FORMATS)
def test_junk_is_refused_with_a_reason_and_nothing_else_is_raised(format, place):
    """Each value of a true row, at any depth, is replaced by each kind of junk."""
    used, refused = 0, []
    for path in paths(TRUE_ROWS[format]):
        for junk in JUNK:
            try:
                parsed = parse(format, replaced(TRUE_ROWS[format], path, junk), place)
            except InputError as error:
                refused.append(str(error))
            else:
                used += 1
                assert parsed.conversation.messages[-1].text.strip()
    assert max(map(len, refused)) < 300
    assert used < len(JUNK) * len(list(paths(TRUE_ROWS[format]))) / 2


def paths(value, path=()):
    """The way to each value inside a value."""
    children = (
        value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    )
    for key, child in children:
        yield (*path, key)
        yield from paths(child, (*path, key))


def replaced(record: dict, path: tuple, value) -> dict:
    record = copy.deepcopy(record)
    inner = record
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return record


@pytest.mark.parametrize("format", FORMATS)
def test_splits_are_read_and_unknown_ones_refused(format, place):
    record = {**TRUE_ROWS[format], "split": "test"}
    assert parse(format, record, place).split == "test"
    assert parse(format, record, place, split="train").split is None
    assert parse(format, record, place, columns=Columns(split=None)).split is None
    assert parse(format, {**record, "split": ""}, place).split is None
    assert parse(format, {**record, "split": "val"}, place).split == "validation"
    assert reason(format, {**record, "split": "held"}, place) == (
        "unknown split 'held'. Known: test, train, validation."
    )


# A row of one format that another takes for its own: instructions and their answers have common names.
ALIKE = {("alpaca", "instruction"), ("instruction", "alpaca"), ("minigpt4", "caption"), ("sharegpt", "llava")}


@pytest.mark.parametrize("found", FORMATS)
def test_a_row_that_looks_like_another_format_says_so(found, place):
    record = TRUE_ROWS[found]
    assert looks_like(record) == found
    for format in set(FORMATS) - {found}:
        if (found, format) in ALIKE:
            continue
        told = reason(format, record, place)
        assert f"This row looks like {found}; set format: {found}" in told, format


def test_a_row_that_looks_like_nothing_names_its_columns(place):
    assert reason("vqa", {"image": "a.png", "frage": "Was?"}, place) == (
        "no column 'question'. Known: frage, image."
    )


def test_columns_can_have_other_names(place):
    columns = Columns(image="file", question="q", answer="a", type="kind")
    record = {"file": "a.png", "q": "Which?", "a": "red", "kind": "color"}
    parsed = parse("vqa", record, place, columns=columns)
    assert (parsed.references, parsed.type) == (("red",), "color")
    assert [media.source.rsplit("/")[-1] for (media,) in parsed.conversation.media_groups] == ["a.png"]


@pytest.mark.parametrize(
    ("format", "record"),
    [
        ("instruction", {"prompt": "Which?", "completion": "red"}),
        ("instruction", {"instruction": "Which?", "context": "this", "response": "red"}),
        ("vqa", {"image": "a.png", "question": "Which?", "answers": ["red"]}),
        ("sharegpt", {"conversation": TRUE_ROWS["sharegpt"]["conversations"]}),
        ("preference", {"question": "Which?", "chosen": "red", "rejected": "blue"}),
    ],
)
def test_other_common_names_are_known(format, record, place):
    assert parse(format, record, place).references == ("red",)


@pytest.mark.parametrize("format", ["messages", "llava", "sharegpt"])
def test_a_list_may_be_json_text_as_csv_has_it(format, place):
    record = TRUE_ROWS[format]
    flat = {key: json.dumps(value) if isinstance(value, list) else value for key, value in record.items()}
    assert parse(format, flat, place) == parse(format, record, place)
    column = "messages" if format == "messages" else "conversations"
    assert reason(format, {**record, column: "Hello"}, place) == f"column {column!r} does not hold a list"


@pytest.mark.parametrize(
    ("format", "record"),
    [
        ("vqa", {"images": ["a.png", "a.png"], "question": "Which?", "answers": ["red", "crimson"]}),
        ("vqa", {"image": "a.png", "question": "Which?", "answer": [{"answer": "red"}, {"answer": "pink"}]}),
        ("caption", {"image": "a.png", "caption": ["red", "A red one."]}),
        (
            "preference",
            {
                "prompt": [{"role": "user", "content": "Which?"}],
                "chosen": [{"role": "assistant", "content": "red"}],
                "rejected": [{"role": "assistant", "content": "blue"}],
            },
        ),
    ],
)
def test_a_list_may_be_json_text_where_a_text_may_be_too(format, record, place):
    flat = {key: json.dumps(value) if isinstance(value, list) else value for key, value in record.items()}
    parsed = parse(format, flat, place)
    assert parsed == parse(format, record, place)
    assert parsed.references[0] == "red"


def test_a_text_in_brackets_is_no_list_of_texts(place):
    record = {"image": "a.png", "question": "Which two?", "answer": "[1, 2]"}
    assert parse("vqa", record, place).references == ("[1, 2]",)
    pair = {"prompt": "As a list?", "chosen": '["red"]', "rejected": "[red"}
    assert parse("preference", pair, place).references == ('["red"]',)


@pytest.mark.parametrize("format", ["messages", "llava", "sharegpt", "alpaca", "instruction", "preference"])
def test_a_system_prompt_in_a_column_of_its_own(format, place):
    parsed = parse(format, {**TRUE_ROWS[format], "system": " Be brief. "}, place)
    first = parsed.conversation.messages[0]
    assert first.role == "system"
    assert first.text.startswith("Be brief.")
