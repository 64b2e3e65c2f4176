"""``bindllm check --memory``: what a run needs on each device, what takes most of it, and what would make it fit."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.table import Table
from torch import nn
from transformers import PreTrainedTokenizerBase

from bindllm.data.rows import Row, make_sample
from bindllm.encoders import Encoder
from bindllm.errors import InputError
from bindllm.model.activations import TrainingStep
from bindllm.model.decoder import default_device
from bindllm.model.memory import MemoryEstimate, ModelPlan, Placement, estimate_memory
from bindllm.training.preflight import MEASURED_ROWS

CUDA_CONTEXT = 600_000_000
"""What a process takes of a GPU before its first tensor: context and kernels, as nvidia-smi shows it."""

_UNITS = {"": 1, "KB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
# The part of a table, and the keys of a recipe that make it smaller.
_TURNS = {
    "activations": "data.batch_size, data.max_length, model.checkpoint_activations",
    "gradients of activations": "data.batch_size, data.max_length",
    "logits": "data.batch_size: supervised tokens times the vocabulary",
    "decoder": "model.decoder.dtype, model.decoder.quantize, or more devices with a sharded decoder",
    "bind": "model.bind.depth, model.bind.expansion",
    "adapter": "model.adapter.rank",
    "optimizer": "model.bind, model.adapter.rank, or DeepSpeed stage 1",
    "gradients": "model.bind, model.adapter.rank, or DeepSpeed stage 2",
    "buckets of DDP": "model.bind, model.adapter.rank",
    "framework": "nothing: the libraries of every run",
}
_SHARDED_DEVICES = (2, 4, 8, 16)


def read_size(text: str) -> int:
    """Read a size such as ``24GB``, ``512MB`` or ``80GiB``, in bytes.

    Raises:
        InputError: it is none.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]I?B)?\s*", text.upper())
    size = int(float(found[1]) * _UNITS[found[2] or ""]) if found else 0
    if not size:
        raise InputError(f"memory limit {text!r}: expected a size such as 24GB, 512MB or 80GiB")
    return size


@dataclass(frozen=True)
class RunPlan:
    """A run as far as its memory depends on it.

    Args:
        model: its parts.
        step: the batch of one device.
        placement: devices and strategy.
        looked_at: rows whose length was counted for the batch; 0: the longest that the recipe allows.
        encoders: bytes of the encoders' weights, which are on the device while media are embedded and not after.
    """

    model: ModelPlan
    step: TrainingStep
    placement: Placement
    looked_at: int = 0
    encoders: int = 0

    def estimate(self) -> MemoryEstimate:
        """Return what it needs, per device."""
        return estimate_memory(self.model, self.step, self.placement)


def plan_run(
    recipe: Mapping[str, Any],
    parts: Mapping[str, Any],
    encoders: Sequence[Encoder],
    rows: Sequence[Row],
    tokenizer: PreTrainedTokenizerBase,
) -> RunPlan:
    """Read off a recipe what its memory depends on.

    Args:
        recipe: the resolved recipe, with `model`, `data` and `trainer`.
        parts: the built parts `decoder`, `bind`, `inject` and, if there is one, `adapter` of the model.
        encoders: of the model.
        rows: training rows, of which some are made into tokens; none: rows of the greatest length are assumed.
        tokenizer: of the decoder.
    """
    model, data, trainer = recipe["model"], recipe["data"], recipe["trainer"]
    device = _device(trainer["accelerator"])
    plan = ModelPlan(
        decoder=parts["decoder"],
        embedding_size=encoders[0].embedding_size,
        bind=parts["bind"],
        inject=parts["inject"],
        adapter=parts.get("adapter"),
        trainable=tuple(model["trainable"]),
        device=device,
    )
    batch, looked_at = _batch(data, rows, tokenizer, pairs=_learns_from_pairs(model))
    framework = resident_bytes() if device == "cpu" else CUDA_CONTEXT
    return RunPlan(
        plan,
        replace(batch, checkpointing=bool(model["checkpoint_activations"])),
        _placement(trainer, device, framework),
        looked_at,
        sum(_weights(encoder) for encoder in encoders),
    )


