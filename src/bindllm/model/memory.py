"""What a training run needs in memory, on each device, worked out before a weight is loaded.

The decoder is built without its weights, so that every parameter is counted as it will be; what a step keeps comes from
`bindllm.model.activations`. A step has a few moments that can be its peak, and the largest one is what must fit:

- the end of the forward pass: all activations, the logits and their logarithms, and the gradients of the step before,
  which Lightning drops only now;
- the start of the backward pass: all activations, and the logits three times in float32;
- the backward pass of one layer: all activations, and the gradients being computed (with activation checkpointing, the
  activations of that layer as well);
- its end: the gradients of all that is trained;
- the step of the optimizer: these, and what it computes with.

Of several devices, DDP sums gradients in buckets, a copy of them. Where the decoder is sharded, each device holds its
share of the layers, the output projection, and two layers gathered: the one that runs and the next. DeepSpeed's ZeRO
cuts the moments of the optimizer (stage 1) and the gradients too (stage 2, arXiv 1910.02054, section 5).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import torch
from torch import nn

from bindllm.errors import InputError, did_you_mean
from bindllm.model.activations import FLOAT, Activations, TrainingStep, Widths
from bindllm.model.adapter import Adapter, AdapterConfig
from bindllm.model.bind_network import BindConfig, BindNetwork
from bindllm.model.decoder import DTYPES, DecoderConfig, choose_dtype, find_folder, without_weights
from bindllm.model.injection import InjectConfig, Injection

GROUPS = ("bind", "inject", "adapter")
Strategy = Literal["single", "ddp", "sharded", "zero1", "zero2"]
STRATEGIES = ("single", "ddp", "sharded", "zero1", "zero2")

# Adam keeps two running means of every gradient.
_MOMENTS = 2
# Bytes of a weight. nf4: half a byte, a scale of one byte for 64 weights, and one of four for 256 of those.
_QUANTIZED = {"nf4": 0.5 + 1 / 64 + 4 / (64 * 256), "int8": 1.0}


@dataclass(frozen=True)
class Placement:
    """How a run is laid out over devices.

    Args:
        devices: number of processes that share what the strategy cuts: all of them, or those of a node.
        strategy: `single`, `ddp`, `sharded` (DDP with the frozen decoder in shards), or a ZeRO stage of DeepSpeed.
        fused: whether the optimizer steps in one pass; otherwise it holds one more copy of the gradients.
        accumulates: whether gradients are summed over several batches, and so are there during each of them.
        framework: bytes of a process that has loaded its libraries and no model (measured), or of a GPU's context.
    """

    devices: int = 1
    strategy: Strategy = "single"
    fused: bool = True
    accumulates: bool = False
    framework: int = 0

    def __post_init__(self) -> None:
        if self.strategy not in STRATEGIES:
            raise InputError(f"unknown strategy {self.strategy!r}. {did_you_mean(self.strategy, STRATEGIES)}")


@dataclass(frozen=True)
class ModelPlan:
    """Everything about a model that its memory depends on, without any weight.

    Args:
        decoder: which language model, its dtype and quantization; only its config is read.
        embedding_size: E of the encoders.
        bind: shape of the bind network.
        inject: which layers are served, and how.
        adapter: what of the decoder is tuned; None: nothing.
        trainable: names of the trained groups.
        device: where it will be: decides on the dtype `auto`.
    """

    decoder: DecoderConfig
    embedding_size: int
    bind: BindConfig = field(default_factory=BindConfig)
    inject: InjectConfig = field(default_factory=InjectConfig)
    adapter: AdapterConfig | None = None
    trainable: Sequence[str] = ("bind", "inject")
    device: str = "cpu"

    @cached_property
    def dtype(self) -> torch.dtype:
        """Precision of the frozen decoder."""
        return choose_dtype(self.device) if self.decoder.dtype == "auto" else DTYPES[self.decoder.dtype]


@dataclass(frozen=True)
class MemoryEstimate:
    """What a run needs on one device, in bytes, by moment and by part.

    Attributes:
        moments: parts by name, at each moment that may be the peak.
        trained: number of trained parameters, of all devices together.
    """

    moments: dict[str, dict[str, int]]
    trained: int

    @property
    def moment(self) -> str:
        """The moment at which most is needed."""
        return max(self.moments, key=lambda name: sum(self.moments[name].values()))

    @property
    def parts(self) -> dict[str, int]:
        """What is there at that moment, largest part first."""
        return dict(sorted(self.moments[self.moment].items(), key=lambda item: -item[1]))

    @property
    def total(self) -> int:
        """Bytes at that moment."""
        return sum(self.parts.values())


def estimate_memory(
    plan: ModelPlan, step: TrainingStep, placement: Placement | None = None
) -> MemoryEstimate:
    """Estimate the peak of training, per device.

    Args:
        plan: the model.
        step: the batch of one device.
        placement: devices and strategy; one device by default.

    Raises:
        DecoderError: not a causal language model, or one whose layers are of another shape than LLaMA's.
        InputError: an unknown group to train.
        MissingExtraError: an adapter is asked for, and peft is not installed.

    Example:
        plan = ModelPlan(DecoderConfig("checkpoints/smollm2-135m-instruct"), embedding_size=1280)
        estimate_memory(plan, TrainingStep(rows=16, tokens=128, supervised=512)).total
    """
    placement = placement or Placement()
    if unknown := [name for name in plan.trainable if name not in GROUPS]:
        raise InputError(f"unknown parameter group {unknown[0]!r}. {did_you_mean(unknown[0], GROUPS)}")
    sizes = _Sizes.of(plan)
    number = plan.dtype.itemsize
    activations = Activations(
        sizes.widths,
        number,
        step,
        plan.bind,
        plan.embedding_size,
        plan.inject,
        plan.adapter,
        frozenset(plan.trainable),
        inputs=plan.decoder.quantize == "int8",
    )
    return MemoryEstimate(_moments(sizes, activations, placement), sizes.trained)


@dataclass(frozen=True)
class _Sizes:
    """Bytes of the parameters of a model, and the sizes of its decoder.

    Attributes:
        widths: of the decoder.
        decoder: frozen weights.
        layer: frozen weights of one layer.
        head: the output projection.
        matrix: one frozen matrix as products see it, where it is kept in fewer bits; else 0.
        groups: bytes of the groups, trained or not.
        trained: number of trained parameters.
    """

    widths: Widths
    decoder: int
    layer: int
    head: int
    matrix: int
    groups: dict[str, int]
    trained: int

    @classmethod
    def of(cls, plan: ModelPlan) -> _Sizes:
        decoder = without_weights(find_folder(plan.decoder))
        widths, number = Widths.of(decoder), plan.dtype.itemsize
        layer = _bytes_of(decoder.get_decoder().layers[0], number, plan.decoder.quantize)
        everything = sum(parameter.numel() for parameter in decoder.parameters()) * number
        plain = widths.layers * _bytes_of(decoder.get_decoder().layers[0], number, None)
        with torch.device("meta"):
            bind = BindNetwork(plan.embedding_size, widths.width, plan.bind).parameters()
            adapter = {} if plan.adapter is None else Adapter(decoder, plan.adapter).parameters()
            inject = Injection(decoder, plan.inject).parameters()
        parameters = {"bind": bind, "inject": inject, "adapter": adapter.values()}
        counts = {name: sum(p.numel() for p in group) for name, group in parameters.items()}
        return cls(
            widths=widths,
            decoder=everything - plain + widths.layers * layer,
            layer=layer,
            head=decoder.get_output_embeddings().weight.numel() * number,
            matrix=widths.width * widths.inner * number if plan.decoder.quantize else 0,
            groups={name: FLOAT * count for name, count in counts.items()},
            trained=sum(counts[name] for name in plan.trainable),
        )


def _bytes_of(layer: nn.Module, number: int, quantize: str | None) -> int:
    """Bytes of a layer's weights; its projections may be quantized, its norms and biases never are."""
    size = 0.0
    for module in layer.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if quantize is not None and isinstance(module, nn.Linear) and name == "weight":
                rows = FLOAT * module.out_features if quantize == "int8" else 0
                size += parameter.numel() * _QUANTIZED[quantize] + rows
            else:
                size += parameter.numel() * number
    return round(size)


