"""Tuned decoders and encoders in a model: exactly the named parts are trained, and a checkpoint brings them back."""

from __future__ import annotations

import json

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from bindllm import BindLLM, Media
from bindllm.encoders import Tuned
from bindllm.errors import CheckpointError, InputError
from bindllm.model.adapter import AdapterConfig
from bindllm.model.bind_network import BindConfig
from bindllm.model.decoder import DecoderConfig
from bindllm.model.export import export_decoder
from tiny import COLORS, IDS, save_tiny_decoder, tiny_batch, tuned_encoder

KIND = "tiny.BlockEncoder"
RED, BLUE = (
    Media.image(torch.tensor(COLORS[name], dtype=torch.uint8).expand(8, 8, 3).numpy())
    for name in ("red", "blue")
)


def build(folder, *, tuned=True, **parts) -> BindLLM:
    torch.manual_seed(0)
    decoder = DecoderConfig(str(save_tiny_decoder(folder / "decoder")), tuned=tuned)
    encoders = [Tuned(**tuned_encoder()["init_args"])]
    model = BindLLM.build(
        decoder, device="cpu", encoders=encoders, bind=BindConfig(depth=1, expansion=2), **parts
    )
    torch.nn.init.normal_(model.injection.gates, std=2.0)
    return model.eval()


def load(folder, **options) -> BindLLM:
    return BindLLM.from_pretrained(folder, device="cpu", allow=[KIND], **options)


def everything(model) -> dict[str, torch.Tensor]:
    """Every tensor of a model and its encoder, trained or frozen."""
    blocks = torch.nn.ModuleList(model.encoders[0].base.blocks("image"))
    return {**model.state_dict(), **{f"block.{name}": x for name, x in blocks.state_dict().items()}}


def train(model, names, *, steps=5) -> list[float]:
    model.set_trainable(names)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer, losses = torch.optim.AdamW(trained, lr=0.02), []
    inputs = [model.encoders[0].prepare(media) for media in (RED, BLUE)]
    for _ in range(steps):
        embeddings = model.encoders[0].embed("image", inputs).unsqueeze(1)
        output = model(**tiny_batch(embeddings=embeddings, labels=IDS))
        loss = cross_entropy(output.logits, output.targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    model.requires_grad_(False)
    return losses


@pytest.mark.parametrize(
    ("names", "prefixes"),
    [
        (["decoder"], ("decoder.",)),
        (["encoders"], ("tuned.", "block.")),
        (["bind", "inject", "decoder", "encoders"], ("bind.", "injection.", "decoder.", "tuned.", "block.")),
    ],
)
def test_only_the_named_parts_are_trained(tmp_path, names, prefixes):
    model = build(tmp_path)
    before = {name: x.clone() for name, x in everything(model).items()}
    losses = train(model, names)
    assert losses[-1] < losses[0] - 0.1
    changed = {name for name, x in everything(model).items() if not torch.equal(x, before[name])}
    # The first of three blocks is frozen.
    assert changed == {name for name in before if name.startswith(prefixes)} - {
        "block.0.0.weight",
        "block.0.0.bias",
    }


def test_a_reload_gives_the_same_logits(tmp_path):
    model = build(tmp_path)
    train(model, ["bind", "inject", "decoder", "encoders"])
    model.save_pretrained(tmp_path / "model")
    again = load(tmp_path / "model")
    batch = tiny_batch(embeddings=model.encode([RED, BLUE]).unsqueeze(1))
    assert torch.equal(again.encode([RED, BLUE]), model.encode([RED, BLUE]))
    assert torch.equal(again(**batch).logits, model(**batch).logits)
    assert again.describe() == model.describe()
    # Saved again by the model that was loaded.
    again.save_pretrained(tmp_path / "again")
    for file in ("bind.safetensors", "decoder.safetensors", "encoders.safetensors"):
        assert (tmp_path / "again" / file).read_bytes() == (tmp_path / "model" / file).read_bytes()


def test_files_that_were_exchanged_are_refused(tmp_path):
    model = build(tmp_path)
    model.save_pretrained(tmp_path / "first")
    train(model, ["decoder", "encoders"])
    model.save_pretrained(tmp_path / "second")
    for file in ("decoder.safetensors", "encoders.safetensors"):
        kept = (tmp_path / "first" / file).read_bytes()
        (tmp_path / "first" / file).write_bytes((tmp_path / "second" / file).read_bytes())
        with pytest.raises(CheckpointError, match="is not the file that its folder was written with"):
            load(tmp_path / "first")
        (tmp_path / "first" / file).write_bytes(kept)
    # A manifest that no longer names the trained blocks: the fingerprint is another one.
    manifest = json.loads((tmp_path / "second/bindllm.json").read_text())
    manifest["encoders"][0]["fingerprint"] = "0" * 64
    (tmp_path / "second/bindllm.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="the encoder .* is not the one"):
        load(tmp_path / "second")


def test_a_plain_folder_has_the_tuned_weights(tmp_path):
    model = build(tmp_path, adapter=AdapterConfig(rank=4, bias=False))
    train(model, ["decoder", "adapter"])
    model.save_pretrained(tmp_path / "model")
    assert torch.equal(load(tmp_path / "model").decoder(IDS).logits, model.decoder(IDS).logits)
    export_decoder(tmp_path / "model", tmp_path / "plain")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype=torch.float32)
    torch.testing.assert_close(plain(IDS).logits, model.decoder(IDS).logits, atol=1e-4, rtol=1e-3)
    assert "the weights and the adapter (21 projections" in (tmp_path / "plain/README.md").read_text()


def test_a_decoder_without_an_adapter_is_exported_too(tmp_path):
    model = build(tmp_path)
    train(model, ["decoder"])
    model.save_pretrained(tmp_path / "model")
    export_decoder(tmp_path / "model", tmp_path / "plain")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype=torch.float32)
    assert torch.equal(plain(IDS).logits, model.decoder(IDS).logits)


