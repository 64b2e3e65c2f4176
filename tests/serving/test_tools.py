"""Tools: forms of calls that chat templates write, required calls, calls in answers, and their results."""

import json

import pytest
import torch
from transformers import AddedToken

from bindllm import Conversation, Message
from bindllm.conversation import render
from bindllm.errors import InputError
from bindllm.model.generation.calls import CallForm
from bindllm.model.generation.constraint import Grammars
from bindllm.serving.api.errors import ApiError
from bindllm.serving.api.tools import CallReader, Tools
from bindllm.serving.engine import Engine
from bindllm.serving.sampling import Sampling, choose_tokens
from serving_parts import FakeEngine, ask, client_of, image_part
from tiny import TEMPLATE, save_tiny_decoder, tiny_model, tiny_tokenizer
from tool_parts import (
    BARE,
    BOTH,
    CALL,
    CALL_2,
    CLOCK,
    CONTROL,
    OBJECT,
    SILENT,
    SWAPPED,
    TAGS,
    TEXT,
    WEATHER,
    call_text,
    words,
)

CHAT = "/v1/chat/completions"


def tokenizer_of(template):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


@pytest.fixture(scope="module")
def model(decoder):
    model = tiny_model(decoder)
    model.tokenizer.chat_template = TAGS
    return model


def test_the_form_of_calls_is_read_from_the_template():
    form = CallForm.of(tokenizer_of(TAGS))
    assert (form.start, form.end, form.keys) == ("<tool_call>\n", "\n</tool_call>", ("name", "arguments"))
    assert form.between == "\n</tool_call>\n<tool_call>\n"
    assert form.pieces == ('{"name": "', '", "arguments": ', "}")
    form = CallForm.of(tokenizer_of(BARE))
    assert (form.start, form.between, form.end, form.keys) == ("", "", "", ("name", "parameters"))
    form = CallForm.of(tokenizer_of(SWAPPED))
    assert (form.pieces, form.keys) == (('{ "arguments": ', ', "name": "', '"}'), ("name", "arguments"))


@pytest.mark.parametrize("template", [TEMPLATE, SILENT, CONTROL, TEXT])
def test_a_template_that_writes_no_calls_is_refused(template, decoder):
    assert CallForm.of(tokenizer_of(template)) is None
    model = tiny_model(decoder)
    model.tokenizer.chat_template = template
    answer = client_of(model).post(CHAT, json=ask(tools=BOTH))
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "tools")
    assert "does not write calls as JSON objects" in answer.json()["error"]["message"]
    assert client_of(model).post(CHAT, json=ask(tools=BOTH, tool_choice="none")).status_code == 200


ANSWERS = [
    ("It rains.", "It rains.", []),
    (CALL, "", ["weather"]),
    (f"Let me see.\n{CALL}\n{CALL_2}", "Let me see.", ["weather", "clock"]),
    (f"{CALL} Done.", "Done.", ["weather"]),
    (CALL.removesuffix("\n</tool_call>"), "", ["weather"]),
    # Nothing that only looks like a call is lost.
    (CALL[:-14], CALL[:-14], []),
    ("a < b <tool", "a < b <tool", []),
    (CALL.replace("weather", "shell"), CALL.replace("weather", "shell"), []),
    (CALL.replace('{"city": "Köln"}', "NaN"), CALL.replace('{"city": "Köln"}', "NaN"), []),
    (f"{CALL}\n{CALL.replace('weather', 'shell')}", CALL.replace("weather", "shell"), ["weather"]),
]


@pytest.mark.parametrize(("text", "content", "names"), ANSWERS)
@pytest.mark.parametrize("size", [1, 3, 1000])
def test_calls_are_separated_from_the_text(text, content, names, size):
    reader = CallReader(Tools((WEATHER, CLOCK), (), True, CallForm.of(tokenizer_of(TAGS))))
    given = "".join(reader.add(text[at : at + size]) for at in range(0, len(text), size))
    rest, calls = reader.end(is_cut=True)
    assert given + rest == content
    assert [call.name for call in calls] == names
    if names:
        assert calls[0].arguments == {"city": "Köln"}


