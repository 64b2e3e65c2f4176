"""`/v1/chat/completions`: fields, content parts, streams, and refusals."""

import functools
import json
import threading

import pytest

from bindllm.errors import MediaError
from bindllm.media import Media
from bindllm.model.generation.constraint import json_grammar
from bindllm.serving.api import chat, content
from bindllm.serving.fetch import FetchConfig
from serving_parts import FakeEngine, ask, client_of, data_uri, image_part, png
from tiny import tiny_model

CHAT = "/v1/chat/completions"
# Deeper than programs that read it can follow.
DEEP = {"a": functools.reduce(lambda inner, _: {"anyOf": [inner]}, range(40), {})}


@pytest.fixture(scope="module")
def model(decoder):
    return tiny_model(decoder)


def events(answer) -> list:
    """The objects of a stream; the last event must be [DONE]."""
    lines = [line.removeprefix("data: ") for line in answer.text.split("\n\n") if line.startswith("data: ")]
    assert lines.pop() == "[DONE]"
    return [json.loads(line) for line in lines]


def test_an_answer_has_the_shape_of_openai(model):
    client = client_of(model)
    answer = client.post(CHAT, json=ask(image_part()))
    assert answer.status_code == 200
    body = answer.json()
    assert body["id"].startswith("chatcmpl-")
    assert (body["object"], body["model"]) == ("chat.completion", "tiny")
    assert body["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "a red square", "refusal": None},
            "logprobs": None,
            "finish_reason": "stop",
        }
    ]
    assert body["usage"] == {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10}
    (request,) = client.engine.requests
    (message,) = request.conversation.messages
    assert (message.media[0].source, message.text) == (png(), "What is it?")
    assert (request.max_tokens, request.temperature, request.top_p) == (None, 0.0, 1.0)
    assert 200 < request.timeout < 300


def test_a_stream_ends_with_usage_and_done(model):
    body = ask(stream=True, stream_options={"include_usage": True})
    answer = client_of(model).post(CHAT, json=body)
    assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
    first, *middle, last = events(answer)
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": "", "refusal": None}
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in middle) == "a red square"
    assert [chunk["choices"][0]["finish_reason"] for chunk in middle] == [None, None, None, "stop"]
    assert (last["choices"], last["usage"]["total_tokens"]) == ([], 10)
    assert all(chunk["usage"] is None for chunk in (first, *middle))
    assert len({(chunk["id"], chunk["created"]) for chunk in (first, *middle, last)}) == 1


def test_open_webui_reads_models_and_streams(model):
    """The requests of its backend: headers and body of a chat, and of a title that it asks for."""
    client, url = client_of(model), "https://raw.example.com/cat.png"
    headers = {"authorization": "Bearer ", "content-type": "application/json", "x-openwebui-user-name": "A"}
    (entry,) = client.get("/v1/models", headers=headers).json()["data"]
    part = {**image_part(), "cache_control": {"type": "ephemeral"}}
    system = {"role": "system", "content": "Be brief."}
    body = ask(
        part, stream=True, stream_options={"include_usage": True}, temperature=0.8, reasoning_effort="low"
    )
    body |= {"model": entry["id"], "messages": [system, *body["messages"]]}
    *chunks, last = events(client.post(CHAT, json=body, headers=headers))
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks) == "a red square"
    assert (last["choices"], last["usage"]["completion_tokens"]) == ([], 3)
    title = ask(stream=False, max_completion_tokens=1000)
    answer = client.post(CHAT, json=title, headers=headers)
    assert answer.json()["choices"][0]["message"]["content"] == "a red square"
    # An image that it links to is not lost without a word.
    linked = client.post(CHAT, json=ask({"type": "image_url", "image_url": {"url": url}}), headers=headers)
    assert "does not download" in linked.json()["error"]["message"]


def test_without_stream_options_no_chunk_has_usage(model):
    chunks = events(client_of(model).post(CHAT, json=ask(stream=True)))
    assert not [chunk for chunk in chunks if "usage" in chunk or not chunk["choices"]]


