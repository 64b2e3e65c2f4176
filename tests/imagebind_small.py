"""A small ImageBind of made-up weights, in the published names and as a converted folder."""

from __future__ import annotations

import json
import math
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from bindllm.convert.imagebind import convert_imagebind
from bindllm.encoders.imagebind.text import tokenizer_tree
from goldens import filled, golden, keys

HEADS = {"vision": 4, "text": 2, "audio": 4, "depth": 4, "thermal": 3, "imu": 8}
SCALES = {"text": 1 / 0.07, "audio": 20.0, "depth": 5.0, "thermal": 10.0, "imu": 5.0}


def constants(table: str) -> dict[str, Tensor]:
    """Return the tensors of a published checkpoint that keep the values they are constructed with."""
    kept = {
        f"modality_postprocessors.{trunk}.1.log_logit_scale": torch.tensor(math.log(scale))
        for trunk, scale in SCALES.items()
    }
    kept["modality_preprocessors.text.mask"] = torch.full((77, 77), -torch.inf).triu(1)
    return {name: tensor for name, tensor in kept.items() if name in keys(table)}


def small_state(*, text_log_scale: float | None = None) -> dict[str, Tensor]:
    """Return the state dict of the small model, in the published names."""
    state = filled("imagebind_small") | constants("imagebind_small")
    if text_log_scale is not None:
        state["modality_postprocessors.text.1.log_logit_scale"] = torch.tensor(text_log_scale)
    return state


def write_small_imagebind(folder: Path, *, texts: bool = True, **changes: float) -> Path:
    """Write a converted folder of the small model and return it; E = 32; the tokenizer knows letters alone."""
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "tokenizer.json"
        file.write_text(json.dumps(tokenizer_tree({})), encoding="utf-8")
        convert_imagebind(small_state(**changes), folder, tokenizer_file=file if texts else None, heads=HEADS)
    return folder


def published_heads() -> dict[str, int]:
    """Return the attention heads that the golden file states."""
    config = json.loads(str(golden("imagebind_small")["meta"]))["config"]
    return {
        name.removesuffix("_num_heads"): size for name, size in config.items() if name.endswith("_num_heads")
    }
