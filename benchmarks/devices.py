"""Losses and throughput of two processes against one, and of a sharded decoder against DDP.

On a machine with fewer than two GPUs the two processes run on its cores (gloo). The decoder is the default one.
"""

from __future__ import annotations

import csv
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning.pytorch.callbacks import Callback
from PIL import Image

from benchmarks.measure import Metric

ROOT = Path(__file__).parents[1]
DECODER = ROOT / "checkpoints/smollm2-135m-instruct"
ENCODER = ROOT / "checkpoints/efficientnet-lite0"
COLORS = ("red", "green", "blue", "white", "black", "yellow", "cyan", "magenta")
STEPS = 6
ROWS = 8
"""Rows of a batch. Each step has two batches, one after the other or one in each process."""

ON_GPUS = torch.cuda.device_count() > 1

_SHARDED = {"class_path": "bindllm.training.strategies.ShardedDecoder"}
_SIDES: dict[str, dict[str, Any]] = {
    "one": {"devices": 1, "accumulate_grad_batches": 2},
    "ddp": {"devices": 2, "strategy": "ddp"},
    "sharded": {"devices": 2, "strategy": _SHARDED},
}


class StepTimes(Callback):
    """Logs the seconds from one optimizer step to the next as ``step_seconds``."""

    def __init__(self) -> None:
        self._last: float | None = None

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        """Log the time since the last step."""
        now = time.perf_counter()
        if self._last is not None:
            pl_module.log("step_seconds", now - self._last)
        self._last = now


def metrics() -> list[Metric]:
    """Train the same few steps with one process, with two, and with two that shard the decoder."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _write_images(folder / "images")
        runs = {side: _train(folder, side, options) for side, options in _SIDES.items()}
    losses = {side: [float(row["train_loss"]) for row in rows] for side, rows in runs.items()}
    seconds = {side: _seconds_of_a_step(rows) for side, rows in runs.items()}
    shape = f"{STEPS} steps of {2 * ROWS} rows, float32, {'2 GPUs' if ON_GPUS else 'CPU (gloo)'}"
    cores = f"{os.cpu_count()} cores"
    return [
        Metric(
            "ddp2_loss_difference", _difference(losses["ddp"], losses["one"]), "nats/token", 0.0,
            f"largest over {shape}: 2 processes (DDP) against 1 that accumulates 2 batches; at most 1e-5",
        ),
        Metric(
            "fsdp2_loss_difference", _difference(losses["sharded"], losses["ddp"]), "nats/token", 0.0,
            f"largest over {shape}: 2 processes that share the decoder (ShardedDecoder) against DDP; at most 1e-5",
        ),
        Metric(
            "ddp2_throughput", seconds["one"] / seconds["ddp"], "ratio", 2.0,
            f"rows per second of 2 processes over 1, on {cores}, each process with its share of them; {shape}",
        ),
        Metric(
            "fsdp2_throughput", seconds["ddp"] / seconds["sharded"], "ratio", 1.0,
            f"rows per second of 2 processes that share the decoder over 2 of DDP; {shape}",
        ),
    ]  # fmt: skip


def _difference(ours: list[float], theirs: list[float]) -> float:
    return max(abs(a - b) for a, b in zip(ours, theirs, strict=True))


def _seconds_of_a_step(rows: list[dict[str, str]]) -> float:
    """The shortest step of a run: the others include first-time costs and other programs."""
    return min(float(row["step_seconds"]) for row in rows if row["step_seconds"])


def _write_images(folder: Path) -> None:
    """Write plain colors with captions of many lengths, so that the batches of a step differ in tokens."""
    folder.mkdir()
    with (folder / "captions.csv").open("w", newline="") as stream:
        table = csv.writer(stream)
        table.writerow(["image", "caption", "split"])
        for number in range(2 * ROWS * STEPS):
            color = COLORS[number % len(COLORS)]
            Image.new("RGB", (32, 32), color).save(folder / f"{number}.png")
            caption = " ".join([f"a {color} square"] * (1 + number % 7))
            table.writerow([f"{number}.png", caption, "train"])


def _train(folder: Path, side: str, options: dict[str, Any]) -> list[dict[str, str]]:
    """Train a side in its own processes and return one row per step."""
    recipe = {
        "output": f"checkpoints/{side}",
        "save_every_seconds": 10_000,
        "model": {
            "decoder": {"name": str(DECODER), "dtype": "float32", "system": ""},
            "encoders": [
                {
                    "class_path": "bindllm.encoders.EfficientNetLite",
                    "init_args": {"weights": str(ENCODER)},
                }
            ],
            "bind": {},
            "inject": {},
            "optim": {},
        },
        "data": {
            "sources": [{"path": "images"}],
            "store": "store",
            "batch_size": ROWS,
        },
        "trainer": {
            "accelerator": "gpu" if ON_GPUS else "cpu",
            "max_epochs": 1,
            "limit_val_batches": 0,
            "gradient_clip_val": 1.0,
            "log_every_n_steps": 1,
            "enable_progress_bar": False,
            "logger": False,
            "callbacks": [{"class_path": "benchmarks.devices.StepTimes"}],
            **options,
        },
    }
    file = folder / f"{side}.yaml"
    file.write_text(yaml.safe_dump(recipe))
    # As a module, because Lightning starts the other processes with the same command line.
    command = [sys.executable, "-m", "bindllm.cli", "fit", "--config", str(file)]
    paths = os.pathsep.join([str(ROOT), str(ROOT / "src")])
    subprocess.run(command, check=True, cwd=folder, env={**os.environ, "PYTHONPATH": paths})
    with (folder / "runs" / side / "metrics.csv").open(newline="") as stream:
        return [row for row in csv.DictReader(stream) if row["train_loss"]]
