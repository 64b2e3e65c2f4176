"""Which settings hold in generation: the end tokens of the chat template, and no recommendation of a folder."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from bindllm.conversation import Conversation, Message, render
from bindllm.data.collate import prompt_batch
from bindllm.data.rows import tokenize
from bindllm.errors import DecoderError, InputError
from bindllm.model.adapter import AdapterConfig
from bindllm.model.decoder import DecoderConfig, load_tokenizer
from bindllm.model.export import export_decoder
from bindllm.model.generation import AnswerText, decode_answers
from bindllm.objectives.grpo import draw_answers
from preference_parts import conversation, lookup
from tiny import tiny_model, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
END = TOKENIZER.convert_tokens_to_ids("<|im_end|>")
# An ordinary word that some configs name as end token.
WORD = TOKENIZER.convert_tokens_to_ids("o")


def ids(text: str) -> list[int]:
    return TOKENIZER(text, add_special_tokens=False)["input_ids"]


def script(model, answer: list[int], *, second: float = 0.0):
    """Let the decoder say an answer token by token, and give every token a second choice."""
    following = dict(zip([*ids("\n"), *answer[:-1]], answer, strict=True))

    def hook(_, __, kwargs, output):
        last = kwargs["input_ids"][:, -1].tolist()
        output.logits[:, -1] = 0
        output.logits[:, -1, ids("z")[0]] = second
        for row, token in enumerate(last):
            output.logits[row, -1, following.get(token, answer[-1])] = 10.0
        return output

    return model.decoder.register_forward_hook(hook, with_kwargs=True)


FOLDERS = {
    "another control token": {"eos_token_id": 0},
    "a list": {"eos_token_id": [0]},
    "an ordinary word": {"eos_token_id": [WORD, END]},
    "null": {"eos_token_id": None},
    "no file": None,
    "penalties": {
        "eos_token_id": 2,
        "repetition_penalty": 9.0,
        "no_repeat_ngram_size": 1,
        "min_new_tokens": 9,
    },
    "beams": {"eos_token_id": 2, "num_beams": 3, "length_penalty": 5.0},
    "stop strings": {"eos_token_id": 2, "stop_strings": ["y"]},
    "contrastive search": {"eos_token_id": 2, "penalty_alpha": 0.6, "top_k": 4},
    "groups of beams": {"eos_token_id": 2, "num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 1.0},
    "sampling": {"eos_token_id": 2, "do_sample": True, "temperature": 50.0, "max_length": 3},
    "suppressed": {"eos_token_id": 2, "suppress_tokens": ids("yo"), "forced_eos_token_id": 0},
}


def folder_with(decoder, place, recommended: dict | None, **config):
    """A copy of a decoder's folder with other settings for generation."""
    place.mkdir()
    for file in decoder.iterdir():
        (place / file.name).write_bytes(file.read_bytes())
    settings = {**json.loads((place / "config.json").read_text()), **config}
    # Old folders have these settings in their config, which also names an end token.
    if recommended is None:
        settings |= {"eos_token_id": WORD, "repetition_penalty": 9.0, "num_beams": 2, "max_length": 3}
    (place / "config.json").write_text(json.dumps(settings))
    (place / "generation_config.json").unlink()
    if recommended is not None:
        (place / "generation_config.json").write_text(json.dumps(recommended))
    return place


@pytest.mark.parametrize("recommended", FOLDERS)
def test_an_answer_is_greedy_and_ends_where_the_template_ends_it(decoder, tmp_path, recommended):
    model = tiny_model(folder_with(decoder, tmp_path / "decoder", FOLDERS[recommended]))
    samples = [
        tokenize(conversation("red", "yo", question), TOKENIZER, 100) for question in ("a?", "longer?")
    ]
    prompts = prompt_batch(samples, lookup, pad_id=TOKENIZER.pad_token_id)
    script(model, [*ids("yoyoyo"[:2]), END], second=5.0)
    assert model.generate("What?") == "yo"
    assert "".join(model.stream("What?")) == "yo"
    assert model.decode(model.generate_from(**prompts, max_new_tokens=8)) == ["yo", "yo"]
    _, texts, cut = draw_answers(model, prompts, group_size=2, temperature=0.1, max_new_tokens=8)
    assert texts == ["yo"] * 4
    assert not cut.any()