def test_fields_reach_the_engine(model):
    client = client_of(model)
    body = ask(
        **{"max_completion_tokens": 5, "temperature": 0.7, "top_p": 0.9, "seed": 3, "n": 2, "stop": "x"},
        **{"logprobs": True, "top_logprobs": 2, "user": "me", "metadata": {}, "store": True, "tools": []},
        **{"presence_penalty": 0, "logit_bias": {}, "response_format": {"type": "text"}, "unknown": 1},
    )
    answer = client.post(CHAT, json=body).json()
    (request,) = client.engine.requests
    assert (request.max_tokens, request.temperature, request.top_p, request.stop) == (5, 0.7, 0.9, ("x",))
    assert (request.seed, request.logprobs) == (3, 2)
    assert [choice["index"] for choice in answer["choices"]] == [0, 1]
    token = answer["choices"][1]["logprobs"]["content"][0]
    assert token["token"] == "a "
    assert token["bytes"] == [97, 32]
    assert token["top_logprobs"][1] == {"token": "x", "logprob": -1.5, "bytes": [120]}
    part = client_of(model, FakeEngine(("\ufffd",))).post(CHAT, json=ask(logprobs=True)).json()
    assert part["choices"][0]["logprobs"]["content"][0]["bytes"] is None


def test_penalties_and_formats_reach_the_engine(model):
    client = client_of(model)
    schema = {"type": "object", "properties": {"a": {"const": "é"}}}
    body = ask(
        **{"presence_penalty": 0.5, "frequency_penalty": -1, "logit_bias": {"12": -100, "7": 0.5}},
        response_format={
            "type": "json_schema",
            "json_schema": {"name": "a", "strict": True, "schema": schema},
        },
    )
    assert client.post(CHAT, json=body).status_code == 200
    assert client.post(CHAT, json=ask(response_format={"type": "json_object"})).status_code == 200
    first, second = client.engine.requests
    assert (first.presence_penalty, first.frequency_penalty) == (0.5, -1.0)
    assert first.logit_bias == {12: -100.0, 7: 0.5}
    assert first.grammar == json_grammar(schema)
    assert second.grammar == json_grammar({"type": "object"})


@pytest.mark.parametrize(
    ("fields", "temperature"), [({}, 0), ({"top_p": 0.5}, 1), ({"n": 2}, 1), ({"temperature": 0, "n": 2}, 0)]
)
def test_an_answer_is_greedy_unless_a_field_asks_for_sampling(model, fields, temperature):
    client = client_of(model)
    client.post(CHAT, json=ask(**fields))
    assert client.engine.requests[0].temperature == temperature


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [{"type": "function"}]}, "tools[0].function"),
        ({"response_format": {"type": "grammar"}}, "response_format"),
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": "{}"}}}, "response_format"),
        ({"response_format": "json"}, "response_format"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": DEEP}}}, "response_format"),
        ({"presence_penalty": 2.5}, "presence_penalty"),
        ({"frequency_penalty": -3}, "frequency_penalty"),
        ({"logit_bias": {"1": 101}}, "logit_bias"),
        ({"logit_bias": {"1.5": 5}}, "logit_bias"),
        ({"top_k": 5}, "top_k"),
        ({"min_p": False}, "min_p"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"temperature": 3}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 5, "max_completion_tokens": 6}, "max_tokens"),
        ({"n": 99}, "n"),
        ({"stop": [""]}, "stop[0]"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"messages": []}, "messages"),
        ({"messages": None}, "messages"),
        ({"messages": [{"role": "assistant", "content": "Hi"}]}, "messages"),
        ({"cache": True}, "cache"),
        ({"cache": {"place": "/etc"}}, "cache.place"),
        ({"seed": 2**63}, "seed"),
        ({"images": [data_uri(png())]}, "images"),
        ({"max_output_tokens": 5}, "max_output_tokens"),
        ({"stop_token_ids": [2]}, "stop_token_ids"),
        ({"messages": [{"role": "user", "content": "Hi", "images": [data_uri(png())]}]}, "messages[0]"),
    ],
)
def test_a_field_that_cannot_be_used_is_refused(model, fields, param):
    answer = client_of(model).post(CHAT, json={**ask(), **fields})
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert (error["type"], error["param"]) == ("invalid_request_error", param)
    assert error["message"]


