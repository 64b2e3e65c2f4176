"""The whole model on tiny parts: encode, forward, generate, save and load."""

from __future__ import annotations

import base64
import dataclasses
import re

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from transformers import GenerationConfig
from transformers.modeling_outputs import CausalLMOutput

from bindllm import BindLLM, Conversation, Media, Message
from bindllm.errors import CheckpointError, DecoderError, InputError, MediaError
from bindllm.model.bind_network import BindConfig
from bindllm.model.checkpoint import fingerprint_checkpoint
from bindllm.model.decoder import DecoderConfig
from bindllm.model.generation.scores import UNSURE
from bindllm.model.injection import InjectConfig, Injection
from bindllm.model.injection.probe import probe
from bindllm.shots import Shot
from tiny import COLORS, ColorEncoder, TokenEncoder, save_tiny_decoder, tiny_decoder, tiny_model

MAMBA = {"num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 1}
KINDS = ("value", "residual", "attend", "cross")
OF_TOKENS = {"attend": 4, "cross": "all"}


def build(folder, *, kind="value", open_gates=True, **options) -> BindLLM:
    """A model of this kind; attend has four bind tokens, cross as many as the encoder."""
    parts = {
        "encoders": [TokenEncoder() if kind in OF_TOKENS else ColorEncoder()],
        "bind": BindConfig(depth=1, expansion=2, tokens=OF_TOKENS.get(kind, 1)),
        "inject": InjectConfig(kind=kind),
    }
    return tiny_model(folder, gates=2.0 if open_gates else 0.0, **parts, **options)


def build_family(family, kind, *, device="cpu", **changes) -> BindLLM:
    """An untrained model on a decoder of another family, without a folder."""
    decoder = tiny_decoder(family, **changes).requires_grad_(False)
    if device == "meta":
        with torch.device("meta"):
            decoder = type(decoder)(decoder.config)
    with torch.device(device):
        parts = {
            "encoders": [TokenEncoder() if kind in OF_TOKENS else ColorEncoder()],
            "inject": InjectConfig(kind=kind),
        }
        bind = BindConfig(depth=1, tokens=OF_TOKENS.get(kind, 1))
        return BindLLM(decoder, None, DecoderConfig("x"), bind=bind, **parts).eval()


@pytest.fixture(scope="module")
def model(decoder):
    return build(decoder)


@pytest.fixture(scope="module", params=["value", *OF_TOKENS])
def any_kind(request, decoder):
    return build(decoder, kind=request.param)


def image(color: str) -> Media:
    return Media.image(np.full((8, 8, 3), COLORS[color], dtype=np.uint8))


def batch(model, *, groups=1, rows=2, length=8):
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(3, 259, (rows, length), generator=generator)
    embeddings = nn.functional.normalize(torch.randn(rows, groups, 16, generator=generator), dim=-1)
    labels = torch.full_like(ids, -100)
    labels[:, -3:] = ids[:, -3:]
    tokens = torch.randn(rows, groups, 6, 8, generator=generator)
    # Media of different token counts in one batch.
    tokens[-1, -1, 4:] = 0
    return {
        **({"tokens": tokens} if model.bind_config.reads_tokens else {}),
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "media_index": torch.zeros_like(ids),
        "embeddings": embeddings,
        "labels": labels,
    }


def test_encode_gives_unit_vectors_and_fuses_lists(model):
    red, blue = image("red"), Media.image(image("blue").source, weight=3.0)
    single = model.encode([red, blue])
    assert single.shape == (2, 16)
    torch.testing.assert_close(single.norm(dim=-1), torch.ones(2))
    fused = model.encode([[red, blue], [red]])
    expected = nn.functional.normalize(0.25 * single[0] + 0.75 * single[1], dim=-1)
    torch.testing.assert_close(fused[0], expected)
    torch.testing.assert_close(fused[1], single[0])


def test_the_published_mean_is_chosen_by_name(decoder, tmp_path):
    model = tiny_model(decoder, bind=BindConfig(depth=0, fusion="mean"))
    model.save_pretrained(tmp_path / "m")
    model = BindLLM.from_pretrained(tmp_path / "m", device="cpu", allow=["tiny.ColorEncoder"])
    red, blue = image("red"), Media.image(image("blue").source, weight=3.0)
    units = ColorEncoder().embed("image", [ColorEncoder().prepare(media) for media in (red, blue)])
    found = model.encode([[red, blue]])[0]
    torch.testing.assert_close(found, (units[0] + 3 * units[1]) / 4.000001)
    assert found.norm() < 0.999
    *_, prepared, _ = model.prepare("?", [red, blue])
    assert torch.equal(prepared[0, 0], found)


def test_a_modality_that_no_encoder_serves(model):
    with pytest.raises(InputError, match="image"):
        model.encode([Media.audio("bark.wav")])


def test_a_file_that_is_not_there(model):
    with pytest.raises(MediaError, match=r"nowhere\.png"):
        model.generate("?", media=[Media.image("nowhere.png")])


def test_logits_at_supervised_positions_are_those_of_the_full_forward(any_kind):
    model = any_kind
    inputs = batch(model)
    labels = inputs.pop("labels")
    full = model(**inputs).logits
    output = model(**inputs, labels=labels)
    assert output.rows.tolist() == [0, 0, 0, 1, 1, 1]
    assert torch.equal(output.targets, labels[:, -3:].flatten())
    torch.testing.assert_close(output.logits, full[:, -4:-1].flatten(0, 1))


MINICPM3 = {"head_dim": None, "q_lora_rank": 16, "kv_lora_rank": 16, "num_key_value_heads": 4}
MINICPM3 |= {"qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8, "dim_model_base": 8}


@pytest.mark.parametrize(
    ("family", "kind", "changes"),
    [
        ("gemma2", "value", {"final_logit_softcapping": 2.0}),
        ("granite", "value", {"logits_scaling": 8.0}),
        ("cohere", "value", {"logit_scale": 0.2}),
        ("minicpm3", "residual", MINICPM3),
        ("opt", "residual", {"ffn_dim": 64, "word_embed_proj_dim": 32}),
        ("stablelm", "residual", {}),
        ("gpt_oss", "value", {}),
        ("gemma2", "attend", {"final_logit_softcapping": 2.0}),
        ("granite", "attend", {"logits_scaling": 8.0}),
        ("cohere", "attend", {"logit_scale": 0.2}),
        ("gpt_oss", "attend", {}),
    ],
)
def test_training_sees_the_logits_that_the_family_answers_with(family, kind, changes):
    model = build_family(family, kind, **changes)
    inputs = batch(model)
    labels = inputs.pop("labels")
    closed = model(**inputs).logits
    assert torch.equal(closed, model.decoder(inputs["input_ids"], use_cache=False).logits)
    nn.init.normal_(model.injection.gates)
    full = model(**inputs).logits
    assert not torch.allclose(full, closed, atol=1e-3)
    torch.testing.assert_close(model(**inputs, labels=labels).logits, full[:, -4:-1].flatten(0, 1))


def skip(self, hidden_states, **_):
    """Attention that uses the weight of its output projection and not the module."""
    return hidden_states @ self.o_proj.weight.T, None


def constant(self, input_ids, **_):
    logits = torch.arange(259.0).expand(*input_ids.shape, 259)
    return CausalLMOutput(logits=logits + 0 * self.model(input_ids).last_hidden_state.sum())


def shifted(self, input_ids, **_):
    logits = self.lm_head(self.model(input_ids).last_hidden_state)
    return CausalLMOutput(logits=logits if logits.ndim == 3 else logits.flip(-1))


@pytest.mark.parametrize(
    ("name", "forward", "words"),
    [
        ("LlamaAttention", skip, "does not run its projections as modules: the media reached 0 of 3 layers"),
        ("LlamaForCausalLM", constant, "media do not change the logits of the tokens that listen"),
        ("LlamaForCausalLM", shifted, "the logits of training are others than those of answers, by up to"),
    ],
)
def test_a_family_that_fails_the_probe_is_refused_before_training(monkeypatch, name, forward, words):
    monkeypatch.setattr(f"transformers.models.llama.modeling_llama.{name}.forward", forward)
    with pytest.raises(DecoderError, match=words):
        build_family("llama", "value")


def test_the_probe_finds_gates_that_are_not_closed_and_leaves_them(model):
    gates = model.injection.gates.clone()
    with pytest.raises(DecoderError, match="closed gates change its logits, by up to"):
        probe(model.decoder, model.injection)
    assert torch.equal(model.injection.gates, gates)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_deep_decoder_passes_the_probe(kind, dtype):
    decoder = tiny_decoder(num_hidden_layers=40).to(dtype)
    injection = Injection(decoder, InjectConfig(kind=kind))
    probe(decoder, injection)
    assert not injection.gates.any()


def test_loading_a_checkpoint_does_not_probe_again(decoder, tmp_path, monkeypatch):
    build(decoder).save_pretrained(tmp_path / "m")
    monkeypatch.setattr("bindllm.model.bindllm.probe", lambda *_: pytest.fail("probed again"))
    BindLLM.from_pretrained(tmp_path / "m", device="cpu", allow=["tiny.ColorEncoder"])


@pytest.mark.parametrize("kind", ["residual", "cross"])
def test_a_decoder_that_reads_both_ways_is_refused(kind):
    with pytest.raises(DecoderError, match="media change the logits of tokens before them"):
        build_family("bert", kind)


@pytest.mark.parametrize("family", ["mamba2", "stablelm", "gpt_neox"])
def test_a_family_that_drops_keywords_gets_its_media(family):
    model = build_family(family, "residual", **(MAMBA if family == "mamba2" else {}))
    nn.init.normal_(model.injection.gates)
    inputs = batch(model)
    found = model(**inputs).logits
    assert not torch.allclose(
        found, model(**{**inputs, "embeddings": -inputs["embeddings"]}).logits, atol=1e-3
    )


def test_a_family_that_cannot_run_with_an_injection_is_refused(monkeypatch):
    def forward(self, hidden_states, **kwargs):
        raise TypeError("unexpected keyword")

    monkeypatch.setattr("transformers.models.llama.modeling_llama.LlamaDecoderLayer.forward", forward)
    with pytest.raises(DecoderError, match="cannot run with an injection .TypeError: unexpected keyword"):
        build_family("llama", "residual")


def test_several_residual_streams_get_the_same_term_and_kind_cross_is_refused():
    heads = {"head_dim": 8, "q_lora_rank": 16, "num_experts_per_tok": 2, "n_routed_experts": 4}
    build_family("deepseek_v4", "residual", **heads)
    with pytest.raises(DecoderError, match="cannot run with an injection"):
        build_family("deepseek_v4", "cross", **heads)


def test_a_decoder_in_training_mode_is_set_to_eval_mode():
    """Else its dropout would look like gates that change the logits."""
    decoder = tiny_decoder("gpt2").train()
    model = BindLLM(decoder, None, DecoderConfig("x"), encoders=[ColorEncoder()])
    assert not any(part.training for part in model.decoder.modules())


def test_activation_checkpointing_switches_no_dropout_on():
    losses = []
    for checkpointing in (False, True):
        model = build_family("opt", "residual", ffn_dim=64, word_embed_proj_dim=32, dropout=0.9)
        if checkpointing:
            model.checkpoint_activations()
        losses.append(model.train()(**batch(model)).logits)
    torch.testing.assert_close(*losses)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_row_is_the_same_alone_in_a_batch_and_padded(decoder, kind, side):
    model = build(decoder, kind=kind)
    inputs = batch(model)
    inputs.pop("labels")
    full = model(**inputs).logits
    pad = (3, 0) if side == "left" else (0, 3)
    padded = {
        name: nn.functional.pad(value, pad, value=0) if value.dim() == 2 else value
        for name, value in inputs.items()
    }
    padded["media_index"] = nn.functional.pad(inputs["media_index"], pad, value=-1)
    found = model(**padded).logits
    found = found[:, 3:] if side == "left" else found[:, :-3]
    torch.testing.assert_close(found, full, atol=2e-5, rtol=1e-4)
    alone = model(**{name: value[1:] for name, value in inputs.items()}).logits
    torch.testing.assert_close(alone, full[1:], atol=2e-5, rtol=1e-4)


def test_a_checkpoint_does_not_keep_the_kernels_of_its_training(tmp_path):
    model = tiny_model(save_tiny_decoder(tmp_path / "decoder"))
    # This machine has no flash attention; the training had.
    model.config = dataclasses.replace(model.config, attention="flash_attention_2", compile=True)
    model.save_pretrained(tmp_path / "m")
    loaded = BindLLM.from_pretrained(tmp_path / "m", device="cpu", allow=["tiny.ColorEncoder"])
    assert loaded.config.attention is None
    assert not loaded.config.compile
    assert loaded.decoder.config._attn_implementation != "flash_attention_2"
    before, after = (fingerprint_checkpoint(each.describe(), {}) for each in (model, loaded))
    assert before == after


def test_padding_on_the_right_costs_no_attention_mask(model):
    inputs = batch(model)
    inputs["attention_mask"][0, -2:] = 0
    masks = []
    layer = model.decoder.model.layers[0]
    hook = layer.register_forward_pre_hook(
        lambda _, args, kwargs: masks.append(kwargs["attention_mask"]), with_kwargs=True
    )
    try:
        model(**inputs)
        model(**{**inputs, "attention_mask": inputs["attention_mask"].flip(1)})
    finally:
        hook.remove()
    assert masks[0] is None
    assert masks[1] is not None


def test_a_generation_config_is_followed(model):
    config = GenerationConfig(max_new_tokens=3, do_sample=True, temperature=3.0, pad_token_id=0)
    torch.manual_seed(0)
    answers = {model.generate("What?", generation_config=config) for _ in range(5)}
    assert len(answers) > 1
    assert all(len(model.tokenizer(answer)["input_ids"]) <= 9 for answer in answers)
    for option in ("return_dict_in_generate", "penalty_alpha", "num_beam_groups", "token_healing"):
        with pytest.raises(InputError, match=f"{option} has no effect"):
            model.generate("What?", **{option: 2})


def test_two_pictures_with_turns_of_their_own(any_kind):
    model = any_kind

    def ask(first, second):
        turns = (
            Message("user", [image(first), "What?"]),
            Message("assistant", "A color."),
            Message("user", [image(second), "And this?"]),
        )
        *batch, tokens = model.prepare([Conversation(turns)], None)
        return batch[2], model(*batch, tokens=tokens).logits

    index, base = ask("red", "blue")
    assert sorted(set(index.flatten().tolist())) == [0, 1]
    border = int((index == 1).float().argmax())
    _, changed = ask("red", "white")
    assert torch.equal(base[:, :border], changed[:, :border])
    assert not torch.allclose(base[:, border:], changed[:, border:], atol=1e-3)


def test_generation_hears_the_picture_and_a_batch_equals_one_by_one(any_kind):
    model = any_kind
    prompts = ["What is this?", "Describe this image, please."]
    media = [[image("red")], [image("blue")]]
    together = model.generate(prompts, media=media, max_new_tokens=8)
    alone = [model.generate(p, media=m, max_new_tokens=8) for p, m in zip(prompts, media, strict=True)]
    assert together == alone
    assert model.generate(prompts[0], media=media[1], max_new_tokens=8) != alone[0]


def test_rows_with_and_without_media_share_a_batch(any_kind):
    model = any_kind
    base = build(model.config.name, open_gates=False)
    mixed = model.generate(["What?", "What?"], media=[[], [image("red")]], max_new_tokens=8)
    assert mixed[0] == base.generate("What?", max_new_tokens=8) == model.generate("What?", max_new_tokens=8)
    assert mixed[1] == model.generate("What?", media=[image("red")], max_new_tokens=8)


def test_sampling_options_are_those_of_hugging_face(any_kind):
    model = any_kind

    def sample(seed):
        torch.manual_seed(seed)
        return model.generate("What?", media=[image("red")], max_new_tokens=8, temperature=1.5, top_p=0.95)

    assert sample(1) == sample(1)
    assert len({sample(seed) for seed in range(4)}) > 1
    three = model.generate(
        "What?", media=[image("red")], num_beams=3, num_return_sequences=3, max_new_tokens=4
    )
    assert len(three) == 3


def test_prompts_and_media_must_pair_up(model):
    with pytest.raises(InputError, match="2 prompts but 1 rows"):
        model.generate(["a", "b"], media=[[image("red")]])
    with pytest.raises(InputError, match="no prompt"):
        model.generate([])
    with pytest.raises(InputError, match="holds its own media"):
        model.generate(Conversation((Message("user", "hi"),)), media=[image("red")])


def test_the_stream_is_the_answer_in_pieces(any_kind):
    model = any_kind
    options = {"media": [image("red")], "max_new_tokens": 10}
    pieces = list(model.stream("What?", **options))
    assert "".join(pieces).strip() == model.generate("What?", **options)


def test_a_stream_can_be_left_early_and_its_errors_arrive(model):
    import threading

    stream = model.stream("What?", max_new_tokens=400, min_new_tokens=400)
    next(stream)
    stream.close()
    assert not any(thread.name == "bindllm-stream" for thread in threading.enumerate())
    with pytest.raises(RuntimeError, match="on purpose"):
        list(model.stream("What?", prefix_allowed_tokens_fn=_fail))


def _fail(*_):
    raise RuntimeError("on purpose")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"temperatures": 1}, "Did you mean 'temperature'"),
        ({"temperature": 0}, "leave it out to be greedy"),
        ({"max_new_tokens": 0}, "at least 1"),
        ({"num_beams": 0}, "at least 1"),
        ({"num_beams": 1.5}, "whole number of at least 1"),
        ({"top_p": 2}, "top_p is 2, expected more than 0 and at most 1"),
    ],
)
def test_options_out_of_range_are_refused(model, options, words):
    with pytest.raises(InputError, match=words):
        model.generate("What?", **options)
    with pytest.raises(InputError, match=words):
        list(model.stream("What?", **options))


