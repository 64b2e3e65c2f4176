from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from bindllm.encoders import Tuned
from bindllm.errors import DecoderError, InputError
from bindllm.media import Media
from bindllm.model.adapter import AdapterConfig
from bindllm.model.bind_network import BindConfig
from bindllm.model.bindllm import BindLLM
from bindllm.model.decoder import DecoderConfig
from bindllm.model.injection import InjectConfig
from bindllm.model.memory import read_size, saved_bytes
from bindllm.objectives import DPO, KTO, ORPO, NextToken
from bindllm.training.memory import RunPlan
from tiny import (
    ColorEncoder,
    TokenEncoder,
    color_images,
    save_tiny_decoder,
    synthetic_efficientnet,
    tiny_decoder,
    tiny_tokenizer,
    tuned_encoder,
)

FORWARD, BACKWARD, OPTIMIZER = "the forward pass", "the backward pass", "the optimizer step"


@pytest.fixture(scope="module")
def plan(tmp_path_factory):
    folder = save_tiny_decoder(tmp_path_factory.mktemp("decoder"))
    decoder = DecoderConfig(str(folder), dtype="float32")
    return RunPlan(decoder, [ColorEncoder()], rows=4, tokens=16, supervised=8)


def parts(plan, moment=OPTIMIZER, **changes):
    return replace(plan, **changes).estimate.moments[moment]


def with_decoder(plan, **changes):
    return replace(plan, decoder=replace(plan.decoder, **changes))


def test_parameters_are_those_of_the_model(plan):
    adapter = AdapterConfig(rank=4)
    found = parts(plan, adapter=adapter, trainable=["adapter"])
    decoder = tiny_decoder()
    weights = 4 * sum(t.numel() for t in (*decoder.parameters(), *decoder.buffers()))
    joined = {"encoders": [ColorEncoder()], "adapter": adapter}
    model = BindLLM(decoder, tiny_tokenizer(), DecoderConfig("tiny"), **joined)
    sizes = {name: 4 * sum(p.numel() for _, p in group) for name, group in model.parameter_groups().items()}
    assert found["decoder"] == weights
    assert {name: found[name] for name in sizes} == sizes
    # Gradients and both moments of the trained parameters only.
    assert found["gradients"] == sizes["adapter"]
    assert found["optimizer"] == 2 * sizes["adapter"]


def test_precision_and_quantization_shrink_only_the_decoder(plan):
    whole, half = parts(plan), parts(with_decoder(plan, dtype="bfloat16"))
    buffers = 4 * sum(buffer.numel() for buffer in tiny_decoder().buffers())
    assert (half["decoder"] - buffers) * 2 == whole["decoder"] - buffers
    assert half["bind"] == whole["bind"]
    packed = parts(with_decoder(plan, dtype="bfloat16", quantize="nf4"))
    # Per layer: attention 32 x (32 + 16 + 16 + 32) and the feed-forward layer 3 x 32 x 64, in 3 layers.
    projections = 3 * (32 * 96 + 3 * 32 * 64)
    saved = projections * (2 - 0.5 - 1 / 64 - 4 / (64 * 256))
    assert half["decoder"] - packed["decoder"] == pytest.approx(saved, abs=12)
    rows = 3 * (32 + 16 + 16 + 32 + 64 + 64 + 32)
    packed = parts(with_decoder(plan, dtype="bfloat16", quantize="int8"))
    assert half["decoder"] - packed["decoder"] == projections - 4 * rows


def test_int8_saves_the_inputs_of_its_layers_and_unpacks_one_matrix(plan):
    half = replace(with_decoder(plan, dtype="bfloat16"), rows=8, tokens=64)
    plain = parts(half, FORWARD)
    packed = parts(with_decoder(half, quantize="int8"), FORWARD)
    # Into queries, keys and values; into the output; into gate and up; into down.
    inputs = 8 * 64 * 2 * (32 + 32 + 32 + 64)
    assert packed["activations"] - plain["activations"] == pytest.approx(2.5 * inputs, rel=0.2)
    assert packed["unpacked matrix"] == 2 * 32 * 64


def test_the_peak_is_the_largest_moment(plan):
    totals = {name: sum(found.values()) for name, found in plan.estimate.moments.items()}
    assert plan.estimate.total == max(totals.values()) == totals[plan.estimate.moment]
    # Many supervised tokens: three float32 copies of 259 logits each outweigh all gradients.
    many = replace(plan, rows=64, tokens=65, supervised=64 * 64).estimate
    assert many.moment == BACKWARD
    assert many.parts["logits"] == 3 * 4 * 64 * 64 * 259


def test_checkpointing_keeps_fewer_activations(plan):
    large = replace(plan, rows=8, tokens=64)
    whole = parts(large, FORWARD)["activations"]
    few = parts(large, FORWARD, checkpointing=True)["activations"]
    inputs = 3 * 8 * 64 * 32 * 4
    assert inputs < few < whole / 2


