"""A training step of the bound model against the bare frozen decoder: time and peak memory."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.learning import LAYERS
from benchmarks.measure import Metric, forget_peak, matrix_rate, paired, peak_bytes
from benchmarks.parts import bare_decoder, bare_loss, bound_loss, bound_model, training_batch
from bindllm.model.bindllm import BindLLM
from bindllm.model.injection import InjectConfig

ON_GPU = torch.cuda.is_available()
# The shape of the batches of recipes/openmoji.yaml; on a GPU the published stage 1 (prompt and caption of 96 tokens).
SHAPE = {"rows": 32, "tokens": 96, "answer": 32} if ON_GPU else {"rows": 16, "tokens": 24, "answer": 6}


def metrics() -> list[Metric]:
    """Compare a whole step (forward, backward, clipping, AdamW) with the bare forward and backward."""
    bare, model = bare_decoder(), bound_model()
    batch = training_batch(bare, **SHAPE)
    repeats = 5 if ON_GPU else 9
    ratio, ours, theirs = paired(
        whole_step(model, batch), lambda: bare_loss(bare, batch).backward(), repeats=repeats
    )
    tokens = SHAPE["rows"] * SHAPE["tokens"]
    layers = sum(p.numel() for p in bare.get_decoder().layers.parameters())
    # Forward, and backward to the activations only: two multiply-adds per weight and token.
    work = (
        4 * layers * tokens
        + 4 * bare.get_output_embeddings().weight.numel() * SHAPE["rows"] * SHAPE["answer"]
    )
    config = bare.config
    rate = matrix_rate(tokens, config.hidden_size, config.intermediate_size, bare.dtype, str(bare.device))
    device = str(bare.device)
    halved, whole = (matrix_rate(4096, 1024, 1024, kind, device) for kind in (torch.bfloat16, torch.float32))
    shape = f"batch {SHAPE['rows']} x {SHAPE['tokens']} tokens, {str(bare.dtype)[6:]}"
    return [
        Metric(
            "train_step_over_bare", ratio, "ratio", 1.0,
            f"{shape}; {ours * 1e3:.0f} ms with AdamW over {theirs * 1e3:.0f} ms bare; at most 1.10",
        ),
        Metric(
            "train_samples_per_second", SHAPE["rows"] / ours, "samples/s", SHAPE["rows"] * rate / work,
            f"{shape}; floor: {work / 1e12:.2f} TFLOP at the matrix rate measured here, {rate / 1e9:.0f} GFLOP/s",
        ),
        Metric(
            "train_tokens_per_second", tokens / ours, "tokens/s", tokens * rate / work, f"{shape}; floor as above",
        ),
        Metric(
            "train_share_of_matrix_rate", work / rate / ours, "share", 1.0,
            "of the rate of one matrix product at the shapes of the decoder's feed-forward layer",
        ),
        Metric(
            "matrix_rate_bf16_over_fp32", halved / whole, "ratio", None,
            f"4096 x 1024 x 1024: {halved / 1e9:.0f} over {whole / 1e9:.0f} GFLOP/s; above 1, bfloat16 pays here",
        ),
        _memory(),
        *_attention(),
        *_fewer_layers(batch),
    ]  # fmt: skip


def whole_step(model: BindLLM, batch: dict[str, Tensor]) -> Callable[[], None]:
    """Return one training step of the bound model, as a call."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=1e-4, fused=True)

    def step() -> None:
        bound_loss(model, batch).backward()
        torch.nn.utils.clip_grad_norm_(trainable, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def _attention() -> list[Metric]:
    """Compare a step with plain products in the attention with one of torch's fused kernel."""
    found = []
    for tokens in (24, 96, 512):
        eager, fused = bound_model(attention="eager"), bound_model(attention="sdpa")
        # As many tokens in all, but for the shortest rows.
        batch = training_batch(eager.decoder, rows=max(2, 1536 // max(96, tokens)), tokens=tokens, answer=6)
        ratio, ours, theirs = paired(whole_step(eager, batch), whole_step(fused, batch), repeats=5)
        note = (
            f"rows of {tokens} tokens: {ours * 1e3:.0f} over {theirs * 1e3:.0f} ms; below 1, eager pays here"
        )
        found.append(Metric(f"train_step_eager_over_sdpa_{tokens}", ratio, "ratio", None, note))
    return found


def _fewer_layers(batch: dict[str, Tensor]) -> list[Metric]:
    """Compare a step whose bind vectors reach only some layers with the bare decoder's step."""
    bare, metrics = bare_decoder(), []
    num_layers = bare.config.num_hidden_layers
    for name, layers in LAYERS.items():
        if layers is None:
            continue
        step = whole_step(bound_model(inject=InjectConfig(layers=layers)), batch)
        ratio, ours, theirs = paired(step, lambda: bare_loss(bare, batch).backward(), repeats=5)
        # All layers run forward; backward, one product of the same size, ends at the first served layer.
        floor = (num_layers + num_layers - layers[0]) / (2 * num_layers)
        note = f"{ours * 1e3:.0f} ms over {theirs * 1e3:.0f} ms; floor: the backward pass ends at layer {layers[0]}"
        metrics.append(Metric(f"train_step_{name.replace(' ', '_')}", ratio, "ratio", floor, note))
    return metrics


def _memory() -> Metric:
    """Return the peak memory of a few training steps over that of the bare decoder, each in its own process."""
    peaks = {}
    for side in ("bare", "bound"):
        command = [sys.executable, "-m", "benchmarks.train_step", side]
        peaks[side] = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    trainable = sum(p.numel() for p in bound_model().parameters() if p.requires_grad)
    floor = 1 + 12 * trainable / peaks["bare"]
    return Metric(
        "train_peak_memory_over_bare", peaks["bound"] / peaks["bare"], "ratio", floor,
        f"{peaks['bound'] / 1e6:.0f} MB over {peaks['bare'] / 1e6:.0f} MB; floor: weights and both moments "
        f"of {trainable / 1e6:.1f} M trainable parameters, 12 bytes each; gradients come when activations have gone",
    )  # fmt: skip


def _peak(side: str) -> int:
    """Run three steps of one side and return the peak bytes of this process (or of the GPU), without loading."""
    if side == "bare":
        decoder = bare_decoder()
        batch = training_batch(decoder, **SHAPE)
        forget_peak()
        for _ in range(3):
            bare_loss(decoder, batch).backward()
    else:
        model = bound_model()
        batch = training_batch(model.decoder, **SHAPE)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True)
        forget_peak()
        for _ in range(3):
            bound_loss(model, batch).backward()
            optimizer.step()
            optimizer.zero_grad()
    return peak_bytes()


if __name__ == "__main__":
    print(_peak(sys.argv[1]))