@pytest.mark.parametrize("media", ["cat.png", ["cat.png"], [None], image("red")])
def test_media_that_is_no_list_of_media_is_refused_never_read_out_as_text(model, media):
    for ask in (model.generate, lambda *args: list(model.stream(*args))):
        with pytest.raises(InputError, match=r"Media"):
            ask("What?", media)
    with pytest.raises(InputError, match="Media"):
        model.generate(["What?"], media=[media])
    with pytest.raises(InputError, match="Media"):
        model.encode(media if isinstance(media, Media) else [media])


def test_nothing_to_encode_and_odd_prompts_are_refused(model):
    with pytest.raises(InputError, match="at least one"):
        model.encode([])
    with pytest.raises(InputError, match="a prompt is"):
        model.generate(3)
    several = {"num_return_sequences": 2, "do_sample": True}
    for prompt, options in (("What?", {"num_beams": 2}), ("What?", several), (["What?", "Who?"], {})):
        with pytest.raises(InputError, match="a stream is one answer to one prompt"):
            list(model.stream(prompt, **options))
    with pytest.raises(InputError, match="not a Message"):
        Conversation("hello")
    huge = Media.image(image("red").source, weight=1e308)
    assert torch.isfinite(model.encode([[huge, huge]])).all()


def test_the_system_text_of_the_model_goes_ahead_of_every_prompt(decoder):
    model = build(decoder, system='Be "brief" 😀.\n')
    ids, *_ = model.prepare(["Hi", Conversation((Message("system", "Own."), Message("user", "Hi")))], None)
    texts = model.tokenizer.batch_decode(ids)
    assert texts[0].startswith('<|im_start|>system\nBe "brief" 😀.\n<|im_end|>\n<|im_start|>user\nHi')
    assert "brief" not in texts[1]