def memory_lines(plan: RunPlan, limit: int | None) -> tuple[list[Any], str]:
    """Return what to print, and what is wrong: a sentence if it does not fit, else nothing.

    Args:
        plan: the run.
        limit: bytes of a device; None: what this machine has.
    """
    estimate, step = plan.estimate(), plan.step
    rows = (
        f"longest of {plan.looked_at:,} rows" if plan.looked_at else "data.max_length, all of it supervised"
    )
    where = f"each of {plan.placement.devices} devices" if plan.placement.devices > 1 else "one device"
    lines: list[Any] = [
        f"memory of {where} ({plan.model.device}, decoder in {str(plan.model.dtype)[6:]}), at {estimate.moment}, with "
        f"{step.rows} rows of {step.tokens} tokens ({rows}):",
        _table(estimate),
    ]
    if plan.encoders:
        lines.append(
            f"while media are embedded, before that: {_text(plan.encoders)} of encoders and their activations"
        )
    if plan.model.device == "cpu":
        lines.append(
            "the process may show more than is in use at once: the C library keeps freed memory (docs/memory.md)"
        )
    largest = next(iter(estimate.parts))
    lines.append(f"most of it: {largest}; what changes it: {_TURNS.get(largest, 'more or larger devices')}")
    available = device_bytes(plan.model.device) if limit is None else limit
    if available is None:
        lines.append("this machine has no such device; say what a device has with --memory_limit 24GB")
        return lines, ""
    if estimate.total <= available:
        lines.append(f"fits into {_text(available)}: {estimate.total / available:.0%} of it")
        return lines, ""
    told = [
        f"{words}: {_text(total)}{', fits' if total <= available else ''}"
        for words, total in ways(plan, available)
    ]
    return lines, (
        f"the run needs {_text(estimate.total)} on {where}, which has {_text(available)}. "
        + ("What makes it less, one after the other: " + "; ".join(told) if told else "Nothing makes it less")
    )


def ways(plan: RunPlan, available: int) -> Iterator[tuple[str, int]]:
    """Yield changes of a run, each on top of those before, until it fits: words of a recipe, and the bytes then.

    First what costs time alone, then what costs precision, then further devices.
    """
    for change in (_checkpointed, _smaller_batch, _halved, _quantized, _spread):
        found = change(plan, available)
        if found is None:
            continue
        words, plan = found
        total = plan.estimate().total
        yield words, total
        if total <= available:
            return


Way = tuple[str, RunPlan] | None


def _checkpointed(plan: RunPlan, available: int) -> Way:
    if plan.step.checkpointing:
        return None
    return "model.checkpoint_activations true", replace(plan, step=replace(plan.step, checkpointing=True))


