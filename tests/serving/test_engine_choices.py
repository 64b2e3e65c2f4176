"""Choices of one request share its prompt, and a long prompt is read in chunks between the steps of others."""

from __future__ import annotations

import random
import time
from dataclasses import replace

import pytest

from bindllm.errors import EngineBusy, InputError
from bindllm.serving.engine import Engine, Request
from engine_parts import SECONDS, Listener, answers, build, conversation, draw_request, stripes, submit


@pytest.fixture(scope="module")
def model():
    return build("tokens")


def texts(listeners: list[Listener]) -> list[str]:
    """Texts of choices that must end well."""
    assert [str(listener.last.error or "") for listener in listeners] == [""] * len(listeners)
    return [listener.text for listener in listeners]


def choices(engine: Engine, request: Request, count: int) -> list[Listener]:
    listeners = [Listener() for _ in range(count)]
    engine.submit_choices(request, listeners)
    return listeners


def reads(model, monkeypatch) -> list[tuple[int, int]]:
    """Rows and columns of each call of the decoder that reads more than one token."""
    found = []
    forward = model.decoder.forward

    def record(*args, **kwargs):
        if kwargs["input_ids"].shape[1] > 1:
            found.append(tuple(kwargs["input_ids"].shape))
        return forward(*args, **kwargs)

    monkeypatch.setattr(model.decoder, "forward", record)
    return found


@pytest.mark.parametrize(
    ("parts", "slots"),
    [
        pytest.param(parts, slots, marks=() if slots == fast else pytest.mark.slow)
        for parts, fast in (("value", 3), ("tokens", 1), ("context", 8))
        for slots in (1, 3, 8)
    ],
)
def test_choices_are_separate_requests_with_one_prompt(parts, slots, monkeypatch):
    model = build(parts)
    draw = random.Random(slots)
    requests = [draw_request(draw, temperature=1.2, top_p=0.9, seed=10 * n) for n in range(4)]
    alone = [replace(request, seed=request.seed + n) for request in requests for n in range(5)]
    with Engine(model, slots=8) as engine:
        expected = answers(engine, alone)
        misses = engine.recent.misses
        assert len(set(expected)) > 8
    found = reads(model, monkeypatch)
    with Engine(model, slots=slots) as engine:
        # Together, so that choices of several requests join at the same time, and some wait for a slot.
        listeners = [listener for request in requests for listener in choices(engine, request, 5)]
        assert texts(listeners) == expected
        tokens = sum(len(one.ids) for one in prompts(model, requests))
        assert engine.counters.prompt_tokens == tokens
        assert engine.recent.misses <= misses
    assert sum(rows for rows, _ in found) == len(requests)


def prompts(model, requests):
    from bindllm.embeddings.embedder import RecentEmbeddings
    from bindllm.serving.request import make_input

    return [make_input(model, request, RecentEmbeddings(), 4096) for request in requests]


def test_choices_without_a_seed_differ(model):
    with Engine(model) as engine:
        found = texts(choices(engine, Request(conversation("?"), max_tokens=12, temperature=1.5), 4))
        assert len(set(found)) == 4
        greedy = texts(choices(engine, Request(conversation("?"), max_tokens=12), 2))
        assert len(set(greedy)) == 1


def test_choices_are_queued_together_or_not_at_all(model):
    with Engine(model, queue=3) as engine, engine._changed:
        request = Request(conversation("?"), max_tokens=2)
        choices(engine, request, 2)
        with pytest.raises(EngineBusy, match="2 requests are waiting already, at most 3"):
            choices(engine, request, 2)
        assert engine.waiting == 2


def test_a_prompt_that_fails_ends_all_of_its_choices(model):
    request = Request(conversation("x" * 600))
    with Engine(model, slots=2) as engine:
        for listener in choices(engine, request, 3):
            assert isinstance(listener.last.error, InputError)
        assert (engine.waiting, engine.running, engine.counters.finished["error"]) == (0, 0, 3)


def test_a_cancelled_choice_leaves_the_others(model):
    request = Request(conversation(stripes("red"), "?"), max_tokens=9, temperature=1.0, seed=1)
    with Engine(model, slots=1) as engine:
        expected = texts(choices(engine, request, 3))
        listeners = [Listener() for _ in range(3)]
        with engine._changed:
            engine.submit_choices(request, listeners)[1].cancel()
        assert texts([listeners[0], listeners[2]]) == [expected[0], expected[2]]
        assert listeners[1].pieces == []


CHUNKED = [
    ("llama", "tokens", {}),
    ("mistral", "value", {"sliding_window": 8}),
    ("gemma3_text", "attend", {"sliding_window": 8}),
    ("opt", "residual", {"ffn_dim": 64, "word_embed_proj_dim": 32}),
    ("llama", "cross", {}),
    ("gpt_oss", "value", {"sliding_window": 8}),
]


def check_chunks(model, *sizes: int) -> None:
    draw = random.Random(7)
    requests = [draw_request(draw) for _ in range(5)]
    expected = [
        model.generate(one.conversation, shots=list(one.shots), max_new_tokens=one.max_tokens)
        for one in requests
    ]
    for size in sizes:
        with Engine(model, prefill=size, slots=3) as engine:
            assert answers(engine, requests) == expected, size


@pytest.mark.parametrize(("family", "parts", "changes"), CHUNKED)
def test_prompts_in_chunks_have_the_answers_of_whole_ones(family, parts, changes):
    check_chunks(build(parts, family, **changes), 7, 64)


# One token at a time takes seconds, and the family with a window says as much of it as all.
@pytest.mark.parametrize(
    ("family", "parts", "changes"),
    [pytest.param(*one, marks=pytest.mark.slow if number != 1 else ()) for number, one in enumerate(CHUNKED)],
)
def test_prompts_token_by_token_have_the_answers_of_whole_ones(family, parts, changes):
    check_chunks(build(parts, family, **changes), 1)


def test_running_answers_wait_for_one_chunk_of_a_long_prompt_only(model, monkeypatch):
    found = reads(model, monkeypatch)
    long = Request(conversation(stripes("red"), "x" * 300), max_tokens=1)
    with Engine(model, prefill=32) as engine:
        running, ticket = submit(engine, Request(conversation("?"), max_tokens=450))
        end = time.monotonic() + SECONDS
        while not running.pieces and time.monotonic() < end:
            time.sleep(0.001)
        listener, _ = submit(engine, long)
        steps = engine.counters.steps
        assert listener.last.error is None
        # A step follows each chunk.
        assert engine.counters.steps - steps >= 300 // 32
        ticket.cancel()
    assert max(columns for _, columns in found) <= 32


@pytest.mark.parametrize("gone", ["cancelled", "late"])
def test_a_client_that_leaves_ends_the_reading_of_its_prompt(model, monkeypatch, gone):
    found = reads(model, monkeypatch)
    forward = model.decoder.forward
    monkeypatch.setattr(model.decoder, "forward", lambda *a, **k: time.sleep(0.02) or forward(*a, **k))
    long = Request(conversation("x" * 400), max_tokens=1, timeout=0.2 if gone == "late" else None)
    with Engine(model, prefill=4) as engine:
        listener, ticket = submit(engine, long)
        end = time.monotonic() + SECONDS
        while not found and time.monotonic() < end:
            time.sleep(0.001)
        assert engine.running == 1
        if gone == "cancelled":
            ticket.cancel()
        else:
            assert listener.last.finish == "timeout"
        while engine.running and time.monotonic() < end:
            time.sleep(0.001)
        assert len(found) < 100
        assert answers(engine, [Request(conversation("?"), max_tokens=1)])