@pytest.mark.parametrize("kind", KINDS)
def test_saved_and_loaded_it_gives_the_same_logits(decoder, tmp_path, kind):
    model = build(decoder, kind=kind, system="Be brief.")
    model.save_pretrained(tmp_path / "m")
    again = BindLLM.from_pretrained(
        tmp_path / "m", device="cpu", allow=["tiny.ColorEncoder", "tiny.TokenEncoder"]
    )
    inputs = batch(model)
    assert torch.equal(model(**inputs).logits, again(**inputs).logits)
    assert again.config == model.config
    assert model.generate("?", media=[image("red")]) == again.generate("?", media=[image("red")])


def test_a_checkpoint_whose_decoder_has_moved_says_how_to_load_it(tmp_path):
    place = save_tiny_decoder(tmp_path / "decoder")
    model = BindLLM.build(DecoderConfig(str(place)), encoders=[ColorEncoder()], device="cpu")
    model.save_pretrained(tmp_path / "model")
    place.rename(tmp_path / "moved")
    options = {"allow": ["tiny.ColorEncoder"], "device": "cpu"}
    with pytest.raises(
        DecoderError, match=r"model/bindllm.json names it; .* give decoder=FOLDER, or --decoder FOLDER"
    ):
        BindLLM.from_pretrained(tmp_path / "model", **options)
    assert BindLLM.from_pretrained(tmp_path / "model", decoder=str(tmp_path / "moved"), **options)
    with pytest.raises(InputError, match="device gpu: torch cannot compute there .*; leave it out for"):
        BindLLM.from_pretrained(tmp_path / "model", **options | {"device": "gpu"})