def test_a_repeated_word_is_not_punished(decoder, tmp_path):
    model = tiny_model(folder_with(decoder, tmp_path / "decoder", FOLDERS["penalties"]))
    # Every token is followed by the same one.
    script(model, ids("y"), second=5.0)
    assert model.generate("What?", max_new_tokens=5) == "yyyyy"
    assert model.generate("What?", max_new_tokens=5, repetition_penalty=9.0) != "yyyyy"


@pytest.mark.parametrize(
    "recommended", ["another control token", "no file", "penalties", "contrastive search"]
)
def test_the_exported_folder_ends_answers_as_the_template_does(decoder, tmp_path, recommended):
    folder = folder_with(decoder, tmp_path / "decoder", FOLDERS[recommended])
    model = tiny_model(folder, adapter=AdapterConfig(rank=2, bias=False))
    model.save_pretrained(tmp_path / "checkpoint")
    export_decoder(tmp_path / "checkpoint", tmp_path / "plain")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    for config in (plain.generation_config, plain.config):
        assert END in config.eos_token_id
        assert WORD not in config.eos_token_id
    # The same settings as in `BindLLM.generate`.
    assert plain.generation_config.to_diff_dict() == model.settings.to_diff_dict()
    assert AutoTokenizer.from_pretrained(tmp_path / "plain").model_max_length == 512


def test_stop_strings_of_the_caller_end_an_answer(decoder):
    model = tiny_model(decoder)
    script(model, [*ids("ab, cd"), END])
    assert model.generate("What?", stop_strings=[","]) == "ab,"
    assert model.generate("What?", generation_config=GenerationConfig(stop_strings=["b"])) == "ab"
    assert "".join(model.stream("What?", stop_strings=[","])) == "ab,"
    assert model.generate("What?", stop_strings=[], max_new_tokens=8).startswith("ab,")
    with pytest.raises(InputError, match="stop_strings is \\[''\\], expected texts"):
        model.generate("What?", stop_strings="")


@pytest.mark.parametrize(
    ("limit", "text"), [(1, "a"), (2, "a"), (3, "a"), (4, "a日"), (5, "a日"), (6, "a日é")]
)
def test_a_limit_inside_a_character_drops_its_first_bytes(decoder, limit, text):
    model = tiny_model(decoder)
    # Tokens: a 1, 日 3, é 2.
    script(model, [*ids("a日é"), END])
    assert model.generate(["What?", "Which?"], max_new_tokens=limit) == [text, text]
    assert "".join(model.stream("What?", max_new_tokens=limit)) == text


def test_bytes_that_the_model_ends_itself_stay_visible(decoder):
    model = tiny_model(decoder)
    script(model, [*ids("a日")[:3], END])
    assert model.generate("What?") == "a\ufffd"
    assert "".join(model.stream("What?")) == "a\ufffd"


def test_no_more_tokens_than_the_decoder_has_positions(decoder, tmp_path):
    model = tiny_model(folder_with(decoder, tmp_path / "decoder", {}, max_position_embeddings=40))
    script(model, ids("y"))
    prompt = len(model.prepare("What?", None)[0][0])
    assert model.generate("What?", max_new_tokens=500) == "y" * (40 - prompt)
    assert model.generate("What?", max_length=500) == "y" * (40 - prompt)
    with pytest.raises(InputError, match=r"prompt has 1\d\d tokens, and the decoder has 40 positions"):
        model.generate("What? " * 20)
    tokenizer = load_tokenizer(model.config)
    fits, long = (conversation("red", "yo", "x" * length) for length in (1, 40))
    assert tokenize(fits, tokenizer, 1000).num_answers == 1
    with pytest.raises(InputError, match=r"longer than the 40 positions .* lower data.max_length cuts it"):
        tokenize(long, tokenizer, 1000)


def test_padding_without_a_row_in_the_embedding(decoder, tmp_path):
    folder = folder_with(decoder, tmp_path / "decoder", {})
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "<|pad|>"})
    tokenizer.save_pretrained(folder)
    model = tiny_model(folder)
    with torch.no_grad():
        nn.init.normal_(model.decoder.lm_head.weight)
    long, short = model.generate(["What is this long question?", "What?"], max_new_tokens=4)
    assert (long, short) == tuple(
        model.generate(each, max_new_tokens=4) for each in ("What is this long question?", "What?")
    )


