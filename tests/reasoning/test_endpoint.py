"""An OpenAI-compatible endpoint as a brain: requests, calls in answers, and servers that are down, slow or wrong."""

import json
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Annotated

import pytest

from bindllm import Media
from bindllm.errors import InputError
from bindllm.reasoning.endpoint import Endpoint, EndpointError
from bindllm.reasoning.measure import calculate
from bindllm.reasoning.solver import Budget, Solver
from bindllm.reasoning.tools import tool

ADD = {"name": "calculate", "arguments": '{"operation": "add", "a": 1, "b": 2}'}


def message(text=None, *calls, **more):
    tool_calls = [{"id": f"x{n}", "type": "function", "function": call} for n, call in enumerate(calls)]
    choice = {
        "message": {"role": "assistant", "content": text, **({"tool_calls": tool_calls} if calls else {})}
    }
    return {"choices": [{**choice, **more}], "usage": {"completion_tokens": 7}}


class Server:
    """Gives prepared answers, each a body of JSON, or a function that writes to the request."""

    def __init__(self):
        self.answers, self.requests, outer = [], [], self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = self.rfile.read(int(self.headers["content-length"]))
                outer.requests.append((self.path, dict(self.headers), json.loads(body)))
                answer = outer.answers.pop(0)
                if callable(answer):
                    answer(self)
                else:
                    write(self, json.dumps(answer).encode())

            def log_message(self, *_):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        threading.Thread(target=self.http.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1/"


def write(handler, body, status=200):
    handler.send_response(status)
    handler.send_header("content-length", str(len(body)))
    handler.end_headers()
    handler.wfile.write(body)


@pytest.fixture
def server():
    server = Server()
    yield server
    server.http.shutdown()
    server.http.server_close()


def solve(server, *answers, media=(), **budget):
    server.answers = list(answers)
    brain = Endpoint(server.url, "big", key="secret", temperature=0)
    return Solver(brain, [calculate, look], budget=Budget(**budget)).run("1 + 2?", media)


def test_calls_are_made_and_results_sent_back(server):
    found = solve(server, message("I add.", ADD), message("It is 3."))
    assert (found.answer, found.tokens) == ("It is 3.", 14)
    (path, headers, first), (_, _, second) = server.requests
    assert (path, headers["Authorization"]) == ("/v1/chat/completions", "Bearer secret")
    assert (first["model"], first["temperature"], first["tool_choice"]) == ("big", 0, "auto")
    assert first["tools"][0]["function"]["name"] == "calculate"
    assert second["messages"][2]["tool_calls"][0]["function"]["name"] == "calculate"
    assert second["messages"][3] == {"role": "tool", "content": "result1: 3", "tool_call_id": "call_1"}


@tool
def look(image: Annotated[Media, "image"]) -> str:
    """Look."""
    return "a cat"


def test_no_path_leaves_this_machine_and_media_ask_for_a_call(server, tmp_path):
    call = {"name": "look", "arguments": '{"image": "image1"}'}
    found = solve(
        server, message("", call), message("3"), media=[Media.image(str(tmp_path / "private.png"))], rounds=1
    )
    assert found.answer == "3"
    assert server.requests[0][2]["tool_choice"] == "required"
    assert "private" not in json.dumps([body for _, _, body in server.requests])
    assert "tools" not in server.requests[1][2]


@pytest.mark.parametrize(
    "bad",
    [
        message(None, {"name": "calculate", "arguments": '{"a": 1'}),
        message(None, {"name": "calculate", "arguments": "[1]"}),
        message(None, {"name": "calculate", "arguments": {"a": NotImplemented.__class__.__name__}}),
        message(None, {"name": "calculate", "arguments": '{"operation": "add", "a": NaN, "b": 1}'}),
        message('```json\n{"name": "calculate", "arguments": {}}\n```'),
        message("It is", finish_reason="length"),
        message("It is", finish_reason="content_filter"),
        message({"answer": 3}),
        message(None),
    ],
)
def test_unreadable_calls_are_repaired_once(bad, server):
    assert solve(server, bad, message("3")).answer == "3"
    assert "This reply cannot be used" in server.requests[-1][2]["messages"][-1]["content"]
    assert solve(server, bad, bad).failure == "unusable"


def test_thoughts_are_no_part_of_the_answer(server):
    assert solve(server, message("<think>A <tool_call>?</think>\n\nIt is 3.")).answer == "It is 3."


def test_a_refusal_is_shown(server):
    refused = {"choices": [{"message": {"content": None, "refusal": "I cannot."}}]}
    assert "the model refuses: I cannot." in solve(server, refused, refused).message


def test_unknown_usage_counts_as_the_most(server):
    found = solve(server, {"choices": message("3")["choices"]}, reply_tokens=100)
    assert (found.answer, found.tokens) == ("3", 100)
    # A negative count would add to the budget.
    found = solve(server, message("3") | {"usage": {"completion_tokens": -9}}, reply_tokens=100)
    assert (found.answer, found.tokens) == ("3", 100)


def drip(handler):
    handler.send_response(200)
    handler.end_headers()
    for _ in range(200):
        handler.wfile.write(b" ")
        time.sleep(0.05)


def flood(handler):
    handler.send_response(200)
    handler.end_headers()
    for _ in range(100):
        handler.wfile.write(b"x" * 100_000)


WRONG = [
    (
        lambda handler: write(handler, b'{"error": {"message": "no such model"}}', 404),
        "status 404: .*no such model",
    ),
    (
        lambda handler: write(handler, b"<html>\x1b[31mbad gateway", 502),
        r"status 502: <html>\?\[31mbad gateway",
    ),
    (lambda handler: write(handler, b"<html>"), "does not answer in JSON: <html>"),
    (lambda handler: write(handler, b"\xff\xfe"), "does not answer in JSON"),
    ({"error": "overloaded"}, "answers without choices: .*overloaded"),
    ({"choices": []}, "answers without choices"),
    ({"choices": [{"message": "hi"}]}, "answers without choices"),
    ([], "answers without choices"),
    (lambda handler: handler.connection.close(), "cannot be reached"),
    (flood, "more than 4,194,304 bytes"),
]


@pytest.mark.parametrize(("answer", "text"), WRONG)
def test_an_endpoint_that_answers_wrongly_is_a_typed_failure(answer, text, server):
    server.answers = [answer]
    with pytest.raises(EndpointError, match=text):
        Endpoint(server.url, "big").reply([], [], required=False, seconds=20, tokens=9)
    found = solve(server, answer)
    assert (found.answer, found.failure) == (None, "brain")


def test_a_slow_endpoint_ends_with_the_run(server):
    for answer in (drip, lambda handler: time.sleep(10)):
        started = time.monotonic()
        assert solve(server, answer, seconds=0.4).failure in ("brain", "seconds")
        assert time.monotonic() - started < 5


def test_an_endpoint_that_is_down():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
        found = Solver(Endpoint(url, "big"), [calculate]).run("1 + 2?")
    assert found.failure == "brain"
    assert "cannot be reached" in found.message
    with pytest.raises(InputError, match="expected an address"):
        Endpoint("localhost:8000", "big")