def test_another_decoder_or_encoder_is_refused(decoder, tmp_path):
    build(decoder).save_pretrained(tmp_path / "m")
    other = str(save_tiny_decoder(tmp_path / "other", seed=1))
    with pytest.raises(CheckpointError, match=r"decoder .*other.* is not the one"):
        BindLLM.from_pretrained(tmp_path / "m", decoder=other, allow=["tiny.ColorEncoder"])
    with pytest.raises(CheckpointError, match="allow="):
        BindLLM.from_pretrained(tmp_path / "m")
    text = (tmp_path / "m" / "bindllm.json").read_text()
    (tmp_path / "m" / "bindllm.json").write_text(text.replace('"grid": 4', '"grid": 2'))
    with pytest.raises(CheckpointError, match="encoder 'tiny.ColorEncoder' is not the one"):
        BindLLM.from_pretrained(tmp_path / "m", allow=["tiny.ColorEncoder"])
    for name in ("init_args", "fingerprint", "decoder"):
        (tmp_path / "m" / "bindllm.json").write_text(text.replace(f'"{name}"', '"other"'))
        with pytest.raises(CheckpointError, match=name):
            BindLLM.from_pretrained(tmp_path / "m", allow=["tiny.ColorEncoder"])
    for old, new, words in (
        ('"inject"', '"injct"', "inject"),
        ('"decoder": {', '"decoder": "x", "other": {', r"bindllm\.json: an entry is"),
    ):
        (tmp_path / "m" / "bindllm.json").write_text(text.replace(old, new))
        with pytest.raises(CheckpointError, match=words):
            BindLLM.from_pretrained(tmp_path / "m", allow=["tiny.ColorEncoder"])


