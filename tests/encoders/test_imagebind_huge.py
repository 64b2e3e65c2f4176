"""ImageBind in its published sizes, made-up weights: one trunk at a time, since all need 5 GB."""

from __future__ import annotations

import gc
import json
import shutil

import numpy as np
import pytest
import torch

from bindllm.convert.imagebind import convert_imagebind
from bindllm.encoders.imagebind import ImageBind
from bindllm.encoders.imagebind.text import tokenizer_tree
from goldens import fill, fill_input, golden, keys
from imagebind_small import constants

INPUTS = {
    "vision": ("image", (1, 3, 224, 224), 2.0),
    "audio": ("audio", (1, 1, 128, 204), 1.5),
    "depth": ("depth", (1, 1, 224, 224), 1.0),
    "thermal": ("thermal", (1, 1, 224, 224), 1.0),
    "imu": ("imu", (1, 6, 2000), 3.0),
    "text": ("text", (2, 77), 0.0),
}


@pytest.mark.slow
@pytest.mark.parametrize("trunk", INPUTS)
def test_huge_trunks_give_the_published_results(trunk, tmp_path):
    modality, shape, limit = INPUTS[trunk]
    table = keys("imagebind_huge")
    kept = constants("imagebind_huge")
    state = {name: fill(name, shape) for name, shape in table.items() if f".{trunk}." in name}
    state |= {name: tensor for name, tensor in kept.items() if name in state}
    # Texts are served with a tokenizer only; its words do not matter, since the ids are given.
    tokenizer = tmp_path / "tokenizer.json"
    tokenizer.write_text(json.dumps(tokenizer_tree({})), encoding="utf-8")
    convert_imagebind(state, tmp_path / "huge", tokenizer_file=tokenizer)
    del state
    gc.collect()
    encoder = ImageBind(str(tmp_path / "huge"), scale="published")
    results = golden("imagebind_huge")
    inputs = (
        fill_input(f"huge_{trunk}", shape, -limit, limit) if limit else torch.from_numpy(results["text/ids"])
    )
    found = encoder.embed(modality, list(inputs)).numpy()
    with torch.no_grad():
        head = encoder._trunk(trunk)(inputs)[0].numpy()
    shutil.rmtree(tmp_path / "huge")
    errors = {
        name: float(np.abs(array - results[f"{trunk}/{name}"]).max())
        for name, array in (("out", found), ("head", head))
    }
    assert max(errors.values()) < 1e-5, errors
