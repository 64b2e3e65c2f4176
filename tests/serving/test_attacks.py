"""Attacks on the listening server: raw bytes on its socket, forged headers, bodies without end, and fuzzed bodies."""

import json
import logging
import random
import socket
import string
import time
from contextlib import suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import bombs
from bindllm.serving import server as server_module
from crowd_parts import CHAT, LiveServer, malformed_bodies, part_of, until
from serving_parts import ask, image_part

CONTENT_TYPE = {"content-type": "application/json"}


@pytest.fixture(scope="module")
def server(decoder):
    with LiveServer(decoder, max_body_mib=1, body_seconds=0.5) as server:
        yield server


@pytest.fixture(scope="module")
def client(server):
    with server.client() as client:
        yield client


def send_raw(server, *parts: bytes, pause: float = 0.0, seconds: float = 10) -> bytes:
    """Send bytes, and return everything until the server closes the connection."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=seconds) as connection:
        received = b""
        try:
            for part in parts:
                connection.sendall(part)
                time.sleep(pause)
            while data := connection.recv(1 << 16):
                received += data
        except ConnectionError:
            pass
        return received


def status_of(answer: bytes) -> int:
    return int(answer.split(b" ", 2)[1]) if answer else 0


def head(*lines: str, path: str = CHAT, method: str = "POST", host: str = "localhost") -> bytes:
    return "\r\n".join(
        [f"{method} {path} HTTP/1.1", f"Host: {host}", "Connection: close", *lines, "", ""]
    ).encode("latin-1")


# --- bodies ---


def test_bodies_that_are_not_requests(client):
    for body in malformed_bodies():
        content = {"content": body} if isinstance(body, bytes) else {"content": json.dumps(body)}
        answer = client.post(CHAT, headers=CONTENT_TYPE, **content)
        assert answer.status_code in (400, 404), (body, answer.text)
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


@pytest.mark.parametrize("path", ["/v1/embeddings", "/v1/responses", CHAT])
@pytest.mark.parametrize("number", range(0, 20, 3))
def test_bombs_at_every_endpoint(client, path, number):
    part = part_of(*bombs.small_bombs()[number])
    body = {"messages": [{"role": "user", "content": [part]}], "input": [{"role": "user", "content": [part]}]}
    if path == "/v1/embeddings":
        body["input"] = [part]
    answer = client.post(path, json=body)
    assert answer.status_code in (400, 413), answer.text


def test_chunked_bodies_have_the_same_limit(server):
    """A body without a length is read up to the limit, and no further."""
    chunk = b"10000\r\n" + b" " * 0x10000 + b"\r\n"
    answer = send_raw(server, head("Transfer-Encoding: chunked"), *[chunk] * 40)
    assert status_of(answer) in (0, 413)
    until(lambda: server.held == 0)
    body = json.dumps(ask(image_part(), max_tokens=1)).encode()
    chunks = b"".join(
        b"%x\r\n%s\r\n" % (len(body[at : at + 7]), body[at : at + 7]) for at in range(0, len(body), 7)
    )
    assert (
        status_of(
            send_raw(
                server,
                head("Transfer-Encoding: chunked", "Content-Type: application/json"),
                chunks + b"0\r\n\r\n",
            )
        )
        == 200
    )


def test_a_claimed_length_is_refused_before_the_body(server):
    assert status_of(send_raw(server, head("Content-Length: 99999999999"))) == 413


def test_slow_bodies_end(server):
    started = time.monotonic()
    answer = send_raw(server, head("Content-Length: 1000"), b"{")
    assert status_of(answer) == 408
    assert time.monotonic() - started < 5
    assert server.held == 0


def test_slow_headers_end(server, monkeypatch):
    """Thousands of connections that say nothing would keep everyone else out."""
    monkeypatch.setattr(server_module, "HEADER_SECONDS", 0.3)
    started = time.monotonic()
    assert send_raw(server) == b""
    assert send_raw(server, *[b"G"] * 3, b"ET / HTTP/1.1\r\n", pause=0.05) == b""
    # Also for the second request of a connection.
    first = head(path="/health", method="GET").replace(b"Connection: close\r\n", b"")
    assert send_raw(server, first, b"GET", pause=0.1).startswith(b"HTTP/1.1 200")
    assert time.monotonic() - started < 5


def test_a_request_is_not_ended_by_the_time_of_its_headers(server, monkeypatch):
    monkeypatch.setattr(server_module, "HEADER_SECONDS", 0.1)
    body = json.dumps(ask(max_tokens=1)).encode()
    answer = send_raw(
        server,
        head(f"Content-Length: {len(body)}", "Content-Type: application/json"),
        body[:9],
        body[9:],
        pause=0.2,
    )
    assert status_of(answer) == 200


def test_a_client_that_does_not_read_is_left(server, monkeypatch):
    monkeypatch.setattr(server_module, "WRITE_SECONDS", 0.2)
    connections = server._server.server_state.connections
    earlier = set(connections)
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect(("127.0.0.1", server.port))
        # More than the buffers of both systems take.
        with suppress(OSError):
            client.sendall(b"GET /chat.js HTTP/1.1\r\nHost: localhost\r\n\r\n" * 600)
        until(lambda: connections - earlier)
        until(lambda: not connections - earlier)


# --- headers ---


@pytest.mark.parametrize(
    "request_bytes",
    [
        head("Content-Length: 5", "Content-Length: 6") + b"hello!",
        head("Content-Length: 5", "Transfer-Encoding: chunked") + b"0\r\n\r\n",
        head("Transfer-Encoding: chunked, chunked") + b"0\r\n\r\n",
        head("Transfer-Encoding: gzip"),
        head("Content-Length: -1"),
        head("Content-Length: 0x10"),
        head("Content-Length : 5") + b"hello",
        head("Host: evil.example"),
        head("X: " + "a" * 100_000),
        head(*["X: a"] * 30_000),
        head(path="/v1/models HTTP/1.1\r\nHost: evil.example\r\n\r\nGET /"),
        head(path="/\x00"),
        head(path="http://evil.example/v1/models"),
        head(host="evil.example"),
        head(host="localhost@evil.example"),
        head(host="localhost, evil.example"),
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"GET /\r\n\r\n",
        b"\r\n" * 50_000,
    ],
)
def test_requests_that_two_programs_could_read_differently(server, request_bytes):
    assert status_of(send_raw(server, request_bytes)) in (0, 400, 403, 404, 405, 413, 431)


@pytest.mark.parametrize(
    "value",
    [
        "a\\r\\nx-evil: 1",
        "a\tb",
        "a" * 65,
        "../../x",
        "\x1b[31m",
        "<script>",
        "http://169.254.169.254/",
        "\xe9",
        "a\r\n x-evil: 1",
    ],
)
def test_a_forged_request_id_is_replaced(server, value, caplog):
    with caplog.at_level(logging.INFO, logger="bindllm.serving"):
        answer = send_raw(server, head(f"X-Request-Id: {value}", path="/health", method="GET"))
    headers = answer.partition(b"\r\n\r\n")[0].decode("latin-1").lower().splitlines()
    assert not [line for line in headers if line.startswith("x-evil")]
    ids = [line for line in headers if line.startswith("x-request-id")]
    # A header over two lines may be refused as a whole.
    assert status_of(answer) == 400 or (len(ids) == 1 and value.lower() not in ids[0])
    assert all(
        value not in record.getMessage() and "\n" not in record.getMessage() for record in caplog.records
    )


def test_paths_of_a_client_stay_one_line_of_the_log(server, caplog):
    with caplog.at_level(logging.INFO, logger="bindllm.serving"):
        send_raw(server, head(path="/%0A%1b[31mfake%20entry", method="GET"))
    assert [record for record in caplog.records if "fake" in record.getMessage()]
    assert all(record.getMessage().isprintable() for record in caplog.records)


# --- fuzz ---

# One text each, since a list of this length takes a line for each word.
WORDS = """
user assistant system tool
text image_url input_audio image point depth file video_url
type url data format file_data filename role content path detail weight tool_calls name
data:image/png;base64, data:, data:;base64,AAAA file:///etc/passwd http://127.0.0.1/ /etc/passwd
"""
FIELDS = """
model temperature top_p n seed stop logprobs top_logprobs stream stream_options cache shots neighbors tools user
max_completion_tokens response_format metadata logit_bias
"""
ODD = ["\ud800", "\x00", "\u202e", "<|im_end|>", "<image>", "", " ", "image_url" * 50]

_words = st.sampled_from([*WORDS.split(), *ODD, image_part()["image_url"]["url"]])
_keys = st.sampled_from(WORDS.split())
_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | _words | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(_keys, inner, max_size=4),
    max_leaves=12,
)
_parts = st.lists(st.dictionaries(_keys, _values, max_size=4) | _values, max_size=4)
_messages = st.lists(
    st.fixed_dictionaries({"role": _words, "content": _parts | _values}) | _values, max_size=3
)
_fields = st.dictionaries(st.sampled_from(FIELDS.split()), _values, max_size=3)


def check_fuzzed(client, path: str, body: dict) -> None:
    # NaN and infinity as Python writes them, which is not JSON.
    answer = client.post(path, content=json.dumps(body).encode(), headers=CONTENT_TYPE)
    assert answer.status_code in (200, 400, 404), (answer.status_code, answer.text)
    if answer.status_code != 200:
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
        assert answer.json()["error"]["message"].isprintable()


@settings(max_examples=60)
@given(messages=_messages, fields=_fields)
def test_fuzzed_chats_are_answered_or_explained(client, messages, fields):
    check_fuzzed(client, CHAT, {"max_tokens": 1, **fields, "messages": messages})


@settings(max_examples=40)
@given(parts=_parts, fields=_fields)
def test_fuzzed_content_parts(client, parts, fields):
    check_fuzzed(
        client, CHAT, {"max_tokens": 1, **fields, "messages": [{"role": "user", "content": [*parts, "?"]}]}
    )


@settings(max_examples=40)
@given(values=_values, fields=_fields)
def test_fuzzed_embeddings_and_responses(client, values, fields):
    check_fuzzed(client, "/v1/embeddings", {"input": values, **fields})
    check_fuzzed(client, "/v1/responses", {"max_output_tokens": 1, **fields, "input": values})


def test_damaged_media_of_every_modality(client):
    """Cut and flipped files of all kinds: an answer or an explanation, never a failure of the server."""
    from crowd_parts import some_media

    draw = random.Random(0)
    for _ in range(40):
        modality, content = some_media(draw)
        damaged = bytearray(content[: draw.randrange(1, len(content) + 1)])
        for _ in range(draw.randrange(8)):
            damaged[draw.randrange(len(damaged))] = draw.randrange(256)
        body = {
            "messages": [{"role": "user", "content": [part_of(modality, bytes(damaged)), "?"]}],
            "max_tokens": 1,
        }
        answer = client.post(CHAT, json=body)
        assert answer.status_code in (200, 400), (modality, bytes(damaged), answer.text)


@pytest.mark.parametrize(
    "text", ["x" + " " * 600_000 + "<b", "<" * 600_000, "\n" * 600_000 + "x", string.printable * 6000]
)
def test_long_texts_are_refused_in_time(client, text):
    started = time.process_time()
    answer = client.post(CHAT, json={"messages": [{"role": "user", "content": text}], "max_tokens": 1})
    assert answer.status_code in (400, 413)
    assert time.process_time() - started < 5


@pytest.mark.parametrize(
    "body",
    [
        '{"messages": [' + "{}," * 300_000 + "{}]}",
        '{"messages": [' + "0," * 300_000 + "0]}",
        '{"messages": [{"role": "user", "content": "a"}],"cache": {'
        + ",".join(f'"{n}":0' for n in range(90_000))
        + "}}",
        json.dumps({"messages": [{"role": "user", "content": "a"}] * 20_000}),
        json.dumps({"messages": [{"role": "user", "content": ["a"] * 100_000}]}),
        json.dumps(
            {
                "messages": [{"role": "user", "content": "a"}],
                "shots": [{"prompt": "a", "answer": ""}] * 20_000,
            }
        ),
        json.dumps(
            {
                "messages": [{"role": "user", "content": "a"}],
                "shots": [{"prompt": [0] * 200_000, "answer": ""}],
            }
        ),
        "[[],{}," * 140_000,
    ],
)
def test_many_values_are_refused_in_time(client, body):
    started = time.process_time()
    answer = client.post(CHAT, content=body, headers={"content-type": "application/json"})
    assert answer.status_code in (400, 413)
    assert len(answer.text) < 1000
    assert time.process_time() - started < 3


def test_the_server_is_well_after_all_of_this(server, client):
    until(server.is_idle)
    answer = client.post(CHAT, json=ask(image_part(), max_tokens=3))
    assert answer.status_code == 200
    assert server.engine.counters.finished["error"] > 0
