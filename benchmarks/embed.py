"""`bindllm embed` from files to the store: share of time in the encoder, and the cost of reading files."""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from benchmarks.measure import Metric, paired, seconds
from bindllm import EmbeddingStore, Media
from bindllm.embeddings.precompute import precompute_embeddings
from bindllm.encoders import EfficientNetLite
from bindllm.model.decoder import default_device

IMAGES, WIDTH, HEIGHT = 512, 640, 480
BATCH = 32
"""The default of `precompute_embeddings`."""
REPEATS = 3


class TimedEncoder(EfficientNetLite):
    """Adds up the time inside ``embed``."""

    seconds = 0.0

    def embed(self, modality: str, inputs: list[Tensor]) -> Tensor:
        """Embed and wait for the accelerator: `cpu()` blocks until the result exists."""
        started = time.perf_counter()
        embeddings = super().embed(modality, inputs).cpu()
        self.seconds += time.perf_counter() - started
        return embeddings


def write_images(folder: Path) -> list[Media]:
    """Write JPEG files with the file size of photographs: soft shapes with sensor noise."""
    rng = np.random.default_rng(0)
    media = []
    for n in range(IMAGES):
        shapes = Image.fromarray(rng.integers(0, 256, (HEIGHT // 16, WIDTH // 16, 3), dtype=np.uint8))
        soft = np.asarray(shapes.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC), dtype=np.int16)
        grain = rng.integers(-6, 7, soft.shape, dtype=np.int16)
        file = folder / f"{n:04}.jpg"
        Image.fromarray(np.clip(soft + grain, 0, 255).astype(np.uint8)).save(file, quality=90)
        media.append(Media.image(file))
    return media


def metrics() -> list[Metric]:
    """Fill new stores with the same images, alternating with the encoder only on prepared inputs."""
    device, cores = default_device(), os.cpu_count() or 1
    encoder = TimedEncoder().to(device)
    shares: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        media = write_images(Path(folder))
        prepared: list[Tensor] = []
        reading = seconds(lambda: prepared.extend(encoder.prepare(item) for item in media))

        def from_files() -> None:
            encoder.seconds = 0.0
            with tempfile.TemporaryDirectory(dir=folder) as place:
                store = EmbeddingStore.for_encoder(place, encoder)
                whole = seconds(lambda: precompute_embeddings(store, encoder, media, progress=False))
            shares.append(encoder.seconds / whole)

        def encoder_only() -> None:
            for start in range(0, IMAGES, BATCH):
                encoder.embed("image", prepared[start : start + BATCH])

        # The first run, which is not counted, loads the weights.
        ratio, whole, bare = paired(from_files, encoder_only, repeats=REPEATS)
        kilobytes = sum(item.source.stat().st_size for item in media) / IMAGES / 1000
    # The floor spreads the reading of one thread over all cores. On CPU it adds to the encoder, which needs the same
    # cores; an accelerator runs at the same time.
    reading_share = reading / cores / bare
    return [
        Metric(
            "embed_encoder_share", statistics.median(shares[1:]), "share", 1.0,
            f"of the time of `precompute_embeddings`, inside encoder.embed; {IMAGES} JPEG files, {WIDTH}x{HEIGHT}, "
            f"{kilobytes:.0f} kB each, EfficientNet-Lite0 on {device}",
        ),
        Metric(
            "embed_over_encoder", ratio, "ratio", 1 + reading_share if device == "cpu" else max(1.0, reading_share),
            f"{IMAGES / whole:.0f} images/s over {IMAGES / bare:.0f} of the encoder only; one thread reads and "
            f"prepares {IMAGES / reading:.0f}; floor: its work spread over {cores} cores",
        ),
    ]  # fmt: skip
