import numpy as np
import pytest

from bindllm.conversation import Conversation, Message, render
from bindllm.data.rows import IGNORE, tokenize
from bindllm.errors import InputError
from bindllm.media import Media
from tiny import tiny_tokenizer

A, B = Media.image("a.png"), Media.image("b.png")
ONE = Conversation((Message("user", [A, "Hi"]), Message("assistant", "yoyo")))
TWO = Conversation((*ONE.messages, Message("user", [B, "2"]), Message("assistant", "xyz")))

# One token a letter: "<user|Hi>|" 10, "<assistant|" 11, "yoyo>" 5, "|" 1, "<user|2>|" 9, "<assistant|" 11, "xyz>" 4.
PROMPT, FIRST_ANSWER, SECOND_PROMPT, WHOLE = 21, 26, 47, 51


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


def learnt(sample, tokenizer) -> str:
    return tokenizer.decode(sample.labels[sample.labels != IGNORE])


def test_labels_are_the_supervised_ids_and_the_sample_ends_with_them(tokenizer):
    sample = tokenize(ONE, tokenizer, 100)
    rendered = render(ONE, tokenizer)
    # The newline after the end token teaches nothing and is skipped.
    assert sample.input_ids.tolist() == rendered.input_ids[:-1]
    assert sample.labels.tolist() == [IGNORE] * PROMPT + rendered.input_ids[PROMPT:-1]
    assert sample.media_index.tolist() == [0] * FIRST_ANSWER
    assert {array.dtype for array in (sample.input_ids, sample.labels, sample.media_index)} == {
        np.dtype(np.int64)
    }
    assert (sample.truncated, sample.num_supervised, sample.prompt_length) == (False, 5, PROMPT)


def test_answer_of_exactly_the_longest_length_is_not_cut(tokenizer):
    assert not tokenize(ONE, tokenizer, FIRST_ANSWER).truncated


@pytest.mark.parametrize(
    ("max_length", "answer"),
    [(25, "yoy<|im_end|>"), (24, "yo<|im_end|>"), (23, "y<|im_end|>")],
)
def test_cut_answer_keeps_its_end_token(tokenizer, max_length, answer):
    sample = tokenize(ONE, tokenizer, max_length)
    assert len(sample.input_ids) == max_length
    assert learnt(sample, tokenizer) == answer
    assert sample.truncated


@pytest.mark.parametrize("max_length", [1, PROMPT, PROMPT + 1])
def test_prompt_that_leaves_no_room_is_refused(tokenizer, max_length):
    with pytest.raises(InputError, match=f"no room for an answer in max_length={max_length}"):
        tokenize(ONE, tokenizer, max_length)


@pytest.mark.parametrize(
    ("max_length", "length", "answers"),
    [
        (WHOLE, WHOLE, "yoyo<|im_end|>xyz<|im_end|>"),
        (WHOLE - 1, WHOLE - 1, "yoyo<|im_end|>xy<|im_end|>"),
        (SECOND_PROMPT + 2, SECOND_PROMPT + 2, "yoyo<|im_end|>x<|im_end|>"),
        # Not even the start of the second answer fits: its whole turn is skipped.
        (SECOND_PROMPT + 1, FIRST_ANSWER, "yoyo<|im_end|>"),
        (FIRST_ANSWER + 3, FIRST_ANSWER, "yoyo<|im_end|>"),
    ],
)
def test_truncation_of_two_turns(tokenizer, max_length, length, answers):
    sample = tokenize(TWO, tokenizer, max_length)
    assert len(sample.input_ids) == len(sample.labels) == len(sample.media_index) == length
    assert learnt(sample, tokenizer) == answers
    assert sample.truncated == (max_length < WHOLE)


def test_turns_that_are_skipped_take_their_images_along(tokenizer):
    assert tokenize(TWO, tokenizer, WHOLE).media == ((A,), (B,))
    assert tokenize(TWO, tokenizer, FIRST_ANSWER).media == ((A,),)


def test_prompt_is_what_a_request_would_render(tokenizer):
    for conversation in (ONE, TWO):
        sample = tokenize(conversation, tokenizer, 100)
        asked = render(Conversation(conversation.messages[:-1]), tokenizer, add_generation_prompt=True)
        assert sample.input_ids[: sample.prompt_length].tolist() == asked.input_ids
        assert sample.media_index[: sample.prompt_length].tolist() == asked.media_index


def test_text_only_conversation_has_no_media(tokenizer):
    sample = tokenize(Conversation((Message("user", "Hi"), Message("assistant", "yo"))), tokenizer, 100)
    assert sample.media == ()
    assert set(sample.media_index.tolist()) == {-1}


def test_conversation_without_answer_is_refused(tokenizer):
    with pytest.raises(InputError, match="no answer"):
        tokenize(Conversation((Message("user", [A, "Hi"]),)), tokenizer, 100)


@pytest.mark.parametrize(
    ("max_length", "answer"), [(29, "a日é<|im_end|>"), (27, "a日<|im_end|>"), (24, "a<|im_end|>")]
)
def test_cut_answer_ends_at_a_character(tokenizer, max_length, answer):
    # Tokens of the answer: a 1, 日 3, é 2, its end 1.
    conversation = Conversation((*ONE.messages[:1], Message("assistant", "a日é")))
    for length in range(max_length - 1, max_length + 1) if max_length > 24 else (23, 24, 25):
        sample = tokenize(conversation, tokenizer, length)
        text = learnt(sample, tokenizer)
        assert "\ufffd" not in text
        assert text.endswith("<|im_end|>")
        assert len(sample.input_ids) <= length
    assert learnt(tokenize(conversation, tokenizer, max_length), tokenizer) == answer
