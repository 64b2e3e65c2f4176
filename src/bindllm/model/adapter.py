"""The adapter of the decoder: low-rank matrices, biases and norms, tuned through peft.

LoRA (arXiv 2106.09685) on the seven projections of every layer, with new biases and the decoder's own norms, as in
the second stage of ImageBind-LLM (arXiv 2309.03905, section 3.3): ``y = W x + scale * (B (A x) + b)``. ``B`` and
``b`` start at zero and the norms at the decoder's, so an untrained adapter changes nothing. Two variants: rsLoRA (arXiv
2312.03732) takes the scale to be alpha / sqrt(rank) and not alpha / rank; DoRA (arXiv 2402.09353) learns the norm of
each row of ``W + scale * B A`` as well, ``y = m * (W + scale * B A) x / |W + scale * B A|``, ``m`` being ``|W|`` at the
start.

peft builds the layers and its files hold everything: plain peft loads the folder ``adapter/`` of a checkpoint onto
the plain decoder. Order of construction: decoder, quantization, adapter, injection.
"""

from __future__ import annotations

import copy
import logging
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from bindllm.errors import DecoderError, InputError, needs_extra
from bindllm.model.checkpoint import ADAPTER_PREFIX
from bindllm.model.decoder import without_weights
from bindllm.model.injection.attend import RUNNING
from bindllm.model.layers import check_layers, choose_layers, find_layers
from bindllm.model.quantize import quiet_bitsandbytes

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
ALL_LINEAR = "all-linear"
MOST_RANK = 65536
"""Largest rank: wider than any projection, and small enough that a damaged checkpoint cannot ask for more."""

# Settings of some families that give their projections the biases which the adapter has.
_BIAS_SETTINGS = ("attention_bias", "mlp_bias")
_PEFT_PREFIX = "base_model.model."
_ADAPTER_NAME = "default"
# peft's names of the trained parts of its layers.
_TUNED = {"lora_A", "lora_B", "lora_magnitude_vector", "modules_to_save"}
# peft saves the vector of DoRA without the name of the parameter in it.
_MAGNITUDE = ".lora_magnitude_vector"


@dataclass
class AdapterConfig:
    """Which tensors of the decoder are tuned, and how."""

    rank: int = 16
    """Rank of the low-rank matrices; 16 in the paper."""

    alpha: float | None = None
    """Scale of the low-rank term and of the biases, as a multiple of 1/rank; by default the rank: scale 1."""

    bias: bool | None = None
    """Whether the projections get new biases; by default if the decoder's family can store them, so that `bindllm
    export` can merge the adapter."""

    norm: bool = True
    """Whether the norms are tuned as well."""

    dora: bool = False
    """Whether the length of each row of a projection is learned apart from its direction; excludes `bias: true`."""

    targets: list[str] | str | None = None
    """Projections that are tuned, by name, such as `[qkv_proj, o_proj]`; `all-linear`: every linear projection of the
    layers; by default the seven of LLaMA. Experts that are one tensor, as in most mixtures, are no linear projections:
    they have two names, such as `experts.gate_up_proj`, and exclude `bias: true`, `dora` and `media_only`."""

    layers: int | list[int] | None = None
    """Layers that are tuned, as in `inject.layers`. By default all. The norm after the last layer belongs to each
    choice."""

    media_only: bool = False
    """Whether only tokens that listen to media pass through the adapter: text alone keeps the output of the base model,
    to the last bit. `bindllm export` cannot merge such an adapter; excludes `dora`."""

    rslora: bool = False
    """Whether `alpha` is a multiple of 1/sqrt(rank) instead of 1/rank, so that no rank learns slower; needs `alpha`."""

    def __post_init__(self) -> None:
        # How to read this: each check names the two settings that contradict each other.
        check_layers(self.layers, "adapter.layers")
        is_rank = isinstance(self.rank, int) and 1 <= self.rank <= MOST_RANK
        if not is_rank or not (self.alpha is None or 0 < self.alpha < math.inf):
            raise InputError(
                f"adapter with rank {self.rank} and alpha {self.alpha}: rank must be 1 to {MOST_RANK}, alpha finite "
                "and above 0"
            )
        if (isinstance(self.targets, str) and self.targets != ALL_LINEAR) or self.targets == []:
            raise InputError(
                f"adapter.targets is {self.targets!r}, expected names of projections, such as [q_proj, v_proj], "
                f"{ALL_LINEAR}, or null for {', '.join(TARGETS)}"
            )
        if self.dora and self.bias:
            raise InputError(
                "adapter with dora and bias: peft has no new biases for DoRA; set adapter.bias: false, or dora: false"
            )
        if self.dora and self.media_only:
            raise InputError(
                "adapter with dora and media_only: DoRA changes the rows of a projection, for all tokens; set one "
                "of them to false"
            )
        experts = [name for name in self.targets or () if "." in name] if self.targets != ALL_LINEAR else []
        excluded = [name for name in ("bias", "dora", "media_only") if getattr(self, name)]
        if experts and excluded:
            raise InputError(
                f"adapter with {', '.join(excluded)} and targets {', '.join(experts)}: peft adds to the tensor of all "
                "experts, not to their output; set these to false, or leave the experts out"
            )
        if self.rslora and self.alpha is None:
            raise InputError(
                "adapter with rslora and no alpha: rslora divides alpha by the square root of the rank, "
                f"and does nothing without one; give adapter.alpha (16 with rank {self.rank}: scale "
                f"{16 / math.sqrt(self.rank):.3g})"
            )

    @property
    def scale(self) -> float:
        """The factor of the low-rank term and of the new biases."""
        if self.alpha is None:
            return 1.0
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


