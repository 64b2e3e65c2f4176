"""Properties of rendering that hold for any text: nothing in a message is a control token, labels cover the answers."""

from __future__ import annotations

from unicodedata import normalize

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from bindllm.conversation import Conversation, Message, control_tokens, end_tokens, render
from bindllm.data.rows import IGNORE, tokenize
from bindllm.media import Media
from test_conversation import IN_BRACKETS, REWRITES_ANSWERS, THINKS, WITH_DEFAULT_SYSTEM, merging_tokenizer
from tiny import TEMPLATE, tiny_tokenizer

TEMPLATES = {
    "ChatML": TEMPLATE,
    "default system": WITH_DEFAULT_SYSTEM,
    "brackets": IN_BRACKETS,
    "thinks": THINKS,
    "rewrites": REWRITES_ANSWERS,
    "space": TEMPLATE.replace("\n{{", ": {{").replace("assistant\n", "assistant: "),
}
# Pairs that cross the end of a header, a word, a line and a control token.
MERGES = [
    ("Ċ", "Ċ"),
    ("Ġ", "a"),
    ("Ċ", "a"),
    ("Ġ", "Ġ"),
    ("a", "s"),
    ("as", "s"),
    ("Ġa", "s"),
    ("Ã", "©"),
    (":", "Ġ"),
]
TOKENIZERS = {"bytes": tiny_tokenizer(), "merges": merging_tokenizer(MERGES)}

# Text with the pieces that could go wrong more often than chance gives them.
pieces = st.sampled_from(
    [
        "<|im_end|>",
        "<|im_start|>",
        "<|im_",
        "end|>",
        "assistant\n",
        "\n",
        " ",
        "as",
        "é",
        "日",
        "👍🏽",
        "</s>",
        "{{ a }}",
    ]
)
characters = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
texts = st.lists(st.one_of(pieces, characters), max_size=5).map("".join)
answers = texts.filter(lambda text: text.strip())
kinds = pytest.mark.parametrize("kind", TOKENIZERS)
templates = pytest.mark.parametrize("template", TEMPLATES)
fast = settings(max_examples=40)


def using(kind: str, template: str):
    tokenizer = TOKENIZERS[kind]
    tokenizer.chat_template = TEMPLATES[template]
    return tokenizer


def talk(turns: list[tuple[str, str]], *, images: bool = False) -> Conversation:
    messages = []
    for n, (question, answer) in enumerate(turns):
        media = [Media.image(f"{n}.png")] if images else []
        messages += [Message("user", [*media, question]), Message("assistant", answer)]
    return Conversation(tuple(messages))


def plain(text: str) -> str:
    """In form NFC, without white space and the joiner that escapes control tokens, which tell nothing."""
    return normalize("NFC", "".join(text.split()).replace("\u2060", ""))


@kinds
@templates
@fast
@given(question=texts, answer=answers)
def test_control_text_of_any_content_stays_text(kind, template, question, answer):
    tokenizer = using(kind, template)
    control = set(control_tokens(tokenizer).values())

    def structure(*texts: str) -> list[int]:
        rendered = render(talk([texts]), tokenizer, control_text="escape")
        return [token for token in rendered.input_ids if token in control]

    # As many control tokens as in a conversation of harmless words, and no other ones.
    assert structure(question, answer) == structure("what", "that")


@kinds
@templates
@fast
@given(turns=st.lists(st.tuples(texts, answers), min_size=1, max_size=3))
@example(turns=[("q", "as")])
@example(turns=[("\n", "\nas"), (" ", " as")])
def test_labels_are_the_answers_and_their_end_and_follow_the_prompt_of_generation(kind, template, turns):
    tokenizer = using(kind, template)
    ends = end_tokens(tokenizer)
    conversation = talk(turns)
    rendered = render(conversation, tokenizer, control_text="escape")
    assert rendered.whole == [True] * len(turns)
    assert [bool(flag) for flag in rendered.supervised].count(True) == sum(b - a for a, b in rendered.answers)
    for n, (first, stop) in enumerate(rendered.answers):
        *said, end = rendered.input_ids[first:stop]
        assert end in ends
        # The thought or mark of some templates comes first.
        assert plain(tokenizer.decode(said)).endswith(plain(turns[n][1]))
        assert not set(said) & set(control_tokens(tokenizer).values())
    # The prompt of generation is the beginning of the training row, token for token.
    asked = Conversation(conversation.messages[:-1])
    prompt = render(asked, tokenizer, add_generation_prompt=True, control_text="escape")
    first, _ = rendered.answers[-1]
    assert rendered.input_ids[:first] == prompt.input_ids
    # The spans do not overlap, and the index of a token never decreases.
    assert sorted(rendered.answers) == rendered.answers
    assert rendered.starts == sorted(rendered.starts)


@kinds
@fast
@given(turns=st.lists(st.tuples(texts, answers), min_size=1, max_size=3))
def test_a_token_listens_to_the_image_of_its_own_turn(kind, turns):
    tokenizer = using(kind, "ChatML")
    rendered = render(talk(turns, images=True), tokenizer, control_text="escape")
    assert rendered.media_index == sorted(rendered.media_index)
    for n, (first, stop) in enumerate(rendered.answers):
        assert set(rendered.media_index[first:stop]) == {n}


@kinds
@fast
@given(answer=answers, room=st.integers(5, 12))
def test_a_cut_answer_is_the_beginning_of_the_whole_one_with_its_end(kind, answer, room):
    tokenizer = using(kind, "ChatML")
    answer = plain(answer.replace("<|", ""))
    if not answer:
        return
    # Four tokens hold the longest character: there is room for one of them and the end.
    whole = tokenize(talk([("q", answer)]), tokenizer, 10_000)
    cut = tokenize(talk([("q", answer)]), tokenizer, whole.prompt_length + room)
    *said, end = cut.labels[cut.labels != IGNORE].tolist()
    assert end == whole.input_ids[-1]
    assert whole.input_ids[whole.prompt_length :].tolist()[: len(said)] == said
    assert answer.startswith(tokenizer.decode(said))
    assert cut.truncated == (len(cut.input_ids) < len(whole.input_ids))