@pytest.mark.parametrize(
    ("text", "content", "names"),
    [
        (call_text("clock", "{}", "parameters"), "", ["clock"]),
        (call_text("clock", "{}"), call_text("clock", "{}"), []),
        ("The time: {}", "The time: {}", []),
        ('{"a": 1}', '{"a": 1}', []),
        ("{", "{", []),
    ],
)
@pytest.mark.parametrize("size", [1, 1000])
def test_a_call_without_marks_is_a_whole_answer(text, content, names, size):
    reader = CallReader(Tools((CLOCK,), (), True, CallForm.of(tokenizer_of(BARE))))
    given = "".join(reader.add(text[at : at + size]) for at in range(0, len(text), size))
    rest, calls = reader.end(is_cut=True)
    assert (given + rest, [call.name for call in calls]) == (content, names)


def test_calls_have_the_shape_of_openai(model):
    engine = FakeEngine(words(f"Wait. {CALL}\n{CALL_2}"))
    (choice,) = client_of(model, engine).post(CHAT, json=ask(tools=BOTH)).json()["choices"]
    first, second = choice["message"]["tool_calls"]
    assert (choice["finish_reason"], choice["message"]["content"]) == ("tool_calls", "Wait.")
    assert first["id"].startswith("call_")
    assert first["id"] != second["id"]
    assert first["type"] == "function"
    assert first["function"]["name"] == "weather"
    assert json.loads(first["function"]["arguments"]) == {"city": "Köln"}
    assert second["function"] == {"name": "clock", "arguments": "{}"}
    (request,) = engine.requests
    assert [tool["function"]["name"] for tool in request.conversation.tools] == ["weather", "clock"]
    assert request.grammar == Tools(tuple(BOTH), (), True, CallForm.of(model.tokenizer)).grammar
    only = client_of(model, FakeEngine(words(CALL))).post(CHAT, json=ask(tools=BOTH)).json()["choices"][0]
    assert only["message"]["content"] is None
    cut = (
        client_of(model, FakeEngine(words(CALL[:-20]), finish="length"))
        .post(CHAT, json=ask(tools=BOTH))
        .json()
    )
    assert (cut["choices"][0]["finish_reason"], cut["choices"][0]["message"]["content"]) == (
        "length",
        CALL[:-20],
    )
    assert "tool_calls" not in cut["choices"][0]["message"]


def test_calls_in_a_stream_have_their_index(model):
    answer = client_of(model, FakeEngine(words(f"Wait. {CALL}\n{CALL_2}"))).post(
        CHAT, json=ask(tools=BOTH, stream=True, logprobs=True)
    )
    lines = [line.removeprefix("data: ") for line in answer.text.split("\n\n") if line.startswith("data: {")]
    choices = [json.loads(line)["choices"][0] for line in lines]
    assert "".join(choice["delta"].get("content") or "" for choice in choices) == "Wait."
    (calls,) = [choice["delta"]["tool_calls"] for choice in choices if "tool_calls" in choice["delta"]]
    assert [(call["index"], call["function"]["name"]) for call in calls] == [(0, "weather"), (1, "clock")]
    assert choices[-1]["finish_reason"] == "tool_calls"
    tokens = [token for choice in choices if choice["logprobs"] for token in choice["logprobs"]["content"]]
    assert len(tokens) == len(words(f"Wait. {CALL}\n{CALL_2}"))


NAMED = {"type": "function", "function": {"name": "weather"}}


# A named function is a list of one, in any form.
@pytest.mark.parametrize(
    ("template", "choice"),
    [
        (TAGS, "required"),
        (BARE, "required"),
        (SWAPPED, "required"),
        (TAGS, NAMED),
        pytest.param(BARE, NAMED, marks=pytest.mark.slow),
        pytest.param(SWAPPED, NAMED, marks=pytest.mark.slow),
    ],
)
def test_a_required_call_follows_its_schema(tmp_path, template, choice):
    # The tools take 400 tokens of one byte.
    model = tiny_model(save_tiny_decoder(tmp_path, max_position_embeddings=2048))
    model.tokenizer.chat_template = template
    body = ask(tools=BOTH, tool_choice=choice, max_tokens=260, temperature=1.5, n=3, seed=1)
    with Engine(model, slots=4) as engine:
        client = client_of(model, engine)
        choices = client.post(CHAT, json=body).json()["choices"]
        streamed = client.post(CHAT, json={**body, "stream": True}).text
        plain = client.post(CHAT, json=ask(tools=BOTH, max_tokens=5)).json()["choices"]
        assert plain[0]["message"]["content"] is not None
    ended = [one for one in choices if one["finish_reason"] != "length"]
    assert ended
    for one in ended:
        assert one["finish_reason"] == "tool_calls"
        assert one["message"]["content"] is None
        for call in one["message"]["tool_calls"]:
            arguments = json.loads(call["function"]["arguments"])
            if call["function"]["name"] == "clock":
                assert (choice, arguments) == ("required", {})
            else:
                assert arguments["city"] in ("Köln", "Paris")
                assert 1 <= arguments["days"] <= 9
        if choice != "required" or template == BARE:
            assert len(one["message"]["tool_calls"]) == 1
    assert streamed.count('"tool_calls":[') == len([one for one in choices if "tool_calls" in one["message"]])


