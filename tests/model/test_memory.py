"""The traced memory of a step, against what autograd saves when the same step runs on real tensors."""

from weakref import WeakSet

import pytest
import torch

from bindllm.model.adapter import AdapterConfig
from bindllm.model.bind_network import BindConfig
from bindllm.model.bindllm import BindLLM
from bindllm.model.decoder import DecoderConfig
from bindllm.model.injection import InjectConfig
from bindllm.model.memory import LiveBytes, meta_decoder, trace_step
from bindllm.objectives import next_token_loss
from tiny import FAMILIES, TokenEncoder, save_tiny_decoder, tiny_decoder, tiny_tokenizer

# Sizes of which no two are equal, so that one cannot be taken for another.
SIZES = {"hidden_size": 48, "intermediate_size": 112, "head_dim": 16, "num_hidden_layers": 3}
BIND, ADAPTER = ("bind", "inject"), ("adapter",)
FLOAT, HALF = torch.float32, torch.bfloat16


class Held:
    """A saved tensor; it goes with the graph that needs it."""

    def __init__(self, tensor):
        self.tensor = tensor


def build(decoder, *, trainable, adapter=None, inject=None, checkpointing=False, bind=None):
    parts = {"encoders": [TokenEncoder()], "adapter": adapter, "inject": inject, "bind": bind}
    model = BindLLM(decoder, tiny_tokenizer(), DecoderConfig("tiny"), **parts)
    model.bind.drops_tokens = False
    model.set_trainable(trainable)
    if checkpointing:
        model.checkpoint_activations()
    return model.train()


def batch(rows=3, tokens=20, supervised=5):
    ids = torch.randint(10, 259, (rows, tokens))
    labels = torch.full_like(ids, -100)
    labels[:, -supervised:] = 7
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "media_index": torch.zeros_like(ids)}
    return {**inputs, "embeddings": torch.randn(rows, 1, 16), "labels": labels}


def run(model, inputs):
    output = model(**inputs)
    return next_token_loss(output.logits, output.targets)


def saved_bytes(decoder, inputs, **parts):
    """Bytes of the distinct storages that autograd saves in a forward pass, without the parameters."""
    model = build(decoder, **parts)
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    saved = WeakSet()

    def pack(tensor):
        held = Held(tensor)
        saved.add(held)
        return held

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda held: held.tensor):
        loss = run(model, inputs)
    storages = {held.tensor.untyped_storage().data_ptr(): held.tensor.untyped_storage() for held in saved}
    assert loss.requires_grad
    return sum(storage.nbytes() for place, storage in storages.items() if place not in own)


def traced_bytes(folder, dtype, inputs, *, attention=None, **parts):
    """Bytes that are alive after a traced forward pass, without parameters and batch."""
    model = None
    with torch.device("meta"):
        model = build(meta_decoder(DecoderConfig(str(folder), attention=attention), dtype), **parts)
    live = LiveBytes(259)
    for tensor in (*model.parameters(), *model.buffers(), *inputs.values()):
        live.add(tensor, "given")
    with live:
        loss = run(model, inputs)
        live.take_peak()
        torch.empty(0, device="meta").clone()
        now = live.take_peak()
    assert loss.requires_grad
    return sum(size for kind, size in now.items() if kind != "given")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {
        family: save_tiny_decoder(tmp_path_factory.mktemp(family), family, **SIZES) for family in FAMILIES
    }


def compare(folder, family, dtype, inputs, **parts):
    expected = saved_bytes(tiny_decoder(family, **SIZES).to(dtype), inputs, **parts)
    # The rest is the loss and other scalars.
    assert traced_bytes(folder, dtype, inputs, **parts) == pytest.approx(expected, rel=0.01, abs=200)


