"""Formats of one question and its answer: instructions, captions, VQA and multiple choice."""

import json
import os
import time

import pytest

from bindllm.conversation import INPUT_HEADER
from bindllm.data.formats import read_row
from bindllm.data.formats.media import FolderResolver
from bindllm.data.source_config import Columns, SourceConfig
from bindllm.errors import InputError
from bindllm.media import Media


@pytest.fixture
def read(tmp_path):
    """Reads a record in a folder that holds the files named."""
    (tmp_path / "image").mkdir()
    for name in ("a.png", "b.png", "bark.wav", "image/2.jpg"):
        (tmp_path / name).touch()

    def read(format, record, **options):
        config = SourceConfig(str(tmp_path / "rows.csv"), format, **options)
        return read_row(record, config, FolderResolver.of(config))

    return read


def said(parsed) -> list[str]:
    return [message.text for message in parsed.conversation.messages]


def names(parsed) -> list[str]:
    return [media.source.rsplit("/")[-1] for group in parsed.conversation.media_groups for media in group]


def test_the_input_of_alpaca_follows_its_header(read):
    record = {"instruction": "Add.", "input": "1 + 1", "output": "2"}
    assert said(read("alpaca", record)) == ["Add." + INPUT_HEADER + "1 + 1", "2"]
    assert said(read("alpaca", {**record, "input": " "})) == ["Add.", "2"]
    assert said(read("alpaca", {"instruction": "Add.", "output": "2"})) == ["Add.", "2"]


def test_the_input_of_an_instruction_follows_after_a_blank_line(read):
    record = {"instruction": "Add.", "input": "1 + 1", "response": 2, "system": "Be brief."}
    parsed = read("instruction", record)
    assert said(parsed) == ["Be brief.", "Add.\n\n1 + 1", "2"]
    assert [message.role for message in parsed.conversation.messages] == ["system", "user", "assistant"]


@pytest.mark.parametrize("format", ["alpaca", "instruction"])
def test_instructions_may_have_media(read, format):
    record = {"instruction": "Compare <image> with <image>.", "output": "same", "images": ["a.png", "b.png"]}
    assert names(read(format, record)) == ["a.png", "b.png"]
    record = {"instruction": "Which?", "output": "red", "audio": "bark.wav", "image": "a.png"}
    parsed = read(format, record)
    assert parsed.conversation.messages[0].content[-1] == "Which?"
    assert names(parsed) == ["a.png", "bark.wav"]
    # Without media it is a word like any other.
    assert said(read(format, {"instruction": "Write <image>.", "output": "ok"}))[0] == "Write <image>."
    record = {"instruction": "Is <image> an <image>?", "output": "yes", "image": "a.png"}
    assert said(read(format, record))[0] == "Is an <image>?"
    record = {"instruction": "Compare <image>", "output": "same", "images": ["a.png", "b.png"]}
    with pytest.raises(InputError, match="fewer placeholders <image> than media: 1 for 2"):
        read(format, record)


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"instruction": "Add."}, r"no column 'output'\. Known: instruction\."),
        ({"instruction": "", "output": "2"}, "nothing in column 'instruction'"),
        ({"instruction": "Add.", "output": " "}, "nothing in column 'output'"),
        ({"instruction": "Add.", "output": None}, "nothing in column 'output'"),
        ({"instruction": ["Add."], "output": "2"}, "column 'instruction' does not hold a text"),
        ({"instruction": "Add.", "output": "2", "input": {"a": 1}}, "column 'input' does not hold a text"),
    ],
)
def test_bad_instructions(read, record, reason):
    with pytest.raises(InputError, match=reason):
        read("alpaca", record)


def test_a_record_of_captions_learns_the_first_and_refers_to_all(read):
    record = {"image": "a.png", "caption": [" a\tred  one", "red", "red"]}
    parsed = read("caption", record, prompt="What?")
    assert said(parsed) == ["What?", "a red one"]
    assert parsed.references == ("a red one", "red")
    assert names(read("caption", {"audio": "bark.wav", "caption": "a dog"}, modality="audio")) == ["bark.wav"]
    parsed = read("caption", {"text": "Ein Hund", "caption": "a dog"}, modality="text")
    assert parsed.conversation.media_groups == ((Media.text("Ein Hund"),),)


