"""Answers of the serving engine in any company: those of `BindLLM.generate` for each request alone."""

from __future__ import annotations

import random
import time

import pytest
import torch

from bindllm import BindLLM
from bindllm.embeddings.datastore import Datastore, Record
from bindllm.errors import DecoderError
from bindllm.model.bind_network import BindConfig
from bindllm.model.context import ContextConfig
from bindllm.model.decoder import DecoderConfig
from bindllm.model.injection import InjectConfig
from bindllm.serving.engine import Engine, Request
from engine_parts import draw_request, stripes, submit
from tiny import ColorEncoder, TokenEncoder, tiny_decoder, tiny_tokenizer

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
    "context": {"inject": InjectConfig(kind="value"), **CONTEXT},
    "tokens and context": {"inject": InjectConfig(kind="attend"), **TOKENS, **CONTEXT},
}


def records(encoder: ColorEncoder) -> Datastore:
    colors = ("red", "green", "blue")
    inputs = [encoder.prepare(stripes(color)) for color in colors]
    found = [Record((), color, "image", (f"a {color} thing",)) for color in colors]
    return Datastore(encoder.embed("image", inputs), found, [encoder.fingerprint()])


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


@pytest.mark.parametrize("parts", PARTS)
@pytest.mark.parametrize("seed", range(3))
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
    check_company(build(parts, family, **changes), seed=7, count=8, slots=3)


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
