"""The application with the real engine on a tiny model: answers through HTTP are those of the model."""

import io
import json
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from bindllm.cache.visual_cache import VisualCache
from bindllm.conversation import Conversation, Message
from bindllm.media import Media
from bindllm.serving.engine import Engine
from cache_parts import Multimodal, filled_store
from crowd_parts import AnyEncoder, part_of
from serving_parts import ask, client_of, image_part, png
from store_parts import write_images
from tiny import tiny_model

CHAT = "/v1/chat/completions"
COLORS = [(220, 20, 20), (20, 200, 20), (20, 20, 220), (250, 250, 250)]


@pytest.fixture(scope="module")
def model(decoder, tmp_path_factory):
    home = tmp_path_factory.mktemp("cache")
    model = tiny_model(decoder, encoders=[Multimodal()])
    store = filled_store(home / "store", write_images(home / "images", 6))
    model.cache = VisualCache.build(home / "cache", store, top_k=2)
    return model


@pytest.fixture
def client(model):
    with Engine(model, slots=3) as engine:
        yield client_of(model, engine)


def offline(model, color, **options) -> str:
    return model.generate("What is it?", [Media.image(png(color))], max_new_tokens=12, **options)


def test_answers_of_concurrent_clients_are_those_of_the_model(model, client):
    def answer(color):
        body = ask(image_part(color), max_tokens=12, neighbors=True, logprobs=True)
        return client.post(CHAT, json=body).json()

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(answer, COLORS * 2))
    for color, found in zip(COLORS * 2, answers, strict=True):
        (choice,) = found["choices"]
        assert choice["message"]["content"] == offline(model, color)
        assert found["usage"]["completion_tokens"] <= 12
        assert len(choice["logprobs"]["content"]) in (found["usage"]["completion_tokens"] - 1, 12)
        # Images are not blended: the cache skips them by default.
        assert found["neighbors"] == [[]]


def test_neighbors_are_those_of_the_cache(model, client):
    sound = {"type": "input_audio", "input_audio": {"data": "AAAA", "format": "wav"}}
    answer = client.post(CHAT, json=ask(sound, neighbors=True, max_tokens=2)).json()
    (group,) = answer["neighbors"]
    assert len(group) == 2
    assert all("/" not in one["name"] and one["thumbnail"].startswith("data:image/webp;") for one in group)
    assert group[0]["similarity"] >= group[1]["similarity"]
    one = client.post(CHAT, json=ask(sound, neighbors=True, cache={"top_k": 1}, max_tokens=2)).json()
    assert one["neighbors"] == [group[:1]]
    off = client.post(CHAT, json=ask(sound, neighbors=True, cache=False, max_tokens=2)).json()
    assert off["neighbors"] == []


def test_an_answer_after_an_empty_one_is_that_of_the_model(model, client):
    messages = [Message("user", "Hi"), Message("assistant", ""), Message("user", "What is it?")]
    turns = [{"role": message.role, "content": message.text} for message in messages]
    answer = client.post(CHAT, json={"messages": turns, "max_tokens": 9}).json()
    expected = model.generate(Conversation(tuple(messages)), max_new_tokens=9)
    assert answer["choices"][0]["message"]["content"] == expected


def test_an_answer_follows_a_schema_and_an_unsupported_one_is_refused(client):
    def answer(schema, **fields):
        wanted = {"type": "json_schema", "json_schema": {"name": "color", "schema": schema}}
        return client.post(CHAT, json=ask(image_part(), response_format=wanted, seed=1, n=2, **fields))

    properties = {"color": {"enum": ["red", "green"]}, "count": {"type": "integer", "maximum": 99}}
    schema = {"type": "object", "properties": properties, "required": ["color", "count"]}
    found = answer({**schema, "additionalProperties": False}, max_tokens=120).json()["choices"]
    for choice in found:
        assert choice["finish_reason"] == "stop"
        value = json.loads(choice["message"]["content"])
        assert value["color"] in ("red", "green")
        assert value["count"] <= 99
    (cut, _) = answer(schema, max_tokens=3).json()["choices"]
    assert cut["finish_reason"] == "length"
    for stream in (False, True):
        refused = answer({"type": "array", "uniqueItems": True}, stream=stream)
        assert refused.status_code == 400
        assert "uniqueItems" in refused.json()["error"]["message"]


def test_a_setting_that_the_engine_refuses_is_named(client):
    unsupported = {"type": "array", "uniqueItems": True}
    form = {"type": "json_schema", "name": "numbers", "schema": unsupported}
    for url, fields, param in (
        (CHAT, {"response_format": {"type": "json_schema", "json_schema": form}}, "response_format"),
        (CHAT, {"logit_bias": {"259": 1}}, "logit_bias"),
        ("/v1/responses", {"text": {"format": form}}, "text"),
        (CHAT, {"messages": [{"role": "user", "content": "Hi " * 3000}]}, "messages"),
        ("/v1/responses", {"input": "Hi " * 3000}, "input"),
        (CHAT, {"shots": [{"prompt": "Hi " * 3000, "answer": "a"}]}, "shots"),
    ):
        for stream in (False, True):
            body = {"input": "Hi"} if url != CHAT else ask()
            answer = client.post(url, json={**body, **fields, "stream": stream})
            error = answer.json()["error"]
            assert (answer.status_code, error["param"]) == (400, param)
            # LiteLLM and others shorten the conversation at this code.
            is_length = param in ("messages", "input", "shots")
            assert (error["code"] == "context_length_exceeded") == is_length


def test_a_media_that_cannot_be_read_is_refused(client):
    broken = {"type": "image", "image": "data:image/png;base64,iVBORw0KGgo="}
    for stream in (False, True):
        answer = client.post(CHAT, json=ask(broken, stream=stream))
        assert answer.status_code == 400
        assert "messages[0].content[0] (image): " in answer.json()["error"]["message"]


def test_media_that_are_not_used_as_they_are_have_warnings(decoder):
    """Whoever sent them cannot read the log; also an embedding of an earlier request keeps its warning."""
    stream = io.BytesIO()
    np.save(stream, np.array([[0.0, 0, 0], [1, 2, 3], [np.nan, 0, 0]]))
    part, words = part_of("point", stream.getvalue()), ": 1 of 3 points are NaN or infinite, and were skipped"
    with Engine(tiny_model(decoder, encoders=[AnyEncoder()])) as engine:
        client = client_of(engine.model, engine)
        place, later = ("messages[0].content[0] (point)", "messages[0].content[1] (point)")
        assert client.post(CHAT, json=ask(part, max_tokens=2)).json()["warnings"] == [place + words]
        chunks = client.post(CHAT, json=ask(image_part(), part, max_tokens=2, stream=True)).text.split("\n\n")
        found = [json.loads(c.removeprefix("data: ")).get("warnings") for c in chunks if "{" in c]
        assert [one for one in found if one] == [[later + words]]
        asked = {"input": ask(part)["messages"], "max_output_tokens": 2}
        answer = client.post("/v1/responses", json=asked).json()
        assert answer["warnings"] == ["input[0].content[0] (point)" + words]
        vectors = client.post("/v1/embeddings", json={"input": [part, part, image_part()]}).json()
        assert vectors["warnings"] == [f"input[{number}] (point){words}" for number in (0, 1)]
        assert "warnings" not in client.post(CHAT, json=ask(image_part(), max_tokens=2)).json()
