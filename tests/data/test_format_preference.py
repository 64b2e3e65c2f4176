import pytest

from bindllm.data.formats import read_row
from bindllm.data.formats.media import FolderResolver
from bindllm.data.source_config import SourceConfig
from bindllm.errors import InputError

SYSTEM = {"role": "system", "content": "Be brief."}
ASKED = {"role": "user", "content": "Which?"}
RED, BLUE = ({"role": "assistant", "content": word} for word in ("red", "blue"))


@pytest.fixture
def read(tmp_path):
    """Reads a record in a folder with the image a.png."""
    (tmp_path / "a.png").touch()
    config = SourceConfig(str(tmp_path / "pairs.jsonl"), "preference")
    return lambda record: read_row(record, config, FolderResolver.of(config))


def said(conversation) -> list[tuple[str, str]]:
    return [(message.role, message.text) for message in conversation.messages]


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": " Which?", "chosen": "red\n", "rejected": "blue", "system": "Be brief."},
        {"prompt": [SYSTEM, ASKED], "chosen": [RED], "rejected": [BLUE]},
        {"prompt": [SYSTEM, ASKED], "chosen": "red", "rejected": [BLUE]},
        # The prompt is what both share.
        {"chosen": [SYSTEM, ASKED, RED], "rejected": [SYSTEM, ASKED, BLUE]},
        {
            "prompt": "Which?",
            "chosen": [SYSTEM, ASKED, RED],
            "rejected": [SYSTEM, ASKED, BLUE],
            "score_chosen": 8.0,
        },
        # A prompt of messages is repeated in the conversations, or comes before them.
        {"prompt": [SYSTEM], "chosen": [SYSTEM, ASKED, RED], "rejected": [SYSTEM, ASKED, BLUE]},
        {"prompt": [SYSTEM], "chosen": [ASKED, RED], "rejected": [ASKED, BLUE]},
    ],
)
def test_forms_of_a_pair(read, record):
    parsed = read(record)
    asked = [("system", "Be brief."), ("user", "Which?")]
    assert said(parsed.conversation) == [*asked, ("assistant", "red")]
    assert said(parsed.rejected) == [*asked, ("assistant", "blue")]
    assert (parsed.references, parsed.task, parsed.desirable) == (("red",), "chat", None)


def test_an_answer_after_earlier_turns_keeps_them(read):
    turns = [RED, {"role": "user", "content": "Sure?"}, {"role": "assistant", "content": "yes"}]
    parsed = read({"prompt": [ASKED], "completion": turns, "label": True})
    assert [text for _, text in said(parsed.conversation)] == ["Which?", "red", "Sure?", "yes"]


def test_a_pair_about_a_later_turn(read):
    before = [ASKED, RED, {"role": "user", "content": "Sure?"}]
    parsed = read({"prompt": before, "chosen": "yes", "rejected": "no"})
    assert [text for _, text in said(parsed.rejected)] == ["Which?", "red", "Sure?", "no"]
    assert parsed.rejected.messages[:-1] == parsed.conversation.messages[:-1]


@pytest.mark.parametrize(
    "prompt",
    [
        {"prompt": "Which?", "image": "a.png"},
        {"prompt": "<image>\nWhich?", "images": ["a.png"]},
        {
            "prompt": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Which?"}]}],
            "images": ["a.png"],
        },
        {"prompt": [{"role": "user", "content": "Which?"}], "images": ["a.png"]},
        {"question": [{"role": "user", "content": [{"type": "image", "image": "a.png"}, "Which?"]}]},
    ],
)
def test_pairs_about_an_image(read, tmp_path, prompt):
    parsed = read({**prompt, "chosen": "red", "rejected": "blue"})
    for conversation in (parsed.conversation, parsed.rejected):
        ((media,),) = conversation.media_groups
        assert (media.source, conversation.messages[0].text) == (str(tmp_path / "a.png"), "Which?")


@pytest.mark.parametrize(
    ("label", "unwanted"), [(True, False), (1, 0), ("true", "false"), ("True", "False"), ("1", "0")]
)
@pytest.mark.parametrize("completion", ["red", [RED], [ASKED, RED]])
def test_an_answer_with_a_label(read, label, unwanted, completion):
    parsed = read({"prompt": "Which?", "completion": completion, "label": label, "image": "a.png"})
    assert said(parsed.conversation) == [("user", "Which?"), ("assistant", "red")]
    assert len(parsed.conversation.media_groups) == 1
    assert (parsed.desirable, parsed.rejected) == (True, None)
    assert read({"prompt": "Which?", "completion": completion, "label": unwanted}).desirable is False


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"chosen": "red", "rejected": "blue"}, r"no column 'prompt'\. Known: chosen, rejected\."),
        ({"prompt": "Which?", "chosen": "red"}, "no column 'rejected'"),
        ({"prompt": "Which?", "chosen": "red", "rejected": " red "}, "chosen and rejected are the same"),
        ({"prompt": "Which?", "chosen": "red", "rejected": " "}, "empty answer"),
        ({"prompt": "Which?", "chosen": "", "rejected": "blue"}, "empty answer"),
        ({"prompt": " ", "chosen": "red", "rejected": "blue"}, "a question without text or media"),
        ({"prompt": 7, "chosen": "red", "rejected": "blue"}, "the prompt is neither a text nor a list"),
        ({"prompt": [], "chosen": "red", "rejected": "blue"}, "the prompt does not end with a question"),
        (
            {"prompt": [ASKED, RED], "chosen": "red", "rejected": "blue"},
            "the prompt does not end with a question",
        ),
        (
            {"prompt": [SYSTEM], "chosen": "red", "rejected": "blue"},
            "the prompt does not end with a question",
        ),
        ({"prompt": "Which?", "chosen": [ASKED], "rejected": [BLUE]}, "last message is not the assistant's"),
        ({"prompt": "Which?", "chosen": [], "rejected": [BLUE]}, "neither a text nor a list of messages"),
        ({"prompt": "Which?", "chosen": 7, "rejected": [BLUE]}, "neither a text nor a list of messages"),
        ({"chosen": [ASKED, RED], "rejected": [SYSTEM, ASKED, BLUE]}, "differ before their last message"),
        ({"chosen": [ASKED, RED], "rejected": "blue"}, "differ before their last message"),
        ({"prompt": "?", "chosen": "red", "rejected": [ASKED, BLUE]}, "differ before their last message"),
        (
            {"prompt": "How many?", "chosen": [ASKED, RED], "rejected": [ASKED, BLUE]},
            "the text in column 'prompt' is not in the conversation",
        ),
        (
            {"prompt": "How many?", "completion": [ASKED, RED], "label": True},
            "the text in column 'prompt' is not in the conversation",
        ),
        ({"prompt": "Which?", "completion": "red"}, "no column 'label'"),
        ({"prompt": "Which?", "completion": "red", "label": "good"}, "the label is neither true nor false"),
        ({"prompt": "Which?", "completion": "red", "label": 2}, "the label is neither true nor false"),
        (
            {"prompt": "Which?", "chosen": "red", "rejected": "blue", "image": "gone.png"},
            "no such image file: gone.png",
        ),
    ],
)
def test_bad_rows(read, record, reason):
    with pytest.raises(InputError, match=reason):
        read(record)
