"""The layer around all routes: keys, hosts, sizes, headers, errors, and what the log shows."""

import asyncio
import gc
import gzip
import json
import logging
import re
import sys
import threading
import weakref
from functools import partial

import pytest

from bindllm.errors import EngineBusy, InputError
from bindllm.serving.api import content
from bindllm.serving.api.errors import ApiError
from bindllm.serving.app import _Workers
from bindllm.serving.config import KEYS_VARIABLE, ServeConfig, read_keys
from bindllm.serving.fetch import FetchConfig
from bindllm.serving.server import LogFormatter
from serving_parts import FakeEngine, ask, client_of, png
from tiny import tiny_model

CHAT = "/v1/chat/completions"
KEY = "sk-test-0123456789"
CLOSED = [
    "/v1/models",
    "/v1/models/tiny",
    "/metrics",
    "/openapi.json",
    "/nowhere",
    "/v1",
    "/%2e/health",
    "/health/",
]


@pytest.fixture(scope="module")
def model(decoder):
    return tiny_model(decoder)


@pytest.mark.parametrize("path", CLOSED)
def test_every_other_path_needs_a_key(model, path):
    client = client_of(model, keys=(KEY, "other"))
    for header in (None, "", KEY, "Bearer", "Bearer ", f"Bearer {KEY}x", f"Basic {KEY}", "Bearer \xe9"):
        headers = {} if header is None else {"authorization": header.encode("latin-1")}
        answer = client.get(path, headers=headers)
        assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key")
    for key in (KEY, "other"):
        assert client.get(path, headers={"authorization": f"bearer {key}"}).status_code in (200, 404)


def test_open_paths_need_no_key(model):
    client = client_of(model, keys=(KEY,))
    assert client.get("/health").json() == {"status": "ok"}
    assert client.get("/ready").json() == {"status": "ready"}
    # The path that routing uses decides, whatever the headers say.
    answer = client.get("/v1/models", headers={"host": "localhost/health?", "x-forwarded-prefix": "/health"})
    assert answer.status_code in (401, 403)


def test_the_page_is_open_and_needs_no_file_of_another_site(model):
    client = client_of(model, keys=(KEY,))
    page = client.get("/")
    assert (page.headers["content-type"], page.headers["cache-control"]) == (
        "text/html; charset=utf-8",
        "no-cache",
    )
    names = re.findall(r'(?:src|href)="([^"#]+)"', page.text)
    assert {"chat.js", "chat.css"} <= set(names)
    for name in names:
        assert client.get(f"/{name}").status_code == client.head(f"/{name}").status_code == 200
    assert client.get("/__init__.py").status_code == client.get("/%2e%2e/app.py").status_code == 401


def test_the_host_must_be_a_name_of_this_machine(model):
    client = client_of(model)
    for host in ("localhost", "LOCALHOST:8000", "127.0.0.1:1", "[::1]:8000"):
        assert client.get("/v1/models", headers={"host": host}).status_code == 200
    for host in (
        "evil.example",
        "localhost.evil.example",
        "127.0.0.1.evil.example",
        "localhost:x",
        "a@localhost",
        "",
    ):
        answer = client.get("/v1/models", headers={"host": host})
        assert (answer.status_code, answer.json()["error"]["code"]) == (403, "host_not_allowed")
    assert client_of(model, hosts=()).get("/v1/models", headers={"host": "any.example"}).status_code == 200
    named = client_of(model, hosts=("Models.Example",))
    assert named.get("/v1/models", headers={"host": "models.example:80"}).status_code == 200
    for name in ("models.example:80", "https://models.example", ""):
        with pytest.raises(InputError, match="without a scheme or a port"):
            ServeConfig("m", hosts=(name,))


def test_probes_are_answered_under_any_host_and_tell_nothing(model):
    client = client_of(model, hosts=("models.example",), keys=(KEY,))
    for host in ("10.0.0.7:8000", "evil.example", ""):
        for path in ("/health", "/ready"):
            answer = client.get(path, headers={"host": host})
            assert (answer.status_code, list(answer.json())) == (200, ["status"])
            assert client.head(path, headers={"host": host}).status_code == 200
        assert client.get("/metrics", headers={"host": host}).status_code == 403


