"""An epoch that reads embeddings from the store, against the same epoch encoding its pictures on the fly."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import torch

from benchmarks.measure import Figure, paired, seconds
from benchmarks.parts import bound_loss, bound_model, training_batch
from bindllm import EmbeddingStore, Media
from bindllm.embeddings.precompute import precompute_embeddings
from bindllm.encoders import EfficientNetLite

PICTURES = Path("data/openmoji")
ROWS, BATCH = 64, 16


def figures() -> list[Figure]:
    """Four batches of pictures, both ways, with the training step behind each."""
    encoder, model = EfficientNetLite(), bound_model()
    lines = (PICTURES / "captions.jsonl").read_text().splitlines()[:ROWS]
    media = [Media.image(PICTURES / json.loads(line)["image"]) for line in lines]
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
        Figure(
            "epoch_store_over_fly", ratio, "ratio", (ours - reading) / theirs,
            f"{ROWS} pictures: {ours:.1f} s over {theirs:.1f} s; floor: training alone; filling: {first:.1f} s",
        ),
        Figure(
            "embed_pictures_per_second", ROWS / first, "pictures/s", None,
            "SVG rendering, encoding and writing, EfficientNet-Lite0 at 224 pixels",
        ),
    ]  # fmt: skip