@pytest.mark.parametrize(
    ("dtype", "trainable"),
    [
        (FLOAT, ADAPTER),
        (HALF, BIND),
        pytest.param(FLOAT, BIND, marks=pytest.mark.slow),
        pytest.param(HALF, ADAPTER, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_saved_byte_is_traced(folders, family, dtype, trainable):
    adapter = AdapterConfig(rank=8) if trainable == ADAPTER else None
    compare(folders[family], family, dtype, batch(), trainable=trainable, adapter=adapter)


@pytest.mark.parametrize(
    ("dtype", "parts"),
    [
        (FLOAT, {"trainable": BIND + ADAPTER, "adapter": AdapterConfig(rank=8)}),
        (HALF, {"trainable": BIND, "adapter": AdapterConfig(rank=8)}),
        (HALF, {"trainable": ADAPTER, "adapter": AdapterConfig(4, bias=False, norm=False)}),
        (FLOAT, {"trainable": ADAPTER, "adapter": AdapterConfig(8, bias=False, norm=False, dora=True)}),
        (FLOAT, {"trainable": BIND, "inject": InjectConfig(kind="residual")}),
        (HALF, {"trainable": BIND, "inject": InjectConfig(layers=2)}),
    ],
)
def test_other_parts(folders, dtype, parts):
    compare(folders["llama"], "llama", dtype, batch(2, 50, 40), **parts)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("dtype", "kind", "tokens"),
    [
        (FLOAT, "attend", 6),
        (HALF, "cross", "all"),
        pytest.param(FLOAT, "cross", "all", marks=pytest.mark.slow),
        pytest.param(HALF, "attend", 6, marks=pytest.mark.slow),
    ],
)
def test_every_byte_of_several_bind_tokens_is_traced(folders, family, dtype, kind, tokens):
    parts = {"bind": BindConfig(depth=1, tokens=tokens), "inject": InjectConfig(kind=kind)}
    # A row without tokens, so that bind tokens are masked, as the estimate assumes.
    inputs = {**batch(), "tokens": torch.randn(3, 1, 10, 8) * torch.tensor([0, 1, 1]).view(3, 1, 1, 1)}
    compare(folders[family], family, dtype, inputs, trainable=BIND, **parts)


def test_checkpointing_keeps_the_inputs_of_the_layers(folders):
    parts = {"trainable": ADAPTER, "adapter": AdapterConfig(rank=8)}
    few = traced_bytes(folders["llama"], HALF, batch(), **parts, checkpointing=True)
    layers = 3 * 3 * 20 * 48 * HALF.itemsize
    assert layers < few < traced_bytes(folders["llama"], HALF, batch(), **parts) / 3


def test_plain_products_save_their_scores(folders):
    parts, inputs = {"trainable": ["inject"]}, batch(tokens=40)
    decoder = tiny_decoder("llama", **SIZES, attn_implementation="eager")
    expected = saved_bytes(decoder, inputs, **parts)
    found = traced_bytes(folders["llama"], FLOAT, inputs, attention="eager", **parts)
    assert found == pytest.approx(expected, rel=0.01, abs=200)
    assert found > 1.1 * traced_bytes(folders["llama"], FLOAT, inputs, **parts)


def test_nothing_is_allocated_and_gradients_are_counted(tmp_path):
    """The step of a model with 38 GB of weights runs here in seconds."""
    folder = save_tiny_decoder(tmp_path)
    config = (folder / "config.json").read_text()
    large = config.replace('"hidden_size": 32', '"hidden_size": 32768')
    (folder / "config.json").write_text(large.replace('"head_dim": 8', '"head_dim": 8192'))
    with torch.device("meta"):
        model = build(meta_decoder(DecoderConfig(str(folder)), FLOAT), trainable=["inject"])
    forward, backward = trace_step(model, lambda: run(model, batch()), accumulates=True)
    assert forward["decoder"] > 38e9
    gates, queries = 3 * 4, 3 * 32768
    assert backward["gradients"] == 4 * (gates + queries)
    assert all(parameter.grad is None for parameter in model.parameters())
