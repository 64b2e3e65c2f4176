"""A whole model with several bind tokens: tokens of the encoder, fewer tokens, and media without any."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from torch import nn

from bindllm import BindLLM, Conversation, Media, Message
from bindllm.errors import InputError
from bindllm.model import bind_network
from bindllm.model.bind_network import BindConfig
from bindllm.model.injection import InjectConfig
from tiny import COLORS, ColorEncoder, TokenEncoder, tiny_model

NUM_TOKENS = 4


class ThermalEncoder(ColorEncoder):
    """Serves a modality that has no tokens."""

    modalities = ("thermal",)


# Each kind with a way to make bind tokens: learned latents, or one of each token of the encoder.
WAYS = {"attend": NUM_TOKENS, "cross": "all"}


def build(folder, *, kind="attend", encoders=(TokenEncoder, ThermalEncoder), **options) -> BindLLM:
    return tiny_model(
        folder,
        encoders=[encoder() for encoder in encoders],
        bind=BindConfig(**{"depth": 1, "expansion": 2, "tokens": NUM_TOKENS, **options}),
        inject=InjectConfig(kind=kind),
    )


@pytest.fixture(scope="module", params=WAYS)
def model(request, decoder):
    return build(decoder, kind=request.param, tokens=WAYS[request.param])


def image(*colors: str) -> Media:
    """Stripes of colors, each as wide as a cell of the encoder's grid."""
    pixels = np.concatenate([np.full((8, 2, 3), COLORS[color], dtype=np.uint8) for color in colors], axis=1)
    return Media.image(pixels)


STRIPES = image("red", "red", "blue", "white"), image("blue", "green", "green", "red")
THERMAL = Media("thermal", image("red", "blue", "blue", "blue").source)


def batch(rows: int = 2):
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(3, 259, (rows, 6), generator=generator)
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "media_index": torch.zeros_like(ids),
        "embeddings": nn.functional.normalize(torch.randn(rows, 1, 16, generator=generator), dim=-1),
        "tokens": torch.randn(rows, 1, 5, 8, generator=generator),
    }


def test_the_answer_depends_on_the_tokens_of_its_own_row_only(model):
    inputs = batch()
    base = model(**inputs).logits
    for n in range(5):
        changed = inputs["tokens"].clone()
        changed[0, 0, n] += 1
        found = model(**{**inputs, "tokens": changed}).logits
        assert not torch.allclose(found[0], base[0], atol=1e-4)
        assert torch.equal(found[1], base[1])