class Adapter:
    """The tuned tensors inside a decoder, under the names that peft saves them by.

    Args:
        decoder: a causal language model whose layers hold the projections; peft's layers take their place.
        config: rank, scale, biases, norms and variant.

    Raises:
        DecoderError: the decoder lacks a projection, carries an injection (which must come last) or an adapter.
        MissingExtraError: peft is not installed.

    Example:
        adapter = Adapter(decoder, AdapterConfig(rank=8))
        adapter.parameters()["adapter.base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"]
    """

    def __init__(self, decoder: PreTrainedModel, config: AdapterConfig) -> None:
        quiet_bitsandbytes()
        with needs_extra("peft", extra="adapter", purpose="tune a decoder, or run a tuned one"):
            from peft import inject_adapter_in_model
            from peft.tuners.lora.layer import LoraLayer, ParamWrapper
        targets = choose_targets(decoder, config)
        self.config = config = _choose_bias(config, decoder, targets)
        self._peft_config = _peft_config(decoder, config, targets)
        self._decoder = decoder
        with warnings.catch_warnings():
            # peft warns that biases cannot be merged into layers without one; `export` checks that case itself.
            warnings.filterwarnings("ignore", message=".*lora_bias=True.*")
            inject_adapter_in_model(self._peft_config, decoder, adapter_name=_ADAPTER_NAME)
        # peft's new layers start in training mode; a frozen decoder is always in eval mode.
        decoder.eval()
        for module in decoder.modules():
            parts = dict(module.named_children())
            for name in _TUNED & parts.keys():
                # In half precision the small steps of training would vanish.
                parts[name].float()
            if "modules_to_save" in parts:
                module.register_forward_hook(_as_base if config.media_only else _as_input)
            if isinstance(module, LoraLayer) and not (config.dora or isinstance(module, ParamWrapper)):
                module.forward = partial(_project, module, config)
            if config.dora and "lora_magnitude_vector" in parts:
                _measure_rows(module)

    def parameters(self) -> dict[str, nn.Parameter]:
        """Return the tuned parameters by their names in a checkpoint."""
        found = {}
        for name, parameter in self._decoder.named_parameters():
            # peft's wrappers add these parts to a name; a name without them belongs to a frozen tensor.
            plain = name.replace(".modules_to_save.", ".").replace(f".{_ADAPTER_NAME}.", ".")
            if plain != name:
                if plain.endswith(f"{_MAGNITUDE}.weight"):
                    plain = plain.removesuffix(".weight")
                found[ADAPTER_PREFIX + _PEFT_PREFIX + plain] = parameter
        return found

    def peft_config(self) -> dict[str, Any]:
        """Return the content of peft's ``adapter_config.json``."""
        # peft keeps sets in it, which JSON cannot hold.
        entries = {**self._peft_config.to_dict(), "inference_mode": True}
        return {name: sorted(value) if isinstance(value, set) else value for name, value in entries.items()}