def test_errors_have_one_shape(model):
    client = client_of(model)
    json_header = {"content-type": "application/json"}
    deep = "[" * 200_000
    for answer, status in (
        (client.get("/nowhere"), 404),
        (client.get("/v1/models/other"), 404),
        (client.get(CHAT), 405),
        (client.delete("/v1/models"), 405),
        (client.post(CHAT, content="{", headers=json_header), 400),
        (client.post(CHAT, content=deep, headers=json_header), 400),
        (client.post(CHAT, content="[]", headers=json_header), 400),
        (client.post(CHAT, content="", headers=json_header), 400),
        (client.post(CHAT, content=b"\xff", headers=json_header), 400),
        (client.post(CHAT, content='{"seed": ' + "9" * 5000 + "}", headers=json_header), 400),
        # A form of another site can send this without asking the browser first.
        (client.post(CHAT, content=json.dumps(ask()), headers={"content-type": "text/plain"}), 400),
    ):
        assert answer.status_code == status
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
        assert answer.json()["error"]["message"]


def test_a_body_that_cannot_be_read_is_explained(model):
    client = client_of(model)
    json_header = {"content-type": "application/json"}
    for body in (b"\xff", "[" * 200_000, '{"seed": ' + "9" * 5000 + "}", gzip.compress(b"{}")):
        answer = client.post(CHAT, content=body, headers=json_header)
        assert (answer.status_code, "must be UTF-8" in answer.json()["error"]["message"]) == (400, True)
    answer = client.post(
        CHAT, content=gzip.compress(b"{}"), headers={**json_header, "content-encoding": "gzip"}
    )
    assert (answer.status_code, "without compression" in answer.json()["error"]["message"]) == (415, True)
    answer = client.post(
        CHAT, content=json.dumps(ask()), headers={**json_header, "content-encoding": "identity"}
    )
    assert answer.status_code == 200


def test_an_unexpected_error_says_nothing_of_itself(model, caplog):
    engine = FakeEngine()
    engine.submit_choices = lambda *_: 1 / 0
    answer = client_of(model, engine).post(CHAT, json=ask())
    assert (answer.status_code, answer.json()["error"]["type"]) == (500, "server_error")
    assert "division" not in answer.text
    assert "division by zero" in caplog.text
    assert f"a request failed: {answer.headers['x-request-id']}" in caplog.text
    assert len([record for record in caplog.records if record.levelname == "ERROR"]) == 1


def test_answers_carry_safe_headers_and_an_id(model):
    client = client_of(model)
    for answer in (client.get("/health"), client.get("/nowhere"), client.post(CHAT, json=ask(stream=True))):
        assert "default-src 'none'" in answer.headers["content-security-policy"]
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["x-request-id"].startswith("req-")
        assert "access-control-allow-origin" not in answer.headers
    echoed = client.get("/health", headers={"x-request-id": "my-id.1"}).headers["x-request-id"]
    assert echoed == "my-id.1"
    for bad in ("a b", "x" * 65, "<script>", "a\x7f"):
        assert client.get("/health", headers={"x-request-id": bad}).headers["x-request-id"].startswith("req-")


def test_the_log_cannot_be_forged(model, caplog):
    with caplog.at_level(logging.INFO, "bindllm.serving"):
        client_of(model).get("/v1/%0aforged%1b[31m")
    (record,) = [record for record in caplog.records if record.name == "bindllm.serving"]
    assert "\n" not in record.getMessage()
    assert "\x1b" not in record.getMessage()
    assert "404" in record.getMessage()


