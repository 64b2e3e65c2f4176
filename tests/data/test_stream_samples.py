"""From the members of a sample to a row: what the JSON says, and which member it means."""

import json

import pytest

from bindllm.conversation.messages import RowError
from bindllm.data.source_config import Columns, SourceConfig
from bindllm.data.stream.samples import TarResolver, read_row
from bindllm.data.stream.shards import TarSample
from bindllm.errors import InputError
from bindllm.media import Media


def sample(key="a/cat", /, problem="", **members):
    return TarSample(
        "0.tar", key, 4, {end.replace("_", "."): content for end, content in members.items()}, problem
    )


def row(one, **config):
    return read_row(one, SourceConfig("0.tar", **config), 2)


def test_image_and_text_are_a_captioned_row():
    found = row(sample(jpg=b"J", txt="\ufeffA cat. \n".encode()))
    question, answer = found.conversation.messages
    assert question.content == (Media.image(b"J"), "Describe this image.")
    assert answer.text == "A cat."
    assert found.references == ("A cat.",)
    assert (found.name, found.source, found.task) == ("0.tar sample 5 (a/cat)", 2, "caption")


def test_the_caption_of_the_json_comes_first_and_an_empty_one_does_not_count():
    both = {"jpg": b"J", "txt": b"text"}
    assert row(sample(**both, json=b'{"caption": "json"}')).references == ("json",)
    assert row(sample(**both, json=b'{"caption": null}')).references == ("text",)
    renamed = Columns(caption="alt")
    assert row(sample(**both, json=b'{"alt": "other", "caption": "json"}'), columns=renamed).references == (
        "other",
    )


def test_other_formats_take_media_from_the_members():
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A cat."}]
    found = row(
        sample(jpg=b"J", json=json.dumps({"image": "coco/000.jpg", "conversations": turns}).encode()),
        format="llava",
    )
    assert found.media == (Media.image(b"J"),)
    assert found.references == ("A cat.",)
    asked = row(sample(png=b"P", json=b'{"question": "Red?", "answer": "yes"}'), format="vqa")
    assert asked.media == (Media.image(b"P"),)
    assert (asked.references, asked.task) == (("yes",), "answer")
    text = row(sample(json=b'{"instruction": "Add 1 and 1.", "output": "2"}'), format="alpaca")
    assert text.media == ()


def test_media_that_a_row_does_not_use_are_named():
    asked = {"instruction": "Which?", "output": "red"}
    members = {"left_jpg": b"L", "right_jpg": b"R", "wav": b"W", "cls": b"1"}

    def remarks(**record):
        found = row(sample(**members, json=json.dumps({**asked, **record}).encode()), format="alpaca")
        return found.media, found.remarks

    unused = "media next to the row that it does not use (.right.jpg, .wav)"
    assert remarks(image="cat.left.jpg") == ((Media.image(b"L"),), (unused,))
    every = {"images": ["left.jpg", "right.jpg"], "audio": "cat.wav"}
    assert remarks(**every) == ((Media.image(b"L"), Media.image(b"R"), Media.audio(b"W")), ())


def test_a_split_that_a_sample_names_is_reported():
    config = SourceConfig("0.tar")
    assert read_row(sample(jpg=b"J", json=b'{"caption": "x", "split": "test"}'), config, 0).split == "test"
    assert read_row(sample(jpg=b"J", txt=b"x"), config, 0).split is None


def resolver(**members):
    return TarResolver(sample(**members))


@pytest.mark.parametrize("value", ["cat.left.jpg", "a/cat.left.jpg", "left.jpg", ".LEFT.jpg"])
def test_members_are_named_by_their_name_or_end(value):
    assert resolver(left_jpg=b"L", right_jpg=b"R", json=b"{}")("image", value) == Media.image(b"L")


def test_a_name_from_before_the_packing_means_the_only_image():
    assert resolver(jpg=b"J", wav=b"W")("image", "images/000123.jpg") == Media.image(b"J")
    assert resolver(jpg=b"J", wav=b"W")("audio", None) == Media.audio(b"W")
    assert resolver(depth_png=b"D", png=b"P", npy=b"N")("depth", None) == Media.depth(b"D")
    assert resolver(npy=b"N", json=b"{}", txt=b"t")("radar", None) == Media("radar", b"N")
    assert resolver(jpg=b"J")("image", b"inside") == Media.image(b"inside")


def test_two_names_from_before_the_packing_do_not_mean_the_same_image():
    one = resolver(jpg=b"J", mp3=b"M")
    assert one("image", "first.jpg") == one("image", "first.jpg") == Media.image(b"J")
    assert one("audio", "second.mp3") == Media.audio(b"M")
    with pytest.raises(RowError, match="several image names for one member: second.jpg"):
        one("image", "second.jpg")


@pytest.mark.parametrize("names", [("cat.jpg", "dog.jpg"), ("dog.jpg", "cat.jpg"), ("dog.jpg", None)])
def test_an_unknown_name_does_not_mean_an_image_that_has_another_name(names):
    one = resolver(jpg=b"J")
    assert one("image", names[0]) == Media.image(b"J")
    with pytest.raises(RowError, match="several image names for one member: dog.jpg"):
        one("image", names[1])


@pytest.mark.parametrize(
    ("members", "modality", "value", "message"),
    [
        ({"left_jpg": b"L", "right_jpg": b"R"}, "image", "000.jpg", "several members that may be its image"),
        ({"json": b"{}", "txt": b"x"}, "image", None, "no member that is its image"),
        ({"mp4": b"M"}, "audio", "mp3", "no member that is its audio"),
        ({"jpg": b"J"}, "image", "https://x.org/1.jpg", "download it first"),
    ],
)
def test_media_that_cannot_be_resolved(members, modality, value, message):
    with pytest.raises(RowError, match=message):
        resolver(**members)(modality, value)


@pytest.mark.parametrize(
    ("one", "message"),
    [
        (sample(jpg=b"J"), "media without a row, a member .json or .txt of the same name: .jpg"),
        (sample(jpg=b"J", json=b" {} "), "the member .json is empty"),
        (sample(v2_1_jpg=b"J", v2_1_json=b"{}"), "a dot in the name of a sample, .*: .v2.1.jpg, .v2.1.json"),
        (
            sample(heic=b"J", txt=b"x"),
            r"no member that is its image, only other endings than \.bmp, .*: .heic",
        ),
        (sample(jpg=b"J", json=b"[" * 1_000_000), "not valid JSON"),
        (sample(jpg=b"J", json=b"{"), "not valid JSON"),
        (sample(jpg=b"J", json=b"[" * 100_000), "not valid JSON"),
        (sample(jpg=b"J", json=b"[1]"), "not a JSON object"),
        (sample(jpg=b"J", txt=b"\xff\xfe"), "not UTF-8"),
        (sample(jpg=b"J", txt=b"x", problem="two members .jpg"), "two members .jpg"),
        (sample(txt=b"A cat."), "no member that is its image"),
    ],
)
def test_samples_that_cannot_be_used_say_why(one, message):
    with pytest.raises(InputError, match=message):
        row(one)