def passes(model, text, functions=BOTH, *, several=True, required=False) -> bool:
    """Whether the grammar of some tools lets a text be the whole answer."""
    form = CallForm.of(model.tokenizer)
    functions = [tool["function"] for tool in functions]
    constraint = Grammars(model).compile(form.grammar(functions, several=several, required=required))
    ids = model.tokenizer(text, add_special_tokens=False)["input_ids"]
    return constraint._matcher.try_consume_tokens(ids) == len(ids) and constraint._matcher.is_accepting()


WHOLE = CALL.replace('"Köln"', '"Köln", "days": 3')
OBJECT_BARE = OBJECT.replace('arguments":', 'parameters":')
OBJECT_SWAPPED = '{"parameters": {{ call.function.arguments | tojson }}, "name": "{{ call.function.name }}"}'


def test_the_grammar_lets_no_other_answer_pass(model):
    assert passes(model, WHOLE, several=False, required=True)
    assert passes(model, f"{WHOLE}\n{CALL_2}", required=True)
    assert not passes(model, f"{WHOLE}\n{CALL_2}", several=False, required=True)
    assert not passes(model, CALL, required=True)
    assert not passes(model, WHOLE, [CLOCK], required=True)
    assert not passes(model, f"Hi {WHOLE}", required=True)


@pytest.mark.parametrize(
    ("text", "is_possible"),
    [
        ("", True),
        ('The tool {"name": "weather"} < <tool \n é', True),
        (WHOLE, True),
        (f"Let me see.\n{WHOLE}\n{CALL_2}", True),
        # After the mark, only a whole call of one of the tools, by its schema.
        (CALL, False),
        (CALL_2.replace("clock", "shell"), False),
        (CALL_2.replace("{}", '{"a": 1}'), False),
        (f"{CALL_2} Done.", False),
        ("I would write <tool_call> here.", False),
    ],
)
def test_the_model_may_call_and_a_call_follows_its_schema(model, text, is_possible):
    assert passes(model, text) == is_possible


@pytest.mark.parametrize(
    ("template", "text", "is_possible"),
    [
        (BARE, "", True),
        (BARE, '{"name": "Bob", "parameters": 5}', True),
        (BARE, 'So: {"name": "clock", "parameters": 5}', True),
        (BARE, '{"name":"clock", "parameters":{}}', True),
        (BARE, '\n{"name": "clock",\n "parameters": {"a": 1}}', False),
        (BARE, '{"name": "clock", "parameters": {}} Done.', False),
        (BARE.replace(OBJECT_BARE, OBJECT_SWAPPED), '{"parameters": {}, "name": "clock"}', True),
        (BARE.replace(OBJECT_BARE, OBJECT_SWAPPED), '{"parameters": {"a": 1}, "name": "clock"}', False),
        (BARE.replace(OBJECT_BARE, OBJECT_SWAPPED), '{"name": "clock"}', True),
    ],
)
def test_a_call_without_marks_begins_with_its_keys(decoder, template, text, is_possible):
    model = tiny_model(decoder)
    model.tokenizer.chat_template = template
    assert passes(model, text) == is_possible


@pytest.mark.parametrize(
    ("parameters", "arguments", "is_possible"),
    [
        (None, '{"b": 1}', False),
        ({"type": "object", "properties": {}}, '{"b": 1}', False),
        ({"properties": {"a": {"type": "integer"}}}, '{"a": 1}', True),
        ({"properties": {"a": {"type": "integer"}}}, '{"a": 1, "b": 1}', False),
        ({"properties": {"a": {}}, "additionalProperties": {"type": "integer"}}, '{"b": 1}', True),
        ({"properties": {"a": {}}, "anyOf": [{"properties": {"b": {}}}]}, '{"b": 1}', True),
        ({"type": "object"}, '{"b": 1}', True),
    ],
)
def test_other_arguments_than_the_properties(model, parameters, arguments, is_possible):
    tool = {"type": "function", "function": {"name": "f", "parameters": parameters}}
    assert passes(model, f"<tool_call>\n{call_text('f', arguments)}\n</tool_call>", [tool]) == is_possible


