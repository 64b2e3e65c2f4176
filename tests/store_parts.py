"""Rows for a store, images to embed, and an encoder that counts."""

import io
import os
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from bindllm import EmbeddingStore, Media
from bindllm.embeddings.precompute import PrecomputeReport, precompute_embeddings
from bindllm.parallel import Processes
from tiny import ColorEncoder

FINGERPRINT = "a1" * 32
SIZE = 4
CLOCK_TICK = 0.02
"""Seconds after which a change of a file has another time: more than a tick of the file system's clock."""


def texts(*numbers: int) -> list[Media]:
    return [Media.text(f"text {n}") for n in numbers]


def keys_of(media: list[Media]) -> list[str]:
    return [item.content_hash() for item in media]


def vectors(*numbers: int) -> torch.Tensor:
    return torch.stack([torch.randn(SIZE, generator=torch.Generator().manual_seed(n)) for n in numbers])


def open_store(folder: Path) -> EmbeddingStore:
    return EmbeddingStore(folder, FINGERPRINT, SIZE)


def add(store: EmbeddingStore, *numbers: int) -> None:
    media = texts(*numbers)
    store.append(keys_of(media), vectors(*numbers), media)


def write_settled(path: Path, content: bytes) -> Path:
    """Write a file with a fixed time of modification, as cp -p and tar keep it."""
    path.write_bytes(content)
    os.utime(path, ns=(10**18, 10**18))
    return path


class CountingEncoder(ColorEncoder):
    """Counts its calls; tests can act before it embeds."""

    def __init__(self, **changes) -> None:
        super().__init__(**changes)
        self.prepared: list[str] = []
        self.batches: list[int] = []

    def prepare(self, media: Media) -> torch.Tensor:
        inputs = super().prepare(media)
        self.prepared.append(media.name)
        return inputs

    def embed(self, modality: str, inputs: list[torch.Tensor]) -> torch.Tensor:
        self.batches.append(len(inputs))
        self.before_embed()
        return super().embed(modality, inputs)

    def before_embed(self) -> None:
        """Overridden by tests."""


def image_bytes(n: int) -> bytes:
    """The bytes of a small PNG that differs for each number."""
    pixels = np.random.default_rng(n).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


def write_images(folder: Path, count: int, *, start: int = 0) -> list[Media]:
    """Write images, each with other pixels."""
    folder.mkdir(parents=True, exist_ok=True)
    names = {n: folder / f"{n:03}.png" for n in range(start, start + count)}
    return [Media.image(write_settled(path, image_bytes(n))) for n, path in names.items()]


def counts(report: PrecomputeReport) -> tuple[int, int, int, int]:
    return report.encoded, report.reused, report.duplicates, len(report.failed)


def expected(media: list[Media]) -> torch.Tensor:
    encoder = ColorEncoder()
    return torch.cat([encoder.embed("image", [encoder.prepare(item)]) for item in media])


def run(folder: Path, media, encoder: ColorEncoder | None = None, **options) -> PrecomputeReport:
    encoder = encoder or CountingEncoder()
    store = EmbeddingStore.for_encoder(folder, encoder)
    return precompute_embeddings(
        store,
        encoder,
        media,
        **{"batch_size": 4, "processes": Processes(threads=2), "progress": False, **options},
    )


def stored(folder: Path, media: list[Media], encoder: ColorEncoder | None = None) -> torch.Tensor:
    store = EmbeddingStore.for_encoder(folder, encoder or ColorEncoder())
    return store.get([store.key_of(item) for item in media])