@pytest.mark.parametrize(
    ("body", "key", "param"),
    [
        ('{"messages": [{"role": "user", "content": "a"}], "seed": 1, "seed": 2}', "seed", "seed"),
        ('{"messages": [{"role": "user", "content": "a", "content": "a"}]}', "content", "content"),
        ('{"messages": [], "a b\\n": 1, "a b\\n": 2}', "a b\\n", None),
    ],
)
def test_a_key_that_occurs_twice_is_refused(model, body, key, param):
    for url in (CHAT, "/v1/responses", "/v1/embeddings"):
        error = (
            client_of(model)
            .post(url, content=body, headers={"content-type": "application/json"})
            .json()["error"]
        )
        assert f"the key '{key}' occurs more than once" in error["message"]
        assert (error["param"], error["type"]) == (param, "invalid_request_error")


@pytest.mark.parametrize(
    ("part", "words"),
    [
        ({"type": "image_url", "image_url": {"url": "/etc/passwd"}}, "expected a data: URI"),
        ({"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}, "expected a data: URI"),
        ({"type": "image_url", "image_url": {"url": "http://localhost/a.png"}}, "does not download"),
        ({"type": "image_url", "image_url": {"path": "/etc/passwd"}}, "expected a data: URI"),
        ({"type": "image", "path": "/etc/passwd"}, "expected a data: URI"),
        ({"type": "image_url", "image_url": {"url": "data:image/png;base64,!!"}}, "not base64"),
        ({"type": "image_url", "image_url": {"url": "data:image/png;base64"}}, "no comma"),
        ({"type": "input_audio", "input_audio": {"data": "AAAA"}}, "does not serve audio, only image"),
        ({"type": "depth", "depth": data_uri(png())}, "does not serve depth, only image"),
        ({"type": "image"}, "has no image"),
        ({"type": "img_url"}, "unknown content part"),
        ({"type": "file", "file": {"file_id": "file-1"}}, "file_id"),
        ({"type": "file", "file": {"file_data": "data:application/pdf;base64,AAAA"}}, "any modality"),
        ({"type": "text", "text": "half \ud800"}, "not valid Unicode"),
        ({"text": "What?", "image": data_uri(png())}, "has image and text; give each"),
        ({**image_part(), "type": "text", "text": "What?"}, "has image_url and text; give each"),
        ({**image_part(), "url": data_uri(png())}, "has image_url and url; give each"),
        (
            {"type": "image_url", "image_url": {"url": "data:,a", "data": "YQ=="}},
            "has data and url; give each",
        ),
        ({**image_part(), "weight": 0.5}, "does not support weight of a part"),
        ({"type": "video_url", "video_url": {"url": "data:,a", "fps": 1}}, "does not support fps of a part"),
        ({"type": "file", "file": {"file_data": data_uri(png())}, "text": "What?"}, "has file and text"),
    ],
)
def test_a_content_part_that_cannot_be_used_is_refused(model, part, words):
    # By hand, since httpx cannot write half of a surrogate pair.
    body = json.dumps(ask(part))
    answer = client_of(model).post(CHAT, content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 400
    assert words in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image_url", "image_url": data_uri(png())},
        {"type": "input_image", "image_url": data_uri(png())},
        {"type": "file", "file": {"file_data": data_uri(png()), "filename": "a"}},
        {"type": "file", "file": {"file_data": data_uri(png()).partition(",")[2], "filename": "a.PNG"}},
        {"type": "image", "image": data_uri(png()).replace("+", "%2B")},
    ],
)
def test_spellings_of_an_image(model, part):
    client = client_of(model)
    assert client.post(CHAT, json=ask(part)).status_code == 200
    (message,) = client.engine.requests[0].conversation.messages
    assert message.media == (Media.image(png()),)


def test_a_placeholder_in_a_text_is_a_word(model):
    client = client_of(model)
    client.post(
        CHAT, json={"messages": [{"role": "developer", "content": "Be brief."}, *ask("<image>")["messages"]]}
    )
    system, user = client.engine.requests[0].conversation.messages
    assert (system.role, user.text) == ("system", "<image>\nWhat is it?")


def test_shots_stand_before_the_question(model):
    client = client_of(model)
    shots = [{"prompt": [image_part()], "answer": "red"}, {"prompt": "And this?", "answer": "blue"}]
    assert client.post(CHAT, json=ask(shots=shots)).status_code == 200
    conversation = client.engine.requests[0].conversation
    assert conversation.examples == 2
    assert [message.text for message in conversation.messages] == [
        "",
        "red",
        "And this?",
        "blue",
        "What is it?",
    ]
    long = [{"prompt": "x" * 400, "answer": "y"}]
    assert "0 of 1 shots fit" in client.post(CHAT, json=ask(shots=long)).json()["error"]["message"]


BAD_URI = {"type": "image_url", "image_url": {"url": "data:image/png;base64,!"}}


@pytest.mark.parametrize(
    ("path", "body", "param", "name"),
    [
        (CHAT, ask(image_part(), BAD_URI), "messages[0].content[1]", " (image_url): a data: URI"),
        (CHAT, ask({"type": "<b>"}), "messages[0].content[0]", ": unknown content part '<b>'"),
        (CHAT, ask({"type": "file", "file": {}}), "file_data", "messages[0].content[0] (file): file_data"),
        (
            CHAT,
            ask(shots=[{"prompt": [image_part(), BAD_URI], "answer": "b"}]),
            "shots[0].prompt[1]",
            " (image_url)",
        ),
        (
            CHAT,
            {"messages": [{"role": "user"}, *ask()["messages"]]},
            "messages[0]",
            ": a message whose content",
        ),
        (
            CHAT,
            {"messages": [*ask()["messages"], {"role": "pilot", "content": "?"}]},
            "messages[1]",
            "'pilot'",
        ),
        (CHAT, ask(shots=[{"prompt": [1], "answer": "b"}]), "shots[0].prompt[0]", "dictionary, not 1"),
        ("/v1/responses", {"input": " "}, "input", ": a question without text"),
        (
            "/v1/responses",
            {"instructions": "Be brief.", "input": ask(BAD_URI)["messages"]},
            "input[0].content[0]",
            " (image_url)",
        ),
    ],
)
def test_an_error_names_the_part_of_the_request(model, path, body, param, name):
    answer = client_of(model).post(path, json=body)
    fault = answer.json()["error"]
    assert (answer.status_code, fault["param"]) == (400, param)
    assert name in fault["message"]
    assert fault["message"].startswith(param) or param == "file_data"
    assert fault["message"].count(param) == 1 or param == "file_data"


@pytest.mark.parametrize("stream", [False, True])
def test_media_that_cannot_be_decoded_are_named_too(model, stream):
    error = MediaError("messages[0].content[1] (image_url): not an image")
    answer = client_of(model, FakeEngine((), error=error)).post(CHAT, json=ask(stream=stream))
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "messages[0].content[1]")


