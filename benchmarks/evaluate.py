"""Questions per second of `bindllm.evaluation.evaluate`, against a bare loop of `generate` over the same batches.

And the gain of computing the beginning of prompts once for all questions about an image, and of large batches.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest.mock import patch

import numpy as np
from PIL import Image

from benchmarks.measure import Metric, paired
from benchmarks.parts import DECODER, bound_model
from bindllm.data.batches import sorted_batches
from bindllm.data.collate import prompt_batch
from bindllm.data.embeddings import MediaEmbeddings
from bindllm.data.rows import Sample, make_sample
from bindllm.evaluation import evaluate
from bindllm.evaluation.answering import count_shared, default_batch_size, plan_batches
from bindllm.evaluation.benchmarks import BENCHMARKS
from bindllm.evaluation.benchmarks.benchmark import read_items
from bindllm.model.decoder import load_tokenizer
from bindllm.model.generation import shared

IMAGES, QUESTIONS = 48, 10
"""Images, and questions about each, as many as in easy-VQA. An evaluation starts in half a second, which counts little
then."""
BATCH_SIZE = 32
LONGEST = 8
"""Tokens of an answer."""
SHORT = {"max_new_tokens": 2, "min_new_tokens": 2}
"""An answer of one word, and the end token."""


def write_questions(folder: Path) -> None:
    """Write a table of questions of several lengths about images of noise."""
    rng, rows = np.random.default_rng(0), []
    for n in range(IMAGES):
        Image.fromarray(rng.integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(folder / f"{n}.png")
        rows += [
            {"image": f"{n}.png", "question": f"{verb} it {'really ' * k}an image?", "answer": "no"}
            for verb in ("Is", "Was")
            for k in range(QUESTIONS // 2)
        ]
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def metrics() -> list[Metric]:
    """Measure with embeddings in the store, as a second evaluation of the same data has them; without controls."""
    model = bound_model().eval()
    with TemporaryDirectory() as name:
        folder, numbers = Path(name), count()
        write_questions(folder)
        items = read_items(BENCHMARKS["questions"], folder, prompt="{question}").items
        embeddings = MediaEmbeddings(model.encoders, folder / "store")
        embeddings.precompute(media for item in items for media in item.media)

        def samples_of(system: str | None) -> list[Sample]:
            tokenizer = load_tokenizer(replace(DECODER, system=system))
            return [make_sample(item.row, tokenizer, 2048) for item in items]

        def generate(samples: Sequence[Sample], plan: Sequence[Sequence[int]], **options: int) -> None:
            for rows in plan:
                batch = prompt_batch(
                    [samples[n] for n in rows], embeddings, pad_id=model.tokenizer.pad_token_id
                )
                model.generate_from(**batch, **options)

        def ours() -> None:
            output, store = folder / f"out{next(numbers)}", folder / "store"
            own = {"output": output, "store": store, "controls": False, "max_new_tokens": LONGEST}
            evaluate(model, "questions", root=folder, **own)

        samples = samples_of(None)
        plan = plan_batches(samples, default_batch_size(samples))
        ratio, a, b = paired(partial(generate, samples, plan, max_new_tokens=LONGEST), ours, repeats=3)
        note = f"{len(items) / b:.1f} over {len(items) / a:.1f} questions per second; at least 0.95"
        found = [Metric("evaluate_over_generate", ratio, "ratio of seconds", None, note)]
        for kind, system in (("short", ""), ("system", None)):
            samples = samples_of(system)
            found += batches(kind, samples[: len(samples) // 2], generate)
    return found


def batches(kind: str, samples: list[Sample], generate: Callable[..., None]) -> list[Metric]:
    """Measure batches of 32 prompts by length over those of `plan_batches`, as large and as large as by default."""
    lengths = [sample.prompt_length for sample in samples]
    by_length, size = sorted_batches(lengths, batch_size=BATCH_SIZE), default_batch_size(samples)
    common = count_shared([sample.input_ids[: sample.prompt_length] for sample in samples])
    note = (
        f"prompts of {sum(lengths) / len(lengths):.1f} tokens, {common} of them the same; {QUESTIONS} questions about "
        f"an image, answers of one word"
    )

    def apart() -> None:
        with patch.object(shared, "MIN_SAVED", sys.maxsize):
            generate(samples, by_length, **SHORT)

    def metric(name: str, batch_size: int) -> Metric:
        together = partial(generate, samples, plan_batches(samples, batch_size), **SHORT)
        ratio, a, b = paired(apart, together, repeats=3)
        told = f"{note}: {a:.1f} s by length, {BATCH_SIZE} at a time, over {b:.1f} s, {batch_size} at a time"
        return Metric(f"{name}_{kind}", ratio, "times faster", None, told)

    return [metric("evaluate_shared_prefix", BATCH_SIZE), metric("evaluate_batches", size)]