def test_groups_are_chosen_by_name_and_the_decoder_stays_frozen(decoder):
    model = build(decoder)
    model.set_trainable(["inject"])
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable == {"injection.gates", "injection.queries"}
    with pytest.raises(InputError, match="Did you mean 'inject'"):
        model.set_trainable(["injection"])
    model.train()
    assert model.bind.training
    assert not any(module.training for module in model.decoder.modules())
    model.set_trainable([])
    assert not any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_activation_checkpointing_is_on_in_training_and_changes_nothing(decoder, kind):
    gradients, kept = [], []
    for checkpointing in (False, True):
        model = build(decoder, kind=kind)
        model.bind.drops_tokens = False
        model.set_trainable(["bind", "inject"])
        if checkpointing:
            model.checkpoint_activations()
        model.train()
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda x, saved=saved: saved.append(x.numel()) or x, lambda x: x
        ):
            loss = nn.functional.cross_entropy((out := model(**batch(model))).logits, out.targets)
        kept.append(sum(saved))
        loss.backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
        assert not any(m.training for layer in model.decoder.model.layers for m in layer.children())
    assert kept[1] < 0.7 * kept[0]
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("kind", KINDS)
def test_only_gates_learn_at_the_first_step_then_everything(decoder, kind):
    model = build(decoder, kind=kind, open_gates=False)
    model.set_trainable(["bind", "inject"])
    out = model(**batch(model))
    nn.functional.cross_entropy(out.logits, out.targets).backward()
    assert model.injection.gates.grad.abs().min() > 0
    for name, parameter in model.injection.named_parameters():
        assert name == "gates" or parameter.grad.abs().max() == 0
    with torch.no_grad():
        model.injection.gates.add_(0.1)
        if kind == "cross":
            # Keys learn as soon as queries are not zero.
            nn.init.normal_(model.injection.reader.query)
        model(**batch(model))  # a validation pass in between must leave nothing behind
    out = model(**batch(model))
    nn.functional.cross_entropy(out.logits, out.targets).backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_unequal_length_padded_on_the_left_are_those_alone_whatever_the_padding_is(decoder, kind):
    """The decoder gets mask and positions, so that neither padding nor its amount is heard."""
    model = build(decoder, kind=kind)
    inputs = batch(model)
    inputs.pop("labels")
    lengths, width = (8, 5), 8

    def cut(value, row, length):
        return value[row : row + 1, :length] if value.dim() == 2 else value[row : row + 1]

    expected = [
        model(**{name: cut(value, row, length) for name, value in inputs.items()}).logits[0]
        for row, length in enumerate(lengths)
    ]
    mask = torch.stack([torch.arange(width) >= width - length for length in lengths]).long()
    heard = []
    hook = model.decoder.get_decoder().register_forward_pre_hook(
        lambda _, args, kwargs: heard.append((kwargs["attention_mask"], kwargs["position_ids"])),
        with_kwargs=True,
    )
    try:
        found = []
        for padding in (0, 77):
            ids, index = torch.full((2, width), padding), torch.full((2, width), -1)
            for row, length in enumerate(lengths):
                ids[row, width - length :] = inputs["input_ids"][row, :length]
                index[row, width - length :] = 0
            padded = {**inputs, "input_ids": ids, "attention_mask": mask, "media_index": index}
            found.append(model(**padded).logits)
    finally:
        hook.remove()
    for row, length in enumerate(lengths):
        for logits in found:
            torch.testing.assert_close(logits[row, width - length :], expected[row], atol=2e-5, rtol=1e-4)
    for seen, positions in heard:
        assert torch.equal(seen, mask)
        assert positions.tolist() == [[0, 1, 2, 3, 4, 5, 6, 7], [0, 0, 0, 0, 1, 2, 3, 4]]