def _project(layer: nn.Module, config: AdapterConfig, x: Tensor) -> Tensor:
    """The output of a tuned projection, ``W x + scale * (B (A x) + b)``.

    The decoder's own product and this one are equally limited by memory, so the wide output is touched once: scale,
    bias and mask are applied to the narrow ``A x``. peft's forward passes over it four more times.
    """
    output = layer.base_layer(x)
    down, up = layer.lora_A[_ADAPTER_NAME], layer.lora_B[_ADAPTER_NAME]
    # The range of float16 is too small for trained tensors.
    dtype = torch.float32 if output.dtype is torch.float16 else output.dtype
    low = nn.functional.linear(x.to(dtype), down.weight.to(dtype)) * config.scale
    weight = up.weight
    if up.bias is not None:
        low = nn.functional.pad(low, (0, 1), value=config.scale)
        weight = torch.cat([weight, up.bias[:, None]], 1)
    if config.media_only:
        low = torch.where(_listening(low), low, 0)
    wide = torch.addmm(output.flatten(0, -2).to(dtype), low.flatten(0, -2), weight.to(dtype).T)
    return wide.to(output.dtype).view_as(output)


def _as_input(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
    """Bring the output of a float32 norm back to the precision of the decoder."""
    return output.to(args[0].dtype)


def _as_base(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
    """The output of a tuned norm for tokens that listen to media, and that of the base model for the others."""
    return torch.where(_listening(output), _as_input(module, args, output), module.original_module(*args))


def _listening(output: Tensor) -> Tensor:
    """Return which tokens of an output [B, T, ...] or [B * T, ...] listen to media, with as many axes."""
    running = RUNNING.get()
    if running is None:
        return torch.zeros((), dtype=torch.bool, device=output.device)
    listeners = running.route.any(-1, keepdim=True)
    shape = listeners.shape[:2] if output.shape[:2] == listeners.shape[:2] else (-1,)
    return listeners.to(output.device).reshape(*shape, *[1] * (output.dim() - len(shape)))


def _measure_rows(layer: nn.Module) -> None:
    """Start DoRA from the exact norms of the rows: peft rounds them to the decoder's precision."""
    layer.lora_magnitude_vector[_ADAPTER_NAME].update_layer(
        base_layer=layer.get_base_layer(),
        lora_A=layer.lora_A[_ADAPTER_NAME].weight,
        lora_B=layer.lora_B[_ADAPTER_NAME].weight,
        scaling=layer.scaling[_ADAPTER_NAME],
    )


def enable_biases(config: PretrainedConfig) -> None:
    """Switch on the biases of the projections in a decoder's config, as far as its family has settings for them."""
    # Composite configs hold the settings in their text config.
    for part in (config, config.get_text_config()):
        for setting in _BIAS_SETTINGS:
            if setting in part.to_dict():
                setattr(part, setting, True)


def lacking_biases(config: PretrainedConfig, targets: Sequence[str]) -> list[str]:
    """Return the names of tuned projections that have no bias in a plain decoder of this config."""
    # Shapes only: this shows which projections get a bias.
    core = without_weights(config.name_or_path, config).get_decoder()
    return list(
        {
            kind: None
            for path, module in core.named_modules()
            if (kind := path.rpartition(".")[2]) in targets and module.bias is None
        }
    )


def _choose_bias(config: AdapterConfig, decoder: PreTrainedModel, targets: Sequence[str]) -> AdapterConfig:
    """Decide on new biases if the config leaves it open, and warn about those that could never be merged."""
    # Named targets get none by default: only the settings of LLaMA's projections are known.
    if config.bias is False or config.dora or (config.bias is None and config.targets is not None):
        return replace(config, bias=False)
    plain = copy.deepcopy(decoder.config)
    enable_biases(plain)
    lacking = lacking_biases(plain, targets)
    if config.bias and lacking:
        logging.getLogger("bindllm").warning(
            "%s cannot store biases for %s, so bindllm export will not be able to merge this adapter; with "
            "model.adapter.bias: null it gets none",
            type(decoder).__name__,
            ", ".join(lacking),
        )
    return replace(config, bias=not lacking if config.bias is None else config.bias)


def choose_targets(decoder: PreTrainedModel, config: AdapterConfig) -> list[str]:
    """Return the names of the projections, and of tensors of experts, that an adapter of a decoder tunes.

    Raises:
        DecoderError: the decoder lacks one, carries an injection or an adapter.
    """
    name = type(decoder).__name__
    # A hook on the model is the injection; it would miss peft's new projections.
    if decoder._forward_pre_hooks:
        raise DecoderError("this decoder carries an injection already; the adapter must come before it")
    if any("lora_A" in dict(module.named_children()) for module in decoder.modules()):
        raise DecoderError("this decoder carries an adapter already; load the decoder again for another")
    # By the last part of the path, as peft matches its targets.
    parts = [part for _, layer in find_layers(decoder) for part in layer.named_modules()]
    found = sorted({path.rpartition(".")[2] for path, part in parts if isinstance(part, nn.Linear | Conv1D)})
    experts = sorted({target for _, layer in find_layers(decoder) for target in _experts(layer).values()})
    targets = found if config.targets == ALL_LINEAR else config.targets or TARGETS
    if missing := [target for target in targets if target not in (*found, *experts)]:
        also = f", its experts {', '.join(experts)}" if experts else ""
        raise DecoderError(
            f"{name} has no {', '.join(missing)}, so the adapter does not fit it. Its projections are "
            f"{', '.join(found)}{also}: set adapter.targets to some of them, or to {ALL_LINEAR}"
        )
    if experts and not isinstance(config.targets, list):
        logging.getLogger("bindllm").warning(
            "the experts of %s are one tensor each (%s) and are not tuned; to tune them, name them in adapter.targets "
            "next to projections: [%s]",
            name,
            ", ".join(experts),
            ", ".join([*targets, *experts]),
        )
    return list(targets)


def _experts(layer: nn.Module) -> dict[str, str]:
    """Return the paths of tensors that hold all experts of a layer, each with its name as a target."""
    paths = {
        f"{path}.{name}": f"{path.rpartition('.')[2]}.{name}"
        for path, part in layer.named_modules()
        if not isinstance(part, nn.Conv1d)
        for name, parameter in part.named_parameters(recurse=False)
        # Expert, output, input.
        if parameter.ndim == 3
    }
    return paths


def _peft_config(decoder: PreTrainedModel, config: AdapterConfig, names: Sequence[str]) -> Any:
    """Return the `LoraConfig`; naming it above would let jsonargparse import peft whenever it reads a recipe."""
    from peft import LoraConfig

    # How to read this: peft finds modules by the end of their path. Short names are enough, unless an image tower next
    # to the language model has them too, or other layers; then only whole paths keep the adapter out of them.
    core = set(decoder.get_decoder().modules())
    if config.layers is not None:
        every = find_layers(decoder)
        tuned = choose_layers(every, config.layers, type(decoder).__name__, "adapter.layers")
        core -= {part for number, layer in every if number not in dict(tuned) for part in layer.modules()}
    inside = {path: module for path, module in decoder.named_modules() if module in core}
    targets = [path for path in inside if path.rpartition(".")[2] in names]
    # Whole paths: a dense layer may have a projection of the same name.
    experts = [path for path, name in _experts(decoder).items() if name in names]
    experts = [path for path in experts if path.rpartition(".")[0] in inside]
    # Families name their norm modules differently; only the class names have a common ending.
    norms = [path for path, module in inside.items() if type(module).__name__.endswith("Norm")]
    ends = {path.rpartition(".")[2] for path in norms}
    is_transposed = any(isinstance(inside[path], Conv1D) for path in targets)
    if not any(path.endswith((*names, *ends)) for path, _ in decoder.named_modules() if path not in inside):
        targets, norms = [name for name in names if "." not in name], sorted(ends)
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=config.rank,
        # Alpha equal to the rank gives scale 1.
        lora_alpha=config.rank if config.alpha is None else config.alpha,
        lora_bias=config.bias,
        use_dora=config.dora,
        use_rslora=config.rslora,
        target_modules=targets,
        target_parameters=experts or None,
        # GPT-2 keeps its matrices the other way round.
        fan_in_fan_out=is_transposed,
        modules_to_save=norms if config.norm else None,
        base_model_name_or_path=decoder.config.name_or_path or None,
    )
