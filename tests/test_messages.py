"""The one rule for placeholders, in the parser and in every format; and media that only lie next to a streamed row."""

import json

import pytest

from bindllm.conversation import Conversation, Message
from bindllm.conversation.messages import RecordMedia, RowError, Verbatim, answered, parse_messages
from bindllm.data.formats import read_row
from bindllm.data.formats.columns import SPELLED
from bindllm.data.source_config import SourceConfig
from bindllm.data.sources import read_source
from bindllm.data.stream.samples import read_row as read_sample
from bindllm.data.stream.shards import TarSample
from bindllm.errors import InputError
from bindllm.media import Media

ANSWER = {"role": "assistant", "content": "red"}


def shown(messages) -> list[str]:
    """The messages, their media by name in brackets."""
    parts = [[p if isinstance(p, str) else f"[{p.source}]" for p in m.content] for m in messages]
    return ["".join(content) for content in parts]


def parse(*turns: str, **media: list[str]) -> list[str]:
    """Parse turns of the user and the assistant in turn."""
    messages = [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(turns)]
    return shown(parse_messages(messages, RecordMedia(Media, media)))


def read(format: str, record: dict, **options):
    return read_row(record, SourceConfig("rows.jsonl", format, **options), Media)


def test_each_placeholder_takes_its_media_in_its_own_turn():
    turns = ("<image>\nWhich?", "red", "And <image>?", "blue")
    assert parse(*turns, image=["a", "b"]) == ["[a]Which?", "red", "And [b]?", "blue"]
    # The layout of ms-swift and LLaMA-Factory.
    messages = [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(turns)]
    row = read("messages", {"messages": messages, "images": ["a", "b"]})
    assert shown(row.conversation.messages) == ["[a]Which?", "red", "And [b]?", "blue"]
    assert [len(group) for group in row.conversation.media_groups] == [1, 1]


@pytest.mark.parametrize(
    ("turns", "media", "parsed"),
    [
        # No media of that modality, or none left.
        (("What is <image>?", "a tag"), {}, ["What is <image>?", "a tag"]),
        (("<image>\nIs <image> a tag?", "yes"), {"image": ["a"]}, ["[a]Is <image> a tag?", "yes"]),
        (("<image>\n<video> ?", "yes"), {"image": ["a"]}, ["[a]<video> ?", "yes"]),
        (("<b>bold</b> <image>", "yes"), {"image": ["a"]}, ["<b>bold</b>[a]", "yes"]),
        # An answer is taken as it is.
        (("<image> ?", "<image>"), {"image": ["a"]}, ["[a]?", "<image>"]),
        # Without a placeholder, all media go before the first question.
        (("Which?", "red", "And?", "blue"), {"image": ["a", "b"]}, ["[a][b]Which?", "red", "And?", "blue"]),
    ],
)
def test_a_placeholder_counts_only_if_media_of_its_modality_are_left(turns, media, parsed):
    assert parse(*turns, **media) == parsed


def test_a_content_part_without_media_comes_before_placeholders():
    parts = [{"type": "text", "text": "Is <image> a tag?"}, {"type": "image"}]
    messages = parse_messages(
        [{"role": "user", "content": parts}, ANSWER], RecordMedia(Media, {"image": ["a"]})
    )
    assert shown(messages) == ["Is <image> a tag?[a]", "red"]


def test_media_without_a_placeholder_next_to_one_with_are_refused():
    with pytest.raises(RowError, match="fewer placeholders <image> than media: 1 for 2 in column 'image'"):
        parse("<image> ?", "red", image=["a", "b"])
    with pytest.raises(RowError, match="fewer placeholders <audio> than media: 0 for 1"):
        parse("<image> ?", "red", image=["a"], audio=["b"])


def test_an_option_that_spells_a_placeholder_stays_text():
    record = {
        "question": "Which tag shows <image>?",
        "choices": ["<image>", "<b>"],
        "answer": 0,
        "image": "a",
    }
    row = read("choice", record)
    assert (
        shown(row.conversation.messages)[0] == "Question: Which tag shows [a]?\nOptions: (A) <image> (B) <b>"
    )
    assert row.options == ("<image>", "<b>")
    row = read("choice", {**record, "question": "Which tag?"})
    assert shown(row.conversation.messages)[0] == "[a]Question: Which tag?\nOptions: (A) <image> (B) <b>"


@pytest.mark.parametrize(
    ("record", "images"),
    [
        ({"image": "a", "images": ["b", "c"]}, ["a", "b", "c"]),
        ({"image": "b", "images": ["a", "b"]}, ["a", "b"]),
        ({"image": ["a", "b"], "images": None}, ["a", "b"]),
        ({"image": "", "images": '["a", "b"]'}, ["a", "b"]),
    ],
)
@pytest.mark.parametrize("format", ["vqa", "caption"])
def test_a_column_and_its_plural_are_both_used(format, record, images):
    row = read(format, {"question": "Which?", "answer": "red", "caption": "red", **record})
    assert [media.source for media in row.media] == images