async def call(app, chunks, headers=(), *, stall=False, until=lambda: True):
    """Send a body in chunks, leave as soon as a condition holds; return the status and the number of read chunks."""
    sent, read = [], 0

    async def receive():
        nonlocal read
        if read == len(chunks):
            if stall:
                await asyncio.sleep(60)
            while not until():
                await asyncio.sleep(0.01)
            return {"type": "http.disconnect"}
        read += 1
        return {"type": "http.request", "body": chunks[read - 1], "more_body": stall or read < len(chunks)}

    async def send(message):
        sent.append(message)

    scope = {
        **{"type": "http", "method": "POST", "path": CHAT, "raw_path": CHAT.encode(), "query_string": b""},
        **{"headers": [(b"host", b"localhost"), (b"content-type", b"application/json"), *headers]},
        **{"http_version": "1.1", "scheme": "http", "server": ("localhost", 80), "client": ("127.0.0.1", 1)},
        **{"root_path": "", "asgi": {"version": "3.0", "spec_version": "2.3"}},
    }
    await app(scope, receive, send)
    return next(
        (message["status"] for message in sent if message["type"] == "http.response.start"), None
    ), read


def test_a_large_body_is_refused_before_it_is_read(model):
    app = client_of(model, max_body_mib=1000 / 2**20).app
    assert asyncio.run(call(app, [b"x" * 2000], [(b"content-length", b"2000")])) == (413, 0)
    # In chunks there is no length: reading ends with the first chunk that is too much.
    assert asyncio.run(call(app, [b"x" * 600] * 50)) == (413, 2)


def test_all_bodies_together_are_limited_and_released(model):
    app = client_of(model, max_body_mib=1000 / 2**20, max_held_mib=3000 / 2**20).app
    question = json.dumps(ask()).encode().ljust(900)

    async def together():
        slow = asyncio.create_task(call(app, [question], stall=True))
        await asyncio.sleep(0.05)
        refused = await call(app, [question])
        slow.cancel()
        await asyncio.gather(slow, return_exceptions=True)
        return refused, await call(app, [question])

    refused, accepted = asyncio.run(together())
    assert refused[0] == 429
    # The client of this call leaves after its body; only the status of a refusal would come.
    assert accepted[0] in (200, None)


@pytest.mark.parametrize("limit", ["body_seconds", "timeout"])
def test_a_slow_body_is_given_up(model, limit):
    app = client_of(model, **{limit: 0.05}).app
    assert asyncio.run(call(app, [b"{"], stall=True))[0] == 408


def test_the_deadline_counts_from_the_first_byte(model):
    client = client_of(model, timeout=5)
    body = json.dumps(ask()).encode()

    async def slow(receive):
        await asyncio.sleep(0.2)
        return await receive()

    async def delayed(scope, receive, send):
        await client.app(scope, partial(slow, receive), send)

    asyncio.run(call(delayed, [body], until=lambda: client.engine.requests))
    assert 4 < client.engine.requests[0].timeout < 4.8


def test_reading_media_ends_with_the_deadline_and_frees_its_thread(model, monkeypatch):
    free = threading.Event()
    monkeypatch.setattr(content, "fetch", lambda *_: free.wait(10) and png())
    part = {"type": "image_url", "image_url": {"url": "https://media.example.com/a.png"}}
    client = client_of(model, timeout=0.2, fetch=FetchConfig(("media.example.com",)))
    assert client.post(CHAT, json=ask(part)).status_code == 504
    assert client.post("/v1/embeddings", json={"input": [part]}).status_code == 504
    free.set()
    client = client_of(model, fetch=FetchConfig(("media.example.com",)))
    assert client.post(CHAT, json=ask(part)).status_code == 200


def test_media_count_as_held_memory_and_downloads_too(model, monkeypatch):
    image = png(size=64).ljust(3000, b" ")
    monkeypatch.setattr(content, "fetch", lambda *_: image)
    part = {"type": "image_url", "image_url": {"url": "https://media.example.com/a.png"}}
    fetch = FetchConfig(("media.example.com",))
    body = len(json.dumps(ask(part)))
    for spare, status in ((-1, 429), (9, 200)):
        client = client_of(model, fetch=fetch, max_held_mib=(2 * body + len(image) + spare) / 2**20)
        answer = client.post(
            CHAT, content=json.dumps(ask(part)), headers={"content-type": "application/json"}
        )
        assert answer.status_code == status


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_its_slot(model, stream):
    engine = FakeEngine(hold=True)
    app = client_of(model, engine).app
    body = json.dumps(ask(stream=stream)).encode()
    asyncio.run(asyncio.wait_for(call(app, [body], until=lambda: engine.requests), 5))
    engine.release.set()
    assert engine.cancelled == 1


