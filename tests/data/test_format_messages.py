import base64

import pytest

from bindllm.conversation import Message
from bindllm.data.formats import read_row
from bindllm.data.formats.media import FolderResolver
from bindllm.data.source_config import SourceConfig
from bindllm.errors import InputError
from bindllm.media import Media

ANSWER = {"role": "assistant", "content": "red"}


@pytest.fixture
def read(tmp_path):
    """Reads messages in a folder that holds the files named; gives the messages of the conversation."""
    for name in ("a.png", "b.png", "bark.wav", "chair.npy", "sweep.bin"):
        (tmp_path / name).touch()

    def read(*messages, modality="image", **record):
        config = SourceConfig(str(tmp_path / "rows.jsonl"), "messages", modality=modality)
        row = read_row({"messages": list(messages), **record}, config, FolderResolver.of(config))
        return row.conversation.messages

    return read


def user(*parts):
    return {"role": "user", "content": list(parts)}


def text(words):
    return {"type": "text", "text": words}


def image(url):
    return {"type": "image_url", "image_url": {"url": url}}


def test_any_number_of_turns_with_a_system_prompt(read):
    messages = read(
        {"role": "developer", "content": "Be brief.\n"},
        {"role": "user", "content": " Hi "},
        {"role": "assistant", "content": "Hello."},
        {"role": "user", "content": "Which?"},
        ANSWER,
    )
    assert [(m.role, m.text) for m in messages] == [
        ("system", "Be brief."),
        ("user", "Hi"),
        ("assistant", "Hello."),
        ("user", "Which?"),
        ("assistant", "red"),
    ]


DATA = base64.b64encode(b"content").decode()


@pytest.mark.parametrize(
    ("part", "modality", "source"),
    [
        (image("a.png"), "image", "a.png"),
        ({"type": "image_url", "image_url": "a.png"}, "image", "a.png"),
        (image("file://{folder}/a.png"), "image", "a.png"),
        (image(f"data:image/png;base64,{DATA}"), "image", b"content"),
        (image("data:image/svg+xml,%3Csvg/%3E"), "image", b"<svg/>"),
        ({"type": "image", "image": "a.png"}, "image", "a.png"),
        ({"type": "image", "url": "a.png"}, "image", "a.png"),
        ({"type": "image", "path": "a.png"}, "image", "a.png"),
        ({"image": "a.png"}, "image", "a.png"),
        ({"type": "image", "image": {"bytes": b"content", "path": "gone.png"}}, "image", b"content"),
        ({"type": "image", "image": {"bytes": None, "path": "a.png"}}, "image", "a.png"),
        ({"type": "input_audio", "input_audio": {"data": DATA, "format": "wav"}}, "audio", b"content"),
        ({"type": "input_audio", "input_audio": {"data": "bark.wav", "format": "wav"}}, "audio", "bark.wav"),
        ({"type": "input_audio", "input_audio": "bark.wav"}, "audio", "bark.wav"),
        ({"type": "video", "video": "a.png"}, "video", "a.png"),
        ({"type": "video_url", "video_url": {"url": "a.png"}}, "video", "a.png"),
        ({"type": "point", "point": "chair.npy"}, "point", "chair.npy"),
        ({"type": "depth", "depth": "a.png"}, "depth", "a.png"),
        ({"type": "thermal", "thermal": "a.png"}, "thermal", "a.png"),
        ({"type": "imu", "imu": "chair.npy"}, "imu", "chair.npy"),
        # Arrow gives every part the keys of all parts.
        (
            {"type": "image_url", "text": None, "image_url": {"url": "a.png", "detail": None}},
            "image",
            "a.png",
        ),
    ],
)
def test_media_parts(read, tmp_path, part, modality, source):
    if isinstance(url := part.get("image_url"), dict):
        part = {**part, "image_url": {**url, "url": url["url"].format(folder=tmp_path)}}
    source = source if isinstance(source, bytes) else str(tmp_path / source)
    (question, _) = read(user(text("Which?"), part), ANSWER)
    assert question == Message("user", ("Which?", Media(modality, source)))


def test_a_modality_of_the_source_may_be_a_part(read, tmp_path):
    (question, _) = read(user({"type": "radar", "radar": "sweep.bin"}), ANSWER, modality="radar")
    assert question.media == (Media("radar", str(tmp_path / "sweep.bin")),)


def test_text_parts_do_not_run_into_each_other(read, tmp_path):
    (question, _) = read(
        user(text(" Is this "), text("red?"), image("a.png"), text("Or this?\n"), text("Say.")), ANSWER
    )
    picture = Media.image(str(tmp_path / "a.png"))
    assert question.content == ("Is this ", "red?", picture, "\nOr this?\n", "Say.")


