"""A bindllm model as a brain: calls that follow a grammar, in the form of the chat template or as text."""

import json
from typing import Annotated, Literal

import numpy as np
import pytest
import torch

from bindllm import Media
from bindllm.model.generation.calls import CallForm
from bindllm.model.generation.constraint import Grammars
from bindllm.reasoning.brain import OWN_FORM, LocalBrain, _Constrained, _signature
from bindllm.reasoning.eyes import model_tools
from bindllm.reasoning.solver import Budget, Solver
from bindllm.reasoning.tools import tool
from tiny import save_tiny_decoder, tiny_model

TAGS = (
    "{% if tools %}<|im_start|>system\n{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}<|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}"
    "{% for call in message.tool_calls or [] %}<tool_call>\n"
    '{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}'
    "\n</tool_call>{% if not loop.last %}{{ '\\n' }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
IMAGE = Media.image(np.full((24, 24, 3), 200, np.uint8))


@tool
def look(image: Annotated[Media, "image"], side: Literal["left", "right"]) -> str:
    """Look at a side."""
    return side


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = save_tiny_decoder(tmp_path_factory.mktemp("decoder"), max_position_embeddings=8192)
    return tiny_model(folder)


@pytest.fixture(params=["text", "template"])
def brain(model, request, monkeypatch):
    if request.param == "template":
        monkeypatch.setattr(model.tokenizer, "chat_template", TAGS)
    return LocalBrain(model)


def ask(brain, **changes):
    messages = [{"role": "system", "content": "Use tools."}, {"role": "user", "content": "Which side?"}]
    limits = {"required": True, "seconds": 60, "tokens": 600, **changes}
    return brain.reply(messages, [look.for_openai({"image1": IMAGE})], **limits)


def test_a_random_model_emits_valid_calls(brain):
    reply = ask(brain)
    assert reply.problem == ""
    assert 1 <= len(reply.calls) <= 4
    for name, arguments in reply.calls:
        assert name == "look"
        assert look.problem(arguments, {"image1": IMAGE}) == ""


def test_any_schema_of_a_server_is_shown_in_one_line():
    properties = {
        "a": True,
        "b": {"$ref": "#/$defs/x"},
        "c": {"type": ["string", "null"], "pattern": "^a|b$"},
        "d": {"anyOf": [True]},
    }
    function = {
        "name": "odd",
        "description": "Odd.",
        "parameters": {"type": "object", "properties": properties},
    }
    assert _signature(function) == "- odd(a?: any, b?: any, c?: string|null, d?: any): Odd."


def test_a_cut_reply_is_a_problem(brain):
    reply = ask(brain, tokens=20)
    assert (reply.calls, reply.tokens) == ((), 20)
    assert reply.problem == "the reply was cut after 20 tokens; write less"


def test_a_run_with_a_random_brain_ends_typed(model, monkeypatch):
    monkeypatch.setattr("bindllm.reasoning.brain.MOST_CALLS", 1)
    found = Solver(model, [look], budget=Budget(rounds=1, reply_tokens=120)).run("Which side?", [IMAGE])
    assert (found.answer is None) == (found.failure is not None)
    assert [event["ok"] for event in found.trace.events if event["kind"] == "result"] == [True]


def test_calls_and_results_come_back_in_the_form_of_the_template(brain, model, monkeypatch):
    call = {"id": "call_1", "type": "function", "function": {"name": "look", "arguments": '{"side": "left"}'}}
    messages = [
        {"role": "system", "content": "Use tools."},
        {"role": "user", "content": "Which side?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "result1: left", "tool_call_id": "call_1"},
    ]
    seen = []
    prepare = model.prepare
    monkeypatch.setattr(
        model,
        "prepare",
        lambda prompt, *rest, **options: seen.append(prompt) or prepare(prompt, *rest, **options),
    )
    brain.reply(messages, [look.for_openai({"image1": IMAGE})], required=False, seconds=60, tokens=5)
    (conversation,) = seen
    if conversation.tools:
        assert conversation.messages[2].fields["tool_calls"][0]["function"]["arguments"] == {"side": "left"}
        assert [message.role for message in conversation.messages] == ["system", "user", "assistant", "tool"]
    else:
        first, call, result = (message.text for message in conversation.messages)
        assert "- look(image: image1, side: left|right): Look at a side." in first
        assert first.endswith("Use tools.\nWhich side?")
        assert call == 'Call: {"name": "look", "arguments": {"side": "left"}}'
        assert result == "result1: left"


@pytest.mark.parametrize(
    ("form", "good", "bad"),
    [
        (
            OWN_FORM,
            ["Two cats.", 'I look.\nCall: {"name": "look", "arguments": {"side": "left"}}'],
            ["Call: me"],
        ),
        (
            "template",
            [
                "a < b",
                'I see.<tool_call>\n{"name": "look", "arguments": {"side": "left"}}\n</tool_call>',
                '<tool_call>\n{"name": "look", "arguments": {"side": "left"}}\n</tool_call>',
            ],
            ["<tool_call>x"],
        ),
    ],
)
def test_free_text_ends_where_the_mark_of_a_call_is_complete(form, good, bad, model, monkeypatch):
    if form == "template":
        monkeypatch.setattr(model.tokenizer, "chat_template", TAGS)
        form = CallForm.of(model.tokenizer)
    side = {"type": "object", "properties": {"side": {"enum": ["left"]}}, "additionalProperties": False}
    functions = [{"name": "look", "parameters": side}]
    for required in (False, True):
        for text in [*good, *bad]:
            constraint = Grammars(model).compile(
                form.grammar(functions, several=True, required=required, most=2)
            )
            accepted = True
            for token in [*model.tokenizer(text)["input_ids"], model.tokenizer.eos_token_id]:
                accepted = accepted and bool(constraint.allowed(259)[token])
                constraint.take(token)
            starts = text.startswith(("Call: {", "<tool_call>\n"))
            assert accepted == (text in good and (not required or starts)), (text, required)


def test_the_tools_of_a_model_look_at_media(model):
    tools = {one.name: one for one in model_tools(model, max_new_tokens=4)}
    # The tiny encoder serves neither texts nor a datastore.
    assert [*tools] == ["describe", "ask", "count"]
    assert tools["ask"](IMAGE, "What?") == model.generate("What?", [IMAGE], max_new_tokens=4)
    assert tools["describe"](IMAGE) == model.generate("Describe this image.", [IMAGE], max_new_tokens=4)
    assert json.dumps(tools["ask"].for_openai({"image1": IMAGE}))


def test_counting_takes_the_most_frequent_number(model, monkeypatch):
    count = {one.name: one for one in model_tools(model)}["count"]
    for answers, number in ((["Three.", "2", "There are two."], 2), (["none", "many", "some"], 0)):
        monkeypatch.setattr(type(model), "generate", lambda *_, answers=answers, **__: answers)
        assert count(IMAGE, "cats") == number
    monkeypatch.setattr(type(model), "generate", lambda *_, **__: ["many"] * 3)
    with pytest.raises(ValueError, match="no answer has a number"):
        count(IMAGE)


def test_a_reply_ends_with_the_second_of_two_equal_calls(brain, model, monkeypatch):
    call = '{"name": "look", "arguments": {"image": "image1", "side": "left"}}'
    mark, between, end = ("Call: ", "\nCall: ", "") if brain._template is None else (
        "<tool_call>\n", "\n</tool_call>\n<tool_call>\n", "\n</tool_call>")  # fmt: skip
    wanted = model.tokenizer(mark + between.join([call] * 4) + end)["input_ids"]

    def follow(self, ids, scores):
        # A model that writes the same call four times, unless something keeps it from that.
        position = ids.shape[1] - self._width
        scores = torch.zeros_like(scores)
        scores[0, wanted[position]] = 9
        return constrained(self, ids, scores)

    constrained = _Constrained.__call__
    monkeypatch.setattr(_Constrained, "__call__", follow)
    assert ask(brain).calls == (("look", {"image": "image1", "side": "left"}),) * 2
