"""Answers of the serving engine in any company: those of `BindLLM.generate` for each request alone."""

from __future__ import annotations

import random
import time

import pytest

from bindllm import BindLLM, Conversation, Message
from bindllm.embeddings.datastore import Datastore, Record
from bindllm.errors import DecoderError
from bindllm.serving.engine import Engine, Request
from engine_parts import PARTS, answers, build, draw_request, stripes, submit
from tiny import ColorEncoder


def records(encoder: ColorEncoder) -> Datastore:
    colors = ("red", "green", "blue")
    inputs = [encoder.prepare(stripes(color)) for color in colors]
    found = [Record((), color, "image", (f"a {color} thing",)) for color in colors]
    return Datastore(encoder.embed("image", inputs), found, [encoder.fingerprint()])


def alone(model: BindLLM, request: Request) -> str:
    shots = list(request.shots)
    return model.generate(request.conversation, shots=shots, max_new_tokens=request.max_tokens)


def check_company(model: BindLLM, *, seed: int, count: int = 12, **options) -> None:
    """Requests that arrive at random moments answer as each alone."""
    draw = random.Random(seed)
    requests = [draw_request(draw) for _ in range(count)]
    expected = [alone(model, request) for request in requests]
    assert len(set(expected)) > count // 3
    with Engine(model, **options) as engine:
        found = []
        for request in requests:
            found.append(submit(engine, request)[0])
            if draw.random() < 0.3:
                time.sleep(0.005 * draw.random())
        assert [listener.last.error for listener in found] == [None] * count
    assert [listener.text for listener in found] == expected


# Every kind of model and every number of slots; the other pairs say little more.
@pytest.mark.parametrize(
    ("parts", "seed"),
    [
        pytest.param(parts, seed, marks=pytest.mark.slow if seed != number % 3 else ())
        for number, parts in enumerate(PARTS)
        for seed in range(3)
    ],
)
def test_answers_in_company_are_those_of_generate_alone(parts, seed):
    model = build(parts)
    if model.context is not None:
        model.datastore = records(*model.encoders)
    check_company(model, seed=seed, slots=[2, 5, 16][seed])


FAMILIES = [
    ("mistral", "value", {"sliding_window": 8}),
    ("qwen2", "attend", {}),
    ("qwen3", "tokens", {}),
    ("gemma2", "value", {"sliding_window": 8}),
    ("gemma3_text", "attend", {"sliding_window": 8}),
    ("olmo2", "attend", {}),
    ("cohere2", "value", {"sliding_window": 8}),
    ("gpt_oss", "value", {"sliding_window": 8}),
    ("granite", "residual", {}),
    ("opt", "residual", {"ffn_dim": 64, "word_embed_proj_dim": 32}),
    ("stablelm", "residual", {}),
    ("phi3", "residual", {}),
    ("mixtral", "value", {}),
]


@pytest.mark.parametrize(("family", "parts", "changes"), FAMILIES)
def test_decoder_families_answer_as_alone(family, parts, changes):
    check_company(build(parts, family, **changes), seed=7, count=5, slots=3)


@pytest.mark.parametrize(
    ("family", "changes", "layer"),
    [
        ("lfm2", {"layer_types": ["conv", "full_attention", "full_attention"]}, "LinearAttentionLayer"),
        ("jamba", {"num_experts": 2}, "LinearAttentionLayer"),
    ],
)
def test_a_decoder_with_another_cache_is_refused(family, changes, layer):
    with pytest.raises(DecoderError, match=f"keeps {layer} in its cache"):
        Engine(build("residual", family, **changes))


@pytest.mark.parametrize("parts", ["context", "words as context"])
def test_text_alone_is_answered_in_company_of_requests_with_records(parts):
    model = build(parts)
    model.datastore = records(*model.encoders)
    asked = [Conversation((Message("user", [*media, "What?"]),)) for media in ([], [stripes("red")], [])]
    with Engine(model, slots=3) as engine:
        found = answers(engine, [Request(each, max_tokens=5) for each in asked])
    assert found == [model.generate(each, max_new_tokens=5) for each in asked]
