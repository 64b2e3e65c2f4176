"""Shots that all prompts of a batch have in common are read once, and the answers stay the same."""

from __future__ import annotations

from contextlib import contextmanager

import numpy as np
import pytest
import torch

from bindllm import Conversation, Media, Message, Shot
from bindllm.model.bind_network import BindConfig
from bindllm.model.context import ContextConfig
from bindllm.model.context.records import CONTEXT_INPUTS
from bindllm.model.generation import shared
from bindllm.model.injection import InjectConfig
from tiny import COLORS, FAMILIES, TokenEncoder, save_tiny_decoder, tiny_model


def image(color: str) -> Media:
    return Media.image(np.full((8, 8, 3), COLORS[color], dtype=np.uint8))


RED, GREEN, TEXT = (
    Shot("Color?", "red", media=[image("red")]),
    Shot("Color?", "green", media=[image("green")]),
    Shot("Sky?", "blue"),
)
SHOTS = [RED, TEXT, GREEN]
# Questions of several lengths, with one media group, two media in one, and none.
PROMPTS = ["What?", "And this one, please?", "Sky?", "Is it of another color than those before it?"]
MEDIA = [[image("blue")], [image("red"), image("white")], [], [image("green")]]
# Windows that end inside the shots: rows with more padding need keys that a whole window has dropped.
WINDOWS = {
    "mistral": {"sliding_window": 24},
    "gemma2": {"sliding_window": 16},
    "gemma3_text": {"query_pre_attn_scalar": 5, "sliding_window": 16},
}


@contextmanager
def forwards(model):
    """Rows and tokens of each call of the decoder, and the logits of its last position."""
    calls, logits = [], []

    def record(_, __, kwargs, output):
        calls.append(tuple(kwargs["input_ids"].shape))
        logits.append(output.logits[..., -1, :])

    hook = model.decoder.register_forward_hook(record, with_kwargs=True)
    yield calls, logits
    hook.remove()


def both_ways(model, monkeypatch, *arguments, seed=None, num_read=1, **options):
    """Answers and logits with and without reuse, and the calls of the decoder with it."""
    found = []
    for least in (1, 10**9):
        monkeypatch.setattr(shared, "MIN_SAVED", least)
        if seed is not None:
            torch.manual_seed(seed)
        with forwards(model) as (calls, logits):
            found.append((model.generate(*arguments, **options), calls, logits))
    (answers, calls, logits), (plain, plain_calls, plain_logits) = found
    assert answers == plain
    # The first call only reads the beginning, once for each media.
    assert calls[0][0] == num_read
    assert calls[1][1] < plain_calls[0][1]
    for own, other in zip(logits[1:], plain_logits, strict=True):
        torch.testing.assert_close(own, other, atol=1e-3, rtol=1e-3)
    return calls


def model_of(folder, kind: str, tokens: int, **parts):
    bind = BindConfig(depth=1, expansion=2, tokens=tokens)
    return tiny_model(folder, inject=InjectConfig(kind=kind), bind=bind, encoders=[TokenEncoder()], **parts)


@pytest.mark.parametrize(
    ("family", "kind", "tokens"),
    [
        *(
            ("llama", *each)
            for each in (
                ("residual", 1),
                ("value", 1),
                ("attend", 1),
                ("attend", 3),
                ("cross", 1),
                ("cross", "all"),
            )
        ),
        *((family, "attend", 3) for family in (*FAMILIES[1:], *WINDOWS, "olmo2", "cohere")),
    ],
)
def test_answers_and_logits_are_the_same(tmp_path, monkeypatch, family, kind, tokens):
    model = model_of(save_tiny_decoder(tmp_path, family, **WINDOWS.get(family, {})), kind, tokens)
    calls = both_ways(model, monkeypatch, PROMPTS, MEDIA, shots=SHOTS, max_new_tokens=6)
    # The shots once, then only the questions.
    width = model.prepare(PROMPTS, MEDIA, shots=SHOTS)[0].shape[1]
    longest = model.prepare(PROMPTS, MEDIA)[0].shape[1]
    assert calls[1][0] == len(PROMPTS)
    assert calls[1][1] <= longest < width // 2
    # Their media reach the answers: other ones give other logits.
    swapped = [Shot("Color?", "red", GREEN.media), TEXT, Shot("Color?", "green", RED.media)]
    first = []
    for shots in (SHOTS, swapped):
        monkeypatch.setattr(shared, "MIN_SAVED", 1)
        with forwards(model) as (_, logits):
            model.generate(PROMPTS, MEDIA, shots=shots, max_new_tokens=1)
        first.append(logits[1])
    assert not torch.allclose(*first, atol=1e-2)


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 3, "num_return_sequences": 2},
        {"num_return_sequences": 3, "temperature": 2.0, "seed": 1},
        {"repetition_penalty": 1.5, "stop_strings": ["e"]},
        {"max_length": 200},
    ],
)
def test_with_every_kind_of_decoding(decoder, monkeypatch, options):
    model = tiny_model(decoder)
    both_ways(model, monkeypatch, PROMPTS, MEDIA, shots=SHOTS, **{"max_new_tokens": 6, **options})


def test_several_answers_to_one_prompt_read_it_once(decoder, monkeypatch):
    model = tiny_model(decoder)
    options = {"num_return_sequences": 4, "temperature": 2.0, "max_new_tokens": 4, "seed": 0}
    calls = both_ways(model, monkeypatch, "What?", [image("blue")], shots=SHOTS, **options)
    assert calls[1] == (4, 1)


def test_a_question_that_is_longer_than_all_shots(decoder, monkeypatch):
    """The shortest row has nothing but padding in the columns that are read once."""
    model = tiny_model(decoder)
    both_ways(model, monkeypatch, ["?", "Why? " * 50], [[image("red")], []], shots=[TEXT], max_new_tokens=4)