def test_images_of_minigpt4_are_found_by_their_number(read):
    for number in (2, "2"):
        parsed = read("minigpt4", {"image_id": number, "caption": "A red\nrose."}, prompt="What?")
        assert (said(parsed), names(parsed)) == (["What?", "A red rose."], ["2.jpg"])


@pytest.mark.parametrize(
    ("format", "record", "reason"),
    [
        ("caption", {"image": "a.png", "caption": []}, "no caption"),
        ("caption", {"image": "a.png", "caption": ["red", " \u200b"]}, "empty caption"),
        ("caption", {"image": "a.png", "caption": 7}, "the caption is not a text"),
        ("caption", {"image": "gone.png", "caption": "red"}, "no such image file: gone.png"),
        ("caption", {"caption": "red"}, "no path to the image file: no column 'image'$"),
        ("caption", {"caption": "red", "image": ""}, "no path to the image file$"),
        ("minigpt4", {"image_id": 3, "caption": "red"}, "no such image file: image/3.jpg"),
        ("minigpt4", {"image": "a.png", "caption": "red"}, "no column 'image_id'.*looks like caption"),
    ],
)
def test_bad_captions(read, format, record, reason):
    with pytest.raises(InputError, match=reason):
        read(format, record)


def test_the_most_frequent_answer_is_learned_and_all_are_references(read):
    answers = [{"answer": word, "answer_confidence": "yes"} for word in ("blue", "red", "blue", "red", "red")]
    parsed = read(
        "vqa", {"image": "a.png", "question": "Which?", "answers": answers, "type": "color", "subset": 2}
    )
    assert said(parsed) == ["Which?", "red"]
    assert parsed.references == ("blue", "red", "blue", "red", "red")
    assert (parsed.type, parsed.subset) == ("color", "2")
    # In a tie the first one.
    assert (
        said(read("vqa", {"image": "a.png", "question": "Which?", "answer": ["b", "a", "a", "b"]}))[1] == "b"
    )


@pytest.mark.parametrize(
    ("answer", "text"), [(3, "3"), (True, "yes"), (False, "no"), (" 2 ", "2"), ([None, "x"], "x")]
)
def test_answers_that_are_no_text(read, answer, text):
    assert said(read("vqa", {"image": "a.png", "question": "Which?", "answer": answer}))[1] == text


def test_a_question_is_put_into_a_prompt_that_has_a_place_for_it(read):
    record = {"image": "a.png", "question": "Which?", "answer": "red"}
    parsed = read("vqa", record, prompt="{question}\nAnswer in one word.")
    assert said(parsed) == ["Which?\nAnswer in one word.", "red"]
    assert parsed.conversation.messages[0].content[0].modality == "image"


def test_media_of_vqa(read):
    record = {"question": "Which?", "answer": "red"}
    assert names(read("vqa", {**record, "audio": "bark.wav"}, modality="audio")) == ["bark.wav"]
    assert names(read("vqa", {**record, "image": ["a.png", "b.png"]})) == ["a.png", "b.png"]
    for nothing in (
        {},
        *({"image": value} for value in (None, "", float("nan"), {"bytes": None, "path": None})),
    ):
        with pytest.raises(InputError, match="no path to the image file"):
            read("vqa", {**record, **nothing})


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ("", "empty answer"),
        ([], "empty answer"),
        (["", None], "empty answer"),
        (float("nan"), "empty answer"),
        (None, "nothing in column 'answer'"),
        ({"text": "red"}, "empty answer"),
        ([["red"]], "column 'answer' does not hold a text"),
    ],
)
def test_bad_answers(read, answer, reason):
    with pytest.raises(InputError, match=reason):
        read("vqa", {"image": "a.png", "question": "Which?", "answer": answer})


CHOICE = {
    "question": "Which burns?",
    "choices": ["the sea", "a match", "1"],
    "answer": 1,
    "hint": "Fire is hot.",
    "lecture": "Wood burns.",
    "solution": "A match is of wood.",
}
PROMPT = "Question: Which burns?\nContext: Fire is hot.\nOptions: (A) the sea (B) a match (C) 1"