def _moments(sizes: _Sizes, activations: Activations, placement: Placement) -> dict[str, dict[str, int]]:
    """Work out what is there at each moment that may be the peak."""
    fixed = _fixed(sizes, placement)
    trained = FLOAT * sizes.trained
    gradients = trained // placement.devices if placement.strategy == "zero2" else trained
    before = gradients if placement.accumulates else 0
    kept, logits, number = activations.kept(), activations.logits(), activations.number
    layer = activations.layer() if activations.step.checkpointing else 0
    work = activations.working() + sizes.matrix
    # Two copies, and a third where they are converted first.
    forward = logits * (number + FLOAT + (FLOAT if number != FLOAT else 0))
    return {
        "the end of the forward pass": {
            **fixed, "gradients": gradients, "activations": kept, "logits": forward,
        },
        "the start of the backward pass": {
            **fixed, "gradients": before, "activations": kept, "logits": 3 * FLOAT * logits,
        },
        "the backward pass of a layer": {
            **fixed, "gradients": before, "activations": kept + layer, "gradients of activations": work,
        },
        "the end of the backward pass": {
            **fixed, "gradients": gradients, "activations": layer, "gradients of activations": work,
        },
        "the step of the optimizer": {
            **fixed, "gradients": gradients, "copies of the optimizer": 0 if placement.fused else gradients,
        },
    }  # fmt: skip


def _fixed(sizes: _Sizes, placement: Placement) -> dict[str, int]:
    """What is there all the time, on one device."""
    trained, cut = FLOAT * sizes.trained, placement.devices
    moments = _MOMENTS * trained
    fixed = {"decoder": sizes.decoder, **sizes.groups, "framework": placement.framework}
    if placement.strategy == "sharded":
        layers = sizes.widths.layers * sizes.layer
        fixed["decoder"] = (sizes.decoder - sizes.head) // cut + sizes.head
        fixed["gathered layers"] = sizes.decoder - sizes.head - layers + 2 * sizes.layer
    if placement.strategy in ("ddp", "sharded"):
        fixed["buckets of DDP"] = trained
    return {
        **fixed, "optimizer": moments // cut if placement.strategy in ("zero1", "zero2") else moments
    }  # fmt: skip
