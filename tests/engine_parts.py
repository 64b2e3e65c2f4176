"""Requests for a serving engine, and a listener that collects answers."""

from __future__ import annotations

import random
import threading

import numpy as np

from bindllm import Conversation, Media, Message
from bindllm.serving.engine import Engine, Piece, Request, Ticket
from bindllm.shots import Shot
from tiny import COLORS

SECONDS = 60


class Listener:
    """Collects the pieces of one answer."""

    def __init__(self) -> None:
        self.pieces: list[Piece] = []
        self.ended = threading.Event()

    def __call__(self, piece: Piece) -> None:
        self.pieces.append(piece)
        if piece.is_last:
            self.ended.set()

    @property
    def text(self) -> str:
        return "".join(piece.text for piece in self.pieces)

    @property
    def tokens(self) -> int:
        return sum(piece.tokens for piece in self.pieces)

    @property
    def last(self) -> Piece:
        assert self.ended.wait(SECONDS), "the answer has not ended"
        assert not any(piece.is_last for piece in self.pieces[:-1])
        return self.pieces[-1]


def submit(engine: Engine, request: Request) -> tuple[Listener, Ticket]:
    listener = Listener()
    return listener, engine.submit(request, listener)


def answers(engine: Engine, requests: list[Request]) -> list[str]:
    """The texts of requests that are submitted at once; each must end well."""
    listeners = [submit(engine, request)[0] for request in requests]
    for listener in listeners:
        assert listener.last.error is None, listener.last.error
    return [listener.text for listener in listeners]


def stripes(*colors: str) -> Media:
    """An image of colored stripes."""
    pixels = np.concatenate([np.full((8, 4, 3), COLORS[color], dtype=np.uint8) for color in colors], axis=1)
    return Media.image(pixels)


def conversation(*parts: object) -> Conversation:
    return Conversation((Message("user", list(parts)),))


def draw_conversation(random: random.Random) -> Conversation:
    """One to three turns with zero to two images each, and texts of very different lengths."""
    messages = []
    for turn in range(random.choice([1, 1, 2, 3])):
        if turn:
            messages.append(Message("assistant", random.choice(["yes", "a red one"])))
        images = [
            stripes(*random.choices(list(COLORS), k=random.choice([1, 2])))
            for _ in range(random.choice([0, 1, 1, 2]))
        ]
        messages.append(Message("user", [*images, random.choice(["?", "What is it?", "Tell me more. " * 6])]))
    return Conversation(tuple(messages))


def draw_request(random: random.Random, **options: object) -> Request:
    shots = (
        (Shot("Which?", "red", media=[stripes("red")]), Shot("And?", "no")) if random.random() < 0.2 else ()
    )
    most = random.choice([1, 2, 5, 9, 17])
    return Request(draw_conversation(random), max_tokens=most, shots=shots, **options)
