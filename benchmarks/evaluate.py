"""Questions per second of `bindllm.evaluation.evaluate`, against a bare loop of `generate` over the same batches."""

from __future__ import annotations

import json
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from PIL import Image

from benchmarks.measure import Metric, paired
from benchmarks.parts import bound_model
from bindllm.data.batches import sorted_batches
from bindllm.data.collate import prompt_batch
from bindllm.data.embeddings import MediaEmbeddings
from bindllm.data.rows import make_sample
from bindllm.evaluation import evaluate
from bindllm.evaluation.benchmarks import BENCHMARKS
from bindllm.evaluation.benchmarks.benchmark import read_items

IMAGES, QUESTIONS = 64, 4
"""Images, and questions about each."""
SETTINGS = {"batch_size": 32, "max_new_tokens": 8}


def write_questions(folder: Path) -> None:
    """Write a table of questions of several lengths about images of noise."""
    rng, rows = np.random.default_rng(0), []
    for n in range(IMAGES):
        Image.fromarray(rng.integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(folder / f"{n}.png")
        rows += [
            {"image": f"{n}.png", "question": f"What is {'really ' * k}in this image?", "answer": "noise"}
            for k in range(QUESTIONS)
        ]
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def metrics() -> list[Metric]:
    """Measure with embeddings in the store, as a second evaluation of the same data has them; without controls."""
    model = bound_model().eval()
    with TemporaryDirectory() as name:
        folder, numbers = Path(name), count()
        write_questions(folder)
        items = read_items(BENCHMARKS["questions"], folder, prompt="{question}").items
        samples = [make_sample(item.row, model.tokenizer, 2048) for item in items]
        embeddings = MediaEmbeddings(model.encoders, folder / "store")
        embeddings.precompute(media for item in items for media in item.media)
        lengths = [sample.prompt_length for sample in samples]
        pad_id = model.tokenizer.pad_token_id
        batches = [
            prompt_batch([samples[n] for n in rows], embeddings, pad_id=pad_id)
            for rows in sorted_batches(lengths, batch_size=SETTINGS["batch_size"])
        ]

        def bare() -> None:
            for batch in batches:
                model.generate_from(**batch, max_new_tokens=SETTINGS["max_new_tokens"])

        def ours() -> None:
            output = folder / f"out{next(numbers)}"
            evaluate(
                model,
                "questions",
                root=folder,
                output=output,
                store=folder / "store",
                controls=False,
                **SETTINGS,
            )

        ratio, a, b = paired(bare, ours, repeats=3)
    note = f"{len(items) / b:.1f} over {len(items) / a:.1f} questions per second; at least 0.95"
    return [Metric("evaluate_over_generate", ratio, "ratio of seconds", None, note)]
