"""A server that listens, an encoder that opens every modality, and a crowd of clients, good and bad."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import io
import json
import random
import socket
import threading
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass

import httpx
import numpy as np
import torch
from PIL import Image

import bombs
from bindllm import BindLLM, Media
from bindllm.serving.app import build_app
from bindllm.serving.config import ServeConfig
from bindllm.serving.engine import Engine
from bindllm.serving.server import build_server
from recordings import numbered, video_file, wav
from serving_parts import data_uri
from tiny import tiny_model

CHAT = "/v1/chat/completions"
SECONDS = 120


class AnyEncoder:
    """Opens every modality with its loader, and projects a few numbers of the content: instant and deterministic."""

    modalities = (*bombs.LOADERS, "text")
    embedding_size, config = 16, {}

    def __init__(self) -> None:
        self._projection = torch.randn(64, 16, generator=torch.Generator().manual_seed(7))

    def fingerprint(self) -> str:
        return hashlib.sha256(b"AnyEncoder").hexdigest()

    def to(self, device) -> AnyEncoder:
        return self

    def prepare(self, media: Media) -> torch.Tensor:
        is_text = media.modality == "text"
        found = list(media.source.encode()) if is_text else bombs.LOADERS[media.modality](media.source)
        if media.modality == "audio":
            found = found[0]
        elif media.modality == "video":
            found = [frame for _, frame in found]
        values = np.asarray(found, dtype=np.float32).ravel()
        # Evenly spread over the content, and not all of one size.
        picked = values[np.linspace(0, len(values) - 1, 64).astype(int)]
        return torch.from_numpy(picked / max(1e-3, np.abs(picked).max()))

    def embed(self, modality: str, inputs: list[torch.Tensor]) -> torch.Tensor:
        return torch.nn.functional.normalize(torch.stack(list(inputs)) @ self._projection + 1e-3, dim=-1)


class LiveServer:
    """The application behind a real socket, with its engine.

    Attributes:
        url: where it listens.
        model: answers.
        engine: of the application.
        config: its limits.
    """

    def __init__(self, folder, *, slots: int = 8, queue: int = 128, **limits) -> None:
        self.model = tiny_model(folder, encoders=[AnyEncoder()])
        self.engine = Engine(self.model, slots=slots, queue=queue)
        self.config = ServeConfig("tiny", slots=slots, queue=queue, **limits)
        self.app = build_app(self.engine, self.config)
        bound = socket.socket()
        bound.bind(("127.0.0.1", 0))
        self.port = bound.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._server = build_server(self.app, self.engine, bound, drain=5, name="tiny")
        run = {"target": self._server.run, "kwargs": {"sockets": [bound]}, "daemon": True}
        self._thread = threading.Thread(**run)

    def __enter__(self) -> LiveServer:
        self._thread.start()
        until(lambda: self._server.started)
        return self

    def __exit__(self, *_) -> None:
        self._server.should_exit = True
        self._thread.join(SECONDS)
        self.engine.close(drain=0)
        assert not self._thread.is_alive()

    @property
    def held(self) -> int:
        """Bytes of bodies that the server holds."""
        layer = self.app.middleware_stack
        while not hasattr(layer, "_held"):
            layer = layer.app
        return layer._held[0]

    def is_idle(self) -> bool:
        return (self.engine.waiting, self.engine.running, self.held) == (0, 0, 0)

    def client(self, **options) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=SECONDS, trust_env=False, **options)


def until(condition, seconds: float = SECONDS) -> None:
    """Wait for a condition."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come true in time"
        time.sleep(0.02)


# --- media and requests ---


def some_media(draw: random.Random) -> tuple[str, bytes]:
    """Return a modality and a small file of it, unlike all others."""
    modality = draw.choice(list(bombs.LOADERS))
    noise = np.random.default_rng(draw.getrandbits(32))
    stream = io.BytesIO()
    match modality:
        case "image" | "thermal":
            Image.fromarray(noise.integers(0, 256, (9, 8, 3), np.uint8)).save(stream, "PNG")
        case "depth":
            Image.fromarray(noise.integers(500, 9000, (9, 8)).astype(np.uint16)).save(stream, "PNG")
        case "audio":
            stream.write(wav(noise.integers(-9999, 9999, (1, 400), np.int16), 16_000))
        case "video":
            stream.write(video_file("mp4", "mpeg4", [numbered(draw.randrange(1024)) for _ in range(2)]))
        case "point":
            np.save(stream, noise.normal(size=(40, 3)))
        case _:
            np.save(stream, noise.normal(size=(6, 40)))
    return modality, stream.getvalue()


def part_of(modality: str, content: bytes) -> dict:
    """Return a content part, in the spelling that clients use for the modality."""
    match modality:
        case "image":
            return {"type": "image_url", "image_url": {"url": data_uri(content)}}
        case "audio":
            return {
                "type": "input_audio",
                "input_audio": {"data": base64.b64encode(content).decode(), "format": "wav"},
            }
        case "video":
            return {"type": "video_url", "video_url": {"url": data_uri(content, "video/mp4")}}
        case _:
            return {"type": modality, modality: data_uri(content, "application/octet-stream")}


@dataclass
class Ask:
    """One request of a crowd.

    Args:
        kind: ``good``, ``leaves``, ``malformed`` or ``bomb``.
        body: JSON of the request, or bytes that are none.
        prompt: its text, for good ones.
        media: its media, for good ones.
    """

    kind: str
    body: dict | bytes
    prompt: str = ""
    media: tuple[tuple[str, bytes], ...] = ()

    def offline(self, model: BindLLM) -> str:
        """Return the answer of `BindLLM.generate`."""
        media = [Media(*item) for item in self.media]
        return model.generate(self.prompt, media, max_new_tokens=self.body["max_tokens"])