def test_media_have_the_name_of_their_part(model):
    client = client_of(model)
    client.post(CHAT, json=ask("Look:", image_part()))
    (media,) = client.engine.requests[0].conversation.messages[0].media
    assert media.name == "messages[0].content[1] (image_url)"


def test_too_many_media_are_refused(model):
    answer = client_of(model, max_media=1).post(CHAT, json=ask(image_part(), image_part()))
    assert answer.json()["error"]["message"].endswith("more than 1 media in one request")


def test_the_downloads_of_a_request_share_their_limits(model, monkeypatch):
    limits = FetchConfig(("media.example.com",), mib=2 * len(png()) / 2**20)
    given = []
    monkeypatch.setattr(content, "fetch", lambda url, config: given.append(config) or png())
    part = {"type": "image_url", "image_url": {"url": "https://media.example.com/a.png"}}
    client = client_of(model, fetch=limits)
    assert client.post(CHAT, json=ask(part, part)).status_code == 200
    assert [config.max_bytes for config in given] == [2 * len(png()), len(png())]
    assert given[1].seconds < given[0].seconds == limits.seconds
    answer = client.post(CHAT, json=ask(part, part, part))
    assert "the downloads of one request" in answer.json()["error"]["message"]


def test_a_silent_stream_has_comments(model, monkeypatch):
    monkeypatch.setattr(chat, "KEEP_ALIVE", 0.01)
    engine = FakeEngine(hold=True)
    submit = engine.submit_choices

    def release_later(*args):
        threading.Timer(0.5, engine.release.set).start()
        return submit(*args)

    engine.submit_choices = release_later
    answer = client_of(model, engine).post(CHAT, json=ask(stream=True))
    assert ": keep-alive\n\n" in answer.text
    assert events(answer)[-1]["choices"][0]["finish_reason"] == "stop"


