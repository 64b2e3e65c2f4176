"""A training step of the second stage against the same step of plain peft LoRA on the bare decoder: time and memory.

Both sides train the same parameters (rank, targets, biases and norms) in float32 over a frozen decoder, with AdamW and
clipping. Both project only the supervised tokens to the vocabulary; plain Hugging Face would project every token and be
slower. Our side also runs the bind network, the routing of the media and the open gates.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import torch
from torch import nn

from benchmarks.measure import Metric, forget_peak, paired, peak_bytes
from benchmarks.parts import DECODER, bare_decoder, bound_loss, training_batch
from bindllm.encoders import EfficientNetLite
from bindllm.model.adapter import TARGETS, AdapterConfig
from bindllm.model.bindllm import BindLLM
from bindllm.model.decoder import load_tokenizer

ON_GPU = torch.cuda.is_available()
# The shape of a question and its answer; on a GPU the shape of the published second stage.
SHAPE = {"rows": 16, "tokens": 256, "answer": 128} if ON_GPU else {"rows": 8, "tokens": 64, "answer": 16}
RANK = 16
STEPS = 3


def metrics() -> list[Metric]:
    """Return the time and peak memory of a step over those of plain peft."""
    (ours, ours_trained), (theirs, theirs_trained) = _bound_step(), _plain_step()
    ratio, a, b = paired(ours, theirs, repeats=5 if ON_GPU else 9)
    shape = f"batch {SHAPE['rows']} x {SHAPE['tokens']} tokens, {SHAPE['answer']} supervised, rank {RANK}"
    peaks = {}
    for side in ("plain", "bound"):
        command = [sys.executable, "-m", "benchmarks.lora_step", side]
        peaks[side] = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return [
        Metric(
            "lora_step_over_peft", ratio, "ratio", 1.0,
            f"{shape}; {a * 1e3:.0f} ms over {b * 1e3:.0f} ms; {ours_trained / 1e6:.2f} M parameters trained on ours, "
            f"{theirs_trained / 1e6:.2f} M on plain peft's; the same vocabulary projection on both; at most 1.10",
        ),
        Metric(
            "lora_memory_over_peft", peaks["bound"] / peaks["plain"], "ratio", 1.0,
            f"{peaks['bound'] / 1e6:.0f} MB over {peaks['plain'] / 1e6:.0f} MB; at most 1.05",
        ),
    ]  # fmt: skip


def _bound_step() -> tuple[Callable[[], None], int]:
    """Return our step: adapter trained, bind network frozen, gates open."""
    torch.manual_seed(0)
    model = BindLLM(
        bare_decoder(),
        load_tokenizer(DECODER),
        DECODER,
        encoders=[EfficientNetLite()],
        adapter=AdapterConfig(rank=RANK),
    )
    model.set_trainable(["adapter"])
    nn.init.constant_(model.injection.gates, 0.01)
    model.train()
    batch = training_batch(model.decoder, **SHAPE)
    return _step(model, lambda: bound_loss(model, batch))


def _plain_step() -> tuple[Callable[[], None], int]:
    """Return the reference step: `get_peft_model` as documented, and the loss at the supervised tokens."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=RANK,
        lora_alpha=RANK,
        lora_bias=True,
        target_modules=list(TARGETS),
        modules_to_save=["input_layernorm", "post_attention_layernorm", "norm"],
    )
    tuned = get_peft_model(bare_decoder(), config).eval()
    decoder = tuned.get_base_model()
    for parameter in tuned.parameters():
        if parameter.requires_grad:
            # As on our side: peft's `autocast_adapter_dtype` converts the matrices only, this also converts the norms.
            parameter.data = parameter.data.float()
    batch = training_batch(decoder, **SHAPE)
    labels = batch["labels"]
    rows, columns = (labels[:, 1:] != -100).nonzero(as_tuple=True)

    def loss() -> torch.Tensor:
        hidden = decoder.get_decoder()(batch["input_ids"], use_cache=False).last_hidden_state
        logits = decoder.get_output_embeddings()(hidden[rows, columns].to(decoder.dtype))
        return nn.functional.cross_entropy(logits.float(), labels[rows, columns + 1])

    return _step(tuned, loss)


def _step(model: nn.Module, loss: Callable[[], torch.Tensor]) -> tuple[Callable[[], None], int]:
    """Return a whole step (forward, backward, clipping, AdamW), and the number of parameters it trains."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)

    def step() -> None:
        loss().backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step, sum(parameter.numel() for parameter in trained)


def _peak(side: str) -> int:
    """Run a few steps of one side and return the peak bytes of this process (or of the GPU), without loading."""
    step, _ = _bound_step() if side == "bound" else _plain_step()
    forget_peak()
    for _ in range(STEPS):
        step()
    return peak_bytes()


if __name__ == "__main__":
    print(_peak(sys.argv[1]))