def test_multiple_choice_without_and_with_a_rationale(read):
    parsed = read("choice", CHOICE)
    assert said(parsed) == [PROMPT, "The answer is (B)."]
    assert parsed.options == ("the sea", "a match", "1")
    with_rationale = read("choice", CHOICE, rationale=True)
    assert said(with_rationale) == [PROMPT, "Wood burns.\nA match is of wood.\nThe answer is (B)."]
    # What is measured is the answer, not the words that lead to it.
    assert parsed.references == with_rationale.references == ("The answer is (B).",)
    assert parsed.conversation.media_groups == ()
    bare = {key: CHOICE[key] for key in ("question", "choices", "answer")}
    assert said(read("choice", bare, rationale=True)) == [
        PROMPT.replace("Context: Fire is hot.\n", ""),
        "The answer is (B).",
    ]


def test_rationales_of_two_stages(read):
    first, second = (read("choice", CHOICE, rationale=kind) for kind in ("only", "given"))
    assert said(first) == [PROMPT, "Wood burns.\nA match is of wood."]
    assert said(second) == [f"{PROMPT}\nRationale: Wood burns.\nA match is of wood.", "The answer is (B)."]
    # A rationale is no answer that could be exact.
    assert (first.task, second.task) == ("chat", "answer")
    record = {"image": "a.png", "question": "How many?", "answer": "two", "rationale": "a cat and <image>."}
    texts = [said(read("vqa", record, rationale=kind)) for kind in (False, True, "only", "given")]
    assert texts == [
        ["How many?", "two"],
        ["How many?", "a cat and <image>.\nThe answer is two."],
        ["How many?", "a cat and <image>."],
        ["How many?\nRationale: a cat and <image>.", "two"],
    ]
    assert read("vqa", record, rationale=True).references == ("two",)
    del record["rationale"]
    with pytest.raises(InputError, match="no rationale to learn"):
        read("vqa", record, rationale="only")
    assert [len(read("vqa", record, rationale=kind).remarks) for kind in (False, True, "given")] == [0, 1, 1]


def test_generated_rationales_are_matched_by_id(read, tmp_path):
    file = tmp_path / "answers.jsonl"

    def rationale(number, **config):
        record = {"id": number, "image": "a.png", "question": "Which?", "answer": "two", "rationale": "Gold."}
        return said(read("vqa", record, **{"rationale": "given", "rationales": str(file), **config}))

    def write(*lines):
        lines = [{"prompt_sha256": "0", "id": str(n), **line} for n, line in enumerate(lines)]
        file.write_text("".join(f"{json.dumps(line, ensure_ascii=False)}\n" for line in lines[::-1]))
        # Within the resolution of the clock a file may be written twice.
        os.utime(file, ns=(0, time.monotonic_ns()))

    write({"answer": "Zero."}, {"answer": "One.\u2028"}, {"error": "no file"})
    assert rationale(1) == ["Which?\nRationale: One.", "two"]
    assert rationale(0, rationale=True) == ["Which?", "Zero.\nThe answer is two."]
    for number in (2, 3, None):
        with pytest.raises(InputError, match="no rationale has the id of the row"):
            rationale(number)
    # An evaluation also has controls, and its file may have been written again.
    write({"answer": "New.", "variant": "model"}, {"id": "0", "answer": "Control.", "variant": "no_media"})
    assert rationale(0) == ["Which?\nRationale: New.", "two"]
    for wrong in ({"id": "0", "answer": "Other."}, {"answer": ["a", "b"]}):
        write({"answer": "One."}, wrong)
        with pytest.raises(InputError, match="several answers of the id"):
            rationale(0)
    for text in (
        '{"id": "0", "answer": "two"}\n',
        '{"prompt_sha256": "0", "answer": "two"}\n',
        # Else all rows without an id would get this rationale.
        '{"prompt_sha256": "0", "id": null, "answer": "two"}\n',
        "[]\n",
        "?",
    ):
        file.write_text(text)
        os.utime(file, ns=(0, time.monotonic_ns()))
        with pytest.raises(InputError, match="cannot be read as rationales"):
            rationale(0)
    file.unlink()
    with pytest.raises(InputError, match="cannot be read as rationales"):
        rationale(0)


def test_media_of_a_choice(read):
    assert names(read("choice", {**CHOICE, "image": "a.png"})) == ["a.png"]
    assert names(read("choice", {**CHOICE, "image": None})) == []
    with pytest.raises(InputError, match="no such image file: gone.png"):
        read("choice", {**CHOICE, "image": "gone.png"})


