"""Chat templates of released models: what is learned, and that training and generation see the same tokens.

The package trl ships the templates as data; its code is not imported. The tokenizer is a stand-in with the control
tokens that a template names, and one token for each other byte.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import re
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from bindllm import Conversation, Media, Message
from bindllm.conversation import control_tokens, render
from bindllm.errors import DecoderError, InputError
from bindllm.model.decoder import DecoderConfig, load_tokenizer
from tool_parts import WEATHER

FOLDER = Path(*importlib.util.find_spec("trl").submodule_search_locations) / "chat_templates"
# The others are changed for training, or of a model that does not write from left to right.
NAMES = sorted(
    file.stem
    for file in FOLDER.glob("*.jinja")
    if not file.stem.endswith("_training") and file.stem != "diffusion_gemma"
)
CONTROL = re.compile(
    r"<[|\uff5c][^<>|\uff5c\s]+[|\uff5c]>|<\|[\w\"]+>|<\w+\|>|<\|\"\|>|<(?:start|end)_of_\w+>|</?s>"
)

# An empty thought in the generation prompt, which earlier answers do not have.
THINKING = {"qwen3", "qwen3_5_nothink", "qwen3_5_think", "qwen3_6"}
# The prompt opens a thought that no answer of a conversation has.
COMPLETED = {"deepseek_r1_distill", "deepseekv3"}
WITHOUT_SYSTEM = {"gemma"}
GEMMA_4 = {f"gemma4{version}" for version in ("", "_v2", "_v3", "_v4", "_v5")}
NEMOTRON = {f"nemotron_3{kind}" for kind in ("_5_lightning", "_nano", "_super", "_ultra")}
LFM_2_5 = {"lfm2_2_5", "lfm2_2_5_v2", "lfm2_2_5_vl"}
WITH_CALLS = THINKING | GEMMA_4 | NEMOTRON | LFM_2_5
WITH_CALLS |= {
    "glm4moe",
    "lfm2_v2",
    "llama3_1",
    "llama3_2",
    "qwen2_5",
    "qwen3_8",
    "qwen3_instruct_2507",
    "qwen3_vl",
}
# If Nemotron 3 may think, it cannot write an answer without a thought, and is refused.
WITH_THOUGHTS = THINKING | NEMOTRON | LFM_2_5 | {"gemma4_v5", "glm4moe", "qwen3_8"}

CALL = {"id": "call00001", "type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}
THOUGHT = "One and one."
A, B = Media.image("a.png"), Media.image("b.png")


def tokenizer_of(folder: Path, name: str, **options) -> PreTrainedTokenizerFast:
    """A byte tokenizer with the control tokens of a template, loaded as that of a decoder."""
    text = (FOLDER / f"{name}.jinja").read_text(encoding="utf-8")
    special = sorted({*CONTROL.findall(text), "<bos>", "<eos>"})
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(special + letters)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<bos>",
        eos_token="<eos>",
        additional_special_tokens=special,
        chat_template=text,
    )
    tokenizer.save_pretrained(folder)
    (folder / "config.json").write_text(
        json.dumps({"model_type": "llama", "vocab_size": len(backend.get_vocab())})
    )
    return load_tokenizer(DecoderConfig(str(folder), template_options=options or None))


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    """Return the tokenizer of a template, made once for all tests."""
    return functools.cache(functools.partial(tokenizer_of, tmp_path_factory.mktemp("tokenizer")))


def ask(*parts: str | Media) -> Message:
    return Message("user", parts)


def answer(text: str, **fields) -> Message:
    return Message("assistant", text, fields)


def learned(tokenizer, conversation: Conversation) -> list[str]:
    """The text of each learned answer; they follow the generation prompt, and each message listens to its media."""
    rendered, messages = render(conversation, tokenizer), conversation.messages
    assert all(rendered.whole)
    prompt = render(
        Conversation(messages[:-1], tools=conversation.tools), tokenizer, add_generation_prompt=True
    )
    assert rendered.input_ids[: rendered.answers[-1][0]] == prompt.input_ids
    heard = {group: [] for group in rendered.media_index}
    for token, group in zip(rendered.input_ids, rendered.media_index, strict=True):
        heard[group].append(token)
    group = 0
    for number, message in enumerate(messages):
        group = max(group, sum(bool(earlier.media) for earlier in messages[: number + 1]) - 1)
        assert message.text in tokenizer.decode(heard[group])
    assert len(heard) == len(conversation.media_groups)
    answers = [tokenizer.decode(rendered.input_ids[start:stop]) for start, stop in rendered.answers]
    control = control_tokens(tokenizer)
    assert all(any(text.endswith(token) for token in control) for text in answers)
    return answers


def text_of(found: str, tokenizer) -> str:
    """A learned answer without its end token and white space."""
    end = next(token for token in control_tokens(tokenizer) if found.endswith(token))
    return found.removesuffix(end).strip()


@pytest.mark.parametrize("name", NAMES)
def test_answers_are_learned_and_nothing_else(name, load):
    tokenizer, conversations = load(name), []
    conversations.append((ask(A, "one?"), answer("First.")))
    conversations.append(
        (*conversations[0], ask("two?"), answer("Second."), ask(B, "three?"), answer("Third."))
    )
    if name not in WITHOUT_SYSTEM:
        conversations.append((Message("system", "Be brief."), *conversations[1]))
    for messages in conversations:
        found = learned(tokenizer, Conversation(messages))
        assert [text_of(text, tokenizer) for text in found] == [
            m.text for m in messages if m.role == "assistant"
        ]
        turns = [{"role": message.role, "content": message.text} for message in messages]
        text = tokenizer.apply_chat_template(turns, tokenize=False, enable_thinking=False)
        same = render(Conversation(messages), tokenizer).input_ids == tokenizer(text)["input_ids"]
        assert same == (name not in COMPLETED)


@pytest.mark.parametrize("name", NAMES)
def test_calls_are_learned_up_to_their_end_token_or_refused(name, load):
    tokenizer = load(name)
    result = Message("tool", "rain", {"name": "weather", "tool_call_id": "call00001"})
    messages = [ask(A, "one?"), answer("", tool_calls=[CALL]), result, answer("It rains.")]
    for more in ([], [ask(B, "two?"), answer("Second.")]):
        conversation = Conversation([*messages, *more], tools=[WEATHER])
        if name not in WITH_CALLS:
            with pytest.raises(InputError):
                render(conversation, tokenizer)
            continue
        call, *texts = learned(tokenizer, conversation)
        assert [text_of(text, tokenizer) for text in texts] == ["It rains.", "Second."][: len(texts)]
        assert "weather" in call
        assert "Oslo" in call
        assert "rain" not in call


@pytest.mark.parametrize("name", NAMES)
def test_thoughts_are_learned_if_the_prompt_lets_the_model_think_or_refused(name, load):
    thought = Conversation([ask(A, "one?"), answer("First.", reasoning_content=THOUGHT)])
    if name not in WITH_THOUGHTS:
        with pytest.raises(InputError, match="does not write the (thoughts|reasoning)"):
            render(thought, load(name))
        return
    if name not in LFM_2_5 | {"gemma4_v5"}:
        with pytest.raises(InputError, match="enable_thinking: true"):
            render(thought, load(name))
    if name in NEMOTRON:
        with pytest.raises(DecoderError, match="use a template that"):
            load(name, enable_thinking=True)
        return
    # LFM 2.5 always lets the model think.
    tokenizer = load(name) if name in LFM_2_5 else load(name, enable_thinking=True)
    again = Conversation([*thought.messages, ask(B, "two?"), answer("Second.", reasoning_content="Two.")])
    for conversation in (thought, again):
        found = learned(tokenizer, conversation)
        last = conversation.messages[-1]
        assert last.fields["reasoning_content"] in found[-1]
        assert text_of(found[-1], tokenizer).endswith(last.text)
        assert "assistant" not in "".join(found)
