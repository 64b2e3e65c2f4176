"""Rows with tool calls, reasoning and answers of weight 0: all of it is kept, and learned as asked."""

import json

import pytest

from bindllm.data.formats import read_row
from bindllm.data.formats.media import FolderResolver
from bindllm.data.rows import make_sample
from bindllm.data.source_config import SourceConfig
from bindllm.errors import InputError
from tiny import TEMPLATE, tiny_tokenizer
from tool_parts import TAGS, WEATHER

THOUGHTS = TEMPLATE.replace(
    "{{ message['content'] }}",
    "{% if message.reasoning_content %}<think>{{ message.reasoning_content }}</think>{% endif %}{{ message.content }}",
)
CALL = {"id": "a", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}
ROW = {
    "messages": [
        {"role": "user", "content": "How is Oslo?"},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "a", "content": "rain"},
        {"role": "assistant", "content": "It rains."},
    ],
    "tools": [WEATHER],
}
WRITTEN = '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call><|im_end|>'


def learned(record, format="messages", template=TAGS, **options) -> list[str]:
    """The text of each run of learned tokens, and the whole text at the end."""
    config = SourceConfig("rows.jsonl", format, **options)
    row = read_row(record, config, FolderResolver.of(config))
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    sample = make_sample(row, tokenizer, 4096)
    runs, last = [], False
    for token, label in zip(sample.input_ids.tolist(), sample.labels.tolist(), strict=True):
        if label >= 0:
            runs[len(runs) :] = [] if last else [[]]
            runs[-1].append(token)
        last = label >= 0
    return [*map(tokenizer.decode, runs), tokenizer.decode(sample.input_ids)]


def test_calls_are_learned_and_results_are_not():
    *runs, text = learned(ROW)
    assert runs == [WRITTEN, "It rains.<|im_end|>"]
    assert "<|im_start|>tool\nrain<|im_end|>" in text
    assert "The weather of a city." in text


def test_other_layouts_give_the_same_row():
    short = {"name": "weather", "arguments": {"city": "Oslo"}}
    turns = [
        {"from": "human", "value": "How is Oslo?"},
        {"from": "function_call", "value": json.dumps(short)},
        {"from": "observation", "value": "rain"},
        {"from": "gpt", "value": "It rains."},
    ]
    sharegpt = {"conversations": turns, "tools": json.dumps([WEATHER["function"]])}
    # Without ids, and with the arguments as an object.
    plain = [{**one, "tool_calls": [short]} if "tool_calls" in one else one for one in ROW["messages"]]
    plain = [{name: value for name, value in one.items() if name != "tool_call_id"} for one in plain]
    assert learned(sharegpt, "sharegpt") == learned({**ROW, "messages": plain}) == learned(ROW)


def test_an_answer_of_weight_0_is_kept_and_not_learned():
    answer, question = {"role": "assistant", "content": "No."}, {"role": "user", "content": "Sure?"}
    turns = [question, {**answer, "weight": 0}, question, {**answer, "content": "Yes."}]
    *runs, text = learned({"messages": turns}, template=TEMPLATE)
    assert runs == ["Yes.<|im_end|>"]
    assert "assistant\nNo.<|im_end|>" in text
    # At the end it teaches nothing.
    assert (
        learned({"messages": [*turns, question, {**answer, "train": False}]}, template=TEMPLATE)[-1] == text
    )


@pytest.mark.parametrize(
    "thought",
    [
        {"reasoning_content": "2 + 2", "content": "4"},
        {"thinking": "2 + 2", "content": "4"},
        {"content": [{"type": "thinking", "thinking": [{"type": "text", "text": "2 + 2"}]}, "4"]},
    ],
)
def test_reasoning_is_learned_masked_or_dropped(thought):
    record = {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", **thought}]}
    expected = {
        "learn": "<think>2 + 2</think>4<|im_end|>",
        "mask": "</think>4<|im_end|>",
        "drop": "4<|im_end|>",
    }
    for reasoning, run in expected.items():
        *runs, text = learned(record, template=THOUGHTS, reasoning=reasoning)
        assert runs == [run]
        assert ("2 + 2" in text) == (reasoning != "drop")
    with pytest.raises(InputError, match="does not write the reasoning of an answer"):
        learned(record, template=TEMPLATE)
    indented = THOUGHTS.replace(
        "message.reasoning_content }}", "message.reasoning_content | replace(' ', '  ') }}"
    )
    with pytest.raises(InputError, match="it cannot be masked; learn or drop it"):
        learned(record, template=indented, reasoning="mask")


def test_masked_reasoning_is_never_mistaken_for_the_answer_or_a_tag():
    question = {"role": "user", "content": "?"}
    turns = [{"role": "assistant", "reasoning_content": text, "content": text} for text in ("red", "think")]
    # As Qwen's, which drops the thoughts of earlier answers.
    template = THOUGHTS.replace("if message.reasoning_content", "if message.reasoning_content and loop.last")
    *runs, _ = learned(
        {"messages": [question, turns[0], question, turns[1]]}, template=template, reasoning="mask"
    )
    assert runs[0] == "red<|im_end|>"
    assert runs[1].endswith(">think<|im_end|>")
    assert "<think>" not in runs[1]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"tools": [{"type": "function"}]}, "does not hold a list of functions, each with a name"),
        (
            {1: {"tool_calls": [{"function": {"arguments": "{}"}}]}},
            "a tool call without the name of a function",
        ),
        ({1: {"tool_calls": [{"name": "weather", "arguments": "Oslo"}]}}, "arguments are not a JSON object"),
        ({2: {"tool_call_id": "b"}}, "the result of a tool names no call before it: b"),
        (
            {1: {"weight": 0}, 3: {"weight": 0}},
            "no answer to learn: no turn of the assistant, or all have the weight 0",
        ),
        (
            {2: {"content": [{"type": "image", "image": "data:image/png;base64,AAAA"}]}},
            "media in the result of a tool",
        ),
    ],
)
def test_rows_that_cannot_be_used(changes, words):
    turns = [{**turn, **changes.get(number, {})} for number, turn in enumerate(ROW["messages"])]
    tools = changes.get("tools", ROW["tools"])
    with pytest.raises(InputError, match=words):
        learned({"messages": turns, "tools": tools})


def test_a_template_without_calls_is_refused():
    with pytest.raises(InputError, match="does not write the tool"):
        learned(ROW, template=TEMPLATE)
    with pytest.raises(InputError, match="reasoning must be learn, mask or drop"):
        SourceConfig("rows.jsonl", "messages", reasoning="keep")