def test_messages_as_programs_write_them(any_kind, tmp_path):
    import io

    model, pixels = any_kind, image("red").source
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    (tmp_path / "red.png").write_bytes(buffer.getvalue())
    uri = f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    parts = (
        {"type": "image_url", "image_url": {"url": uri}},
        {"type": "image", "image": Image.fromarray(pixels)},
        {"type": "image", "path": str(tmp_path / "red.png")},
        {"type": "image", "url": (tmp_path / "red.png").as_uri()},
        {"type": "image", "image": buffer},
        {"type": "image", "base64": base64.b64encode(buffer.getvalue()).decode()},
        {"type": "image", "image": torch.from_numpy(pixels).permute(2, 0, 1)},
    )
    asked, short = {"type": "text", "text": "What?"}, {"max_new_tokens": 8}
    own = model.generate("What?", [image("red")], **short)
    chats = [[{"role": "user", "content": [part, asked]}] for part in parts]
    chats += [
        [{"role": "user", "content": [{"type": "image"}, asked]}],
        [{"role": "user", "content": "<image>What?"}],
    ]
    rows = [[]] * len(parts) + [[image("red")]] * 2
    assert model.generate(chats, rows, **short) == [own] * len(chats)
    # One conversation gives one text, and earlier turns count.
    longer = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": ""}, *chats[0]]
    turns = Message("user", "Hi"), Message("assistant", ""), Message("user", [image("red"), "What?"])
    assert model.generate(longer, **short) == model.generate(Conversation(turns), **short)
    assert "".join(model.stream(chats[0], **short)) == own


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        (
            [{"role": "user", "content": [{"type": "imgae", "image": "a.png"}]}],
            "unknown content part 'imgae'",
        ),
        (
            [{"role": "user", "content": [{"type": "image", "image": "https://a.b/c.png"}]}],
            "download it first",
        ),
        ([{"role": "user", "content": [{"type": "image", "image": "no.png"}]}], "no.png"),
        ([{"role": "bot", "content": "Hi"}], "unknown role 'bot'"),
        ([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "already an answer"),
    ],
)
def test_messages_that_cannot_be_used(model, messages, words):
    with pytest.raises((InputError, MediaError), match=words):
        model.generate(messages)


