"""A LLaMA-shaped 7B decoder with random weights on a GPU: speed and memory of stage 1 (bfloat16) and 2 (QLoRA)."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

from benchmarks.measure import Metric, forget_peak, matrix_rate, peak_bytes, seconds
from benchmarks.parts import DECODER, SEVEN_BILLION, bound_loss, training_batch
from bindllm.encoders import EfficientNetLite
from bindllm.model.adapter import AdapterConfig
from bindllm.model.bindllm import BindLLM
from bindllm.model.decoder import DecoderConfig, load_tokenizer
from bindllm.model.quantize import quantization_config
from bindllm.training.memory import RunPlan

# The published stage 1: a prompt and its caption. Stage 2: an instruction with its answer.
SHAPES = {
    "stage1_bf16": {"rows": 32, "tokens": 96, "answer": 32},
    "stage2_qlora": {"rows": 8, "tokens": 512, "answer": 256},
}
STEPS = 5


def metrics() -> list[Metric]:
    """Return tokens per second, peak memory, share of the matrix rate and the estimator's error of each stage.

    Raises:
        SystemExit: no GPU is available.
    """
    if not torch.cuda.is_available():
        raise SystemExit("the benchmark gpu needs a CUDA GPU of at least 40 GB, but torch finds no GPU here")
    found = []
    for name, shape in SHAPES.items():
        command = [sys.executable, "-m", "benchmarks.gpu", name]
        printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        row = json.loads(printed.splitlines()[-1])
        words = f"7B of random weights, batch {shape['rows']} x {shape['tokens']} tokens, {shape['answer']} supervised"
        found += [
            Metric(
                f"gpu_{name}_tokens_per_second", row["tokens"] / row["seconds"], "tokens/s",
                row["tokens"] * row["rate"] / row["work"],
                f"{words}; {row['seconds'] * 1e3:.0f} ms a step; floor: {row['work'] / 1e12:.0f} TFLOP at the matrix "
                f"rate measured here, {row['rate'] / 1e12:.0f} TFLOP/s",
            ),
            Metric(
                f"gpu_{name}_share_of_matrix_rate", row["work"] / row["rate"] / row["seconds"], "share", 1.0,
                "of the rate of one bfloat16 product at the shapes of the feed-forward layer",
            ),
            Metric(
                f"gpu_{name}_peak_memory", row["peak"] / 1e9, "GB", None,
                f"{words}; of torch's allocator, estimated {row['estimate'] / 1e9:.1f} GB at {row['moment']}",
            ),
            Metric(
                f"gpu_{name}_memory_estimate_error", abs(row["estimate"] / row["peak"] - 1), "ratio", 0.0,
                "at most 0.15",
            ),
        ]  # fmt: skip
    return found


def _run(name: str) -> dict[str, float | str]:
    """Run one stage in this process and return its measurements."""
    shape, stage2 = SHAPES[name], name.startswith("stage2")
    quantize, adapter = ("nf4", AdapterConfig(rank=16)) if stage2 else (None, None)
    trainable = ["adapter"] if stage2 else ["bind", "inject"]
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        AutoConfig.for_model("llama", **SEVEN_BILLION).save_pretrained(folder)
        plan = RunPlan(
            DecoderConfig(folder, dtype="bfloat16", quantize=quantize),
            [EfficientNetLite()],
            rows=shape["rows"],
            tokens=shape["tokens"],
            supervised=shape["rows"] * shape["answer"],
            adapter=adapter,
            trainable=trainable,
            device="cuda",
        )
        estimate = plan.estimate
        decoder = _decoder(Path(folder), quantization_config("nf4", torch.bfloat16) if stage2 else None)
    model = BindLLM(decoder, load_tokenizer(DECODER), DECODER, encoders=[EfficientNetLite()], adapter=adapter)
    model.set_trainable(trainable)
    torch.nn.init.constant_(model.injection.gates, 0.01)
    model.train()
    batch = training_batch(model.decoder, **shape)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)

    def train() -> None:
        # Lightning's order: the gradients of the previous step are still allocated during the forward pass.
        loss = bound_loss(model, batch)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()

    train()
    forget_peak()
    times = [seconds(train) for _ in range(STEPS)]
    peak = peak_bytes()
    tokens = shape["rows"] * shape["tokens"]
    width, inner = SEVEN_BILLION["hidden_size"], SEVEN_BILLION["intermediate_size"]
    layers = SEVEN_BILLION["num_hidden_layers"] * (4 * width**2 + 3 * width * inner)
    # Forward, and backward to the activations only: two multiply-adds per frozen weight and token.
    work = 4 * layers * tokens + 4 * SEVEN_BILLION["vocab_size"] * width * shape["rows"] * shape["answer"]
    return {
        "seconds": sorted(times)[STEPS // 2],
        "tokens": tokens,
        "work": work,
        "rate": matrix_rate(tokens, width, inner, torch.bfloat16, "cuda"),
        "peak": peak,
        "estimate": estimate.total,
        "moment": estimate.moment,
    }


def _decoder(folder: Path, quantized: BitsAndBytesConfig | None) -> PreTrainedModel:
    """A decoder of random weights on the GPU; for quantization it is saved first and then loaded like a real one."""
    with torch.device("cuda"):
        decoder = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=torch.bfloat16)
    if quantized is not None:
        decoder.save_pretrained(folder)
        del decoder
        torch.cuda.empty_cache()
        decoder = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.bfloat16, quantization_config=quantized, device_map={"": 0}
        )
    return decoder.eval().requires_grad_(False)


if __name__ == "__main__":
    print(json.dumps(_run(sys.argv[1])))
