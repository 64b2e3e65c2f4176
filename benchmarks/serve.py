"""The serving engine: the same requests against one static batch of `generate`, and 32 clients against one."""

from __future__ import annotations

import threading

import torch

from benchmarks.measure import Metric, paired
from benchmarks.parts import bound_model
from benchmarks.serve_http import http_metrics
from bindllm import Conversation, Media, Message
from bindllm.model.bindllm import BindLLM
from bindllm.serving.engine import Engine, Piece, Request

CLIENTS, NEW_TOKENS = 32, 32


def conversations(count: int) -> list[Conversation]:
    """Return the same question about images of noise."""
    images = torch.randint(0, 256, (count, 224, 224, 3), dtype=torch.uint8).numpy()
    parts = ([Media.image(image), "Describe this image in one sentence."] for image in images)
    return [Conversation((Message("user", list(each)),)) for each in parts]


def answer_all(engine: Engine, prompts: list[Conversation]) -> None:
    """Submit all requests at once, and wait for the last answer."""
    ended, pieces = threading.Semaphore(0), []

    def listen(piece: Piece) -> None:
        pieces.append(piece)
        if piece.is_last:
            ended.release()

    for prompt in prompts:
        engine.submit(Request(prompt, max_tokens=NEW_TOKENS), listen)
    for _ in prompts:
        ended.acquire()
    if errors := [piece.error for piece in pieces if piece.error]:
        raise SystemExit(f"serve: {errors[0]}")
    # The rates below count on it.
    if (found := sum(piece.tokens for piece in pieces)) != (wanted := len(prompts) * NEW_TOKENS):
        raise SystemExit(f"serve: {found} tokens were generated, expected {wanted}")


def endless_model() -> BindLLM:
    """Return a model whose answers end at their limit only, so that both sides generate the same number of tokens."""
    model = bound_model().eval()
    # No token has this id.
    model.settings.eos_token_id = [model.decoder.config.vocab_size]
    return model


def metrics() -> list[Metric]:
    """Measure on one machine; media are encoded before, because encoding is measured separately."""
    model, prompts = endless_model(), conversations(CLIENTS)
    ids, mask, index, embeddings, tokens = model.prepare(prompts, None)

    def static() -> None:
        answers = model.generate_from(ids, mask, index, embeddings, tokens, max_new_tokens=NEW_TOKENS)
        model.decode(answers)

    with Engine(model, slots=CLIENTS) as engine:
        # The first, uncounted run leaves the embeddings in memory.
        ratio, a, b = paired(static, lambda: answer_all(engine, prompts), repeats=3)
        # In turn too: a machine that is busy in one half only would decide the ratio.
        gain, one, crowd = paired(
            lambda: answer_all(engine, prompts[:1]), lambda: answer_all(engine, prompts), repeats=3
        )
        http = http_metrics(engine, prompts, new_tokens=NEW_TOKENS, static=static)
    many = CLIENTS * NEW_TOKENS
    return [
        Metric(
            "serve_over_generate",
            ratio,
            "ratio of tokens/s",
            1.0,
            f"{many / b:.1f} tokens/s over {many / a:.1f} of one batch of {CLIENTS}; at least 0.85",
        ),
        Metric(
            "serve_throughput_32_over_1",
            CLIENTS * gain,
            "ratio of tokens/s",
            float(CLIENTS),
            f"{many / crowd:.1f} tokens/s over {NEW_TOKENS / one:.1f} of one client; at least 5; a step reads all "
            f"weights whatever the batch, so {CLIENTS} is the ceiling",
        ),
        *http,
    ]
