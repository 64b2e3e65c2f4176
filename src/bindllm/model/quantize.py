"""Frozen projections in 4 or 8 bits, through bitsandbytes, as QLoRA (arXiv 2305.14314) trains an adapter on them.

- ``nf4``: 16 levels placed for normally distributed weights, a scale for each 64 weights, and the scales in 8 bits
  themselves (double quantization); products run in the decoder's dtype. About 0.52 bytes a weight.
- ``int8``: weights and activations in 8 bits, activations above a threshold in 16 (LLM.int8(), arXiv 2208.07339).
  About 1 byte a weight.

Embeddings, norms and the vocabulary projection stay as they are. Order of construction: decoder, quantization, adapter,
injection. The files of the decoder are the plain ones, and it is they that a checkpoint's fingerprint identifies.
"""

from __future__ import annotations

import importlib.util
import logging

import torch
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel

from bindllm.errors import MissingExtraError

QUANTIZATIONS = ("nf4", "int8")

# Repeated for every projection and step: that products run in float16, and that a CPU kernel is missing which
# `keep_gradients` switches off anyway.
_REPEATED = ("MatMul8bitLt: inputs will be cast", "Failed to load CPU gemm_4bit_forward")


def quantization_config(kind: str, dtype: torch.dtype) -> BitsAndBytesConfig:
    """Return the quantization settings of transformers.

    Args:
        dtype: type of the decoder; matrix products run in it.

    Raises:
        MissingExtraError: bitsandbytes or accelerate is not installed.
    """
    # transformers needs accelerate to load quantized weights.
    for package in ("bitsandbytes", "accelerate"):
        if importlib.util.find_spec(package) is None:
            raise MissingExtraError(package, extra="qlora", purpose=f"hold a decoder in {kind}")
    quiet_bitsandbytes()
    if kind == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


def quiet_bitsandbytes() -> None:
    """Filter bitsandbytes' messages for every user; peft and transformers import it wherever it is installed."""
    for module in ("autograd._functions", "backends.cpu.ops"):
        logging.getLogger(f"bitsandbytes.{module}").addFilter(_is_not_repeated)


def keep_gradients(decoder: PreTrainedModel) -> None:
    """Keep the weights in the layout that gradients pass through.

    On a CPU with AVX512-BF16, bitsandbytes repacks 4-bit weights for good at the first forward without a gradient in
    eval mode, such as a validation; the product with repacked weights then returns no gradient, only a warning. A
    frozen decoder is always in eval mode.
    """
    from bitsandbytes.nn import Linear4bit

    for module in decoder.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False


def num_weights(parameter: nn.Parameter) -> int:
    """Return the number of weights in a parameter: in 4 bits, two are packed into each byte."""
    # Only Linear4bit parameters have this attribute; its shape is that of the unpacked matrix.
    state = vars(parameter).get("quant_state")
    return parameter.numel() if state is None else state.shape.numel()


def _is_not_repeated(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(_REPEATED)
