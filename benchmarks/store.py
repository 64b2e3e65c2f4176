"""An epoch that reads embeddings from the store, against the same epoch that encodes its images on the fly."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import torch

from benchmarks.measure import Metric, paired, seconds
from benchmarks.parts import bound_loss, bound_model, training_batch
from bindllm import EmbeddingStore, Media
from bindllm.embeddings.precompute import precompute_embeddings
from bindllm.encoders import EfficientNetLite

IMAGES = Path("data/openmoji")
ROWS, BATCH = 64, 16


def metrics() -> list[Metric]:
    """Time four batches of images both ways, each with its training step."""
    encoder, model = EfficientNetLite(), bound_model()
    lines = (IMAGES / "captions.jsonl").read_text().splitlines()[:ROWS]
    media = [Media.image(IMAGES / json.loads(line)["image"]) for line in lines]
    batch = training_batch(model.decoder, rows=BATCH, tokens=24, answer=6)
    with tempfile.TemporaryDirectory() as folder:
        store = EmbeddingStore.for_encoder(folder, encoder)
        first = seconds(lambda: precompute_embeddings(store, encoder, media, progress=False))

        def epoch(embed) -> None:
            for start in range(0, ROWS, BATCH):
                rows = embed(media[start : start + BATCH]).unsqueeze(1)
                bound_loss(model, {**batch, "embeddings": rows.to(model.device)}).backward()

        def from_store(items: list[Media]) -> torch.Tensor:
            return store.get([store.key_of(item) for item in items])

        ratio, ours, theirs = paired(lambda: epoch(from_store), lambda: epoch(model.encode), repeats=3)
        reading = seconds(lambda: from_store(media))
    return [
        Metric(
            "epoch_store_over_fly", ratio, "ratio", (ours - reading) / theirs,
            f"{ROWS} images: {ours:.1f} s over {theirs:.1f} s; floor: training only; filling: {first:.1f} s",
        ),
        Metric(
            "embed_pictures_per_second", ROWS / first, "images/s", None,
            "SVG rendering, encoding and writing, EfficientNet-Lite0 at 224 pixels",
        ),
    ]  # fmt: skip
