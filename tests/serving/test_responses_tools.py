"""Tools of `/v1/responses`: calls and their results are items of their own."""

import json

import pytest
from test_responses_endpoint import URL, events

from bindllm.serving.engine import Engine
from serving_parts import FakeEngine, client_of
from tiny import save_tiny_decoder, tiny_model
from tool_parts import CALL, CALL_2, CLOCK, TAGS, WEATHER, words

TOOLS = [{"type": "function", "strict": True, **tool["function"]} for tool in (WEATHER, CLOCK)]
ITEMS = [
    {"role": "user", "content": "Weather?"},
    {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "Wait."}]},
    {
        "type": "function_call",
        "id": "fc_1",
        "call_id": "call_1",
        "name": "weather",
        "arguments": '{"city": "Köln"}',
    },
    {"type": "function_call", "call_id": "call_2", "name": "clock", "arguments": "{}", "status": "completed"},
    {"type": "function_call_output", "call_id": "call_1", "output": "rain"},
    {"type": "function_call_output", "call_id": "call_2", "output": [{"type": "input_text", "text": "noon"}]},
]


@pytest.fixture(scope="module")
def model(decoder):
    model = tiny_model(decoder)
    model.tokenizer.chat_template = TAGS
    return model


def test_calls_are_items_after_the_text(model):
    engine = FakeEngine(words(f"Wait. {CALL}\n{CALL_2}"))
    answer = client_of(model, engine).post(URL, json={"input": "?", "tools": TOOLS}).json()
    message, first, second = answer["output"]
    assert (answer["status"], message["content"][0]["text"]) == ("completed", "Wait.")
    assert (first["type"], first["name"], json.loads(first["arguments"])) == (
        "function_call",
        "weather",
        {"city": "Köln"},
    )
    assert (second["name"], second["arguments"], second["status"]) == ("clock", "{}", "completed")
    assert len({item[key] for item in (first, second) for key in ("id", "call_id")}) == 4
    assert (answer["tool_choice"], answer["parallel_tool_calls"], answer["tools"][1]["name"]) == (
        "auto",
        True,
        "clock",
    )
    # The model reads the description, and no setting of the API.
    (request,) = engine.requests
    assert request.conversation.tools == (WEATHER, CLOCK)
    only = client_of(model, FakeEngine(words(CALL))).post(URL, json={"input": "?", "tools": TOOLS}).json()
    assert [item["type"] for item in only["output"]] == ["function_call"]
    none = {"input": "?", "tools": TOOLS, "tool_choice": "none"}
    assert client_of(model).post(URL, json=none).json()["output"][0]["type"] == "message"


def test_calls_and_results_come_back_as_items(model):
    client = client_of(model)
    assert (
        client.post(URL, json={"input": ITEMS, "tools": TOOLS, "instructions": "Be brief."}).status_code
        == 200
    )
    (request,) = client.engine.requests
    messages = request.conversation.messages
    assert [message.role for message in messages] == ["system", "user", "assistant", "tool", "tool"]
    assert messages[2].text == "Wait."
    assert [call["function"]["name"] for call in messages[2].fields["tool_calls"]] == ["weather", "clock"]
    assert messages[2].fields["tool_calls"][0]["function"]["arguments"] == {"city": "Köln"}
    assert [(message.fields["name"], message.text) for message in messages[3:]] == [
        ("weather", "rain"),
        ("clock", "noon"),
    ]
    # The same without a text before the calls, as an answer of this server that only calls.
    assert client.post(URL, json={"input": [ITEMS[0], *ITEMS[2:]], "tools": TOOLS}).status_code == 200
    assert client.engine.requests[1].conversation.messages[1].text == ""


@pytest.mark.parametrize("text", ["Wait. ", ""])
def test_the_events_of_calls(model, text):
    engine = FakeEngine(words(f"{text}{CALL}\n{CALL_2}"))
    answer = client_of(model, engine).post(URL, json={"input": "?", "tools": TOOLS, "stream": True})
    found = [(name.removeprefix("response."), data) for name, data in events(answer)]
    first = len(text) > 0
    message = ["output_item.added", "content_part.added", "output_text.delta"]
    message += ["output_text.done", "content_part.done", "output_item.done"]
    calls = [
        "output_item.added",
        "function_call_arguments.delta",
        "function_call_arguments.done",
        "output_item.done",
    ]
    names = [name for name, _ in found]
    assert names == ["created", "in_progress", *(message if first else []), *calls, *calls, "completed"]
    output = found[-1][1]["response"]["output"]
    assert [data["item"] for name, data in found if name == "output_item.done"] == output
    for index, item in enumerate(output[first:], first):
        own = [data for _, data in found if data.get("output_index") == index]
        assert own[0]["item"] == {**item, "arguments": "", "status": "in_progress"}
        assert own[1]["delta"] == own[2]["arguments"] == item["arguments"]
        assert own[1]["item_id"] == own[2]["item_id"] == item["id"]


@pytest.mark.parametrize("choice", ["required", {"type": "function", "name": "weather"}])
def test_a_required_call_reaches_the_engine(tmp_path, choice):
    model = tiny_model(save_tiny_decoder(tmp_path, max_position_embeddings=2048))
    model.tokenizer.chat_template = TAGS
    body = {
        "input": "?",
        "tools": TOOLS[:1],
        "tool_choice": choice,
        "max_output_tokens": 260,
        "parallel_tool_calls": False,
    }
    with Engine(model, slots=2) as engine:
        answer = client_of(model, engine).post(URL, json=body).json()
    (call,) = answer["output"]
    assert json.loads(call["arguments"])["city"] in ("Köln", "Paris")
    assert answer["tool_choice"] == choice


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"tools": [WEATHER]}, "tools[0].name"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "name": "shell"}}, "tool_choice"),
        ({"tools": TOOLS, "text": {"format": {"type": "json_object"}}}, "tools"),
        ({"tools": TOOLS, "include": ["message.output_text.logprobs"]}, "include"),
        ({"input": [ITEMS[0], ITEMS[4]]}, "input[1]"),
        ({"input": [*ITEMS[:3], {**ITEMS[4], "output": None}]}, "input[3]"),
        ({"input": [ITEMS[0], {**ITEMS[2], "arguments": "[1]"}, ITEMS[4]]}, "input[1]"),
        ({"input": [ITEMS[0], {**ITEMS[2], "call_id": None}, ITEMS[4]]}, "input[1]"),
        ({"input": [ITEMS[0], {"type": "reasoning", "summary": []}]}, "input[1]"),
        ({"input": [ITEMS[0], {"role": "assistant", "tool_calls": 5}, ITEMS[2]]}, "input[1]"),
        ({"input": ITEMS[:3]}, "input"),
    ],
)
def test_tools_and_items_that_cannot_be_used_are_refused(model, fields, param):
    answer = client_of(model).post(URL, json={"input": "?", **fields})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param), answer.text


def test_the_form_of_a_template_counts_here_too(decoder):
    answer = client_of(tiny_model(decoder)).post(URL, json={"input": "?", "tools": TOOLS})
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "unsupported_parameter")
