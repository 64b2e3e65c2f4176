"""The estimate of ``bindllm check --memory`` against the measured peak of training, on real weights."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, replace

import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader

from benchmarks.measure import Metric, forget_peak, peak_bytes, used_bytes
from benchmarks.parts import DECODER, training_batch
from bindllm.encoders import EfficientNetLite
from bindllm.model.adapter import AdapterConfig
from bindllm.model.bind_network import BindConfig
from bindllm.model.decoder import default_device
from bindllm.model.injection import InjectConfig
from bindllm.training.memory import RunPlan

STEPS = 2
"""In the second step the gradients and moments of the first exist; later steps need no more memory."""
RETURNED = {"MALLOC_MMAP_THRESHOLD_": "65536"}
"""Makes glibc map every larger allocation, so that freed memory is returned to the system."""


@dataclass
class Setting:
    """One run: a stage, its batch, and whether activations are recomputed."""

    stage: int
    rows: int
    tokens: int
    answer: int
    checkpointing: bool = False


SETTINGS = (
    Setting(stage=1, rows=16, tokens=64, answer=16),
    Setting(stage=1, rows=4, tokens=128, answer=64),
    Setting(stage=2, rows=16, tokens=64, answer=16),
    Setting(stage=2, rows=4, tokens=128, answer=64),
    Setting(stage=1, rows=16, tokens=64, answer=16, checkpointing=True),
    Setting(stage=2, rows=16, tokens=64, answer=16, checkpointing=True),
)


class _Batches(LightningDataModule):
    """The same batch at every step, without rows that an objective could refuse."""

    sources = ()

    def __init__(self, batch: dict[str, torch.Tensor]) -> None:
        super().__init__()
        self._batch = {**batch, "numbers": torch.arange(len(batch["labels"]))}

    def samples(self, split: str) -> list:
        """Return no samples."""
        return []

    def train_dataloader(self) -> DataLoader:
        """One epoch is the whole run."""
        return DataLoader([self._batch] * STEPS, batch_size=None)


def metrics() -> list[Metric]:
    """Return the largest relative errors of the whole estimate and of the step without the loaded decoder."""
    whole, steps, notes = [], [], []
    for setting in SETTINGS:
        found = measure(setting)
        whole.append(found["estimate"] / found["peak"] - 1)
        steps.append(found["estimated_step"] / found["step"] - 1)
        notes.append(
            f"stage {setting.stage}, {setting.rows} x {setting.tokens}"
            f"{', checkpointing' if setting.checkpointing else ''}: {found['peak'] / 1e6:.0f} MB, {whole[-1]:+.1%}, "
            f"step only {found['step'] / 1e6:.0f} MB, {steps[-1]:+.1%}"
        )
    plain = measure(SETTINGS[0], returned=False)["peak"] / measure(SETTINGS[0])["peak"]
    return [
        Metric(
            "memory_estimate_error", max(map(abs, whole)), "ratio", 0.0,
            f"largest of {len(SETTINGS)} settings, at most 0.15; {'; '.join(notes)}",
        ),
        Metric(
            "memory_estimate_step_error", max(map(abs, steps)), "ratio", 0.0,
            "the same without libraries and frozen weights, which are loaded before the first step",
        ),
        Metric(
            "memory_kept_by_allocator", plain, "ratio", 1.0,
            "peak of a CPU process with the C library's default allocator, over the same with "
            "MALLOC_MMAP_THRESHOLD_=65536, with which the errors above are measured",
        ),
    ]  # fmt: skip


def measure(setting: Setting, *, returned: bool = True) -> dict[str, int]:
    """Run one setting in its own process and return its peak and the estimate.

    Args:
        setting: the run.
        returned: whether the C library returns freed memory to the system at once. By default it keeps much of it in
            pieces, and the peak of the process is then higher than the memory in use at any time.
    """
    command = [sys.executable, "-m", "benchmarks.memory", json.dumps(asdict(setting))]
    environment = {**os.environ, **(RETURNED if returned else {})}
    printed = subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout
    return json.loads(printed.splitlines()[-1])


def _run(setting: Setting) -> dict[str, int]:
    """Train a few steps like ``bindllm fit`` and return the bytes."""
    from lightning.pytorch import Trainer

    from bindllm.training.module import BindModule
    from bindllm.training.optim import OptimConfig

    encoder = EfficientNetLite()
    adapter = AdapterConfig() if setting.stage == 2 else None
    trainable = ["adapter"] if setting.stage == 2 else ["bind", "inject"]
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            max_steps=STEPS, logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, gradient_clip_val=1.0, devices=1, default_root_dir=folder,
        )  # fmt: skip
        torch.randn(512, 512) @ torch.randn(512, 512)
        plan = RunPlan(
            DECODER,
            [encoder],
            rows=setting.rows,
            tokens=setting.tokens,
            supervised=setting.rows * setting.answer,
            adapter=adapter,
            trainable=trainable,
            checkpointing=setting.checkpointing,
            device=default_device(),
        )
        # As `check` does before: this loads the code of the decoder and of peft into the process.
        assert plan.estimate.total > 0
        libraries = used_bytes()
        estimate = replace(plan, framework=libraries).estimate
        module = BindModule(
            DECODER, [encoder], BindConfig(), InjectConfig(), OptimConfig(warmup=1), trainable, adapter,
            checkpoint_activations=setting.checkpointing,
        )  # fmt: skip
        module.configure_model()
        if trainable == ["adapter"]:
            torch.nn.init.constant_(module.model.injection.gates, 0.01)
        batch = training_batch(
            module.model.decoder, rows=setting.rows, tokens=setting.tokens, answer=setting.answer
        )
        gc.collect()
        forget_peak()
        loaded = used_bytes()
        trainer.fit(module, datamodule=_Batches(batch))
        peak = peak_bytes()
    frozen = sum(
        estimate.parts.get(name, 0) for name in ("framework", "decoder", "bind", "inject", "adapter")
    )
    return {
        "estimate": estimate.total,
        "peak": peak,
        "step": peak - loaded,
        "estimated_step": estimate.total - frozen,
        "libraries": libraries,
        "loaded": loaded,
        "frozen": frozen,
        "moment": estimate.moment,
        "parts": estimate.parts,
    }


if __name__ == "__main__":
    print(json.dumps(_run(Setting(**json.loads(sys.argv[1])))))
