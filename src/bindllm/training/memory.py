"""Estimates the memory of a recipe on each device, before a weight is loaded, and finds what would make it fit."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pkgutil import resolve_name
from typing import Any, Literal

import torch
from rich import box
from rich.table import Table
from transformers import PreTrainedTokenizerBase

from bindllm.data.collate import Batch
from bindllm.data.rows import IGNORE, Row, make_sample, spread
from bindllm.encoders import Encoder
from bindllm.encoders.tokens import MOST_TOKENS, token_size
from bindllm.encoders.trainable import tuned_encoders
from bindllm.errors import InputError
from bindllm.model.adapter import AdapterConfig
from bindllm.model.bind_network import BindConfig
from bindllm.model.bindllm import BindLLM
from bindllm.model.context import ContextConfig
from bindllm.model.decoder import DecoderConfig, default_device
from bindllm.model.injection import InjectConfig
from bindllm.model.layers import find_layers
from bindllm.model.memory import (
    device_bytes,
    encoder_bytes,
    meta_decoder,
    quantized_layers,
    read_size,
    resident_bytes,
    saved_bytes,
    trace_step,
    weight_bytes,
)
from bindllm.objectives import KTO, ORPO, NextToken, Objective

CUDA_CONTEXT = 600_000_000
"""Bytes that a process takes of a GPU before its first tensor: context and kernels, as nvidia-smi shows it."""

MEASURED_ROWS = 2000
"""Rows that are tokenized to find the longest one, spread over the sources."""

_SHARDED_DEVICES = (2, 4, 8, 16)

# Settings of a model that its memory depends on, next to its decoder.
_PARTS = ("bind", "inject", "adapter", "context")


@dataclass(frozen=True)
class MemoryEstimate:
    """The memory of a run on one device, in bytes, by moment and by part.

    Attributes:
        moments: parts by name, at each moment that may be the peak.
    """

    moments: dict[str, dict[str, int]]

    @property
    def moment(self) -> str:
        """The moment of the peak."""
        return max(self.moments, key=lambda name: sum(self.moments[name].values()))

    @property
    def parts(self) -> dict[str, int]:
        """The parts at the peak, largest first."""
        return dict(sorted(self.moments[self.moment].items(), key=lambda item: -item[1]))

    @property
    def total(self) -> int:
        """Bytes at the peak."""
        return sum(self.parts.values())


@dataclass(frozen=True)
class RunPlan:
    """Everything about a run that its memory depends on, without any weight.

    Args:
        decoder: the language model, its dtype and quantization; only its config file is read.
        encoders: the encoders; only the sizes of their embeddings and tokens are used.
        rows: rows of a batch on one device, B; a preference pair is two rows.
        tokens: tokens of a row with its padding, T.
        supervised: supervised tokens of the whole batch, N.
        media_groups: media groups of a row.
        media: media of a group.
        encoded: bytes that autograd saves for a media in a tuned encoder.
        rejected: how many of the rows are rejected answers of preference pairs.
        measured_rows: rows that this size was measured on; 0: it is the largest that the recipe allows.
        trainable: names of the trained parameter groups.
        checkpointing: whether only each layer's input is kept, and the rest is computed again.
        device: device type; it decides what dtype `auto` means.
        devices: number of processes that share what the strategy divides: all of them, or those of a node.
        strategy: `single`, `ddp`, `sharded` (DDP with the frozen decoder in shards), or a ZeRO stage of DeepSpeed.
        fused: whether the optimizer steps in one pass; otherwise it holds one more copy of the gradients.
        accumulates: whether gradients are summed over several batches, and so are kept during each of them.
        framework: bytes of a process that has loaded its libraries and no model (measured), or of a GPU's context.

    Example:
        decoder = DecoderConfig("checkpoints/smollm2-135m-instruct")
        RunPlan(decoder, [EfficientNetLite()], rows=16, tokens=128, supervised=512).estimate.total
    """

    decoder: DecoderConfig
    encoders: Sequence[Encoder]
    rows: int
    tokens: int
    supervised: int
    media_groups: int = 1
    media: int = 1
    encoded: int = 0
    rejected: int = 0
    measured_rows: int = 0
    bind: BindConfig = field(default_factory=BindConfig)
    inject: InjectConfig = field(default_factory=InjectConfig)
    adapter: AdapterConfig | None = None
    context: ContextConfig | None = None
    trainable: Sequence[str] = ("bind", "inject")
    objective: Objective = field(default_factory=NextToken)
    checkpointing: bool = False
    device: str = "cpu"
    devices: int = 1
    strategy: Literal["single", "ddp", "sharded", "zero1", "zero2"] = "single"
    fused: bool = True
    accumulates: bool = False
    framework: int = 0

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the decoder."""
        return self.decoder.torch_dtype(self.device)

    @cached_property
    def estimate(self) -> MemoryEstimate:
        """The memory of the run on each device.

        Raises:
            DecoderError: not a causal language model, or one that cannot run without values.
            InputError: an unknown group to train.
            MissingExtraError: an adapter is requested, and peft is not installed.
        """
        return self._divided(*self._traced)

    def shared(self, devices: int) -> MemoryEstimate:
        """Return the memory on each of several devices that share the decoder."""
        return replace(self, devices=devices, strategy="sharded")._divided(*self._traced)

    @cached_property
    def _traced(self) -> tuple[BindLLM, dict[str, int], dict[str, int]]:
        """The model, and the bytes by part at the peak of its forward and backward pass."""
        decoder = meta_decoder(self.decoder, self.dtype)
        with torch.device("meta"):
            parts = {name: vars(self)[name] for name in _PARTS}
            model = BindLLM(decoder, None, self.decoder, encoders=self.encoders, **parts)
        # The steps that take the most memory have all bind tokens.
        model.bind.drops_tokens = False
        model.set_trainable(self.trainable)
        if self.checkpointing:
            model.checkpoint_activations()
        model.train()
        batch = self._batch()
        peaks = trace_step(model, lambda: self.objective.loss(model, batch)[0], accumulates=self.accumulates)
        return model, *peaks

    def _batch(self) -> Batch:
        """Return a batch of this shape, with zeros for content and the columns that objectives add."""
        ids = torch.zeros(self.rows, self.tokens, dtype=torch.long)
        labels = torch.full_like(ids, IGNORE)
        # Supervised tokens at the end, where answers are: logits are computed only for them.
        labels[:, -max(1, self.supervised // self.rows) :] = 0
        inputs = {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "media_index": torch.zeros_like(ids),
            "embeddings": torch.zeros(self.rows, self.media_groups, self.encoders[0].embedding_size),
            "labels": labels,
        }
        if self.bind.reads_tokens:
            # As many as an encoder may return: their number is known only once a media was read.
            size = token_size(self.encoders, self.bind.token_modalities)
            inputs["tokens"] = torch.zeros(self.rows, self.media_groups, self.media * MOST_TOKENS, size)
        if self.context is not None:
            records = (self.rows, self.media_groups, self.context.records)
            inputs["context_embeddings"] = torch.zeros(*records, self.encoders[0].embedding_size)
            inputs["context_scores"] = torch.zeros(*records)
            inputs["context_ids"] = torch.zeros(*records, self.context.text_length, dtype=torch.long)
        # Columns of all objectives at once: each reads its own, and meta tensors cost nothing.
        numbers = torch.arange(self.rows - self.rejected)
        if "encoders" in self.trainable:
            made = inputs.keys() & {"embeddings", "tokens"}
            # The gradient reaches the encoders through these.
            inputs |= {name: inputs[name].to("meta").requires_grad_() for name in made}
        return {
            **inputs,
            **{f"mismatched_{name}": value[: len(numbers)] for name, value in inputs.items()},
            "numbers": numbers,
            "desirable": torch.ones_like(numbers, dtype=torch.bool),
            "reference": torch.zeros(self.rows),
            "mismatched_reference": torch.zeros(len(numbers)),
        }

    def _divided(
        self, model: BindLLM, forward: Mapping[str, int], backward: Mapping[str, int]
    ) -> MemoryEstimate:
        """Add what does not depend on the batch, and give each device its share (ZeRO: arXiv 1910.02054, section 5)."""
        share, strategy, frozen = self.devices, self.strategy, weight_bytes(model)
        # ZeRO stage 1 divides the optimizer, stage 2 also the gradients; a sharded decoder is ours.
        groups = model.parameter_groups()
        trained = sum(p.nbytes for name in self.trainable for _, p in groups[name])
        # Adam keeps two running means of every gradient.
        moments, gradients = 2 * trained, trained // share if strategy == "zero2" else trained
        fixed = {name: sum(p.nbytes for _, p in group) for name, group in groups.items()}
        # Of a tuned decoder, only the buffers are frozen.
        fixed |= {"decoder": fixed.get("decoder", 0) + sum(frozen.values()), "framework": self.framework}
        if tuned_encoders(self.encoders):
            # Without a store all encoders run in each step; rejected answers share the media of the chosen ones.
            fixed["encoders"] = sum(map(encoder_bytes, self.encoders))
            media = (self.rows - self.rejected) * self.media_groups * self.media
            activations = {"activations of encoders": media * self.encoded}
            forward, backward = {**forward, **activations}, {**backward, **activations}
        fixed["optimizer"] = moments // share if strategy in ("zero1", "zero2") else moments
        if strategy in ("ddp", "sharded"):
            # DDP copies gradients into buckets to send them: as large as the gradients.
            fixed["buckets of DDP"] = trained
        if strategy == "sharded":
            # The layers are divided; the one that runs and the next one are gathered.
            layers = [
                sum(frozen.get(p, 0) for p in layer.parameters()) for _, layer in find_layers(model.decoder)
            ]
            rest = fixed["decoder"] - frozen[model.decoder.get_output_embeddings().weight]
            fixed["decoder"] -= rest - rest // share
            fixed["gathered layers"] = rest - sum(layers) + 2 * layers[0]
        # Three moments that may be the peak: activations at their most, logits and temporaries, the step itself.
        found = {
            "the forward pass": {**forward, **fixed, "gradients": gradients},
            "the backward pass": {**backward, **fixed},
            "the optimizer step": {
                **fixed, "gradients": gradients, "copies of the optimizer": 0 if self.fused else gradients,
            },
        }  # fmt: skip
        if strategy == "zero2":
            found["the backward pass"]["gradients"] = backward.get("gradients", 0) // share
        if self.decoder.quantize is not None:
            # Each product unpacks its matrix.
            matrix = max(linear.weight.nbytes for linear in quantized_layers(model.decoder))
            for moment in ("the forward pass", "the backward pass"):
                found[moment]["unpacked matrix"] = matrix
        return MemoryEstimate(found)

    def changes(self, available: int) -> Iterator[tuple[str, int]]:
        """Yield changes of the recipe, each on top of the earlier ones, until the run fits.

        First those that only cost time, then those that cost precision, then more devices.

        Yields:
            The changed keys of the recipe, and the bytes per device after the change.
        """
        plan = self
        if not plan.checkpointing:
            plan = replace(plan, checkpointing=True)
            yield "model.checkpoint_activations true", plan.estimate.total
        if plan.rows > 1 and plan.estimate.total > available:
            # The same rows in each step: a smaller batch, accumulated more often.
            plan = plan._with_fewer_rows(available)
            times = -(-self.rows // plan.rows)
            words = f"data.batch_size {plan.rows} and {times} times trainer.accumulate_grad_batches"
            yield words, plan.estimate.total
        if plan.decoder.tuned:
            # Neither rounded nor shared.
            return
        if plan.dtype.itemsize > torch.bfloat16.itemsize and plan.estimate.total > available:
            plan = replace(plan, decoder=replace(plan.decoder, dtype="bfloat16"))
            yield "model.decoder.dtype bfloat16", plan.estimate.total
        plain = plan
        # Packed weights cannot be divided, so a sharded run is not quantized.
        packs = plan.decoder.quantize is None and plan.strategy != "sharded"
        if packs and plan.estimate.total > available:
            plan = replace(plan, decoder=replace(plan.decoder, quantize="nf4"))
            yield "model.decoder.quantize nf4", plan.estimate.total
        if plan.estimate.total > available:
            if plain.decoder.quantize is not None:
                plain = replace(plain, decoder=replace(plain.decoder, quantize=None))
            totals = {n: plain.shared(n).total for n in _SHARDED_DEVICES if n > self.devices}
            enough = [n for n, total in totals.items() if total <= available]
            if enough:
                yield f"{enough[0]} devices that share a decoder that is not quantized", totals[enough[0]]

    def _with_fewer_rows(self, available: int) -> RunPlan:
        """Return the run with the largest batch of half the rows, a quarter, ... that fits, or with one row."""
        plan = self
        # Halving keeps the rows of a step whole: twice the accumulation makes up for it.
        while plan.rows > 1 and (plan is self or plan.estimate.total > available):
            rows = plan.rows // 2
            plan = replace(
                plan,
                rows=rows,
                supervised=max(1, self.supervised * rows // self.rows),
                rejected=self.rejected * rows // self.rows,
                accumulates=True,
            )
        return plan


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
        parts: the built parts `decoder`, `bind`, `inject` and, if it has one, `adapter` of the model.
        rows: training rows, some of which are tokenized; without any, rows of the greatest length are assumed.
    """
    model, trainer = recipe["model"], recipe["trainer"]
    # The device that the recipe asks for, also if this machine has another one.
    device = str(trainer["accelerator"]).lower()
    device = {"auto": default_device(), "gpu": "cuda"}.get(device, device)
    # Pairs and labels decide how many rows run at once.
    entry = model["objective"]
    needs = resolve_name(entry["class_path"]).needs if entry else NextToken.needs
    shape = _batch_shape(recipe["data"], rows, tokenizer, pairs=needs in ("pairs", "labels"))
    # Ours that run the model on the same rows: another class may need columns that only it adds.
    objective = KTO() if needs == "labels" else ORPO() if shape.get("rejected") else NextToken()
    tuned = tuned_encoders(encoders).values() if "encoders" in model["trainable"] else ()
    media = [item for row in rows for item in row.media]
    saved = [saved_bytes(one, (item for item in media if item.modality == one.modality)) for one in tuned]
    devices = _devices(trainer, device)
    if tuned_encoders(encoders) and device == "cpu":
        # This process has loaded them already, and the table lists them.
        devices["framework"] -= sum(map(encoder_bytes, encoders))
    return RunPlan(
        **{name: parts[name] for name in ("decoder", *_PARTS) if name in parts},
        **shape,
        **devices,
        encoders=encoders,
        encoded=max(saved, default=0),
        trainable=tuple(model["trainable"]),
        objective=objective,
        checkpointing=bool(model["checkpoint_activations"]),
    )


def _devices(trainer: Mapping[str, Any], device: str) -> dict[str, Any]:
    """Read the fields of a plan off a trainer; processes that share memory are counted per node, or all of them."""
    # Read off the recipe: a trainer would refuse devices that this machine lacks.
    asked, strategy = trainer["devices"], trainer["strategy"]
    # A list may be written as text: "0,1", also with one device, as "0,".
    asked = asked.strip(",").split(",") if isinstance(asked, str) and "," in asked else asked
    if str(asked) in ("auto", "-1"):
        devices = max(1, torch.cuda.device_count()) if device == "cuda" else 1
    else:
        devices = len(asked) if isinstance(asked, list) else int(asked) if str(asked).isdigit() else 1
    total = devices * int(trainer["num_nodes"])
    # A strategy is a short name (ddp, deepspeed_stage_2) or a class with arguments.
    options = strategy.get("init_args") or {} if isinstance(strategy, Mapping) else {}
    name = str(strategy["class_path"] if isinstance(strategy, Mapping) else strategy).lower()
    # All devices share, unless shards stay within a node.
    kind, sharing = "ddp", total
    if "shardeddecoder" in name:
        kind, sharing = "sharded", total if options.get("across_nodes") else devices
    elif "deepspeed" in name:
        found = re.search(r"stage_(\d)", name)
        kind = ("ddp", "zero1", "zero2")[min(int(found[1]) if found else int(options.get("stage", 2)), 2)]
    return {
        "device": device,
        "devices": max(1, sharing),
        "strategy": kind if total > 1 else "single",
        # Lightning cannot clip the gradients of a fused optimizer in mixed precision.
        "fused": not str(trainer["precision"] or "").endswith("mixed"),
        "accumulates": int(trainer["accumulate_grad_batches"]) > 1,
        "framework": resident_bytes() if device == "cpu" else CUDA_CONTEXT,
    }


def _batch_shape(
    data: Mapping[str, Any], rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, *, pairs: bool
) -> dict[str, int]:
    """Return the fields of a plan for the largest batch."""
    size, longest = data["batch_size"], data["max_length"]
    samples = []
    for row in spread(rows, MEASURED_ROWS):
        try:
            samples.append(make_sample(row, tokenizer, longest))
        except InputError:
            # Counted and shown with the sources; it will be in no batch.
            continue
    if not samples:
        return {"rows": size, "tokens": longest, "supervised": size * longest}
    rejected = [sample.rejected for sample in samples if pairs and sample.rejected is not None]
    # The longest row stands for all: one batch of the longest rows is enough to run out of memory.
    count = size * (2 if rejected else 1)
    return {
        "rows": count,
        "tokens": max(len(sample.input_ids) for sample in samples + rejected),
        "supervised": count * max(sample.num_supervised for sample in samples + rejected),
        "media_groups": max(1, *(len(sample.media) for sample in samples)),
        "media": max((len(group) for sample in samples for group in sample.media), default=1),
        "rejected": count - size,
        "measured_rows": len(samples),
    }


# The part of a table, and the keys of a recipe that make it smaller.
_KEYS = {
    "activations": "data.batch_size, data.max_length, model.checkpoint_activations",
    "activations of encoders": "data.batch_size, blocks of Tuned",
    "encoders": "nothing: weights that each step needs",
    "temporaries of the backward pass": "data.batch_size, data.max_length",
    "logits": "data.batch_size: supervised tokens times the vocabulary",
    "decoder": "model.decoder.dtype, model.decoder.quantize, or more devices with a sharded decoder",
    "bind": "model.bind.depth, model.bind.expansion",
    "adapter": "model.adapter.rank",
    "optimizer": "model.trainable, model.bind, model.adapter.rank, or DeepSpeed stage 1",
    "gradients": "model.trainable, model.bind, model.adapter.rank, or DeepSpeed stage 2",
    "buckets of DDP": "model.trainable, model.bind, model.adapter.rank",
    "framework": "nothing: the libraries of every run",
}


def memory_lines(plan: RunPlan, limit: str | None) -> tuple[list[Any], str]:
    """Return the lines to print, and the problem if the run does not fit, else an empty text.

    Args:
        limit: memory of a device, such as ``24GB``; None: the memory of this machine.

    Raises:
        InputError: the limit is not a size.
    """
    # How to read this: the table, the encoders before it, its largest part, whether it fits.
    available = device_bytes(plan.device) if limit is None else read_size(limit)
    estimate = plan.estimate
    count = plan.measured_rows
    rows = f"longest of {count:,} rows" if count else "data.max_length, all of it supervised"
    where = f"each of {plan.devices} devices" if plan.devices > 1 else "one device"
    lines: list[Any] = [
        f"memory of {where} ({plan.device}, decoder in {str(plan.dtype)[6:]}) at its peak, in "
        f"{estimate.moment}, with {plan.rows} rows of {plan.tokens} tokens ({rows}):",
        _table(estimate),
    ]
    # Frozen encoders leave the device before training starts.
    if "encoders" not in estimate.parts and (encoders := sum(map(encoder_bytes, plan.encoders))):
        lines.append(f"earlier, while media are embedded: {_text(encoders)} of encoders and activations")
    if plan.device == "cpu":
        lines.append("the process may show more than this: the C library keeps freed memory (docs/memory.md)")
    largest = next(iter(estimate.parts))
    lines.append(f"largest part: {largest}; to change it: {_KEYS.get(largest, 'more or larger devices')}")
    if available is None:
        lines.append("this machine has no such device; give the memory of one with --memory_limit 24GB")
        return lines, ""
    if estimate.total <= available:
        lines.append(f"fits into {_text(available)}: {estimate.total / available:.0%} of it")
        return lines, ""
    # Each change with its effect, so that the user can stop at the one that is enough.
    changes = [
        f"{words}: {_text(total)}{', fits' if total <= available else ''}"
        for words, total in plan.changes(available)
    ]
    advice = (
        f"Changes, each on top of the others: {'; '.join(changes)}" if changes else "Nothing makes it fit"
    )
    return lines, f"the run needs {_text(estimate.total)} on {where}, which has {_text(available)}. {advice}"


def _table(estimate: MemoryEstimate) -> Table:
    table = Table("part", "memory", "share", box=box.SIMPLE)
    for column in table.columns[1:]:
        column.justify = "right"
    for name, size in estimate.parts.items():
        if size:
            table.add_row(name, _text(size), f"{size / estimate.total:.0%}")
    table.add_section()
    table.add_row("total", _text(estimate.total), "")
    return table


def _text(size: int) -> str:
    return f"{size / 1e9:,.2f} GB" if size >= 1e9 else f"{size / 1e6:,.1f} MB"
