"""`bindllm embed` from files to the store: how much of the time the encoder works, and what reading costs it."""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from benchmarks.measure import Figure, paired, seconds
from bindllm import EmbeddingStore, Media
from bindllm.embeddings.precompute import precompute_embeddings
from bindllm.encoders import EfficientNetLite
from bindllm.model.decoder import default_device

PICTURES, WIDTH, HEIGHT = 512, 640, 480
BATCH = 32
"""As `precompute_embeddings` has it by default."""
REPEATS = 3


class TimedEncoder(EfficientNetLite):
    """Adds up the time inside ``embed``."""

    seconds = 0.0

    def embed(self, modality: str, inputs: list[Tensor]) -> Tensor:
        """Embed; what an accelerator still has to do is waited for, as its result is needed at once."""
        started = time.perf_counter()
        embeddings = super().embed(modality, inputs).cpu()
        self.seconds += time.perf_counter() - started
        return embeddings


def write_pictures(folder: Path) -> list[Media]:
    """Write JPEG files as large as photographs of their size are: soft shapes, and the grain of a sensor."""
    rng = np.random.default_rng(0)
    media = []
    for n in range(PICTURES):
        shapes = Image.fromarray(rng.integers(0, 256, (HEIGHT // 16, WIDTH // 16, 3), dtype=np.uint8))
        soft = np.asarray(shapes.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC), dtype=np.int16)
        grain = rng.integers(-6, 7, soft.shape, dtype=np.int16)
        file = folder / f"{n:04}.jpg"
        Image.fromarray(np.clip(soft + grain, 0, 255).astype(np.uint8)).save(file, quality=90)
        media.append(Media.image(file))
    return media


def figures() -> list[Figure]:
    """Fill new stores with the same pictures, in turn with the encoder alone on what was prepared before."""
    device, cores = default_device(), os.cpu_count() or 1
    encoder = TimedEncoder().to(device)
    shares: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        media = write_pictures(Path(folder))
        prepared: list[Tensor] = []
        reading = seconds(lambda: prepared.extend(encoder.prepare(item) for item in media))

        def from_files() -> None:
            encoder.seconds = 0.0
            with tempfile.TemporaryDirectory(dir=folder) as place:
                store = EmbeddingStore.for_encoder(place, encoder)
                whole = seconds(lambda: precompute_embeddings(store, encoder, media, progress=False))
            shares.append(encoder.seconds / whole)

        def encoder_alone() -> None:
            for start in range(0, PICTURES, BATCH):
                encoder.embed("image", prepared[start : start + BATCH])

        # The first fill of all, which is not counted, loads the weights.
        ratio, whole, alone = paired(from_files, encoder_alone, repeats=REPEATS)
        kilobytes = sum(item.source.stat().st_size for item in media) / PICTURES / 1000
    # One thread's reading shared among all cores: beside an encoder that needs these cores too, or behind one
    # that does not.
    behind = reading / cores / alone
    return [
        Figure(
            "embed_encoder_share", statistics.median(shares[1:]), "share", 1.0,
            f"of the time of `precompute_embeddings`, inside encoder.embed; {PICTURES} JPEG files, {WIDTH}x{HEIGHT}, "
            f"{kilobytes:.0f} kB each, EfficientNet-Lite0 on {device}",
        ),
        Figure(
            "embed_over_encoder", ratio, "ratio", 1 + behind if device == "cpu" else max(1.0, behind),
            f"{PICTURES / whole:.0f} pictures/s over {PICTURES / alone:.0f} of the encoder alone; one thread reads and "
            f"prepares {PICTURES / reading:.0f}; floor: its work spread over {cores} cores",
        ),
    ]  # fmt: skip