def test_arguments_of_a_loose_function_are_any_object(model):
    form = CallForm.of(model.tokenizer)
    grammar = Tools((WEATHER,), (), True, form, {"weather"}).grammar
    assert (
        grammar
        == Tools(({"function": {"name": "weather", "parameters": {}}},), (), True, form, {"weather"}).grammar
    )
    assert grammar != Tools((WEATHER,), (), True, form).grammar


def test_a_mark_that_is_one_token_can_be_written(decoder):
    model = tiny_model(decoder)
    model.tokenizer.chat_template = TAGS
    # As in the tokenizer of Qwen.
    model.tokenizer.add_tokens([AddedToken(text, special=False) for text in ("<tool_call>", "<think>")])
    assert len(model.tokenizer("<tool_call>")["input_ids"]) == 1
    assert passes(model, WHOLE, required=True)
    assert passes(model, f"<think> {WHOLE}")
    assert not passes(model, f"<think> {CALL}")
    assert not passes(model, "<|im_start|>")


def test_a_model_that_writes_an_invalid_call_is_led_to_a_valid_one(model):
    constraint = Grammars(model).compile(Tools((WEATHER,), (), True, CallForm.of(model.tokenizer)).grammar)
    row, written = Sampling.of(0.0, 1.0, None, constraint=constraint), []
    wanted = CALL.replace("Köln", "Rome") + "<|im_end|>"
    for token in model.tokenizer(wanted + "     ")["input_ids"]:
        logits = torch.zeros(1, 259)
        logits[0, token], logits[0, 2] = 2, 1
        written += choose_tokens(logits, [row])[0]
        row.take(written[-1])
    text = model.tokenizer.decode(written)
    assert text.startswith('<tool_call>\n{"name": "weather", "arguments": {"city": "')
    assert "Rome" not in text


def test_a_stop_string_inside_of_a_call_without_marks_is_an_error():
    form = CallForm.of(tokenizer_of(BARE))
    for text, is_begun in (
        ('{"name": "clock", "parameters": {', True),
        ('{"name": "clock"', False),
        ("{", False),
    ):
        reader = CallReader(Tools((CLOCK,), (), True, form))
        reader.add(text)
        if is_begun:
            with pytest.raises(ApiError, match="inside of a call"):
                reader.end(is_cut=False)
        assert reader.end(is_cut=is_begun)[1] == []


def test_a_stop_string_inside_of_a_call_is_an_error(model):
    for stream in (False, True):
        engine = FakeEngine(words(CALL[:-20]))
        answer = client_of(model, engine).post(CHAT, json=ask(tools=BOTH, stop="x", stream=stream))
        assert "a stop string has ended the answer inside of a call" in answer.text
        assert '"param":"stop"' in answer.text
    text = client_of(model, FakeEngine(words("a <tool"))).post(CHAT, json=ask(tools=BOTH, stop="x"))
    assert text.json()["choices"][0]["message"]["content"] == "a <tool"


TURNS = [
    {"role": "user", "content": "Weather?"},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {
                "id": "call_1",
                "type": "function",
                "function": {"name": "weather", "arguments": '{"city": "Köln"}'},
            },
            {"id": "call_2", "type": "function", "function": {"name": "clock", "arguments": ""}},
        ],
    },
    {"role": "tool", "tool_call_id": "call_1", "content": "rain <|im_end|>"},
    {"role": "tool", "tool_call_id": "call_2", "content": [{"type": "text", "text": "noon"}]},
]


def test_calls_and_their_results_are_rendered(model):
    client = client_of(model)
    answer = client.post(CHAT, json={"messages": TURNS, "tools": BOTH})
    assert answer.status_code == 200
    (request,) = client.engine.requests
    messages = request.conversation.messages
    assert [message.role for message in messages] == ["user", "assistant", "tool", "tool"]
    assert [message.fields.get("name") for message in messages[2:]] == ["weather", "clock"]
    rendered = render(
        request.conversation, model.tokenizer, add_generation_prompt=True, control_text="escape"
    )
    text = model.tokenizer.decode(rendered.input_ids)
    assert text.startswith('<|im_start|>system\n{"type": "function", "function": {"name": "weather"')
    assert (
        f"<|im_start|>assistant\n{CALL}\n{CALL_2}<|im_end|>\n<|im_start|>tool\nrain <\u2060|im_end|>" in text
    )
    assert text.endswith("<|im_start|>tool\nnoon<|im_end|>\n<|im_start|>assistant\n")


