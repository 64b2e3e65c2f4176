"""`/v1/responses` in its stateless form."""

import json

import pytest

from bindllm.model.generation.constraint import json_grammar
from serving_parts import FakeEngine, client_of, data_uri, png
from tiny import tiny_model

URL = "/v1/responses"


@pytest.fixture(scope="module")
def model(decoder):
    return tiny_model(decoder)


def events(answer) -> list[tuple[str, dict]]:
    found = []
    for block in answer.text.strip().split("\n\n"):
        name, data = block.split("\n")
        found.append((name.removeprefix("event: "), json.loads(data.removeprefix("data: "))))
    assert [data["sequence_number"] for _, data in found] == list(range(len(found)))
    assert all(name == data["type"] for name, data in found)
    return found


def test_a_response_holds_one_message(model):
    client = client_of(model)
    parts = [
        {"type": "input_image", "image_url": data_uri(png())},
        {"type": "input_text", "text": "What is it?"},
    ]
    body = {
        "input": [{"role": "user", "content": parts}],
        "instructions": "Be brief.",
        "max_output_tokens": 9,
    }
    answer = client.post(URL, json=body).json()
    (item,) = answer["output"]
    assert item["content"] == [
        {"type": "output_text", "text": "a red square", "annotations": [], "logprobs": []}
    ]
    assert (answer["object"], answer["status"], answer["usage"]["output_tokens"]) == (
        "response",
        "completed",
        3,
    )
    (request,) = client.engine.requests
    assert [message.role for message in request.conversation.messages] == ["system", "user"]
    assert request.max_tokens == 9


def test_a_cut_response_says_so(model):
    answer = client_of(model, FakeEngine(finish="length")).post(URL, json={"input": "Hi"}).json()
    assert (answer["status"], answer["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})


def test_a_schema_reaches_the_engine(model):
    client = client_of(model)
    schema = {"type": "array", "items": {"type": "integer"}}
    given = {"type": "json_schema", "name": "numbers", "schema": schema}
    answer = client.post(URL, json={"input": "Hi", "text": {"format": given}}).json()
    assert answer["text"]["format"] == given
    assert client.engine.requests[0].grammar == json_grammar(schema)


def test_the_events_of_a_stream(model):
    body = {"input": "Hi", "stream": True, "include": ["message.output_text.logprobs"], "top_logprobs": 1}
    names, data = zip(*events(client_of(model).post(URL, json=body)), strict=True)
    assert names == (
        *(
            "response.created",
            "response.in_progress",
            "response.output_item.added",
            "response.content_part.added",
        ),
        *(["response.output_text.delta"] * 3),
        *("response.output_text.done", "response.content_part.done", "response.output_item.done"),
        "response.completed",
    )
    assert "".join(one["delta"] for one in data[4:7]) == data[7]["text"] == "a red square"
    assert data[4]["logprobs"][0]["token"] == "a "
    assert data[-1]["response"]["output"][0] == data[-2]["item"]
    assert len(data[-2]["item"]["content"][0]["logprobs"]) == 3


def test_an_error_in_a_stream_is_its_last_event(model):
    answer = client_of(model, FakeEngine(error=RuntimeError("x"))).post(
        URL, json={"input": "Hi", "stream": True}
    )
    name, data = events(answer)[-1]
    assert (name, data["error"]["type"]) == ("error", "server_error")
    assert data["message"] == data["error"]["message"]


@pytest.mark.parametrize(
    "fields",
    [
        {"previous_response_id": "resp_1"},
        {"conversation": "conv_1"},
        {"background": True},
        {"text": {"format": {"type": "json_schema"}}},
        {"text": {"format": {"type": "grammar"}}},
        {"text": {"format": "json"}},
        {"presence_penalty": 1},
        {"response_format": {"type": "json_object"}},
        {"include": ["file_search_call.results"]},
        {"top_logprobs": 2},
        {"max_tokens": 5},
        {"n": 2},
        {
            "tools": [{"type": "function", "name": "f"}],
            "tool_choice": "none",
            "include": ["message.output_text.logprobs"],
        },
        {"input": []},
    ],
)
def test_what_would_change_the_answer_is_refused(model, fields):
    answer = client_of(model).post(URL, json={"input": "Hi", **fields})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, [*fields][-1])
