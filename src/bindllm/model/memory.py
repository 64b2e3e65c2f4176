"""Traces the memory of one training step without allocating it.

The model is built on torch's meta device, where a tensor has a shape and a dtype but no data. A real forward and
backward pass runs on it, and `LiveBytes` adds up the storages that are alive. So every activation that autograd saves
is counted, for any decoder and any adapter, and none is predicted from a formula.
"""

from __future__ import annotations

import os
import re
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from transformers import AttentionInterface, PreTrainedModel

from bindllm.encoders import Encoder
from bindllm.encoders.trainable import Tuned
from bindllm.errors import DecoderError, InputError, MediaError
from bindllm.media import Media
from bindllm.model.bindllm import BindLLM
from bindllm.model.decoder import DecoderConfig, without_weights
from bindllm.model.layers import find_layers

# Bytes of a weight. nf4: half a byte, a scale of one byte for 64 weights, and one of four for 256 of those.
_QUANTIZED = {"nf4": 0.5 + 1 / 64 + 4 / (64 * 256), "int8": 1.0}
# int8 keeps one float32 scale for each row of a matrix.
_ROW_SCALE = {"nf4": 0, "int8": 4}
_ATEN = torch.ops.aten
_FUSED = "bindllm_traced"
_UNITS = {"": 1, "KB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def _fused_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Causal attention that saves no scores, as on real devices; on the meta device torch would choose another."""
    output = _ATEN._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, is_causal=True, scale=scaling
    )
    return output[0].transpose(1, 2).contiguous(), None


# Without a mask function of this name transformers builds no mask: padding on the right needs none.
AttentionInterface.register(_FUSED, _fused_attention)


def meta_decoder(config: DecoderConfig, dtype: torch.dtype) -> PreTrainedModel:
    """Build a frozen decoder on the meta device, from its config file only.

    Raises:
        DecoderError: the folder does not hold a causal language model.
    """
    folder = config.folder()
    # Plain products save the scores of all pairs of tokens.
    kernel = config.attention if config.attention == "eager" else _FUSED
    decoder = without_weights(folder, dtype=dtype, attn_implementation=kernel)
    if config.quantize == "int8":
        # Its layers save their inputs for the backward pass, although their weights are frozen.
        for linear in quantized_layers(decoder):
            linear.register_forward_hook(lambda _, args, output: _SaveInput.apply(output, args[0]))
    return decoder.eval().requires_grad_(False)


class _SaveInput(torch.autograd.Function):
    """Passes an output on and saves the input that it was made from."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, given: Tensor) -> Tensor:
        ctx.save_for_backward(given)
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


def quantized_layers(decoder: PreTrainedModel) -> list[nn.Linear]:
    """Return the projections that quantization applies to: those inside the layers, without peft's own."""
    return [
        module
        for _, layer in find_layers(decoder)
        for path, module in layer.named_modules()
        if isinstance(module, nn.Linear) and "lora_" not in path
    ]


def weight_bytes(model: BindLLM) -> dict[Tensor, int]:
    """Return the bytes of each frozen tensor of the decoder, as it is stored on the device."""
    decoder, kind = model.decoder, model.config.quantize
    trained = {parameter for group in model.parameter_groups().values() for _, parameter in group}
    tensors = [t for t in (*decoder.parameters(), *decoder.buffers()) if t not in trained]
    sizes = {tensor: tensor.nbytes for tensor in tensors}
    if kind is not None:
        for linear in quantized_layers(decoder):
            weight = linear.weight
            sizes[weight] = round(weight.numel() * _QUANTIZED[kind] + linear.out_features * _ROW_SCALE[kind])
    return sizes


class LiveBytes(TorchDispatchMode):
    """Adds up the storages that are alive while operations run on the meta device, by kind.

    Small tensors with data (token ids, labels) may be mixed with meta tensors. Results that depend only on them, such
    as the positions of the supervised tokens, have their true values and shapes.

    Args:
        vocabulary: tensors of this last size are of kind ``logits``.

    Attributes:
        kind: kind of the storages made from now on.
    """

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.kind = "activations"
        self._vocabulary = vocabulary
        # Storage -> its kind and bytes. A storage leaves when its last tensor is gone, also one that autograd saved.
        self._alive: dict[int, tuple[str, int]] = {}
        self._now: Counter[str] = Counter()
        self._peak: dict[str, int] = {}

    def add(self, tensor: Tensor, kind: str, size: int | None = None) -> None:
        """Count a tensor's storage as of a kind; one that is counted already changes its kind.

        Args:
            size: bytes, if they differ from the bytes of the storage.
        """
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._alive:
            old, size = self._alive[key]
            self._now[old] -= size
        else:
            size = storage.nbytes() if size is None else size
            weakref.finalize(storage, self._free, key).atexit = False
        self._alive[key] = (kind, size)
        self._now[kind] += size

    def take_peak(self) -> dict[str, int]:
        """Return the bytes by kind at the highest point since the last call, and forget it."""
        peak, self._peak = self._peak, {}
        return peak

    def _free(self, key: int) -> None:
        kind, size = self._alive.pop(key)
        self._now[kind] -= size

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if func is _ATEN._local_scalar_dense.default and args[0].is_meta and args[0].dtype == torch.bool:
            # transformers asks whether a mask may be skipped because all tokens count; in training they do.
            return True
        if any(t.is_meta for t in tensors) and func is not _ATEN._to_copy.default:
            args, kwargs = tree_map_only(Tensor, _without_data, (args, kwargs))
        output = func(*args, **kwargs)
        for leaf in tree_leaves(output):
            if isinstance(leaf, Tensor) and leaf.untyped_storage()._cdata not in self._alive:
                is_logits = leaf.ndim > 1 and leaf.shape[-1] == self._vocabulary
                self.add(leaf, "logits" if is_logits else self.kind)
        if self._now.total() > sum(self._peak.values()):
            self._peak = dict(self._now)
        return output