def test_a_text_that_is_too_long_is_refused_before_it_is_tokenized(model):
    client = client_of(model, max_characters=30)
    for path, body, param in (
        (CHAT, ask("x" * 20), "messages"),
        (CHAT, ask(shots=[{"prompt": "x" * 9, "answer": "y" * 11}]), "shots"),
        ("/v1/responses", {"input": "x" * 31}, "input"),
    ):
        error = client.post(path, json=body).json()["error"]
        assert ("characters, at most 30 are read" in error["message"], error["param"]) == (True, param)
    answer = client.post("/v1/embeddings", json={"input": ["x" * 20, "y" * 20]})
    assert answer.status_code == 400
    assert client.post(CHAT, json=ask()).status_code == 200


@pytest.mark.parametrize("stream", [False, True])
def test_an_error_before_the_first_token_has_its_status(model, stream):
    client = client_of(model, FakeEngine((), error=MediaError("<9 bytes>: not an image")))
    answer = client.post(CHAT, json=ask(stream=stream))
    assert (answer.status_code, answer.json()["error"]["message"]) == (400, "<9 bytes>: not an image")


def test_an_error_in_a_stream_is_its_last_event(model, caplog):
    client = client_of(model, FakeEngine(error=RuntimeError("secret\nforged line")))
    *_, last = events(client.post(CHAT, json=ask(stream=True)))
    assert last["error"]["type"] == "server_error"
    assert "secret" not in last["error"]["message"]
    assert "secret" in caplog.text


def test_a_deadline_is_an_error_that_clients_do_not_retry(model):
    answer = client_of(model, FakeEngine(finish="timeout")).post(CHAT, json=ask())
    assert (answer.status_code, answer.headers["x-should-retry"]) == (504, "false")


def test_a_full_queue_is_429_and_keeps_none_of_the_choices(model):
    client = client_of(model, FakeEngine(busy_after=1))
    answer = client.post(CHAT, json=ask(n=2))
    assert (answer.status_code, answer.json()["error"]["code"]) == (429, "queue_full")
    assert float(answer.headers["retry-after"]) > 0
    assert client.engine.requests == []


def test_another_model_is_not_found(model):
    answer = client_of(model).post(CHAT, json={**ask(), "model": "gpt-4o"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found")


def test_an_empty_answer_of_the_model_can_be_sent_back(model):
    client = client_of(model)
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": ""}, *ask()["messages"]]
    assert client.post(CHAT, json={"messages": turns}).status_code == 200
    roles = [message.role for message in client.engine.requests[0].conversation.messages]
    assert roles == ["user", "assistant", "user"]
