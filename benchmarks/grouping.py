"""Supervised tokens per second of length-grouped batches, against random batches padded to their longest row.

The lengths are synthetic and follow instruction data, with many short and few long answers. Prompts and answers are
log-normal, with a median of some dozens of tokens and a tail of hundreds. Longer rows are truncated.
Both sides train on the same rows, once each, in batches of the same number of rows.
"""

from __future__ import annotations

import numpy as np
import torch

from benchmarks.measure import Metric, seconds
from benchmarks.parts import bound_loss, bound_model, training_batch
from bindllm.data.batches import LengthGroupedBatches
from bindllm.model.bindllm import BindLLM

ON_GPU = torch.cuda.is_available()
ROWS = 512
BATCH = 16 if ON_GPU else 8
TIMED = 16 if ON_GPU else 6
"""Number of batches of each side that are run, evenly spread over its batches in order of length."""
LONGEST = 2048 if ON_GPU else 256
# Median and spread (of the logarithm) of prompts and answers in tokens.
PROMPT, ANSWER = (35.0, 0.7), (55.0, 1.1)


def metrics() -> list[Metric]:
    """Run some batches of each side and compare supervised tokens per second."""
    prompts, answers = lengths(ROWS, LONGEST)
    total = prompts + answers
    grouped = LengthGroupedBatches(total.tolist(), batch_size=BATCH).epoch(0)
    order = np.random.default_rng(1).permutation(ROWS)
    random = [order[start : start + BATCH].tolist() for start in range(0, ROWS, BATCH)]
    model = bound_model()
    rates, shares = [], []
    for batches in (grouped, random):
        rates.append(_rate(model, batches, total, answers))
        padded = sum(len(rows) * int(total[rows].max()) for rows in batches)
        shares.append(float(total.sum()) / padded)
    return [
        Metric(
            "grouped_tokens_gain", rates[0] / rates[1], "ratio", shares[0] / shares[1],
            f"{ROWS} rows, {int(np.median(total))} tokens at the median, {int(total.max())} at most, batches of "
            f"{BATCH}: {rates[0]:.0f} over {rates[1]:.0f} supervised tokens/s; at least 1.5; floor: the share of "
            f"positions that are tokens, {shares[0]:.0%} over {shares[1]:.0%}",
        )
    ]  # fmt: skip


def lengths(rows: int, longest: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the tokens of the prompts and of the answers of a mix of instructions; deterministic."""
    draw = np.random.default_rng(0)
    prompts, answers = (
        np.ceil(draw.lognormal(np.log(median), spread, rows)).astype(np.int64)
        for median, spread in (PROMPT, ANSWER)
    )
    prompts = np.minimum(prompts, longest // 2)
    return prompts, np.minimum(answers, longest - prompts)


def _rate(model: BindLLM, batches: list[list[int]], total: np.ndarray, answers: np.ndarray) -> float:
    """Return supervised tokens per second over all batches, from the seconds of some and the padded size of all."""
    by_size = sorted(batches, key=lambda rows: len(rows) * int(total[rows].max()))
    chosen = [by_size[n] for n in np.linspace(0, len(by_size) - 1, TIMED).round().astype(int)]
    made = [_batch(model, total[rows], answers[rows]) for rows in chosen]
    bound_loss(model, made[0]).backward()
    spent = []
    for batch in made:
        spent.append(seconds(lambda batch=batch: bound_loss(model, batch).backward()))
        model.zero_grad()
    sizes = [batch["input_ids"].numel() for batch in made]
    everything = [len(rows) * int(total[rows].max()) for rows in by_size]
    # The seconds of the other sizes are interpolated between the timed ones.
    return float(answers.sum()) / float(np.interp(everything, sizes, spent).sum())


def _batch(model: BindLLM, total: np.ndarray, answers: np.ndarray) -> dict[str, torch.Tensor]:
    """Return a batch of random ids with these lengths, padded on the right."""
    longest = int(total.max())
    batch = training_batch(model.decoder, rows=len(total), tokens=longest, answer=longest)
    for row, (length, answer) in enumerate(zip(total.tolist(), answers.tolist(), strict=True)):
        batch["attention_mask"][row, length:] = 0
        batch["media_index"][row, length:] = -1
        batch["labels"][row, length:] = -100
        batch["labels"][row, : length - answer] = -100
    return batch
