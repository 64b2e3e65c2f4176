"""A bindllm model as a brain: calls that follow a grammar, in the form of the chat template or as text."""

import json
from typing import Annotated, Literal

import numpy as np
import pytest
import regex
import torch

import bindllm.reasoning.brain
from bindllm import Media
from bindllm.embeddings.datastore import Datastore, Record
from bindllm.errors import InputError, StoreError
from bindllm.model.generation.calls import CallForm
from bindllm.model.generation.constraint import Grammars
from bindllm.reasoning.brain import OWN_FORM, LocalBrain, _Constrained, _signature
from bindllm.reasoning.eyes import model_tools, read_number
from bindllm.reasoning.flat import FlatMasker, calls_pattern
from bindllm.reasoning.measure import calculate
from bindllm.reasoning.solver import Budget, Solver
from bindllm.reasoning.tools import Tool, tool
from tiny import COLORS, ColorEncoder, save_tiny_decoder, tiny_model

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


@pytest.fixture(params=["text", "template", "template without llguidance"])
def brain(model, request, monkeypatch):
    if request.param.startswith("template"):
        monkeypatch.setattr(model.tokenizer, "chat_template", TAGS)
    if "without" in request.param:
        monkeypatch.setattr("bindllm.reasoning.brain.find_spec", lambda name: None)
        monkeypatch.setattr("bindllm.reasoning.flat._TRIED", 1)
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


def test_without_llguidance_calls_of_flat_schemas_are_valid(model, monkeypatch):
    monkeypatch.setattr("bindllm.reasoning.flat._TRIED", 1)
    functions = [one.for_openai({"image1": IMAGE})["function"] for one in (look, calculate, optional)]
    pattern = calls_pattern(OWN_FORM, functions, required=False, most=2)
    ids = model.tokenizer("")["input_ids"]
    masker = FlatMasker(pattern, model.tokenizer, len(ids), [model.tokenizer.eos_token_id], lambda ids: False)
    look_at = '{"name": "look", "arguments": {"image": "%s", "side": "left"}}'
    add = '{"name": "calculate", "arguments": {"operation": "add", "a": %s, "b": "result1"}}'
    other = '{"name": "optional", "arguments": {%s}}'
    good = [
        "Two cats.",
        "I look.\nCall: " + look_at % "image1",
        f"Call: {look_at % 'result12'}\nCall: {add % '-1.5'}",
        *(f"Call: {other % text}" for text in ("", '"b": true', '"a": ["x", "\\n"], "b": false', '"a": []')),
    ]
    bad = [
        "Call: me",
        "Call: " + look_at % "image2",
        "Call: " + add % "01",
        "Call: " + add % '"one"',
        "Call: " + other % '"b": true, "a": []',
        "\n".join([f"Call: {add % 1}"] * 3),
    ]
    for text in [*good, *bad]:
        accepted, tokens = True, [*model.tokenizer(text)["input_ids"], model.tokenizer.eos_token_id]
        for at, token in enumerate(tokens):
            before, scores = torch.tensor([tokens[:at]], dtype=torch.long), torch.zeros(1, 259)
            # The token that is tried first.
            scores[0, token] = 1
            accepted = accepted and bool(masker(before, scores)[0, token] > -torch.inf)
        assert accepted == (text in good), text
    # A form without a mark: a brace starts a call.
    bare = CallForm("", "", "", ("name", "arguments"), ('{"name": "', '", "arguments": ', "}"), True)
    pattern = regex.compile(calls_pattern(bare, functions, required=False, most=2), regex.DOTALL)
    texts = ("Two {cats}", look_at % "image1", " {cats}", look_at % "image2")
    assert [pattern.fullmatch(text) is not None for text in texts] == [True, True, False, False]
    nested = Tool("nested", "", {"type": "object", "properties": {"a": {"type": "object"}}}, print)
    with pytest.raises(InputError, match="the tool nested has a parameter.*install llguidance"):
        calls_pattern(OWN_FORM, [nested.for_openai({})["function"]], required=True, most=1)


@tool
def optional(a: list[str] | None = None, b: bool = False) -> str:
    """Take what is given."""
    return f"{a} {b}"


class NamedColors(ColorEncoder):
    """Texts have the embedding of the color that they name."""

    modalities = ("image", "text")

    def prepare(self, media):
        if media.modality == "text":
            (value,) = (value for name, value in COLORS.items() if name in media.source)
            media = Media.image(np.full((24, 24, 3), value, np.uint8))
        return super().prepare(media)


def test_classify_and_retrieve_compare_embeddings(tmp_path):
    model = tiny_model(save_tiny_decoder(tmp_path), encoders=[NamedColors()])
    images = {name: Media.image(np.full((24, 24, 3), value, np.uint8)) for name, value in COLORS.items()}
    records = [Record((), name, "image", (f"a {name} square",)) for name in images]
    store = Datastore(
        model.encode([[one] for one in images.values()]), records, [NamedColors().fingerprint()]
    )
    tools = {one.name: one for one in model_tools(model, datastore=store)}
    assert [*tools] == ["describe", "ask", "count", "classify", "retrieve"]
    labels = ["blue", "a red thing", "green"]
    assert [tools["classify"](images[name], labels) for name in ("red", "green")] == ["a red thing", "green"]
    with pytest.raises(InputError, match="1 labels, expected at least 2"):
        tools["classify"](images["red"], ["red"])
    assert tools["retrieve"](images["blue"], 1) == ["a blue square"]
    assert len(tools["retrieve"](images["blue"], 20)) == len(images)
    for number in (0, 21):
        with pytest.raises(InputError, match="expected 1 to 20"):
            tools["retrieve"](images["blue"], number)
    with pytest.raises(StoreError, match="was built with the encoder"):
        model_tools(model, datastore=Datastore(torch.eye(4), records, ["f" * 64]))


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


def test_numbers_of_answers_are_read_whole():
    answers = (
        "thirty-two cats",
        "twenty one",
        "ninety",
        "1,200",
        "two hundred",
        "3.5",
        "The 3rd",
        "no",
        "\uff13",
    )
    assert [read_number(answer) for answer in answers] == [32, 21, 90, 1200, None, None, None, 0, 3]


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

    kind = _Constrained if bindllm.reasoning.brain.find_spec("llguidance") else FlatMasker
    constrained = kind.__call__
    monkeypatch.setattr(kind, "__call__", follow)
    assert ask(brain).calls == (("look", {"image": "image1", "side": "left"}),) * 2


def test_the_masker_ends_an_answer_that_no_token_can_continue(model):
    tokenizer = model.tokenizer
    end = tokenizer.eos_token_id
    # No token has this character, and no text has been written.
    masker = FlatMasker("\ufffe", tokenizer, 0, [end], lambda ids: False)
    scores = torch.zeros(1, len(tokenizer))
    masked = masker(torch.empty(1, 0, dtype=torch.long), scores)
    assert masked[0].isfinite().nonzero().flatten().tolist() == [end]
