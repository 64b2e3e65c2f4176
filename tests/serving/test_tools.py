"""Tools: forms of calls that chat templates write, required calls, calls in answers, and their results."""

import json

import pytest

from bindllm import Conversation, Message
from bindllm.conversation import render
from bindllm.errors import InputError
from bindllm.model.generation.calls import CallForm
from bindllm.model.generation.constraint import Grammars
from bindllm.serving.api.tools import CallReader, Tools
from bindllm.serving.engine import Engine
from serving_parts import FakeEngine, ask, client_of, image_part
from tiny import TEMPLATE, save_tiny_decoder, tiny_model, tiny_tokenizer

CHAT = "/v1/chat/completions"
HEAD = (
    "{% if tools %}<|im_start|>system\n{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}<|im_end|>\n{% endif %}"
    "{% for message in messages %}"
)
ASSISTANT = (
    "{% if message.tool_calls %}<|im_start|>assistant\n"
    "{% if message.content %}{{ message.content }}\n{% endif %}"
)
TAIL = (
    "<|im_end|>\n{% else %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
OBJECT = '{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}'
# As Qwen and Hermes, and as Llama 3: with one call only.
TAGS = (
    HEAD
    + ASSISTANT
    + "{% for call in message.tool_calls %}<tool_call>\n"
    + OBJECT
    + "\n</tool_call>{% if not loop.last %}{{ '\\n' }}{% endif %}{% endfor %}"
    + TAIL
)
BARE = (
    HEAD
    + ASSISTANT
    + "{% if message.tool_calls | length > 1 %}{{ raise_exception('one call only') }}{% endif %}"
    + "{% set call = message.tool_calls[0] %}"
    + OBJECT.replace('arguments":', 'parameters":')
    + TAIL
)
# As older templates of Hermes.
SWAPPED = TAGS.replace(
    OBJECT, '{ "arguments": {{ call.function.arguments | tojson }}, "name": "{{ call.function.name }}"}'
)
# Mistral's list after a control token, and OpenAI's arguments as a text.
CONTROL = TAGS.replace("<tool_call>", "<|im_start|>")
TEXT = TAGS.replace("arguments | tojson }}", "arguments | tojson | tojson }}")
# Without the calls.
SILENT = HEAD + TEMPLATE.partition("%}")[2]

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"$ref": "#/$defs/city"},
                "days": {"type": "integer", "minimum": 1, "maximum": 9},
            },
            "required": ["city", "days"],
            "additionalProperties": False,
            "$defs": {"city": {"enum": ["Köln", "Paris"]}},
        },
    },
}
CLOCK = {"type": "function", "function": {"name": "clock"}}
BOTH = [WEATHER, CLOCK]


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


def call_text(name, arguments, key="arguments") -> str:
    return f'{{"name": "{name}", "{key}": {arguments}}}'


CITY = '{"city": "Köln"}'
CALL = f"<tool_call>\n{call_text('weather', CITY)}\n</tool_call>"
CALL_2 = f"<tool_call>\n{call_text('clock', '{}')}\n</tool_call>"
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
    rest, calls = reader.end()
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
    rest, calls = reader.end()
    assert (given + rest, [call.name for call in calls]) == (content, names)


def words(text) -> tuple[str, ...]:
    return tuple(text[at : at + 5] for at in range(0, len(text), 5))


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
    assert request.grammar is None
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


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}])
@pytest.mark.parametrize("template", [TAGS, BARE, SWAPPED])
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


def test_the_grammar_lets_no_other_answer_pass(model):
    form = CallForm.of(model.tokenizer)
    grammars = Grammars(model)

    def passes(text, functions, several) -> bool:
        constraint = grammars.compile(
            form.grammar([tool["function"] for tool in functions], most=None if several else 1)
        )
        ids = model.tokenizer(text, add_special_tokens=False)["input_ids"]
        return constraint._matcher.try_consume_tokens(ids) == len(ids) and constraint._matcher.is_accepting()

    whole = CALL.replace('"Köln"', '"Köln", "days": 3')
    assert passes(whole, BOTH, False)
    assert passes(f"{whole}\n{CALL_2}", BOTH, True)
    assert not passes(f"{whole}\n{CALL_2}", BOTH, False)
    assert not passes(CALL, BOTH, True)
    assert not passes(whole, [CLOCK], True)
    assert not passes(f"Hi {whole}", BOTH, True)


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
    for conversation, words in (
        (Conversation(answered[:1], tools=[CLOCK]), "does not write the tool 'clock'"),
        (Conversation(answered), "does not write the tool calls of an answer"),
    ):
        with pytest.raises(InputError, match=words):
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
        ({"messages": TURNS[2:]}, "messages"),
        ({"messages": [TURNS[0], {**TURNS[1], "tool_calls": 5}, TURNS[2]]}, "messages"),
        ({"messages": [TURNS[0], {**TURNS[1], "content": [image_part()]}, TURNS[2]]}, "messages"),
        ({"messages": [*TURNS[:2], {**TURNS[2], "tool_call_id": ["call_1"]}]}, "messages"),
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
            "messages",
        ),
    ],
)
def test_tools_that_cannot_be_used_are_refused(model, fields, param):
    answer = client_of(model).post(CHAT, json={**ask(), **fields})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)


def test_a_schema_of_arguments_that_is_not_supported_is_named(model):
    tool = {"type": "function", "function": {"name": "f", "parameters": {"properties": {"a": {"not": {}}}}}}
    with Engine(model) as engine:
        answer = client_of(model, engine).post(CHAT, json=ask(tools=[tool], tool_choice="required"))
    assert answer.status_code == 400
    assert '"not"' in answer.json()["error"]["message"]