def _smaller_batch(plan: RunPlan, available: int) -> Way:
    rows = plan.step.rows
    fewer = rows
    while fewer > 1:
        fewer //= 2
        supervised = max(1, plan.step.supervised * fewer // rows)
        step = replace(plan.step, rows=fewer, supervised=supervised)
        smaller = replace(plan, step=step, placement=replace(plan.placement, accumulates=True))
        if fewer == 1 or smaller.estimate().total <= available:
            times = -(-rows // fewer)
            return f"data.batch_size {fewer} and {times} times trainer.accumulate_grad_batches", smaller
    return None


def _halved(plan: RunPlan, available: int) -> Way:
    if plan.model.dtype.itemsize <= torch.bfloat16.itemsize:
        return None
    return "model.decoder.dtype bfloat16", _with_decoder(plan, dtype="bfloat16")


def _quantized(plan: RunPlan, available: int) -> Way:
    # Packed weights cannot be cut, so a run in shards is not quantized.
    if plan.model.decoder.quantize is not None or plan.placement.strategy == "sharded":
        return None
    return "model.decoder.quantize nf4", _with_decoder(plan, quantize="nf4")


def _spread(plan: RunPlan, available: int) -> Way:
    plain = _with_decoder(plan, quantize=None)
    for devices in _SHARDED_DEVICES:
        placement = replace(plan.placement, devices=devices, strategy="sharded")
        shared = replace(plain, placement=placement)
        if devices > plan.placement.devices and shared.estimate().total <= available:
            return f"{devices} devices that share a decoder that is not quantized", shared
    return None


def _with_decoder(plan: RunPlan, **changes: Any) -> RunPlan:
    return replace(plan, model=replace(plan.model, decoder=replace(plan.model.decoder, **changes)))


def device_bytes(device: str) -> int | None:
    """Return the memory of this machine, or of its first GPU; None where there is no such device."""
    if device != "cpu":
        return torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else None
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def resident_bytes() -> int:
    """Return the memory of this process: libraries and data, no decoder yet."""
    status = Path("/proc/self/status")
    found = re.search(r"VmRSS:\s+(\d+) kB", status.read_text()) if status.exists() else None
    if found:
        return int(found[1]) * 1024
    # Elsewhere than on Linux the highest mark is all that can be asked for; macOS counts bytes.
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _device(accelerator: Any) -> str:
    """Return cpu or cuda for the trainer's accelerator, whether or not this machine has it."""
    name = str(accelerator).lower()
    if name == "auto":
        return default_device()
    return "cpu" if name == "cpu" else "cuda" if name in ("gpu", "cuda") else name


def _placement(trainer: Mapping[str, Any], device: str, framework: int) -> Placement:
    """Read devices and strategy of a trainer; what shares a decoder or moments is counted per node, or all."""
    asked, strategy = trainer["devices"], trainer["strategy"]
    if str(asked) in ("auto", "-1"):
        devices = max(1, torch.cuda.device_count()) if device == "cuda" else 1
    else:
        devices = len(asked) if isinstance(asked, list) else int(asked) if str(asked).isdigit() else 1
    nodes = int(trainer["num_nodes"])
    options = strategy.get("init_args") or {} if isinstance(strategy, Mapping) else {}
    name = str(strategy["class_path"] if isinstance(strategy, Mapping) else strategy).lower()
    kind, sharing = "single", devices
    if "shardeddecoder" in name:
        kind, sharing = "sharded", devices * nodes if options.get("across_nodes") else devices
    elif "deepspeed" in name:
        stage = re.search(r"stage_(\d)", name)
        stage = int(stage[1]) if stage else int(options.get("stage", 2))
        kind, sharing = ("ddp", "zero1", "zero2")[min(stage, 2)], devices * nodes
    elif devices * nodes > 1:
        kind, sharing = "ddp", devices * nodes
    return Placement(
        devices=max(1, sharing),
        strategy=kind if devices * nodes > 1 else "single",
        # Lightning clips no gradients of a fused optimizer in mixed precision, so there is none.
        fused=not str(trainer["precision"] or "").endswith("mixed"),
        accumulates=int(trainer["accumulate_grad_batches"]) > 1,
        framework=framework,
    )


def _batch(
    data: Mapping[str, Any], rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, *, pairs: bool
) -> tuple[TrainingStep, int]:
    """Return the largest batch, and the number of rows that it was read off."""
    size, longest = data["batch_size"], data["max_length"]
    samples = []
    for row in rows[:: max(1, len(rows) // MEASURED_ROWS)]:
        try:
            samples.append(make_sample(row, tokenizer, longest))
        except InputError:
            # Counted and shown with the sources; it will be in no batch.
            continue
    if not samples:
        return TrainingStep(size, longest, size * longest), 0
    rejected = [sample.rejected for sample in samples if pairs and sample.rejected is not None]
    everything = samples + rejected
    step = TrainingStep(
        rows=size * (2 if rejected else 1),
        tokens=max(len(sample.input_ids) for sample in everything),
        supervised=size * (2 if rejected else 1) * max(sample.num_supervised for sample in everything),
        groups=max(1, *(len(sample.media) for sample in samples)),
    )
    return step, len(samples)


def _learns_from_pairs(model: Mapping[str, Any]) -> bool:
    objective = model.get("objective")
    if not objective:
        return False
    module, _, name = objective["class_path"].rpartition(".")
    return vars(import_module(module))[name].needs in ("pairs", "labels")


def _weights(encoder: Encoder) -> int:
    """Bytes of the weights of an encoder that are loaded by now."""
    parts = [part for part in vars(encoder).values() if isinstance(part, nn.Module)]
    return sum(value.nbytes for part in parts for value in (*part.parameters(), *part.buffers()))


def _table(estimate: MemoryEstimate) -> Table:
    table = Table("part", "memory", "share", box=box.SIMPLE)
    for column in table.columns[1:]:
        column.justify = "right"
    for name, size in estimate.parts.items():
        if size:
            table.add_row(name, _text(size), f"{size / estimate.total:.0%}")
    table.add_section()
    table.add_row("together", _text(estimate.total), "")
    return table


def _text(size: int) -> str:
    return f"{size / 1e9:,.2f} GB" if size >= 1e9 else f"{size / 1e6:,.1f} MB"