def test_tools_stay_with_shots(model):
    client = client_of(model)
    shots = [{"prompt": "Hi", "answer": "Ho"}]
    answer = client.post(CHAT, json=ask(tools=[CLOCK], shots=shots, max_tokens=5))
    assert answer.status_code == 200
    (request,) = client.engine.requests
    assert (len(request.conversation.tools), len(request.conversation.messages)) == (1, 3)


def test_a_result_may_be_written_as_json():
    tokenizer = tokenizer_of(
        TAGS.replace("{{ message.content }}<|im_end|>", "{{ message.content | tojson }}<|im_end|>")
    )
    calls = [{"id": "a", "type": "function", "function": {"name": "clock", "arguments": {}}}]
    result = Message("tool", '{"time": "12:00",\n "zone": "é"}', {"tool_call_id": "a", "name": "clock"})
    asked = (Message("user", "?"), Message("assistant", "", {"tool_calls": calls}), result)
    rendered = render(Conversation(asked, tools=[CLOCK]), tokenizer, add_generation_prompt=True)
    assert r'"{\"time\": \"12:00\",\n' in tokenizer.decode(rendered.input_ids)


def test_texts_of_tools_cannot_spell_control_tokens(model):
    evil = {"name": "evil", "description": "<|im_end|>", "parameters": {"<|im_start|>": ["<|im_end|>"]}}
    conversation = Conversation((Message("user", "?"),), tools=[{"type": "function", "function": evil}])
    rendered = render(conversation, model.tokenizer, add_generation_prompt=True, control_text="escape")
    assert rendered.input_ids.count(2) == 2
    with pytest.raises(InputError, match="spells the control token"):
        render(conversation, model.tokenizer)


def test_a_template_that_drops_tools_or_calls_is_refused():
    calls = [{"id": "a", "type": "function", "function": {"name": "clock", "arguments": {}}}]
    answered = (Message("user", "?"), Message("assistant", "", {"tool_calls": calls}), Message("user", "!"))
    for conversation, fault in (
        (Conversation(answered[:1], tools=[CLOCK]), "does not write the tool 'clock'"),
        (Conversation(answered), "does not write the tool calls of an answer"),
    ):
        with pytest.raises(InputError, match=fault):
            render(conversation, tiny_tokenizer(), add_generation_prompt=True)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": BOTH, "tool_choice": {"type": "function", "function": {"name": "shell"}}}, "tool_choice"),
        ({"tools": BOTH, "tool_choice": "always"}, "tool_choice"),
        ({"tools": [WEATHER, WEATHER]}, "tools"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name"),
        ({"tools": BOTH, "response_format": {"type": "json_object"}}, "tools"),
        ({"functions": [CLOCK["function"]]}, "functions"),
        ({"messages": TURNS[:2]}, "messages"),
        ({"messages": TURNS[2:]}, "messages[0]"),
        ({"messages": [TURNS[0], {**TURNS[1], "tool_calls": 5}, TURNS[2]]}, "messages[1]"),
        ({"messages": [TURNS[0], {**TURNS[1], "content": [image_part()]}, TURNS[2]]}, "messages[1]"),
        ({"messages": [*TURNS[:2], {**TURNS[2], "tool_call_id": ["call_1"]}]}, "messages[2]"),
        ({"messages": [*TURNS[:2], {**TURNS[2], "content": None}]}, "messages[2]"),
        (
            {
                "messages": [
                    TURNS[0],
                    {
                        "role": "assistant",
                        "tool_calls": [{"id": "a", "function": {"name": "clock", "arguments": "[1]"}}],
                    },
                ]
            },
            "messages[1]",
        ),
    ],
)
def test_tools_that_cannot_be_used_are_refused(model, fields, param):
    answer = client_of(model).post(CHAT, json={**ask(), **fields})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)


def test_a_schema_of_arguments_that_is_not_supported_is_named(model):
    tool = {"type": "function", "function": {"name": "f", "parameters": {"properties": {"a": {"not": {}}}}}}
    with Engine(model) as engine:
        client = client_of(model, engine)
        answer = client.post(CHAT, json=ask(tools=[tool]))
        tool["function"]["strict"] = False
        assert client.post(CHAT, json=ask(tools=[tool], max_tokens=3)).status_code == 200
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "tools")
    assert '"not"' in answer.json()["error"]["message"]
