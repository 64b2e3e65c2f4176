"""Conversations of several turns under the templates of several families: which tokens are learned, to the letter."""

import pytest

from bindllm.conversation import Conversation, Message
from bindllm.data.rows import IGNORE, Row, make_sample, tokenize
from bindllm.errors import InputError
from bindllm.media import Media
from bindllm.model.decoder import apply_template
from tiny import tiny_tokenizer

# A default system text where the conversation brings none, as SmolLM2 does.
SMOLLM2 = (
    "{% for m in messages %}{% if loop.first and m['role'] != 'system' %}<|im_start|>system\nKind<|im_end|>\n"
    "{% endif %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Only the last answer has a thought, an empty one, before it, as in Qwen3.
QWEN3 = (
    "{% set at = namespace(last=-1) %}{% for m in messages %}{% if m['role'] == 'user' %}"
    "{% set at.last = loop.index0 %}{% endif %}{% endfor %}{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' and loop.index0 > at.last %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m['content'] }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# A begin token, headers between control tokens, contents without white space around them, as in Llama 3.
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n"
    "{{ m['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)

TALK = Conversation(
    (
        Message("user", "Hi"),
        Message("assistant", "Yo."),
        Message("user", "1+1?"),
        Message("assistant", " 2"),
        Message("user", "Bye"),
        Message("assistant", "So long"),
    )
)

# In brackets what is learned.
EXPECTED = {
    "smollm2": (
        "<|im_start|>system\nKind<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n[Yo.<|im_end|>]\n"
        "<|im_start|>user\n1+1?<|im_end|>\n<|im_start|>assistant\n[ 2<|im_end|>]\n"
        "<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n[So long<|im_end|>]"
    ),
    "qwen3": (
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n[Yo.<|im_end|>]\n"
        "<|im_start|>user\n1+1?<|im_end|>\n<|im_start|>assistant\n[ 2<|im_end|>]\n"
        "<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n[<think>\n\n</think>\n\nSo long<|im_end|>]"
    ),
    "llama3": (
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n[Yo.<|eot_id|>]"
        "<|start_header_id|>user<|end_header_id|>\n\n1+1?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n[2<|eot_id|>]"
        "<|start_header_id|>user<|end_header_id|>\n\nBye<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n[So long<|eot_id|>]"
    ),
    "alpaca": (
        "<|begin_of_text|>Below is an instruction that describes a task. Write a response that appropriately "
        "completes the request.\n\n### Instruction:\nHi\n\n### Response:[Yo.<|im_end|>]"
        "\n\n### Instruction:\n1+1?\n\n### Response:[ 2<|im_end|>]"
        "\n\n### Instruction:\nBye\n\n### Response:[So long<|im_end|>]"
    ),
}


def tokenizer_like(family: str):
    tokenizer = tiny_tokenizer()
    control = ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    tokenizer.add_special_tokens({"bos_token": "<|begin_of_text|>", "additional_special_tokens": control})
    if family == "alpaca":
        apply_template("alpaca", tokenizer)
    else:
        tokenizer.chat_template = {"smollm2": SMOLLM2, "qwen3": QWEN3, "llama3": LLAMA3}[family]
    return tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


def marked(sample, tokenizer) -> str:
    """Text of a sample with brackets around what is learned."""
    text, learning = "", False
    for token, label in zip(sample.input_ids.tolist(), sample.labels.tolist(), strict=True):
        assert label in (IGNORE, token)
        if (label != IGNORE) != learning:
            text += "]" if learning else "["
            learning = not learning
        text += tokenizer.decode([token])
    return text + "]" * learning


@pytest.mark.parametrize("family", EXPECTED)
def test_every_answer_and_its_end_token_are_learned_and_nothing_else(family):
    tokenizer = tokenizer_like(family)
    sample = tokenize(TALK, tokenizer, 1000)
    assert marked(sample, tokenizer) == EXPECTED[family]
    assert sample.num_answers == 3
    assert sample.media == ()
    assert set(sample.media_index.tolist()) == {-1}


@pytest.mark.parametrize("family", EXPECTED)
def test_every_length_keeps_whole_turns_or_a_cut_answer_with_its_end(family):
    tokenizer = tokenizer_like(family)
    whole = tokenize(TALK, tokenizer, 1000)
    shortest = int((whole.labels != IGNORE).argmax()) + 2
    kept = []
    for max_length in range(len(whole.input_ids), shortest - 1, -1):
        sample = tokenize(TALK, tokenizer, max_length)
        assert len(sample.input_ids) <= max_length
        assert sample.truncated == (max_length < len(whole.input_ids))
        end = tokenizer.convert_tokens_to_ids("<|eot_id|>" if family == "llama3" else "<|im_end|>")
        assert sample.labels[-1] == end
        assert sample.labels[-2] not in (IGNORE, end)
        # All but the last token is as it was.
        assert (sample.labels[:-1] == whole.labels[: len(sample.labels) - 1]).all()
        kept.append(sample.num_answers)
    assert list(dict.fromkeys(kept)) == [3, 2, 1]
    with pytest.raises(InputError, match="no room for an answer"):
        tokenize(TALK, tokenizer, shortest - 1)


def test_images_of_later_turns_speak_from_their_turn_on():
    pictures = Media.image("a.png"), Media.image("b.png")
    messages = list(TALK.messages)
    messages[0] = Message("user", [pictures[0], "Hi"])
    messages[4] = Message("user", ["Bye", pictures[1]])
    for family in EXPECTED:
        tokenizer = tokenizer_like(family)
        sample = tokenize(Conversation(tuple(messages)), tokenizer, 1000)
        first = sample.media_index.tolist().index(1)
        assert set(sample.media_index[:first]) == {0}
        assert set(sample.media_index[first:]) == {1}
        # With the header of its message, and with the answer to it.
        heard = tokenizer.decode(sample.input_ids[first:])
        header = {"llama3": "<|start_header_id|>user", "alpaca": "\n\n### Instruction:"}.get(
            family, "<|im_start|>user"
        )
        assert heard.startswith((header, "\n" + header))
        assert "So long" in heard
        assert "1+1" not in heard


def row(**fields) -> Row:
    fields = {"conversation": TALK, "references": ("So long", "Farewell"), "name": "t.json row 7", **fields}
    return Row(**{"source": 2, "task": "answer", "type": "parting", **fields})


def other(*answers: str) -> Conversation:
    """The conversation with other last answers."""
    messages = list(TALK.messages)
    for number, answer in enumerate(reversed(answers)):
        messages[len(messages) - 1 - 2 * number] = Message("assistant", answer)
    return Conversation(tuple(messages))


def test_a_sample_carries_what_the_row_says(tokenizer):
    sample = make_sample(row(options=("So long", "No")), tokenizer, 1000)
    assert (sample.name, sample.source, sample.task, sample.type) == ("t.json row 7", 2, "answer", "parting")
    assert (sample.references, sample.options) == (("So long", "Farewell"), ("So long", "No"))
    assert (sample.rejected, sample.desirable, sample.number, sample.num_answers) == (None, None, -1, 3)


def test_a_row_of_a_preference_is_learned_from_its_last_answer_alone(tokenizer):
    pair = make_sample(row(rejected=other("Go")), tokenizer, 1000)
    assert marked(pair, tokenizer).count("[") == 1
    assert marked(pair, tokenizer).endswith("assistant\n[So long<|im_end|>]")
    assert marked(pair.rejected, tokenizer).endswith("assistant\n[Go<|im_end|>]")
    assert (pair.rejected.name, pair.rejected.source) == ("t.json row 7", 2)
    # Both were asked the same.
    assert pair.prompt_length == pair.rejected.prompt_length
    assert (pair.input_ids[: pair.prompt_length] == pair.rejected.input_ids[: pair.prompt_length]).all()
    for desirable in (True, False):
        sample = make_sample(row(desirable=desirable), tokenizer, 1000)
        assert sample.desirable is desirable
        assert sample.num_answers == 1
        assert sample.task == "answer"


def test_an_answer_that_does_not_fit_at_all_is_none_to_prefer(tokenizer):
    length = tokenize(TALK, tokenizer, 1000).prompt_length
    for options in ({"rejected": other("Go")}, {"desirable": True}):
        with pytest.raises(InputError, match="no room for an answer"):
            make_sample(row(**options), tokenizer, length + 1)
    cut = make_sample(row(rejected=other("Go away")), tokenizer, length + 4)
    assert marked(cut, tokenizer).endswith("[So <|im_end|>]")
    assert marked(cut.rejected, tokenizer).endswith("[Go <|im_end|>]")
    # Where only the worse answer is cut, the row is one that was cut.
    assert cut.truncated
    assert make_sample(row(rejected=other("Go away!")), tokenizer, length + 8).truncated
    assert not make_sample(row(rejected=other("Go away")), tokenizer, length + 8).truncated


def test_where_the_last_turn_is_skipped_its_references_are_too(tokenizer):
    whole = tokenize(TALK, tokenizer, 1000)
    cut = make_sample(row(), tokenizer, len(whole.input_ids) - 3)
    assert (cut.num_answers, cut.task, cut.references) == (3, "answer", ("So long", "Farewell"))
    short = make_sample(row(), tokenizer, whole.prompt_length)
    assert (short.num_answers, short.task, short.references, short.truncated) == (2, "chat", (), True)


@pytest.mark.parametrize("answer", ["", " \n"])
def test_empty_answers_are_refused(tokenizer, answer):
    with pytest.raises(InputError, match="an answer is empty"):
        make_sample(row(conversation=other(answer)), tokenizer, 1000)
    with pytest.raises(InputError, match="an answer is empty"):
        make_sample(row(conversation=other(answer, "x")), tokenizer, 1000)
    with pytest.raises(InputError, match="an answer is empty"):
        make_sample(row(rejected=other(answer)), tokenizer, 1000)
    # What is not learned may be empty.
    given = other(answer, "x")
    assert make_sample(row(conversation=given, rejected=other(answer, "y")), tokenizer, 1000).num_answers == 1