def _without_data(tensor: Tensor) -> Tensor:
    return tensor if tensor.is_meta else torch.empty_like(tensor, device="meta")


def trace_step(
    model: BindLLM, loss: Callable[[], Tensor], *, accumulates: bool
) -> tuple[dict[str, int], dict[str, int]]:
    """Run one forward and one backward pass, and return the bytes by part at the peak of each.

    Args:
        model: on the meta device, its decoder from `meta_decoder`.
        accumulates: whether gradients of earlier batches are kept during the backward pass.

    Raises:
        DecoderError: the decoder's forward pass depends on values, so it cannot run without them.
    """
    live = LiveBytes(model.decoder.config.get_text_config().vocab_size)
    for tensor, size in weight_bytes(model).items():
        live.add(tensor, "decoder", size)
    for name, group in model.parameter_groups().items():
        for _, parameter in group:
            live.add(parameter, name)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    hooks = [
        parameter.register_post_accumulate_grad_hook(lambda p: live.add(p.grad, "gradients"))
        for parameter in trained
    ]
    try:
        with live:
            # Lightning drops the gradients of the last step only after the forward pass.
            for parameter in trained:
                parameter.grad = torch.empty_like(parameter)
                live.add(parameter.grad, "gradients")
            live.take_peak()
            value = loss()
            forward = live.take_peak()
            if not accumulates:
                for parameter in trained:
                    parameter.grad = None
            live.kind = "temporaries of the backward pass"
            value.backward()
            return forward, live.take_peak()
    except RuntimeError as error:
        name = type(model.decoder).__name__
        raise DecoderError(
            f"the memory of {name} cannot be traced: its forward pass depends on values ({error})"
        ) from error
    finally:
        for hook in hooks:
            hook.remove()
        for parameter in trained:
            parameter.grad = None


def encoder_bytes(encoder: Encoder) -> int:
    """Return the bytes of the weights of an encoder that are loaded by now."""
    # An encoder is any class: its weights are in the torch modules that it holds, also in a dictionary.
    return sum(value.nbytes for value in _weights(encoder))


def saved_bytes(encoder: Tuned, media: Iterable[Media]) -> int:
    """Return the bytes that autograd saves for the first of these media that can be read, or 0."""
    for item in media:
        with suppress(MediaError):
            inputs = [encoder.prepare(item)]
            break
    else:
        return 0
    saved: dict[int, Tensor] = {}

    def save(tensor: Tensor) -> Tensor:
        # Held until the end: the address of a freed storage would be that of another one.
        saved[tensor.untyped_storage()._cdata] = tensor
        return tensor

    trained = encoder.parameters().values()
    was_trained = [parameter.requires_grad for parameter in trained]
    try:
        for parameter in trained:
            parameter.requires_grad_(True)
        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
            kept = encoder.embed(encoder.modality, inputs)
    finally:
        for parameter, before in zip(trained, was_trained, strict=True):
            parameter.requires_grad_(before)
    # Weights may have been loaded just now. The result holds the saved tensors until here.
    known = {value.untyped_storage()._cdata for value in _weights(encoder)}
    del kept
    return sum(tensor.untyped_storage().nbytes() for key, tensor in saved.items() if key not in known)


def _weights(encoder: Encoder) -> Iterator[Tensor]:
    values = vars(encoder).values()
    for part in (one for value in values for one in (value.values() if isinstance(value, dict) else [value])):
        if isinstance(part, nn.Module):
            yield from part.parameters()
            yield from part.buffers()
        # An encoder around another one, such as Tuned.
        elif hasattr(part, "embedding_size"):
            yield from _weights(part)


def resident_bytes() -> int:
    """Return the memory of this process: libraries and data, no decoder yet."""
    status = Path("/proc/self/status")
    found = re.search(r"VmRSS:\s+(\d+) kB", status.read_text()) if status.exists() else None
    if found:
        return int(found[1]) * 1024
    # Other systems than Linux only report the high-water mark; macOS counts bytes.
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def device_bytes(device: str) -> int | None:
    """Return the memory of this machine, or of its first GPU; None if it has no such device."""
    if device != "cpu":
        return torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else None
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def read_size(text: str) -> int:
    """Read a size such as ``24GB``, ``512MB`` or ``80GiB``, in bytes.

    Raises:
        InputError: not a size, or 0.
    """
    # GB is 1e9 bytes, as vendors count; GiB is 2**30.
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]I?B)?\s*", text.upper())
    size = int(float(found[1]) * _UNITS[found[2] or ""]) if found else 0
    if not size:
        raise InputError(f"memory limit {text!r}: expected a size such as 24GB, 512MB or 80GiB")
    return size