def test_names_are_those_of_the_plain_decoder(tmp_path):
    plain, wrapped = build(tmp_path), build(tmp_path, adapter=AdapterConfig(rank=4))
    assert [n for n, _ in plain.parameter_groups()["decoder"]] == [
        n for n, _ in wrapped.parameter_groups()["decoder"]
    ]


def test_another_precision_rounds_the_tuned_weights(tmp_path):
    model = build(tmp_path)
    model.save_pretrained(tmp_path / "model")
    assert load(tmp_path / "model").decoder.dtype == torch.float32
    assert load(tmp_path / "model", dtype="bfloat16").decoder.dtype == torch.bfloat16
    model.decoder.lm_head.weight.data[0, 0] = 1e6
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(CheckpointError, match=r"not finite in float16: lm_head\.weight"):
        load(tmp_path / "model", dtype="float16")


def test_groups_that_do_not_exist_are_refused_with_an_example(tmp_path):
    model = build(tmp_path, tuned=False)
    with pytest.raises(InputError, match=r"'decoder'\. Give the model one, such as decoder: \{tuned: true\}"):
        model.set_trainable(["decoder"])
    model.encoders = ()
    with pytest.raises(InputError, match=r"'encoders'\. .* an encoder of class bindllm\.encoders\.Tuned"):
        model.set_trainable(["encoders"])
    with pytest.raises(
        InputError, match=r"decoder\.quantize is nf4 and decoder\.tuned is true: .* cannot be trained"
    ):
        DecoderConfig("x", quantize="nf4", tuned=True)
    model = build(tmp_path)
    model.config.dtype = "bfloat16"
    with pytest.raises(InputError, match=r"decoder\.dtype is bfloat16, in which small steps would vanish"):
        model.set_trainable(["decoder"])
