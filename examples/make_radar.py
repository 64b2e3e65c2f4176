"""Simulates sweeps of a 77 GHz car radar with captions, and trains the weights of `radar_encoder.py` on them.

Writes data/radar/captions.csv (columns radar and caption), data/radar/sweeps/*.npy and data/radar/encoder.safetensors.
The weights are the principal axes of the training sweeps' range-Doppler maps: a simple encoder, trained without labels.
"""

import csv
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from bindllm.media import Media
from examples.radar_encoder import RadarEncoder

FOLDER = Path("data/radar")
CHIRPS = SAMPLES = 64
# Size of one bin of range (150 MHz) and of speed (64 chirps of 0.1 ms).
METERS, METERS_PER_SECOND = 1.0, 0.3
SPEEDS = {"approaching": (-8, -3), "standing still": (-0.2, 0.2), "moving away": (3, 8)}
DISTANCES = {"near": (4, 15), "at middle distance": (22, 38), "far away": (45, 60)}


def simulate(targets: list[tuple[float, float]], random: np.random.Generator) -> np.ndarray:
    """Return the beat signal of targets (meters, meters per second) with noise: complex64 [chirps, samples]."""
    chirp, sample = np.mgrid[:CHIRPS, :SAMPLES]
    signal = 0.5 * (random.standard_normal((2, CHIRPS, SAMPLES)) * [[[1]], [[1j]]]).sum(0)
    for distance, speed in targets:
        cycles = distance / METERS * sample / SAMPLES + speed / METERS_PER_SECOND * chirp / CHIRPS
        signal += np.exp(2j * np.pi * (cycles + random.random()))
    return signal.astype(np.complex64)


def main(count: int = 360) -> None:
    """Write sweeps, captions and weights."""
    random = np.random.default_rng(0)
    (FOLDER / "sweeps").mkdir(parents=True, exist_ok=True)
    rows = []
    for number in range(count):
        distance, motion = random.choice(list(DISTANCES)), random.choice(list(SPEEDS))
        target = (random.uniform(*DISTANCES[distance]), random.uniform(*SPEEDS[motion]))
        np.save(FOLDER / f"sweeps/{number}.npy", simulate([target], random))
        split = ("test", "validation", *["train"] * 8)[number % 10]
        rows.append((f"sweeps/{number}.npy", f"something {distance}, {motion}", split))
    with open(FOLDER / "captions.csv", "w", newline="", encoding="utf-8") as stream:
        csv.writer(stream).writerows([("radar", "caption", "split"), *rows])

    encoder = RadarEncoder()
    seen = [encoder.prepare(Media("radar", FOLDER / file)) for file, _, split in rows if split == "train"]
    maps = torch.stack(seen)
    mean = maps.mean(0)
    axes = torch.linalg.svd(maps - mean, full_matrices=False).Vh[: RadarEncoder.embedding_size]
    save_file({"mean": mean, "axes": axes.T.contiguous()}, FOLDER / "encoder.safetensors")
    print(f"{count} sweeps with captions and the encoder's weights are in {FOLDER}")


if __name__ == "__main__":
    main()
