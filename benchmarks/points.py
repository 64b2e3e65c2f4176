"""Point clouds per second of both Point-Bind encoders at full size with random weights, and the cost of grouping."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.measure import Metric, matrix_rate, seconds
from bindllm import Media
from bindllm.encoders import PointBind
from bindllm.encoders.pointbind.networks import build_network

VARIANTS = ("i2p-mae", "point-bert")
BATCHES = (1, 8)
REPEATS = 5
# The largest matrix product of both networks, over the points of all groups: rows, width in, width out.
SHAPE = (16384, 256, 512)


def metrics() -> list[Metric]:
    """Measure `embed` of prepared clouds for each variant and batch, and the preparation of a larger cloud."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rate = matrix_rate(*SHAPE, torch.float32, device)
    found = [preparation()]
    for variant in VARIANTS:
        with tempfile.TemporaryDirectory() as folder:
            write_random_weights(Path(folder), variant)
            found += speed(PointBind(folder).to(device), variant.replace("-", ""), rate)
    return found


def speed(encoder: PointBind, name: str, rate: float) -> list[Metric]:
    """Return clouds per second, and the share of time in sampling and grouping."""
    network, device, found = encoder.network, next(encoder.network.parameters()).device, []
    clouds = [encoder.prepare(Media.point(shell(seed, 8192))) for seed in range(max(BATCHES))]
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        points = clouds[0][None].to(device)
        network.head(network(points, network.group(points))[0])
    ceiling = rate / counter.get_total_flops()
    for batch in BATCHES:
        points = torch.stack(clouds[:batch]).to(device)
        whole = best(lambda batch=batch: encoder.embed("point", clouds[:batch]))
        with torch.no_grad():
            grouping = best(lambda points=points: network.group(points))
        found += [
            Metric(
                f"points_{name}_b{batch}_per_second", batch / whole, "clouds/s", ceiling,
                f"8192 points, float32; floor: {counter.get_total_flops() / 1e9:.1f} GFLOP at the matrix rate",
            ),
            Metric(
                f"points_{name}_b{batch}_grouping_share", grouping / whole, "ratio", None,
                f"sampling and nearest neighbors: {grouping * 1e3:.0f} of {whole * 1e3:.0f} ms",
            ),
        ]  # fmt: skip
    return found


def preparation() -> Metric:
    """Measure the reduction of a cloud from 100,000 to 8192 points."""
    encoder, media = PointBind("nowhere"), Media.point(shell(0, 100_000))
    took = best(lambda: encoder.prepare(media))
    return Metric(
        "points_prepare_per_second",
        1 / took,
        "clouds/s",
        None,
        "100,000 points to 8192, one thread: center, thin",
    )


def best(run) -> float:
    run()
    return min(seconds(run) for _ in range(REPEATS))


def shell(seed: int, count: int) -> np.ndarray:
    """A squashed sphere [N, 3] with bumps."""
    directions = np.random.default_rng(seed).normal(size=(count, 3))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    bumps = 0.65 + 0.35 * np.sin(5 * directions[:, :1] + 3 * directions[:, 1:2])
    return (directions * bumps * (1, 0.8, 0.6)).astype(np.float32)


def write_random_weights(folder: Path, variant: str) -> None:
    """Write a converted folder of the published sizes with small random weights."""
    torch.manual_seed(0)
    shapes = build_network({"variant": variant}, source=variant).state_dict()
    tensors = {name: torch.randn(tensor.shape) * 0.02 for name, tensor in shapes.items()}
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"variant": variant}))