def test_shots_without_media_and_a_system_message(decoder, monkeypatch):
    model = tiny_model(decoder)
    both_ways(model, monkeypatch, PROMPTS, None, shots=[TEXT, TEXT], max_new_tokens=4)
    system = Message("system", "Answer in one word, and do not say which one it is.")
    asked = [
        Conversation((system, Message("user", [*row, text])))
        for text, row in zip(PROMPTS, MEDIA, strict=True)
    ]
    calls = both_ways(model, monkeypatch, asked[2:3] * 2 + [asked[2]], max_new_tokens=4)
    assert calls[1] == (3, 1)


@pytest.mark.parametrize(("kind", "tokens"), [("value", 1), ("cross", "all")])
@pytest.mark.parametrize(("shots", "repeats"), [([], 1), ([RED], 3)])
def test_questions_about_one_image_read_their_beginning_once(
    decoder, monkeypatch, kind, tokens, shots, repeats
):
    model = model_of(decoder, kind, tokens)
    system = Message("system", "Answer in one word, and do not say which one it is.")
    asked = [
        Conversation((system, Message("user", [image(color), text])))
        for text in ("What?", "And this one, please?", "Is it of another color?")
        for color in ("blue", "green")
    ]
    options = {"num_return_sequences": repeats, "num_beams": repeats, "shots": shots, "max_new_tokens": 4}
    calls = both_ways(model, monkeypatch, asked, num_read=2, **options)
    assert calls[1][0] == 6 * repeats


def test_retrieved_records_of_the_shots_are_read_with_them(decoder, monkeypatch):
    context = ContextConfig(records=2, latents=2, width=16, depth=1)
    model = tiny_model(decoder, inject=InjectConfig(kind="attend"), context=context)
    torch.nn.init.normal_(model.injection.context_gates, std=2.0)
    batch = dict(
        zip(
            ("input_ids", "attention_mask", "media_index", "embeddings"),
            model.prepare(PROMPTS, MEDIA, shots=SHOTS),
            strict=False,
        )
    )
    size, groups = batch["embeddings"].shape[:2]
    generator = torch.Generator().manual_seed(0)
    records = (
        torch.nn.functional.normalize(torch.randn(size, groups, 2, 16, generator=generator), dim=-1),
        torch.rand(size, groups, 2, generator=generator),
        torch.randint(3, 200, (size, groups, 2, 5), generator=generator),
    )
    # The shots have two groups, the same in all rows.
    for values in records:
        values[:, :2] = values[:1, :2]
    batch |= dict(zip(CONTEXT_INPUTS, records, strict=True))
    found = []
    for least in (1, 10**9):
        monkeypatch.setattr(shared, "MIN_SAVED", least)
        with forwards(model) as (calls, logits):
            found.append((model.generate_from(**batch, max_new_tokens=4), calls[0], logits))
    assert torch.equal(found[0][0], found[1][0])
    assert found[0][1][0] == 1
    torch.testing.assert_close(found[0][2][1], found[1][2][0], atol=1e-3, rtol=1e-3)
    # Other records of one row: its shots are not those of the others.
    batch["context_scores"][0, 0] += 1
    monkeypatch.setattr(shared, "MIN_SAVED", 1)
    with forwards(model) as (calls, _):
        model.generate_from(**batch, max_new_tokens=1)
    assert calls[0][0] == 2


def plain(model, *arguments, **options) -> bool:
    with forwards(model) as (calls, _):
        model.generate(*arguments, max_new_tokens=2, **options)
    return len(calls) == 2


@pytest.mark.parametrize(
    ("arguments", "options"),
    [
        (("What?", [image("blue")]), {"shots": SHOTS}),
        (("What?", [image("blue")]), {"shots": SHOTS, "prompt_lookup_num_tokens": 2}),
        ((PROMPTS, MEDIA), {"shots": SHOTS, "cache_implementation": "static"}),
        ((PROMPTS, MEDIA), {"shots": SHOTS, "use_cache": False}),
        ((PROMPTS[:2], MEDIA[:2]), {"shots": [[RED], [TEXT, RED]]}),
        ((PROMPTS[:2], MEDIA[:2]), {"shots": [[RED], [Shot("Color?", "red", GREEN.media)]]}),
    ],
)
def test_without_a_common_beginning_or_with_another_cache(decoder, arguments, options):
    assert plain(tiny_model(decoder), *arguments, **options)


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}),
        ("lfm2", {"layer_types": ["conv", "full_attention", "conv"]}),
    ],
)
def test_decoders_whose_first_tokens_depend_on_later_ones(tmp_path, family, changes):
    model = tiny_model(save_tiny_decoder(tmp_path, family, **changes), inject=InjectConfig(kind="residual"))
    assert plain(model, PROMPTS, MEDIA, shots=SHOTS)


def test_a_sharded_decoder_runs_as_often_in_all_processes(decoder):
    model = tiny_model(decoder)
    assert not plain(model, PROMPTS, MEDIA, shots=SHOTS)
    model.decoder._is_fsdp_managed_module = True
    assert plain(model, PROMPTS, MEDIA, shots=SHOTS)


def test_media_of_shared_shots_are_embedded_once(decoder, monkeypatch):
    model = tiny_model(decoder)
    seen = []
    prepare = model.encoders[0].prepare
    monkeypatch.setattr(model.encoders[0], "prepare", lambda media: seen.append(media) or prepare(media))
    model.generate(PROMPTS, MEDIA, shots=SHOTS, max_new_tokens=1)
    # Two of the shots, and four of the questions.
    assert len(seen) == 6
