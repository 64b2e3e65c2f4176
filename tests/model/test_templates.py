"""The template of the published weights: its texts to the letter, and what training and generation ask of it."""

from __future__ import annotations

import hashlib

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from bindllm import Conversation, Media, Message
from bindllm.conversation import render
from bindllm.errors import DecoderError, InputError
from bindllm.model.decoder import INPUT_HEADER, DecoderConfig, apply_template, load_tokenizer
from tiny import TEMPLATE, save_tiny_decoder, tiny_tokenizer

SHA256 = {
    "X": "5fc20c4032f672386251673a7ad6e202193beb7118fe6c0baaf0339fb59d5359",
    f"X{INPUT_HEADER}Y": "801144bec3fb5da8a23d99fafd0368a39edb212040b49bf45f21f9625f531442",
}


def alpaca():
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<|im_start|>"})
    apply_template("alpaca", tokenizer)
    return tokenizer


def text_of(tokenizer, *messages, header=True):
    turns = [{"role": role, "content": content} for role, content in messages]
    return tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=header)


@pytest.mark.parametrize("instruction", SHA256)
def test_prompts_are_the_published_ones(instruction):
    text = text_of(alpaca(), ("user", instruction))
    assert text.startswith("<|im_start|>Below")
    assert hashlib.sha256(text.removeprefix("<|im_start|>").encode()).hexdigest() == SHA256[instruction]


def test_the_answer_is_glued_to_the_header_and_ends_with_the_end_token():
    tokenizer = alpaca()
    answer = Conversation((Message("user", "X"), Message("assistant", "Yes.")))
    rendered = render(answer, tokenizer)
    learned = [token for token, wanted in zip(rendered.input_ids, rendered.supervised, strict=True) if wanted]
    assert tokenizer.decode(learned) == "Yes.<|im_end|>"
    prompt = render(Conversation((Message("user", "X"),)), tokenizer, add_generation_prompt=True).input_ids
    assert rendered.input_ids[: len(prompt)] == prompt
    assert tokenizer.decode(prompt).endswith("### Response:")


def test_further_turns_and_system_texts_have_a_form():
    tokenizer = alpaca()
    pictures = [Media.image(f"{n}.png") for n in range(2)]
    turns = (
        Message("system", "Be brief."),
        Message("user", [pictures[0], "What?"]),
        Message("assistant", "A cat."),
        Message("user", [pictures[1], "And this?"]),
    )
    rendered = render(Conversation(turns), tokenizer, add_generation_prompt=True)
    assert tokenizer.decode(rendered.input_ids) == (
        "<|im_start|>Be brief.\n\n### Instruction:\nWhat?\n\n### Response:A cat.<|im_end|>"
        "\n\n### Instruction:\nAnd this?\n\n### Response:"
    )
    second = rendered.media_index.index(1)
    assert tokenizer.decode(rendered.input_ids[second:]).startswith("\n\n### Instruction:\nAnd")


def sentencepiece(*, everywhere: bool) -> PreTrainedTokenizerFast:
    """Put a space ahead of a text, as LLaMA's tokenizers do: at its very start, or after control tokens too."""
    letters = sorted({*"▁Below. X#:\nInstructionRespowgeadlqch,mvt", "▁"})
    special = ["<unk>", "<s>", "</s>"]
    backend = Tokenizer(
        models.BPE(vocab={c: i for i, c in enumerate(special + letters)}, merges=[], unk_token="<unk>")
    )
    backend.pre_tokenizer = pre_tokenizers.Metaspace(
        prepend_scheme="always" if everywhere else "first", split=False
    )
    backend.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


@pytest.mark.parametrize("everywhere", [True, False])
def test_the_prompt_has_the_tokens_of_the_begin_token_and_the_text(everywhere):
    tokenizer = sentencepiece(everywhere=everywhere)
    apply_template("alpaca", tokenizer)
    found = render(Conversation((Message("user", "X"),)), tokenizer, add_generation_prompt=True).input_ids
    text = text_of(alpaca(), ("user", "X")).removeprefix("<|im_start|>")
    assert found == [1, *tokenizer(text, add_special_tokens=False)["input_ids"]]


def test_it_is_chosen_in_the_config_of_the_decoder(tmp_path):
    folder = str(save_tiny_decoder(tmp_path / "d"))
    with pytest.raises(DecoderError, match="has no begin token"):
        load_tokenizer(DecoderConfig(folder, template="alpaca"))
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<|im_start|>"})
    tokenizer.save_pretrained(folder)
    tokenizer = load_tokenizer(DecoderConfig(folder, template="alpaca", system="Be brief."))
    assert text_of(tokenizer, ("user", "X")).startswith("<|im_start|>Be brief.\n\n### Instruction:\nX")
    with pytest.raises(InputError, match="Did you mean 'alpaca'"):
        DecoderConfig(folder, template="alpacca")


def test_a_begin_token_that_is_an_empty_text_is_none():
    """So it stands in some copies of LLaMA; prompts would silently lack it."""
    tokenizer = tiny_tokenizer()
    tokenizer.bos_token = ""
    with pytest.raises(DecoderError, match="has no begin token"):
        apply_template("alpaca", tokenizer)


def test_a_template_is_a_text_or_a_file_and_takes_options(tmp_path):
    folder, file = str(save_tiny_decoder(tmp_path / "d")), tmp_path / "mine.jinja"
    text = "{{ mark }}" + TEMPLATE
    file.write_text(text)
    config = DecoderConfig(folder, template=str(file), template_options={"mark": 'a "b" \U0001f600'})
    # A checkpoint does not need the file.
    assert config.template == text
    loaded = [load_tokenizer(c) for c in (config, DecoderConfig(folder, template=text))]
    plain = "<|im_start|>user\nX<|im_end|>\n"
    assert [text_of(t, ("user", "X"), header=False) for t in loaded] == ['a "b" \U0001f600' + plain, plain]
    with pytest.raises(DecoderError, match=r"none\.jinja is missing.*give a file with a Jinja template"):
        DecoderConfig(folder, template="none.jinja")
    with pytest.raises(InputError, match=r"has marks, which .* does not read. Did you mean 'mark'\?"):
        load_tokenizer(DecoderConfig(folder, template=text, template_options={"marks": 1}))
    for options in ({"enable thinking": True}, {"mark": [1]}, {"mark": float("nan")}):
        with pytest.raises(InputError, match=r"template_options has .*enable_thinking: true"):
            DecoderConfig(folder, template_options=options)


def test_harmony_opens_the_final_channel_in_the_prompt(tmp_path):
    """So answers are learned whole, and no name of a channel is a part of their text."""
    folder, tokenizer = save_tiny_decoder(tmp_path / "d"), tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|channel|>", "<|message|>"]})
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}{% if m.role == 'assistant' %}<|channel|>final{% endif %}"
        "<|message|>{{ m.content }}<|im_end|>{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant{% endif %}"
    )
    tokenizer.save_pretrained(folder)
    tokenizer = load_tokenizer(DecoderConfig(str(folder)))
    turns = (Message("user", "X"), Message("assistant", "Yes."))
    rendered = render(Conversation(turns * 2), tokenizer)
    assert [tokenizer.decode(rendered.input_ids[a:b]) for a, b in rendered.answers] == ["Yes.<|im_end|>"] * 2
    prompt = render(Conversation(turns[:1]), tokenizer, add_generation_prompt=True)
    assert tokenizer.decode(prompt.input_ids).endswith("<|im_start|>assistant<|channel|>final<|message|>")