def test_a_seed_gives_the_same_answers_and_leaves_the_global_state(model):
    options = {"media": [image("red")], "max_new_tokens": 12, "temperature": 1.5}
    state = torch.get_rng_state()
    answers = [model.generate("What?", seed=seed, **options) for seed in (1, 1, 2)]
    assert answers[0] == answers[1] != answers[2]
    assert "".join(model.stream("What?", seed=1, **options)) == answers[0]
    assert torch.equal(state, torch.get_rng_state())


def test_log_probability_is_that_of_each_token(any_kind):
    model, media = any_kind, [image("red")]
    answers = ["red", "a blue square", ""]
    found = model.log_probability("What?", answers, media)
    for answer, value in zip(answers, found, strict=True):
        ids, mask, index, embeddings, tokens = model.prepare("What?", media)
        total = 0.0
        # Token by token, each after those before it.
        for token in [
            *model.tokenizer(answer, add_special_tokens=False)["input_ids"],
            model.tokenizer.eos_token_id,
        ]:
            logits = model(ids, mask, index, embeddings, tokens=tokens).logits[0, -1]
            total += logits.log_softmax(-1)[token].item()
            ids = torch.cat([ids, torch.tensor([[token]])], 1)
            mask, index = torch.ones_like(ids), torch.cat([index, index[:, -1:]], 1)
        assert value == pytest.approx(total, abs=1e-3)
    assert model.log_probability("What?", "red", media) == pytest.approx(found[0], abs=1e-3)
    pairs = model.log_probability(["What?", "Who, then?"], ["red", "blue"], [media, []])
    assert pairs == pytest.approx([found[0], model.log_probability("Who, then?", "blue")], abs=1e-3)
    with pytest.raises(InputError, match="2 prompts but 1 answers"):
        model.log_probability(["a", "b"], "red")