def test_calls_of_clients_that_left_keep_neither_memory_nor_a_place(model):
    free, calls = threading.Event(), []
    workers = _Workers("test", 1, waiting=64)

    class Large:
        pass

    async def many():
        first = asyncio.create_task(workers.run(10, free.wait, 10))
        large = Large()
        gone = [asyncio.create_task(workers.run(10, calls.append, large)) for _ in range(63)]
        seen = weakref.ref(large)
        del large
        await asyncio.sleep(0.05)
        with pytest.raises(EngineBusy):
            await workers.run(10, calls.append, 1)
        for task in gone:
            task.cancel()
        await asyncio.gather(*gone, return_exceptions=True)
        del gone[:], task
        gc.collect()
        assert seen() is None
        with pytest.raises(ApiError, match="deadline"):
            await workers.run(0.05, calls.append, 1)
        free.set()
        await first
        return await workers.run(10, lambda: "served")

    assert asyncio.run(many()) == "served"
    assert not calls


def test_a_draining_server_says_so(model):
    client = client_of(model)
    client.app.state.endpoints.draining = True
    answer = client.post(CHAT, json=ask())
    assert (answer.status_code, float(answer.headers["retry-after"]) > 0) == (503, True)
    assert client.get("/ready").status_code == 503
    assert client.get("/health").status_code == 200


def test_metrics_count_by_route_and_not_by_spelling(model):
    client = client_of(model)
    client.post(CHAT, json=ask(stream=True))
    client.get("/some/path")
    text = client.get("/metrics").text
    assert f'bindllm_requests_total{{route="{CHAT}",status="200"}} 1.0' in text
    assert 'bindllm_requests_total{route="other",status="404"} 1.0' in text
    assert 'bindllm_tokens_total{kind="completion"} 3.0' in text
    assert "bindllm_time_to_first_token_seconds_count 1.0" in text
    assert "bindllm_requests_waiting 0.0" in text
    assert "bindllm_embedding_hits_total 2.0" in text
    assert 'bindllm_answers_total{finish="stop"} 4.0' in text


def test_no_text_in_the_log_looks_like_an_entry():
    try:
        raise ValueError("first\nforged entry\r\x85another\x1b[31m")
    except ValueError:
        record = logging.LogRecord("a", 40, "f", 1, "failed: %s", ("x\ny",), sys.exc_info())
    first, *more = LogFormatter().format(record).splitlines()
    assert first == "failed: x"
    assert all(line.startswith("  | ") and line.isprintable() for line in more)
    assert more[-1] == "  | another?[31m"


def test_keys_come_from_a_file_and_the_environment(tmp_path, monkeypatch):
    monkeypatch.delenv(KEYS_VARIABLE, raising=False)
    assert read_keys(None) == ()
    file = tmp_path / "keys"
    file.write_text("# ours\none\n\n two \n")
    monkeypatch.setenv(KEYS_VARIABLE, "three, four")
    assert read_keys(str(file)) == ("three", "four", "one", "two")
    file.write_text("# none\n")
    with pytest.raises(InputError, match="has no API key"):
        read_keys(str(file))
    monkeypatch.setenv(KEYS_VARIABLE, " ")
    with pytest.raises(InputError, match="unset it"):
        read_keys(None)
    with pytest.raises(InputError, match="visible ASCII") as caught:
        ServeConfig("m", keys=("sécret",))
    assert "sécret" not in f"{caught.value}{ServeConfig('m', keys=(KEY,))}"
    with pytest.raises(InputError, match="max_body_mib is 0"):
        ServeConfig("m", max_body_mib=0)
