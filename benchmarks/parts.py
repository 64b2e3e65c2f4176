"""Models and batches of the benchmarks: the default decoder, or on a GPU a LLaMA-shaped 7B one with random weights."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from bindllm.encoders import EfficientNetLite
from bindllm.model.bindllm import BindLLM
from bindllm.model.decoder import DecoderConfig, default_device, load_decoder, load_tokenizer
from bindllm.objectives import next_token_loss

DECODER = DecoderConfig("checkpoints/smollm2-135m-instruct")
# LLaMA-1 7B: 32 layers of width 4096, the size of the published ImageBind-LLM.
SEVEN_BILLION = {
    "vocab_size": 32_000,
    "hidden_size": 4096,
    "intermediate_size": 11_008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
}


def bare_decoder(attention: str | None = None) -> PreTrainedModel:
    """Return a decoder without hooks, with an attention kernel or transformers' choice."""
    if not torch.cuda.is_available():
        return load_decoder(replace(DECODER, attention=attention))
    config = AutoConfig.for_model("llama", **SEVEN_BILLION)
    with torch.device("cuda"):
        decoder = AutoModelForCausalLM.from_config(
            config, dtype=torch.bfloat16, attn_implementation=attention
        )
    return decoder.eval().requires_grad_(False)


def bound_model(*, open_gates: bool = True, attention: str | None = None, **parts: Any) -> BindLLM:
    """Return the same decoder with bind network and injection; open gates, so that no computation can be skipped.

    Args:
        open_gates: whether the gates are open.
        attention: as for `bare_decoder`.
        **parts: ``bind`` and ``inject`` as for `BindLLM`.
    """
    torch.manual_seed(0)
    encoders = [EfficientNetLite()]
    model = BindLLM(bare_decoder(attention), load_tokenizer(DECODER), DECODER, encoders=encoders, **parts)
    model.set_trainable(["bind", "inject"])
    if open_gates:
        torch.nn.init.constant_(model.injection.gates, 0.01)
    return model.train()


def training_batch(decoder: PreTrainedModel, *, rows: int, tokens: int, answer: int) -> dict[str, Tensor]:
    """Return a batch of random ids with one media group per row; the last ``answer`` tokens are supervised."""
    device = default_device()
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(10, decoder.config.vocab_size, (rows, tokens), generator=generator).to(device)
    labels = torch.full_like(ids, -100)
    labels[:, -answer:] = ids[:, -answer:]
    embeddings = torch.nn.functional.normalize(torch.randn(rows, 1, 1280, generator=generator), dim=-1)
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "media_index": torch.zeros_like(ids),
        "embeddings": embeddings.to(device),
        "labels": labels,
    }


def bare_loss(decoder: PreTrainedModel, batch: dict[str, Tensor]) -> Tensor:
    """Return the loss of the bare frozen decoder, with a gradient down to its input embeddings."""
    labels = batch["labels"]
    inputs = decoder.get_input_embeddings()(batch["input_ids"]).detach().requires_grad_(True)
    hidden = decoder.get_decoder()(inputs_embeds=inputs, use_cache=False).last_hidden_state
    rows, columns = (labels[:, 1:] != -100).nonzero(as_tuple=True)
    logits = decoder.get_output_embeddings()(hidden[rows, columns])
    return torch.nn.functional.cross_entropy(logits.float(), labels[rows, columns + 1])


def bound_loss(model: BindLLM, batch: dict[str, Tensor]) -> Tensor:
    """Return the loss of the bound model on the same batch."""
    output = model(**batch)
    return next_token_loss(output.logits, output.targets)