def test_generation_is_the_argmax_of_the_forward_without_a_cache(model):
    inputs = batch()
    options = {"max_new_tokens": 5, "eos_token_id": None, "pad_token_id": 0}
    found = model.generate_from(**inputs, **options)
    ids, rows = inputs["input_ids"], len(inputs["input_ids"])
    for _ in range(5):
        grown = {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "media_index": torch.zeros_like(ids),
        }
        ids = torch.cat([ids, model(**{**inputs, **grown}).logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(found, ids[:, -5:])
    assert len({tuple(row) for row in found.tolist()}) == rows
    beams = model.generate_from(**inputs, **options, num_beams=3)
    alone = [
        model.generate_from(**{name: x[row : row + 1] for name, x in inputs.items()}, **options, num_beams=3)
        for row in range(rows)
    ]
    assert torch.equal(beams, torch.cat(alone))


def test_requests_in_threads_with_images_of_their_own(model):
    def ask(media):
        return model.generate("What?", [media], max_new_tokens=6)

    several = [image(*colors) for colors in zip(*([list(COLORS)] * 4), strict=True)] + list(STRIPES)
    alone = [ask(media) for media in several]
    assert len(set(alone)) > 1
    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(ask, several)) == alone


def test_requests_read_the_tokens_of_the_encoder(model):
    ids, mask, index, embeddings, tokens = model.prepare(["What?", "What?"], [[STRIPES[0]], [STRIPES[1]]])
    assert tokens.shape == (2, 1, 16, 8)
    assert not torch.equal(tokens[0], tokens[1])
    assert torch.equal(embeddings[:, 0], model.encode(list(STRIPES)))
    expected = model(ids, mask, index, embeddings, tokens=tokens).logits
    assert not torch.allclose(model(ids, mask, index, embeddings).logits, expected, atol=1e-3)


def test_media_without_tokens_have_bind_token_0_also_next_to_an_image(model):
    *_, tokens = model.prepare("What?", [THERMAL])
    assert tokens.abs().max() == 0
    turns = (
        Message("user", [STRIPES[0], "What?"]),
        Message("assistant", "It."),
        Message("user", [THERMAL, "And?"]),
    )
    together = model.generate([Conversation(turns), "What?"], [[], [THERMAL]], max_new_tokens=6)
    assert together[1] == model.generate("What?", [THERMAL], max_new_tokens=6)
    assert together[0] == model.generate(Conversation(turns), max_new_tokens=6)
    # Two media of one message share its bind tokens; only the image has tokens.
    *_, both = model.prepare("What?", [STRIPES[0], THERMAL])
    *_, one = model.prepare("What?", [STRIPES[0]])
    assert torch.equal(both, one)


@pytest.mark.parametrize("kind", WAYS)
def test_one_bind_token_reads_no_tokens(decoder, kind):
    model = build(decoder, kind=kind, tokens=WAYS[kind])
    most = model.bind.num_tokens
    several = model.generate("What?", [STRIPES[0]], max_new_tokens=6)
    model.bind.num_tokens = 1
    *_, tokens = model.prepare("What?", [STRIPES[0]])
    assert tokens is None
    inputs = batch()
    expected = model(**inputs).logits
    inputs.pop("tokens")
    assert torch.equal(model(**inputs).logits, expected)
    one = model.generate("What?", [STRIPES[0]], max_new_tokens=6)
    model.bind.num_tokens = most
    assert model.generate("What?", [STRIPES[0]], max_new_tokens=6) == several != one


def test_a_cache_changes_the_pooled_embedding_only(model):
    class Doubling:
        def blend_groups(self, embeddings, groups, encoders):
            return -embeddings

    *_, before, tokens = model.prepare("What?", [STRIPES[0]])
    *_, after, again = model.prepare("What?", [STRIPES[0]], Doubling())
    assert torch.equal(after, -before)
    assert torch.equal(again, tokens)


@pytest.mark.parametrize("kind", WAYS)
def test_training_with_one_bind_token_reaches_every_parameter(decoder, monkeypatch, kind):
    monkeypatch.setattr(bind_network, "draw_count", lambda _: 1)
    monkeypatch.setattr(bind_network, "draw_alone", lambda shape: torch.ones(shape, dtype=torch.bool))
    model = build(decoder, kind=kind, tokens=WAYS[kind])
    model.set_trainable(["bind", "inject"])
    model.train()
    inputs = batch()
    dropped = model(**inputs).logits
    dropped.square().mean().backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad.isfinite().all(), name
    model.eval()
    model.bind.num_tokens = 1
    torch.testing.assert_close(dropped, model(**inputs).logits, atol=2e-5, rtol=1e-4)


def test_saved_and_loaded_with_all_and_with_fewer_tokens(decoder, tmp_path):
    model = build(decoder, encoders=[TokenEncoder])
    model.save_pretrained(tmp_path / "m")
    manifest = json.loads((tmp_path / "m" / "bindllm.json").read_text())
    assert (manifest["bind"]["tokens"], manifest["bind"]["token_modalities"]) == (NUM_TOKENS, ["image"])
    assert manifest["inject"]["kind"] == "attend"
    assert "4 bind tokens of image media" in (tmp_path / "m" / "README.md").read_text()
    load = {"device": "cpu", "allow": ["tiny.TokenEncoder"]}
    inputs = batch()
    assert torch.equal(
        BindLLM.from_pretrained(tmp_path / "m", **load)(**inputs).logits, model(**inputs).logits
    )
    few = BindLLM.from_pretrained(tmp_path / "m", **load, tokens=2)
    model.bind.num_tokens = 2
    assert torch.equal(few(**inputs).logits, model(**inputs).logits)
    few.save_pretrained(tmp_path / "again")
    assert BindLLM.from_pretrained(tmp_path / "again", **load).bind.num_tokens == NUM_TOKENS
    with pytest.raises(InputError, match="9 bind tokens were asked for.*bind.tokens 4"):
        BindLLM.from_pretrained(tmp_path / "m", **load, tokens=9)
    manifest["inject"]["kind"] = "value"
    (tmp_path / "m" / "bindllm.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match="kind 'value' adds one vector"):
        BindLLM.from_pretrained(tmp_path / "m", **load)


def test_one_bind_token_of_each_token_of_the_encoder(decoder, tmp_path):
    """Each keeps its place and sees no other; a wide image of the same encoder may have more."""
    model = build(decoder, kind="cross", tokens="all", encoders=[TokenEncoder])
    inputs = batch()
    found = model.bind(inputs["embeddings"], inputs["tokens"])
    assert found.shape == (2, 1, 6, 32)
    changed = inputs["tokens"].clone()
    changed[0, 0, 1] += 1
    changed[1, 0, 4] = 0
    again = model.bind(inputs["embeddings"], changed)
    assert (again != found).any(-1)[:, 0].nonzero().tolist() == [[0, 2], [1, 5]]
    assert again[1, 0, 5].abs().max() == 0
    # Many images in one message.
    many = torch.ones(1, 1, bind_network.MOST_BIND_TOKENS + 1, 8)
    assert model.bind(inputs["embeddings"][:1], many)[0, 0].any(-1).sum() == many.shape[2] + 1
    model.save_pretrained(tmp_path / "m")
    assert json.loads((tmp_path / "m" / "bindllm.json").read_text())["bind"]["tokens"] == "all"
    assert "one bind token of each encoder token of image media" in (tmp_path / "m" / "README.md").read_text()
    load = {"device": "cpu", "allow": ["tiny.TokenEncoder"]}
    loaded = BindLLM.from_pretrained(tmp_path / "m", **load)
    assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)
    assert BindLLM.from_pretrained(tmp_path / "m", **load, tokens=1).bind.num_tokens == 1
    with pytest.raises(InputError, match=r"3 bind tokens.*bind\.tokens: all.*give 1"):
        BindLLM.from_pretrained(tmp_path / "m", **load, tokens=3)
    with pytest.raises(InputError, match="bind.tokens is all, and injection kind 'value'"):
        build(decoder, kind="value", tokens="all")
    with pytest.raises(InputError, match="bind.tokens is 'every'"):
        BindConfig(tokens="every")


def test_what_does_not_go_together_is_refused(decoder):
    for kind in ("value", "residual"):
        with pytest.raises(InputError, match=f"bind.tokens is 4, and injection kind '{kind}'"):
            build(decoder, kind=kind)
    with pytest.raises(
        InputError, match="ThermalEncoder has no tokens of thermal media.*TokenEncoder for image"
    ):
        build(decoder, token_modalities=["image", "thermal"])
    with pytest.raises(InputError, match="reads no encoder tokens"):
        build(decoder, tokens=1)(**batch())