def test_a_template_that_cannot_end_an_answer_is_refused(decoder, tmp_path):
    folder = folder_with(decoder, tmp_path / "decoder", {})
    (folder / "chat_template.jinja").write_text("{% for m in messages %}{{ m['content'] }}|{% endfor %}")
    with pytest.raises(DecoderError, match="ends an answer without a control token"):
        load_tokenizer(DecoderConfig(str(folder)))


@pytest.mark.parametrize(("role", "system"), [("system", "Be kind"), ("user", None)])
def test_a_template_that_drops_the_text_of_a_role_is_refused(decoder, tmp_path, role, system):
    folder = folder_with(decoder, tmp_path / "decoder", {})
    template = TOKENIZER.chat_template.replace("in messages", f"in messages if message.role != '{role}'")
    (folder / "chat_template.jinja").write_text(template)
    with pytest.raises(DecoderError, match=f"does not write the text of a {role} message"):
        load_tokenizer(DecoderConfig(str(folder), system=system))
    # Without such a text the template of the system text is as good as any.
    if role == "system":
        tokenizer = load_tokenizer(DecoderConfig(str(folder)))
        with pytest.raises(InputError, match="does not write the text of a system message"):
            render(Conversation((Message("system", "Be kind"), Message("user", "Hi"))), tokenizer)


@pytest.mark.parametrize("system", ["", "Be kind", None])
def test_the_default_of_several_named_templates_is_used(decoder, tmp_path, system):
    folder = folder_with(decoder, tmp_path / "decoder", {})
    (folder / "chat_template.jinja").rename(folder / "default.txt")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("{{ messages[0]['tools'] }}")
    config = DecoderConfig(str(folder), dtype="float32", system=system)
    if system is None:
        (folder / "additional_chat_templates" / "rag.jinja").write_text("rag")
        with pytest.raises(
            DecoderError, match=r"the chat templates rag, tool_use, and none is called default"
        ):
            load_tokenizer(config)
    (folder / "default.txt").rename(folder / "chat_template.jinja")
    model = tiny_model(folder)
    model.tokenizer = load_tokenizer(config)
    shown = model.tokenizer.decode(np.ravel(model.prepare("Hi", None)[0][0]))
    expected = "" if system is None else f"<|im_start|>system\n{system}<|im_end|>\n"
    assert shown == f"{expected}<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize("ended", [True, False])
@pytest.mark.parametrize("seed", range(20))
def test_pieces_of_an_answer_are_its_text(seed, ended):
    draw = random.Random(seed)
    letters = [*"ab \n\t,日é\U0001f600", " word", "  ", "\xa0"]
    answer = ids("".join(draw.choices(letters, k=30)))
    # Tokens that are not a whole character, and control tokens inside an answer.
    answer = [draw.choice([token, token, token, draw.randrange(259)]) for token in answer]
    answer = [token for token in answer if token != END] + [END] * ended
    text, pieces = AnswerText(TOKENIZER), []
    while answer[len(pieces) :]:
        pieces.append(text.add([answer[len(pieces)]]))
        assert pieces[-1] == pieces[-1].rstrip()
    pieces.append(text.end(whole=ended))
    assert "".join(pieces) == decode_answers(torch.tensor([answer]), TOKENIZER, [END])[0]


@pytest.mark.parametrize("seed", range(20))
def test_pieces_end_before_the_first_stop_string(seed):
    draw = random.Random(seed)
    answer = "".join(draw.choices("aabc ", k=40))
    stop = ["".join(draw.choices("abc ", k=draw.choice([2, 3, 5]))) for _ in range(3)]
    text = AnswerText(TOKENIZER, stop)
    found = "".join([*(text.add([token]) for token in ids(answer)), text.end(whole=True)])
    ends = [answer.find(each) for each in stop if each in answer]
    assert text.stopped is bool(ends)
    # Of several stop strings the one that is complete first counts.
    first = min(ends, key=lambda at: min(at + len(s) for s in stop if answer.startswith(s, at)), default=None)
    assert found == answer[:first].strip()