def test_columns_fill_parts_without_media_in_their_order(read, tmp_path):
    empty = {"type": "image"}
    messages = read(
        user(empty, text("Which?")), ANSWER, user(text("And?"), empty), ANSWER, images=["a.png", "b.png"]
    )
    assert [m.media for m in messages if m.media] == [
        (Media.image(str(tmp_path / "a.png")),),
        (Media.image(str(tmp_path / "b.png")),),
    ]


def test_media_of_columns_that_no_part_stands_for_go_before_the_first_question(read, tmp_path):
    system, question, _ = read(
        {"role": "system", "content": "Be brief."},
        user(text("Which?")),
        ANSWER,
        image="a.png",
        audio="bark.wav",
    )
    assert system.media == ()
    assert question.content == (
        Media.image(str(tmp_path / "a.png")),
        Media.audio(str(tmp_path / "bark.wav")),
        "Which?",
    )


def test_turns_of_one_role_become_one_unless_both_hold_media(read, tmp_path):
    messages = read(
        user(image("a.png")),
        user(text("One.")),
        user(text("Two."), image("b.png")),
        ANSWER,
        {**ANSWER, "content": "or blue"},
    )
    picture = Media.image(str(tmp_path / "a.png"))
    assert [(m.role, m.text) for m in messages] == [
        ("user", "One."),
        ("user", "Two."),
        ("assistant", "red\n\nor blue"),
    ]
    assert messages[0].content == (picture, "One.")


def test_turns_after_the_last_answer_are_skipped_with_their_media(read):
    messages = read(user(text("Which?")), ANSWER, user(text("And?"), image("a.png")))
    assert [(m.role, m.media) for m in messages] == [("user", ()), ("assistant", ())]


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([], "no answer"),
        ([user(text("Which?"))], "no answer"),
        ([{"role": "system", "content": "Be brief."}], "no answer"),
        ([ANSWER], "it starts with an answer"),
        (
            [{"role": "system", "content": "Be brief."}, ANSWER, user(text("Which?")), ANSWER],
            "it starts with an answer",
        ),
        ([user(text("Which?")), {"role": "assistant", "content": " \n"}], "empty answer"),
        (
            [user(text("Which?")), {"role": "assistant", "content": ""}, user(text("?")), ANSWER],
            "empty answer",
        ),
        ([user(text(" ")), ANSWER], "a question without text or media"),
        ([user(), ANSWER], "a question without text or media"),
        (["Which?", ANSWER], "a message that is not an object"),
        ([{"role": "user"}, ANSWER], "neither a text nor a list of parts"),
        ([{"role": "usr", "content": "Which?"}, ANSWER], r"unknown role 'usr'\. Did you mean 'user'\?"),
        ([{"content": "Which?"}, ANSWER], r"unknown role None\."),
        ([user(text("?")), {"role": "assistant", "content": [image("a.png")]}], "media in an answer"),
        ([user("?", 7), ANSWER], "a content part that is not an object"),
        ([user({"type": "text"}), ANSWER], "a text part without a text"),
        (
            [user({"type": "imge_url", "imge_url": "a.png"}), ANSWER],
            r"unknown content part 'imge_url'\. Did you mean 'image",
        ),
        ([user({"type": "radar", "radar": "sweep.bin"}), ANSWER], "unknown content part 'radar'"),
        (
            [user(image("https://example.org/a.png")), ANSWER],
            "no path to the image file, but a web address; download it first",
        ),
        ([user(image("gone.png")), ANSWER], "no such image file: gone.png"),
        (
            [user(image("file://host/a.png")), ANSWER],
            "but a file: URL of another machine: file://host",
        ),
        ([user(image("file://[x/a.png")), ANSWER], "but a file: URL that cannot be read"),
        (
            [user({"type": "input_audio", "input_audio": {"data": "gone.wav"}}), ANSWER],
            "no such audio file: gone.wav",
        ),
        ([user(image("data:image/png;base64,!!")), ANSWER], r"a data: URI without image content"),
        ([user(image("data:image/png")), ANSWER], r"a data: URI without image content"),
        ([user({"type": "image_url", "image_url": {"detail": "low"}}), ANSWER], "no path to the image file"),
        (
            [user({"type": "image"}), ANSWER],
            "more placeholders <image> than media: 1 for 0 in column 'image'",
        ),
        ([user(text("\ud83d")), ANSWER], "not valid Unicode"),
    ],
)
def test_bad_rows(read, messages, reason):
    with pytest.raises(InputError, match=reason):
        read(*messages)


def test_parts_without_media_must_be_as_many_as_the_media(read):
    with pytest.raises(InputError, match="fewer placeholders <image> than media: 1 for 2 in column 'image'"):
        read(user({"type": "image"}, text("Which?")), ANSWER, images=["a.png", "b.png"])
