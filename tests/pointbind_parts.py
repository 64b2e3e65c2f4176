"""Small Point-Bind encoders with made-up weights in converted folders, and made-up clouds."""

import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from bindllm.encoders.pointbind.networks import build_network
from goldens import fill, keys

POINTS = 96

SIZES = {
    "point-bert": {
        "groups": 24, "neighbors": 8, "channels": [8, 12, 16, 12], "position": 8,
        "width": 24, "depth": 2, "heads": 3, "projection": 16,
    },
    "i2p-mae": {
        "groups": [24, 12, 6], "neighbors": [8, 6, 4],
        "channels": [[8, 12, 16, 12], [12, 12, 24, 24], [24, 24, 36, 36]],
        "depth": [2, 1, 2], "heads": [3, 3, 3], "radius": [0.4, 0.8, 1.2], "projection": 16,
    },
}  # fmt: skip


def write_small(folder: Path, variant: str, **sizes) -> str:
    """Write a converted folder of a small network, and return its name."""
    config = {"variant": variant, "sizes": SIZES[variant] | sizes}
    network = build_network(config, source="test")
    tensors = {name: fill(name, tuple(tensor.shape)) for name, tensor in network.state_dict().items()}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def bumpy(seed: int, count: int = 200) -> np.ndarray:
    """A cloud without symmetry: a squashed shell with bumps, far from the origin and of any size."""
    random = np.random.default_rng(seed)
    points = random.normal(size=(count, 3))
    points /= np.linalg.norm(points, axis=1, keepdims=True)
    points *= 0.6 + 0.4 * np.sin((3 + seed) * points[:, :1] + points[:, 1:2])
    return (points * (1, 0.7, 0.5) * (1 + seed) + seed).astype(np.float32)


def point_rows(table: str) -> dict[str, Tensor]:
    """Return a published checkpoint with made-up weights for its point encoder, and without memory for the rest."""
    state = {}
    for name, shape in keys(table).items():
        belongs = "point" in name or "pc_projection" in name
        tensor = fill(name, shape) if belongs else None
        # What is not filled keeps its constant; all such constants are scalars, which do not reach the encoder.
        state[name] = torch.empty(shape, device="meta") if tensor is None else tensor
    return state
