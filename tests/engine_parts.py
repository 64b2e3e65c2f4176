"""Models and requests for a serving engine, and a listener that collects answers."""

from __future__ import annotations

import random
import threading

import numpy as np
import torch

from bindllm import BindLLM, Conversation, Media, Message
from bindllm.model.bind_network import BindConfig
from bindllm.model.context import ContextConfig
from bindllm.model.decoder import DecoderConfig
from bindllm.model.injection import InjectConfig
from bindllm.serving.engine import Engine, Piece, Request, Ticket
from bindllm.shots import Shot
from tiny import COLORS, ColorEncoder, TokenEncoder, tiny_decoder, tiny_tokenizer

SECONDS = 60
TOKENS = {"bind": BindConfig(depth=1, expansion=2, tokens=4), "encoders": [TokenEncoder()]}
CONTEXT = {"context": ContextConfig(records=3, latents=2, width=16, text_length=6)}
PARTS = {
    "value": {"inject": InjectConfig(kind="value")},
    "residual": {"inject": InjectConfig(kind="residual")},
    "attend": {"inject": InjectConfig(kind="attend")},
    "tokens": {"inject": InjectConfig(kind="attend", layers=[0, 2]), **TOKENS},
    "cross": {"inject": InjectConfig(kind="cross"), **TOKENS},
    "all tokens": {
        "inject": InjectConfig(kind="cross"),
        **TOKENS,
        "bind": BindConfig(depth=1, expansion=2, tokens="all"),
    },
    "words as context": {
        "inject": InjectConfig(kind="cross"),
        **TOKENS,
        "bind": BindConfig(depth=1, expansion=2, tokens="all"),
        "context": ContextConfig(records=3, latents="all", text_length=6),
    },
    "context": {"inject": InjectConfig(kind="value"), **CONTEXT},
    "tokens and context": {"inject": InjectConfig(kind="attend"), **TOKENS, **CONTEXT},
}


def build(parts: str = "value", family: str = "llama", **changes) -> BindLLM:
    """A model with open gates on a decoder of a family."""
    decoder = tiny_decoder(family, **changes).requires_grad_(False)
    options = {"encoders": [ColorEncoder()], "bind": BindConfig(depth=1, expansion=2), **PARTS[parts]}
    torch.manual_seed(0)
    model = BindLLM(decoder, tiny_tokenizer(), DecoderConfig("tiny"), **options).eval()
    torch.nn.init.normal_(model.injection.gates, std=2.0)
    if model.context is not None:
        torch.nn.init.normal_(model.injection.context_gates, std=2.0)
    return model


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