def test_a_table_of_captions_follows_the_rules_of_all_formats(tmp_path):
    for name in "ab":
        (tmp_path / name).write_bytes(b"x")
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"image": "a", "images": ["b"], "caption": ["red", "blue"], "audio": "b"}))
    config = SourceConfig(str(path), prompt="<image> next to <image>?", split="train")
    rows, report = read_source(config)
    said = [shown(row.conversation.messages) for row in rows["train"]]
    question = f"[{tmp_path / 'a'}]next to [{tmp_path / 'b'}]?"
    assert said == [[question, "red"], [question, "blue"]]
    assert report.remarks.counts == {"media of other modalities than the source's, not used (audio)": 2}


def test_rows_that_only_mention_a_placeholder_are_kept_and_counted(tmp_path):
    turns = [{"from": "human", "value": "Write <video> and <image>"}, {"from": "gpt", "value": "ok"}]
    other = [{"from": "human", "value": "Write <b>"}, {"from": "gpt", "value": "<image>"}]
    path = tmp_path / "x.json"
    path.write_text(json.dumps([{"conversations": turns}, {"conversations": other}]))
    rows, report = read_source(SourceConfig(str(path), "llava", split="train"))
    assert rows["train"][0].conversation.messages[0].text == "Write <video> and <image>"
    assert (report.skipped.total, report.text_only) == (0, 2)
    assert report.remarks.counts == {SPELLED: 1}
    # A misspelled media column shows in the same way, in streamed rows too.
    record = {"conversations": turns, "img": "cat.jpg"}
    sample = TarSample("0.tar", "cat", 0, {"json": json.dumps(record).encode()})
    assert read_sample(sample, SourceConfig("0.tar", "llava"), 0).remarks == (SPELLED,)


@pytest.mark.parametrize("spelled", ["<image 1>", "<image_1>", "<|image|>", "<IMAGE>", "<video>"])
def test_placeholders_of_other_formats_without_media_are_counted(spelled):
    row = read("vqa", {"image": "a", "question": f"What is in {spelled}?", "answer": "red"})
    assert row.remarks == (SPELLED,)


@pytest.mark.parametrize("column", [{"history": [["a", "b"]]}, {"rejected_response": "blue"}])
def test_parts_of_a_conversation_in_unknown_columns_are_counted(column):
    record = {"instruction": "Which?", "output": "red", "history": [], "tools": None, "rejected_response": ""}
    assert read("alpaca", record).remarks == ()
    assert read("alpaca", record | column).remarks == (
        f"a part of the conversation in a column that is not used ({next(iter(column))})",
    )


def test_requests_that_end_with_a_question_are_parsed_too():
    """The parser itself does not ask for an answer; rows of training do."""
    asked = parse_messages([{"role": "user", "content": [Media.image(b"x"), " Which? "]}], RecordMedia(Media))
    assert Conversation(tuple(asked)).messages == (Message("user", (Media.image(b"x"), "Which?")),)
    with pytest.raises(RowError, match="no answer"):
        answered(asked)


def test_a_verbatim_text_keeps_its_placeholders():
    messages = [{"role": "user", "content": [Verbatim("<image> a"), "b <image>"]}]
    parsed = parse_messages(messages, RecordMedia(Media, {"image": ["a"]}))
    assert shown(parsed) == ["<image> a\nb[a]"]
    assert [type(part) for part in parsed[0].content] == [str, str, Media]


@pytest.mark.parametrize(
    ("format", "record"),
    [
        ("alpaca", {"instruction": "Which?", "output": "red"}),
        ("instruction", {"instruction": "Which?", "response": "red"}),
        ("choice", {"question": "Which?", "choices": ["red", "blue"], "answer": 0}),
        ("preference", {"prompt": "Which?", "chosen": "red", "rejected": "blue"}),
        ("messages", {"messages": [{"role": "user", "content": "Which?"}, ANSWER]}),
        (
            "llava",
            {"conversations": [{"from": "human", "value": "<image>\nWhich?"}, {"from": "gpt", "value": "r"}]},
        ),
    ],
)
def test_the_only_image_of_a_streamed_sample_is_used_even_if_its_row_does_not_name_it(format, record):
    def sample(**members):
        return TarSample("0.tar", "cat", 0, {"json": json.dumps(record).encode(), **members})

    config = SourceConfig("0.tar", format)
    row = read_sample(sample(jpg=b"J"), config, 0)
    assert row.media == (Media.image(b"J"),)
    with pytest.raises(InputError, match="several members that may be its image"):
        read_sample(sample(jpg=b"J", png=b"P"), config, 0)
    if format != "llava":
        assert read_sample(sample(wav=b"W"), config, 0).media == ()


def test_messages_of_one_role_are_joined_in_linear_time():
    part, text = {"type": "image", "image": "a.png"}, {"role": "user", "content": "a"}
    turns = [text, {"role": "user", "content": [part]}, {"role": "user", "content": [part]}, *[text] * 20_000]
    first, second = parse_messages(turns, RecordMedia(Media))
    assert shown([first]) == ["a[a.png]"]
    assert second.text == "a\n\n" * 19_999 + "a"


def test_a_streamed_message_that_names_its_image_does_not_get_it_twice():
    part = {"type": "image_url", "image_url": {"url": "cat.jpg"}}
    record = {"messages": [{"role": "user", "content": [part, {"type": "text", "text": "Which?"}]}, ANSWER]}
    sample = TarSample("0.tar", "cat", 0, {"json": json.dumps(record).encode(), "jpg": b"J"})
    assert read_sample(sample, SourceConfig("0.tar", "messages"), 0).media == (Media.image(b"J"),)