def test_devices_share_what_their_strategy_divides(plan):
    one = parts(plan)
    ddp = parts(plan, devices=4, strategy="ddp")
    assert ddp["buckets of DDP"] == one["gradients"]
    assert ddp["decoder"] == one["decoder"]
    sharded = parts(plan, devices=4, strategy="sharded")
    head = 4 * 259 * 32
    assert sharded["decoder"] == pytest.approx((one["decoder"] - head) / 4 + head, abs=1)
    assert sharded["gradients"] == one["gradients"]
    zero = parts(plan, devices=4, strategy="zero2")
    assert (zero["optimizer"], zero["gradients"]) == (one["optimizer"] // 4, one["gradients"] // 4)


def test_accumulated_gradients_are_kept_during_the_backward_pass(plan):
    # At its start, where many logits make the peak.
    many = replace(plan, rows=64, tokens=65, supervised=64 * 64)
    assert parts(many, BACKWARD).get("gradients", 0) == 0
    assert parts(many, BACKWARD, accumulates=True)["gradients"] == parts(many)["gradients"]


def test_a_tuned_encoder_saves_its_activations_for_each_media(plan, tmp_path):
    color_images(tmp_path)
    media = Media.image(tmp_path / "images" / "red0.png")
    encoder = Tuned(**tuned_encoder()["init_args"])
    found = saved_bytes(encoder, [Media.image(tmp_path / "none.png"), media])
    assert saved_bytes(encoder, []) == 0
    # Of 16 float32 numbers: inputs of two trained projections, two results of tanh, and the vector that is normalized.
    assert 5 * 64 <= found < 6 * 64
    assert not any(parameter.requires_grad for parameter in encoder.parameters().values())
    tuned = replace(plan, encoders=[encoder], trainable=["encoders"], media=3, media_groups=2)
    for moment in (FORWARD, BACKWARD):
        assert parts(tuned, moment, encoded=found)["activations of encoders"] == 4 * 2 * 3 * found
        # Three blocks of 16 x 16 weights and 16 biases, of which two are trained.
        assert parts(tuned, moment)["encoders"] == 3 * 4 * 16 * 17
    pairs = parts(tuned, FORWARD, encoded=found, rejected=2, objective=ORPO())
    assert pairs["activations of encoders"] == 2 * 2 * 3 * found


def test_weights_that_are_loaded_meanwhile_are_no_activations(tmp_path):
    save_file(synthetic_efficientnet(), tmp_path / "model.safetensors")
    entry = {"class_path": "bindllm.encoders.EfficientNetLite", "init_args": {"weights": str(tmp_path)}}
    encoder, media = Tuned(entry, blocks=1), Media.image(torch.zeros(8, 8, 3, dtype=torch.uint8).numpy())
    assert saved_bytes(encoder, [media]) == saved_bytes(encoder, [media])


@pytest.mark.parametrize("objective", [DPO, ORPO, KTO])
def test_objectives_run_chosen_and_rejected_rows(plan, objective):
    single, pairs = replace(plan, rows=8, tokens=64), replace(plan, rows=16, tokens=64, rejected=8)
    ratio = (
        parts(pairs, FORWARD, objective=objective())["activations"] / parts(single, FORWARD)["activations"]
    )
    assert 1.8 < ratio < 2.1


@pytest.mark.parametrize(
    ("objective", "kind", "tokens"),
    [
        (NextToken, "attend", 16),
        (DPO, "cross", "all"),
        (ORPO, "attend", 16),
        (KTO, "cross", "all"),
        pytest.param(NextToken, "cross", "all", marks=pytest.mark.slow),
        pytest.param(DPO, "attend", 16, marks=pytest.mark.slow),
        pytest.param(ORPO, "cross", "all", marks=pytest.mark.slow),
        pytest.param(KTO, "attend", 16, marks=pytest.mark.slow),
    ],
)
def test_bind_tokens_are_estimated_with_all_of_them_and_repeat(plan, objective, kind, tokens):
    plan = replace(plan, encoders=[TokenEncoder()], rows=8, rejected=4, objective=objective())
    changes = {"bind": BindConfig(tokens=tokens), "inject": InjectConfig(kind=kind)}
    one, several = parts(plan, FORWARD), parts(plan, FORWARD, **changes)
    assert several["activations"] > 1.2 * one["activations"]
    assert parts(plan, FORWARD, **changes, media=3)["activations"] > 1.2 * several["activations"]
    assert several["bind"] > one["bind"]
    assert parts(plan, FORWARD, **changes) == several


def test_kto_has_two_forward_passes_at_once(plan):
    many = replace(plan, rows=16, tokens=65, supervised=16 * 64)
    once, twice = parts(many, FORWARD), parts(many, FORWARD, objective=KTO())
    # At the highest point the second is in its layers, next to all that the first keeps.
    assert twice["logits"] == once["logits"]
    assert twice["activations"] > 1.2 * once["activations"]


def test_no_weight_is_made_for_a_large_bind_network(plan, monkeypatch):
    made = []
    normal = torch.nn.init.normal_

    def watched(tensor, *args, **kwargs):
        made.append(tensor.device.type)
        return normal(tensor, *args, **kwargs)

    monkeypatch.setattr(torch.nn.init, "normal_", watched)
    parts(plan, bind=BindConfig(depth=1))
    assert set(made) == {"meta"}


def test_unknown_groups_and_folders_are_named(plan, tmp_path):
    with pytest.raises(InputError, match="Did you mean 'bind'"):
        parts(plan, trainable=["bnd"])
    with pytest.raises(DecoderError, match="no usable causal language model here"):
        parts(plan, decoder=DecoderConfig(str(tmp_path)))


@pytest.mark.parametrize(
    ("text", "size"), [("24GB", 24e9), ("1.5 gib", 1.5 * 2**30), ("512mb", 512e6), ("80000", 80000)]
)
def test_sizes_are_read(text, size):
    assert read_size(text) == size


@pytest.mark.parametrize("text", ["24 bananas", "", "0GB", "-1GB"])
def test_other_sizes_are_refused(text):
    with pytest.raises(InputError, match="such as 24GB"):
        read_size(text)