@pytest.mark.parametrize("answer", [1, 1.0, "B", "b", "(B)", "B.", "(B).", " a match "])
def test_the_right_option_by_number_letter_or_text(read, answer):
    assert read("choice", {**CHOICE, "answer": answer}).references == ("The answer is (B).",)


@pytest.mark.parametrize(
    "choices",
    [
        '["the sea", "a match", "1"]',
        {"text": ["the sea", "a match", "1"], "label": ["A", "B", "C"]},
    ],
)
def test_other_ways_to_write_the_options(read, choices):
    assert said(read("choice", {**CHOICE, "choices": choices}))[0] == PROMPT


@pytest.mark.parametrize(("answer", "letter"), [("1", "A"), (2, "B"), ("3", "C"), ("a match", "B")])
def test_the_labels_that_a_record_gives_its_options_come_first(read, answer, letter):
    choices = {"text": ["the sea", "a match", "1"], "label": ["1", "2", "3"]}
    parsed = read("choice", {**CHOICE, "choices": choices, "answer": answer})
    assert parsed.references == (f"The answer is ({letter}).",)


def test_options_in_columns_called_like_their_letters(read):
    record = {"question": "Which?", "A": "sea", "B": "match", "C": "", "D": None, "answer": "B"}
    assert read("choice", record).options == ("sea", "match")


@pytest.mark.parametrize(
    "options",
    [
        {"A": "Two", "B": "One", "C": "", "D": "Three"},
        {"choices": ["Two", "One", None, "Three", ""]},
        {"choices": {"text": ["Two", "One", "", "Three"], "label": ["1", "2", "3", "4"]}},
        {"choices": '{"text": ["Two", "One", "", "Three"], "label": ["1", "2", "3", "4"]}'},
    ],
)
def test_an_empty_option_leaves_the_letters_of_the_others(read, options):
    parsed = read("choice", {"question": "How many?", **options, "answer": "Three"})
    assert said(parsed) == ["Question: How many?\nOptions: (A) Two (B) One (D) Three", "The answer is (D)."]
    assert parsed.options == ("Two", "One", "", "Three")
    by_index = {"question": "How many?", **options, "answer": "4" if "label" in str(options) else 3}
    assert read("choice", by_index).references == ("The answer is (D).",)
    with pytest.raises(InputError, match="the answer is none of the choices"):
        read("choice", {**by_index, "answer": "C"})


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"answer": 3}, "the answer is none of the choices"),
        ({"answer": -1}, "the answer is none of the choices"),
        ({"answer": "D"}, "the answer is none of the choices"),
        ({"answer": True}, "column 'answer' does not hold a text"),
        ({"answer": None}, "nothing in column 'answer'"),
        # The text of option C, and the number of option B.
        ({"answer": "1"}, "the answer can be read as more than one of the choices"),
        ({"choices": ["B", "A"], "answer": "A"}, "the answer can be read as more than one of the choices"),
        ({"choices": ["only"], "answer": 0}, "1 choices that are not empty; expected 2 to 26"),
        ({"choices": [f"{n}" for n in range(27)]}, "27 choices that are not empty; expected 2 to 26"),
        ({"choices": [None, "a"], "answer": 1}, "1 choices that are not empty; expected 2 to 26"),
        ({"choices": "a|b"}, "column 'choices' does not hold a list"),
        ({"choices": 7}, "column 'choices' does not hold a list"),
        ({"choices": {"text": ["a", "b"], "label": ["1"]}}, "1 labels for 2 choices"),
        ({"question": ""}, "nothing in column 'question'"),
    ],
)
def test_bad_choices(read, change, reason):
    with pytest.raises(InputError, match=reason):
        read("choice", {**CHOICE, **change})


@pytest.mark.parametrize(
    ("format", "record", "column"),
    [
        ("messages", {"talk": 7}, "talk"),
        ("vqa", {"image": "a.png", "question": "?", "right": [[1]]}, "right"),
        ("choice", {**CHOICE, "right": True}, "right"),
        ("choice", {"question": "?", "given": ["a", []], "right": 0}, "given"),
    ],
)
def test_errors_name_the_column_that_a_recipe_has_renamed(read, format, record, column):
    columns = Columns(answer="right", messages="talk", choices="given" if "given" in record else "choices")
    with pytest.raises(InputError, match=f"column '{column}' does not hold"):
        read(format, record, columns=columns)