def malformed_bodies() -> list[dict | bytes]:
    """Return bodies that are not requests."""
    good = {"messages": [{"role": "user", "content": "Hi"}]}
    return [
        b"",
        b"{",
        b'{"messages": [' + b"[" * 50_000,
        b"\xff\xfe",
        b'{"messages": NaN}',
        {},
        {"messages": []},
        {"messages": "Hi"},
        {"messages": [{"role": "robot", "content": "Hi"}]},
        {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
        {
            "messages": [
                {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "/etc/passwd"}}]}
            ]
        },
        {
            "messages": [
                {
                    "role": "user",
                    "content": [{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}],
                }
            ]
        },
        {
            "messages": [
                {
                    "role": "user",
                    "content": [{"type": "image_url", "image_url": {"url": "http://127.0.0.1/"}}],
                }
            ]
        },
        {"messages": [{"role": "user", "content": [part_of("image", b"no image"), "?"]}]},
        {**good, "max_tokens": 0},
        {**good, "max_tokens": "9"},
        {**good, "temperature": -1},
        {**good, "n": 10**9},
        {**good, "stop": [""]},
        {**good, "response_format": {"type": "json_schema"}},
        b'{"messages": [{"role": "user", "content": "Hi"}], "max_tokens": ' + b"9" * 5000 + b"}",
        b'{"messages": [{"role": "user", "content": "Hi"}], "temperature": 1e999}',
        b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
        {**good, "model": "\ud800"},
        {**good, "model": "x" * 100_000},
        {**good, "seed": 2**64},
    ]


def draw_crowd(seed: int, size: int) -> list[Ask]:
    """Return requests in random order: a fifth leaves, a tenth is malformed, a tenth carries bombs."""
    draw, crowd = random.Random(seed), []
    waiting = bombs.small_bombs()
    kinds = ["leaves"] * (size // 5) + ["malformed"] * (size // 10) + ["bomb"] * (size // 10)
    kinds += ["good"] * (size - len(kinds))
    draw.shuffle(kinds)
    for number, kind in enumerate(kinds):
        if kind == "malformed":
            crowd.append(Ask(kind, draw.choice(malformed_bodies())))
            continue
        media = tuple(some_media(draw) for _ in range(draw.choice([0, 1, 1, 1, 2])))
        if kind == "bomb":
            media = (*media, draw.choice(waiting))
        prompt = f"{number}? " + "more " * draw.randrange(8)
        message = {"role": "user", "content": [*(part_of(*item) for item in media), prompt]}
        most = 60 if kind == "leaves" else draw.randrange(1, 24)
        body = {"model": "tiny", "messages": [message], "max_tokens": most, "stream": draw.random() < 0.5}
        crowd.append(Ask(kind, body, prompt.strip(), media))
    return crowd


# --- clients ---


async def _one(client: httpx.AsyncClient, ask: Ask, draw: random.Random) -> tuple[int, str]:
    """Send one request and return status and text; a client that leaves returns 0."""
    content = {"content": ask.body if isinstance(ask.body, bytes) else json.dumps(ask.body)}
    headers = {"content-type": "application/json"}
    if ask.kind == "leaves":
        # Some leave before anything was answered, some in the middle of a stream.
        with suppress(TimeoutError):
            async with asyncio.timeout(draw.random() * 2):
                async with client.stream("POST", CHAT, headers=headers, **content) as answer:
                    async for _ in answer.aiter_bytes():
                        if draw.random() < 0.2:
                            return 0, ""
        return 0, ""
    answer = await client.post(CHAT, headers=headers, **content)
    if answer.status_code != 200 or not ask.body["stream"]:
        body = answer.json()
        return answer.status_code, body["choices"][0]["message"][
            "content"
        ] if "choices" in body else answer.text
    return read_stream(answer.text)


def read_stream(stream: str) -> tuple[int, str]:
    """Return 200 and the text of all events, or 400 and the error that ended a stream after its first comment."""
    events = [line.removeprefix("data: ") for line in stream.splitlines() if line.startswith("data: ")]
    assert events.pop() == "[DONE]"
    chunks = [json.loads(event) for event in events]
    if "error" in chunks[-1]:
        assert chunks[-1]["error"]["type"] == "invalid_request_error", chunks
        return 400, chunks[-1]["error"]["message"]
    return 200, "".join(
        choice["delta"].get("content") or "" for chunk in chunks for choice in chunk["choices"]
    )


def send_all(url: str, crowd: list[Ask], *, seed: int = 0) -> list[tuple[int, str]]:
    """Send all requests at the same time, and return status and text of each."""

    async def run() -> list[tuple[int, str]]:
        draw = random.Random(seed)
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=url, timeout=SECONDS, trust_env=False, limits=limits) as client:
            return await asyncio.gather(*(_one(client, ask, draw) for ask in crowd))

    return asyncio.run(run())


def check_crowd(server: LiveServer, crowd: list[Ask]) -> Counter:
    """Send a crowd, compare every answer with its offline answer, and return the numbers of requests by kind."""
    found = send_all(server.url, crowd)
    until(server.is_idle)
    for ask, (status, text) in zip(crowd, found, strict=True):
        if ask.kind == "good":
            assert (status, text) == (200, ask.offline(server.model)), ask.prompt
        elif ask.kind == "malformed":
            assert status in (400, 403, 404), (status, ask.body, text)
        elif ask.kind == "bomb":
            assert status in (400, 413), (status, ask.media[-1][0], text)
    return Counter(ask.kind for ask in crowd)
