import pytest
import torch

from bindllm.errors import InputError
from bindllm.model.activations import TrainingStep
from bindllm.model.adapter import AdapterConfig
from bindllm.model.bind_network import BindConfig
from bindllm.model.bindllm import BindLLM
from bindllm.model.decoder import DecoderConfig
from bindllm.model.memory import ModelPlan, Placement, estimate_memory
from tiny import ColorEncoder, save_tiny_decoder, tiny_decoder, tiny_tokenizer

STEP = TrainingStep(rows=4, tokens=16, supervised=8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(save_tiny_decoder(tmp_path_factory.mktemp("decoder")))


def parts(folder, *, step=STEP, placement=None, moment="the step of the optimizer", **changes):
    changes = {"decoder": DecoderConfig(folder, dtype="float32"), "embedding_size": 16, **changes}
    return estimate_memory(ModelPlan(**changes), step, placement).moments[moment]


def test_parameters_are_those_of_the_model(folder):
    adapter = AdapterConfig(rank=4)
    found = parts(folder, adapter=adapter, trainable=["adapter"])
    decoder = tiny_decoder()
    weights = 4 * sum(p.numel() for p in decoder.parameters())
    joined = {"encoders": [ColorEncoder()], "adapter": adapter}
    model = BindLLM(decoder, tiny_tokenizer(), DecoderConfig("tiny"), **joined)
    sizes = {name: 4 * sum(p.numel() for _, p in group) for name, group in model.parameter_groups().items()}
    assert found["decoder"] == weights
    assert {name: found[name] for name in sizes} == sizes
    # Gradients and both moments, of what is trained alone.
    assert found["gradients"] == sizes["adapter"]
    assert found["optimizer"] == 2 * sizes["adapter"]


def test_precision_and_quantization_shrink_the_decoder_alone(folder):
    whole = parts(folder)
    half = parts(folder, decoder=DecoderConfig(folder, dtype="bfloat16"))
    assert half["decoder"] * 2 == whole["decoder"]
    assert half["bind"] == whole["bind"]
    packed = parts(folder, decoder=DecoderConfig(folder, dtype="bfloat16", quantize="nf4"))
    # Per layer: attention 32 x (32 + 16 + 16 + 32) and the feed-forward layer 3 x 32 x 64, in 3 layers.
    projections = 3 * (32 * 96 + 3 * 32 * 64)
    saved = projections * (2 - 0.5 - 1 / 64 - 4 / (64 * 256))
    assert half["decoder"] - packed["decoder"] == pytest.approx(saved, abs=6)
    rows = 3 * (32 + 16 + 16 + 32 + 64 + 64 + 32)
    packed = parts(folder, decoder=DecoderConfig(folder, dtype="bfloat16", quantize="int8"))
    assert half["decoder"] - packed["decoder"] == projections - 4 * rows


def test_the_peak_is_the_largest_moment(folder):
    plan = ModelPlan(DecoderConfig(folder, dtype="float32"), embedding_size=16)
    estimate = estimate_memory(plan, STEP)
    totals = {name: sum(found.values()) for name, found in estimate.moments.items()}
    assert estimate.total == max(totals.values()) == totals[estimate.moment]
    # Many supervised tokens: three float32 copies of 259 logits each outweigh all gradients.
    many = estimate_memory(plan, TrainingStep(rows=64, tokens=64, supervised=64 * 64))
    assert many.moment == "the start of the backward pass"
    assert many.parts["logits"] == 3 * 4 * 64 * 64 * 259


def test_checkpointing_keeps_inputs_and_one_layer(folder):
    moment = "the backward pass of a layer"
    whole = parts(folder, moment=moment)["activations"]
    step = TrainingStep(4, 16, 8, checkpointing=True)
    few = parts(folder, moment=moment, step=step)["activations"]
    inputs = 3 * 4 * 16 * 32 * 4
    assert inputs < few < whole


def test_devices_share_what_their_strategy_cuts(folder):
    one = parts(folder)
    ddp = parts(folder, placement=Placement(devices=4, strategy="ddp"))
    assert ddp["buckets of DDP"] == one["gradients"]
    assert ddp["decoder"] == one["decoder"]
    sharded = parts(folder, placement=Placement(devices=4, strategy="sharded"))
    head = 4 * 259 * 32
    assert sharded["decoder"] == (one["decoder"] - head) // 4 + head
    assert sharded["gradients"] == one["gradients"]
    zero = parts(folder, placement=Placement(devices=4, strategy="zero2"))
    assert (zero["optimizer"], zero["gradients"]) == (one["optimizer"] // 4, one["gradients"] // 4)


def test_accumulated_gradients_are_there_during_the_backward_pass(folder):
    moment = "the start of the backward pass"
    assert parts(folder, moment=moment)["gradients"] == 0
    summed = parts(folder, moment=moment, placement=Placement(accumulates=True))
    assert summed["gradients"] == parts(folder)["gradients"]


def test_no_weight_is_made_for_a_large_bind_network(folder, monkeypatch):
    made = []
    normal = torch.nn.init.normal_

    def watched(tensor, *args, **kwargs):
        made.append(tensor.device.type)
        return normal(tensor, *args, **kwargs)

    monkeypatch.setattr(torch.nn.init, "normal_", watched)
    parts(folder, bind=BindConfig(depth=1))
    assert set(made) == {"meta"}


def test_undid_you_mean_are_named(folder):
    with pytest.raises(InputError, match="Did you mean 'bind'"):
        parts(folder, trainable=["bnd"])
    with pytest.raises(InputError, match="unknown strategy 'fsdp'"):
        Placement(strategy="fsdp")
