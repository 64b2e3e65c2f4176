"""What autograd really saves, against what is worked out from shapes."""

from weakref import WeakSet

import pytest
import torch

from bindllm.errors import DecoderError
from bindllm.model.activations import Activations, TrainingStep, Widths
from bindllm.model.adapter import AdapterConfig
from bindllm.model.bind_network import BindConfig
from bindllm.model.bindllm import BindLLM
from bindllm.model.decoder import DecoderConfig
from bindllm.model.injection import InjectConfig
from tiny import FAMILIES, ColorEncoder, tiny_decoder, tiny_tokenizer

# Sizes of which no two are equal, so that one cannot be taken for another.
SIZES = {"hidden_size": 48, "intermediate_size": 112, "head_dim": 16, "num_hidden_layers": 3}
STAGE_1, STAGE_2 = ("bind", "inject"), ("adapter",)
FLOAT, HALF = torch.float32, torch.bfloat16


class Held:
    """A saved tensor; it goes with the graph that needs it."""

    def __init__(self, tensor):
        self.tensor = tensor


def saved_bytes(family, dtype, step, *, trainable, adapter=None, inject=None, **changes):
    """Bytes of the distinct storages that autograd saves in a forward pass, the parameters' own left out."""
    model = BindLLM(
        tiny_decoder(family, **SIZES, **changes).to(dtype),
        tiny_tokenizer(),
        DecoderConfig("tiny"),
        encoders=[ColorEncoder()],
        adapter=adapter,
        inject=inject,
    )
    model.set_trainable(trainable)
    if step.checkpointing:
        model.checkpoint_activations()
    model.train()
    ids = torch.randint(10, 259, (step.rows, step.tokens))
    labels = torch.full_like(ids, -100)
    labels[:, -(step.supervised // step.rows) :] = 7
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    saved = WeakSet()

    def pack(tensor):
        held = Held(tensor)
        saved.add(held)
        return held

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda held: held.tensor):
        embeddings = torch.randn(step.rows, step.groups, 16)
        output = model(ids, torch.ones_like(ids), torch.zeros_like(ids), embeddings, labels)
        loss = torch.nn.functional.cross_entropy(output.logits.float(), output.targets)
    # Only now: what a graph that is gone already had saved is not kept.
    storages = {held.tensor.untyped_storage().data_ptr(): held.tensor.untyped_storage() for held in saved}
    assert loss.requires_grad
    return sum(storage.nbytes() for place, storage in storages.items() if place not in own)


def worked_out(family, dtype, step, *, trainable, adapter=None, inject=None, **changes):
    widths = Widths.of(tiny_decoder(family, **SIZES, **changes))
    activations = Activations(
        widths,
        dtype.itemsize,
        step,
        BindConfig(),
        16,
        inject or InjectConfig(),
        adapter,
        frozenset(trainable),
    )
    return activations.kept() + 4 * activations.logits()


@pytest.mark.parametrize("dtype", [FLOAT, HALF])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("stage", [1, 2])
def test_every_saved_byte_is_foreseen(family, dtype, stage):
    step = TrainingStep(rows=3, tokens=20, supervised=15)
    parts = {"trainable": STAGE_1} if stage == 1 else {"trainable": STAGE_2, "adapter": AdapterConfig(rank=8)}
    expected = saved_bytes(family, dtype, step, **parts)
    # What is left is the gates themselves and some scalars.
    assert worked_out(family, dtype, step, **parts) == pytest.approx(expected, abs=200)


@pytest.mark.parametrize(
    ("dtype", "step", "parts"),
    [
        (FLOAT, TrainingStep(2, 50, 80), {"trainable": STAGE_1 + STAGE_2, "adapter": AdapterConfig(rank=8)}),
        (HALF, TrainingStep(3, 20, 15), {"trainable": STAGE_1, "adapter": AdapterConfig(rank=8)}),
        (HALF, TrainingStep(3, 20, 15), {"trainable": STAGE_2, "adapter": AdapterConfig(4, bias=False, norm=False)}),
        (FLOAT, TrainingStep(3, 20, 15), {"trainable": STAGE_1, "inject": InjectConfig(kind="residual")}),
        (HALF, TrainingStep(3, 20, 15), {"trainable": STAGE_1, "inject": InjectConfig(layers=2)}),
        (HALF, TrainingStep(3, 20, 15), {"trainable": STAGE_1, "num_attention_heads": 2, "num_key_value_heads": 2}),
    ],
)  # fmt: skip
def test_other_shapes_and_parts(dtype, step, parts):
    assert worked_out("llama", dtype, step, **parts) == pytest.approx(
        saved_bytes("llama", dtype, step, **parts), abs=200
    )


@pytest.mark.parametrize("dtype", [FLOAT, HALF])
def test_dora_keeps_what_both_products_gave(dtype):
    step = TrainingStep(3, 20, 15)
    parts = {"trainable": STAGE_2, "adapter": AdapterConfig(rank=8, bias=False, norm=False, dora=True)}
    expected = saved_bytes("llama", dtype, step, **parts)
    assert worked_out("llama", dtype, step, **parts) == pytest.approx(expected, rel=0.02)


def test_checkpointing_keeps_the_inputs_of_the_layers():
    step = TrainingStep(3, 20, 15, checkpointing=True)
    parts = {"trainable": STAGE_2, "adapter": AdapterConfig(rank=8)}
    # The sines and cosines are held by the recomputation, and saved by nobody.
    rotary = 2 * 20 * 24 * HALF.itemsize
    expected = saved_bytes("llama", HALF, step, **parts)
    assert worked_out("llama", HALF, step, **parts) == pytest.approx(expected + rotary, abs=700)


def test_a_mixture_of_experts_is_refused_by_name():
    with pytest.raises(DecoderError, match="MixtralForCausalLM cannot be estimated"):
        Widths.of(tiny_decoder("mixtral", num_local_experts=2))
