"""A tiny model, an engine that says fixed words, and a client of the application."""

from __future__ import annotations

import base64
import io
import threading
from types import SimpleNamespace

from PIL import Image
from starlette.testclient import TestClient

from bindllm.errors import EngineBusy, EngineClosed
from bindllm.serving.app import build_app
from bindllm.serving.config import ServeConfig
from bindllm.serving.request import Piece, TokenLogprob

WORDS = ("a ", "red ", "square")


class FakeEngine:
    """Answers with words, in a thread, as the real one does.

    Args:
        words: of every answer.
        finish: why it ends.
        error: ends every answer instead.
        hold: the answer does not end before `release`.
    """

    def __init__(self, words=WORDS, *, finish="stop", error=None, hold=False, busy_after=None):
        self.words, self.finish, self.error = words, finish, error
        self.requests, self.cancelled, self.closed = [], 0, False
        self.waiting = self.running = 0
        self.recent = SimpleNamespace(hits=2, misses=3)
        self.counters = SimpleNamespace(steps=5, finished={"stop": 4})
        self.busy_after = busy_after
        self.release = threading.Event()
        if not hold:
            self.release.set()

    def submit_choices(self, request, listeners):
        if self.closed:
            raise EngineClosed("draining")
        if self.busy_after is not None and len(self.requests) + len(listeners) > self.busy_after:
            raise EngineBusy("full")
        self.requests.append(request)
        for listener in listeners:
            threading.Thread(target=self._answer, args=(request, listener), daemon=True).start()
        prompt = SimpleNamespace(warnings=())
        return [SimpleNamespace(cancel=self._cancel, prompt_tokens=7, prompt=prompt) for _ in listeners]

    def close(self, *, drain):
        self.closed = True
        self.release.set()

    def _cancel(self):
        self.cancelled += 1

    def _answer(self, request, listener):
        self.running += 1
        if self.error is not None and not self.words:
            listener(Piece("", 0, error=self.error))
        for word in self.words:
            token = (TokenLogprob(word, -0.5, (TokenLogprob(word, -0.5), TokenLogprob("x", -1.5))),)
            listener(Piece(word, 1, logprobs=token if request.logprobs is not None else ()))
        if self.words:
            self.release.wait(10)
            listener(Piece("", 0, finish=self.finish, error=self.error))
        self.running -= 1


def client_of(model, engine=None, *, base_url="http://localhost", **limits) -> TestClient:
    """Return a client of the application; ``limits`` are those of `ServeConfig`."""
    engine = engine or FakeEngine()
    if isinstance(engine, FakeEngine):
        engine.model, engine.encode = model, lambda *args, **more: (model.encode(*args, **more), ())
    app = build_app(engine, ServeConfig("tiny", **limits))
    client = TestClient(app, base_url=base_url, raise_server_exceptions=False)
    client.engine = engine
    return client


def png(color=(220, 20, 20), size=8) -> bytes:
    content = io.BytesIO()
    Image.new("RGB", (size, size), color).save(content, "PNG")
    return content.getvalue()


def data_uri(content: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def image_part(color=(220, 20, 20)) -> dict:
    return {"type": "image_url", "image_url": {"url": data_uri(png(color))}}


def ask(*parts, **fields) -> dict:
    """Return the body of a question."""
    return {"model": "tiny", "messages": [{"role": "user", "content": [*parts, "What is it?"]}], **fields}
