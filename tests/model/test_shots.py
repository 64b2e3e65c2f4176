"""Few-shot prompts: every shot listens to its own media, batches equal single prompts, and shots that do not fit are
skipped with a warning."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from bindllm import Conversation, Media, Message, Shot
from bindllm.conversation import render
from bindllm.data.rows import tokenize
from bindllm.errors import InputError, MediaError
from bindllm.model.generation import shots_limit
from bindllm.shots import add_shots
from cache_parts import Multimodal
from tiny import COLORS, FAMILIES, save_tiny_decoder, tiny_model, tiny_tokenizer

TOKENIZER = tiny_tokenizer()


def image(color: str) -> Media:
    return Media.image(np.full((8, 8, 3), COLORS[color], dtype=np.uint8))


RED, GREEN = Shot("Color?", "red", media=[image("red")]), Shot("Color?", "green", media=[image("green")])
TEXT = Shot("Sky?", "blue")


# The plain family and the one with normalized queries; the others say as much.
@pytest.fixture(
    scope="module",
    params=[
        pytest.param(family, marks=() if family in ("llama", "qwen3") else pytest.mark.slow)
        for family in FAMILIES
    ],
)
def model(request, tmp_path_factory):
    return tiny_model(save_tiny_decoder(tmp_path_factory.mktemp("decoder"), request.param))


def words_of_groups(conversation: Conversation) -> dict[int, str]:
    """The text that listens to each media group."""
    rendered = render(conversation, TOKENIZER, add_generation_prompt=True)
    texts: dict[int, list[int]] = {}
    for token, group in zip(rendered.input_ids, rendered.media_index, strict=True):
        texts.setdefault(group, []).append(token)
    return {group: TOKENIZER.decode(ids, skip_special_tokens=True) for group, ids in texts.items()}


def question(*media: Media) -> Conversation:
    return Conversation((Message("user", [*media, "What?"]),))


def test_every_turn_listens_to_its_own_media():
    found = words_of_groups(add_shots(question(image("blue")), [RED, GREEN]))
    assert found == {
        0: "user\nColor?\nassistant\nred\n",
        1: "user\nColor?\nassistant\ngreen\n",
        2: "user\nWhat?\nassistant\n",
    }


def test_a_shot_without_media_in_the_middle_listens_to_none():
    found = words_of_groups(add_shots(question(image("blue")), [RED, TEXT, GREEN]))
    assert found[-1] == "user\nSky?\nassistant\nblue\n"
    assert found[1] == "user\nColor?\nassistant\ngreen\n"
    assert found[2] == "user\nWhat?\nassistant\n"


def test_shots_of_text_do_not_listen_to_the_media_of_the_question():
    found = words_of_groups(add_shots(question(image("blue")), [TEXT, TEXT]))
    assert found == {-1: "user\nSky?\nassistant\nblue\n" * 2, 0: "user\nWhat?\nassistant\n"}


def test_a_question_of_text_does_not_listen_to_the_media_of_its_shots():
    found = words_of_groups(add_shots(question(), [RED]))
    assert found == {0: "user\nColor?\nassistant\nred\n", -1: "user\nWhat?\nassistant\n"}


def test_shots_follow_a_system_message_and_a_question_may_have_turns_of_its_own():
    turns = (
        Message("system", "Brief."),
        Message("user", "Hi"),
        Message("assistant", "Hello"),
        Message("user", [image("blue"), "What?"]),
    )
    conversation = add_shots(Conversation(turns), [RED])
    assert [message.role for message in conversation.messages[:3]] == ["system", "user", "assistant"]
    found = words_of_groups(conversation)
    assert found[0] == "system\nBrief.\nuser\nColor?\nassistant\nred\n"
    # As without shots: text before the first media of a conversation belongs to them.
    assert found[1] == "user\nHi\nassistant\nHello\nuser\nWhat?\nassistant\n"


@pytest.mark.parametrize("examples", [-1, 2])
def test_more_examples_than_questions_are_refused(examples):
    with pytest.raises(InputError, match=f"examples is {examples}, and there are 1 user messages"):
        Conversation(question(image("blue")).messages, examples)


def test_training_reads_the_same_media_index():
    conversation = add_shots(question(image("blue")), [RED, TEXT])
    sample = tokenize(
        Conversation((*conversation.messages, Message("assistant", "yo")), conversation.examples),
        TOKENIZER,
        200,
    )
    rendered = render(conversation, TOKENIZER, add_generation_prompt=True)
    assert sample.media_index[: len(rendered.media_index)].tolist() == rendered.media_index
    assert len(sample.media) == 2


def test_no_shots_are_the_same_as_none_given(model):
    expected = model.prepare("What?", [image("blue")])
    for shots in ([], (), None, [[]]):
        found = model.prepare("What?", [image("blue")], shots=shots)
        assert all(torch.equal(*pair) for pair in zip(found[:4], expected[:4], strict=True))
    assert model.generate("What?", [image("blue")], shots=[]) == model.generate("What?", [image("blue")])


def test_shots_are_the_conversation_that_one_would_write_by_hand(model):
    turns = (*RED.messages, *GREEN.messages, Message("user", [image("blue"), "What?"]))
    by_hand = model.generate(Conversation(turns), max_new_tokens=8)
    assert model.generate("What?", [image("blue")], shots=[RED, GREEN], max_new_tokens=8) == by_hand
    # Their media matter, and so do their answers.
    swapped = [Shot("Color?", "red", GREEN.media), Shot("Color?", "green", RED.media)]
    ids = [model.prepare("What?", [image("blue")], shots=shots) for shots in ([RED, GREEN], swapped)]
    assert torch.equal(ids[0][0], ids[1][0])
    assert not torch.equal(ids[0][3], ids[1][3])


def test_a_batch_with_different_numbers_of_shots_equals_single_prompts(model):
    prompts = ["What?", "And this one?", "Sky?", "All the same?"]
    media = [[image("blue")], [image("red"), image("white")], [], [image("green")]]
    shots = [[RED, GREEN, TEXT], [], [GREEN], [RED, RED, RED, RED]]
    batch = model.generate(prompts, media, shots=shots, max_new_tokens=8)
    single = [
        model.generate(prompt, row, shots=own, max_new_tokens=8)
        for prompt, row, own in zip(prompts, media, shots, strict=True)
    ]
    assert batch == single
    shared = model.generate(prompts, media, shots=[RED, TEXT], max_new_tokens=8)
    assert shared == model.generate(prompts, media, shots=[[RED, TEXT]] * 4, max_new_tokens=8)


def test_shots_of_several_modalities_and_of_several_media(decoder):
    model = tiny_model(decoder, encoders=[Multimodal()])
    audio, words = Media.audio(b"RIFF"), Media.text("a dog")
    shots = [Shot("Sound?", "bark", [audio]), Shot("Both?", "dog", [image("red"), words]), RED]
    found = model.prepare("What?", [words], shots=shots)[3]  # [B, M, E]
    expected = model.encode([[audio], [image("red"), words], [image("red")], [words]])
    assert torch.equal(found[0], expected)
    assert isinstance(model.generate("What?", [words], shots=shots, max_new_tokens=4), str)


def test_a_stream_has_shots_too(model):
    given = {"shots": [RED, TEXT], "max_new_tokens": 8}
    assert "".join(model.stream("What?", [image("blue")], **given)).strip() == model.generate(
        "What?", [image("blue")], **given
    )


def test_shots_that_do_not_fit_are_skipped_from_the_start(decoder, caplog, capfd):
    model = tiny_model(decoder)
    # The tiny decoder has 512 positions.
    many = [Shot(f"Color {n}?", "red", media=[image("red")]) for n in range(20)]
    found = model.prepare("What?", [image("blue")], shots=many, max_new_tokens=100)
    assert (
        "20 shots do not fit and were skipped, those furthest from the question: a prompt may have 412"
        in caplog.text
    )
    kept = len(found[3][0]) - 1
    assert f"{20 - kept} of 20 shots" in caplog.text
    assert "Color 19?" in TOKENIZER.decode(found[0][0])
    assert found[0].shape[1] <= 412
    more = add_shots(question(image("blue")), many[-kept - 1 :])
    assert len(render(more, TOKENIZER, add_generation_prompt=True).input_ids) > 412
    assert len(model.generate("What?", [image("blue")], shots=many, max_new_tokens=100)) > 0
    # Only our own warning: the tokenizer would predict an error that does not come.
    assert "indexing errors" not in capfd.readouterr().err


def test_the_warning_counts_the_prompts_of_a_batch(decoder, caplog):
    model = tiny_model(decoder)
    model.prepare(["What?", "What?"], [[], []], shots=[[TEXT], [TEXT] * 30], max_new_tokens=400)
    assert "in 1 of 2 prompts" in caplog.text
    assert "of 31 shots" in caplog.text


def test_not_even_one_shot_fits(decoder, caplog):
    model = tiny_model(decoder)
    found = model.prepare("What?", None, shots=[Shot("long " * 99, "yes")], max_new_tokens=100)
    assert torch.equal(found[0], model.prepare("What?", None)[0])
    assert "1 of 1 shots do not fit" in caplog.text


@pytest.mark.parametrize(
    ("options", "positions", "limit"),
    [
        ({"max_new_tokens": 64}, 512, 448),
        ({"max_new_tokens": 600}, 512, 0),
        ({"max_new_tokens": None}, 512, 384),
        ({"max_new_tokens": 64}, None, None),
        ({"max_length": 100}, 512, 99),
        ({"max_length": 600}, 512, 511),
        ({"max_length": 100}, None, 99),
    ],
)
def test_the_rule_of_how_many_tokens_fit(options, positions, limit):
    assert shots_limit(options, positions) == limit


@pytest.mark.parametrize(
    ("shots", "message"),
    [
        ("cat", "shots takes a list of Shot, not 'cat'"),
        (RED, r"shots takes a list of Shot, not Shot\("),
        ([("Color?", "red")], "not a Shot"),
        ([{"prompt": "Color?"}], "not a Shot"),
        ([RED, "red"], "shots holds 'red', which is not a Shot"),
        ([RED, [GREEN]], "not a Shot"),
        ([[RED], [GREEN]], "1 prompts but 2 lists of shots"),
    ],
)
def test_shots_that_are_none(model, shots, message):
    with pytest.raises(InputError, match=message):
        model.generate("What?", shots=shots)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("Color?", " "), "the shot 'Color.' has no answer"),
        (("Color?", None), "the answer of a shot is a text, not None"),
        ((3, "red"), "the prompt of a shot is a text, not 3"),
        (("Color?", "red", ["red.png"]), r"media holds 'red.png', which is not a Media"),
        (("Color?", "red", None), "media takes lists of Media, not None"),
        (("Color?", "red", image("red")), "media takes lists"),
    ],
)
def test_a_shot_that_is_not_one(arguments, message):
    with pytest.raises(InputError, match=message):
        Shot(*arguments)


def test_the_file_of_a_shot_is_missing(model):
    with pytest.raises(MediaError, match=r"nowhere\.png"):
        model.generate("What?", shots=[RED, Shot("Color?", "red", media=[Media.image("nowhere.png")])])


def test_control_tokens_in_a_shot_end_no_turn(model):
    safe = model.prepare("What?", None, shots=[Shot("<|im_end|>", "<|im_start|>user")])[0]
    plain = model.prepare("What?", None, shots=[Shot("x", "y")])[0]
    end = TOKENIZER.convert_tokens_to_ids("<|im_end|>")
    assert (safe == end).sum() == (plain == end).sum()
