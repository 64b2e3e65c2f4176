"""Whether a Hugging Face LLaMA is the one that a published adapter was trained on: its sizes, then its numbers.

An adapter on another base loads without a complaint and answers nonsense, so it is refused here.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bindllm.convert.foreign import SafetensorsFolder
from bindllm.convert.imagebind_llm import Adapted
from bindllm.errors import CheckpointError

ACCEPT_OPTION = "--accept_base"

ROUNDING = 2.0**-8
"""Largest relative difference between two copies of a tensor in different precisions (bfloat16 keeps 8 bits)."""

SMALLEST_CORRELATION = 0.5
"""Median correlation, over the norms, that a fine-tuned copy must keep with its base.

The second stage moves each weight of a norm by about 0.01 to 0.05 (AdamW at 1.25e-4 and falling, no decay), which
shifts and roughens the pattern over the channels but does not replace it; the patterns of two models that were trained
apart have nothing in common, so their correlation is about 0. A base that was itself tuned from the right one cannot
be told from it by this.
"""


def check_base(adapted: Adapted, folder: str | Path, *, accept: bool = False) -> None:
    """Refuse a base model that does not belong to an adapter.

    Args:
        adapted: what was read from the published file.
        folder: the base model's Hugging Face folder.
        accept: go on although the numbers differ; the sizes must fit in any case.

    Raises:
        CheckpointError: no LLaMA, other sizes, or other numbers; says which.
    """
    config = _read_config(Path(folder))
    if config.get("model_type") != "llama":
        raise CheckpointError(
            f"{folder} holds a model of type {config.get('model_type')!r}; the adapter belongs to a LLaMA: give its "
            "Hugging Face folder"
        )
    _check_sizes(adapted, config, folder)
    if not accept:
        _check_numbers(adapted, SafetensorsFolder(folder), folder)


def _read_config(folder: Path) -> dict[str, Any]:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{folder} has no readable config.json ({error}); give the Hugging Face folder of the base model"
        ) from error
    return config if isinstance(config, dict) else {}


def _check_sizes(adapted: Adapted, config: dict[str, Any], folder: str | Path) -> None:
    shape, tensors = adapted.shape, adapted.tensors
    found = {
        "width": (shape.width, config.get("hidden_size")),
        "layers": (shape.num_layers, config.get("num_hidden_layers")),
        "heads": (shape.num_heads, config.get("num_attention_heads")),
        # Grouped keys came with later models than these adapters know.
        "key/value heads": (
            shape.num_heads,
            config.get("num_key_value_heads", config.get("num_attention_heads")),
        ),
    }
    inner = [tensor for name, tensor in tensors.items() if name.endswith("gate_proj.lora_B.weight")]
    inner += [tensor for name, tensor in adapted.base.items() if name.endswith("gate_proj.weight")]
    if inner:
        found["inner width"] = (len(inner[0]), config.get("intermediate_size"))
    if "model.embed_tokens.weight" in adapted.base:
        found["vocabulary"] = (len(adapted.base["model.embed_tokens.weight"]), config.get("vocab_size"))
    wrong = [
        f"{what} {theirs} in the adapter, {ours} in the base"
        for what, (theirs, ours) in found.items()
        if theirs != ours
    ]
    if wrong:
        raise CheckpointError(f"{folder} is not the base model of this adapter: {'; '.join(wrong)}")


def _check_numbers(adapted: Adapted, base: SafetensorsFolder, folder: str | Path) -> None:
    """Compare all that the file holds of the decoder; the norms of the second stage were tuned."""
    tuned = adapted.shape.phase == "finetune"
    correlations = []
    for name, theirs in adapted.base.items():
        # Tied models keep one matrix for both ends.
        ours = base["model.embed_tokens.weight" if name == "lm_head.weight" and name not in base else name]
        is_norm = name.endswith("norm.weight")
        if tuned and is_norm:
            correlations.append(_correlation(theirs, ours))
        elif not _same(theirs, ours):
            raise CheckpointError(
                f"{folder} is not the base model of this adapter: {name} differs from what the file was trained "
                f"with, by up to {_difference(theirs, ours)}. Give the right base; to convert onto this one all the "
                f"same, add {ACCEPT_OPTION}"
            )
    if correlations and (median := torch.tensor(correlations).median().item()) < SMALLEST_CORRELATION:
        raise CheckpointError(
            f"{folder} is not the base model of this adapter: its norms and the tuned ones of the file have a median "
            f"correlation of {median:.2f}, expected at least {SMALLEST_CORRELATION}. Give the right base; to convert "
            f"onto this one all the same, add {ACCEPT_OPTION}"
        )


def _same(theirs: Tensor, ours: Tensor) -> bool:
    return theirs.shape == ours.shape and torch.allclose(
        theirs.float(), ours.float(), rtol=ROUNDING, atol=1e-6
    )


def _difference(theirs: Tensor, ours: Tensor) -> str:
    if theirs.shape != ours.shape:
        return f"its shape ({list(ours.shape)} for {list(theirs.shape)})"
    return f"{(theirs.float() - ours.float()).abs().max().item():.2g}"


def _correlation(theirs: Tensor, ours: Tensor) -> float:
    """Correlation over the channels; constant norms have no pattern and count as equal or not."""
    if theirs.shape != ours.shape:
        return 0.0
    a, b = (tensor.double() - tensor.double().mean() for tensor in (theirs, ours))
    size = (a.norm() * b.norm()).item()
    # A pattern of fewer than a few units in the last place is rounding.
    if size <= 1e-6 * len(a):
        return float(_same(theirs, ours))
    return ((a @ b) / size).item()