def test_doubtful_answers_about_media_are_replaced(any_kind):
    model, batch = (
        any_kind,
        (["What?", "Tell me, what is it?", "What?"], [[image("red")], [image("blue")], []]),
    )
    options = {"max_new_tokens": 6, "seed": 0}
    plain = model.generate(*batch, **options)
    ids, mask, index, embeddings, tokens = model.prepare("What?", batch[1][0])
    least = 1.0
    for token in model.generate_from(ids, mask, index, embeddings, tokens, **options)[0].tolist():
        logits = model(ids, mask, index, embeddings, tokens=tokens).logits[0, -1]
        least = min(least, logits.softmax(-1)[token].item())
        ids = torch.cat([ids, torch.tensor([[token]])], 1)
        mask, index = torch.ones_like(ids), torch.cat([index, index[:, -1:]], 1)
    assert model.generate(*batch, **options, min_probability=least * 0.99)[0] == plain[0]
    assert model.generate(*batch, **options, min_probability=least * 1.01)[0] == UNSURE
    # No token of this model is certain; text alone is answered by the language model, whatever the probability.
    assert model.generate(*batch, **options, min_probability=1) == [UNSURE, UNSURE, plain[2]]
    several = {**options, "do_sample": True, "num_return_sequences": 2, "min_probability": 1}
    assert model.generate("What?", [image("red")], **several) == [UNSURE, UNSURE]
    # Text only, also after a worked example with media.
    text, shots = {**options, "min_probability": 1}, [Shot("What?", "red", media=[image("red")])]
    assert model.generate("What?", **text) == plain[2]
    assert model.generate("What?", shots=shots, **text) == model.generate("What?", shots=shots, **options)


def test_padding_after_a_stop_string_is_not_doubted(decoder, monkeypatch):
    model = build(decoder)
    # Certain of its answers, unlike of padding.
    model.decoder.get_output_embeddings().weight.data *= 20
    batch = ["What?", "Tell me, what is it?"], [[image("red")], [image("blue")]]
    first, other = model.generate(*batch, max_new_tokens=8)
    stop = next(char for char in first[:-1] if char.isascii() and char not in other)
    options = {"max_new_tokens": 8, "stop_strings": stop}
    cut = model.generate("What?", batch[1][0], **options)
    assert len(cut) < len(first)
    for ends in (model.settings.eos_token_id, [model.tokenizer.pad_token_id]):
        monkeypatch.setattr(model.settings, "eos_token_id", ends)
        assert model.generate(*batch, **options, min_probability=0.1)[0] == cut


@pytest.mark.parametrize(
    ("option", "value"),
    [
        *(("temperature", value) for value in (0, -1.0, float("nan"), float("inf"), "0.5", True)),
        *(("top_p", value) for value in (0, 1.5, float("nan"), "0.5")),
        *(("seed", value) for value in ("a", 3.5, 2**64, -(2**64))),
    ],
)
def test_numbers_out_of_range_are_refused(model, option, value):
    with pytest.raises(InputError, match=f"{option} is {re.escape(repr(value))}, expected"):
        model.generate("What?", **{option: value})


def test_numbers_of_numpy_are_options(model):
    options = {"temperature": np.float32(1), "seed": np.int64(3), "max_new_tokens": 4}
    assert model.generate("What?", **options) == model.generate(
        "What?", temperature=1.0, seed=3, max_new_tokens=4
    )


@pytest.mark.parametrize("cache", [True, "caches/own"])
def test_something_else_than_a_cache_is_refused(model, cache):
    with pytest.raises(InputError, match=r"expected a VisualCache, .* VisualCache.open\(FOLDER\)"):
        model.generate("What?", [image("red")], cache=cache)


def test_arrays_in_messages_of_errors_are_short(model):
    for asked in (("What?", np.zeros((99, 99, 3))), (np.zeros((99, 99, 3)),)):
        with pytest.raises(InputError) as caught:
            model.generate(*asked)
        assert len(str(caught.value)) < 300


@pytest.mark.parametrize("value", [-0.1, 1.5, "0.5"])
def test_a_probability_out_of_range_is_refused(model, value):
    with pytest.raises(InputError, match="min_probability is .*expected 0 to 1"):
        model.generate("What?", min_probability=value)
    with pytest.raises(InputError, match="a stream is one answer"):
        list(model.stream("What?", min_probability=0.5))
