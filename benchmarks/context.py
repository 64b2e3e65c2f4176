"""Retrieved records as context tokens, over the same records as shots in the prompt: tokens, time and memory by K."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import partial

import torch
from torch import Tensor

from benchmarks.few_shot import ROWS, few_shot_batch
from benchmarks.measure import Metric, forget_peak, paired, peak_bytes, seconds, used_bytes
from benchmarks.memory import RETURNED
from benchmarks.parts import bound_model
from bindllm.model.bindllm import BindLLM
from bindllm.model.context import ContextConfig
from bindllm.model.injection import InjectConfig

RECORDS = (1, 4, 16)
TEXT, ANSWER = 8, 8
"""Tokens of a record's text, as a shot of `few_shot_batch` has, and of an answer."""
OPTIONS = {"max_new_tokens": ANSWER, "min_new_tokens": ANSWER}

FORMS = {
    "perceivers": (ContextConfig(latents=8), InjectConfig(kind="attend")),
    "words": (ContextConfig(latents="all"), InjectConfig(kind="cross", layers=10)),
}


def metrics() -> list[Metric]:
    """Time and memory of a batch of answers for each form and number of records, over those with shots."""
    found = []
    for form in FORMS:
        model = _model(form)
        for count in RECORDS:
            found.append(_time(model, form, count))
        command = [sys.executable, "-m", "benchmarks.context", form]
        environment = {**os.environ, **RETURNED}
        # In a process of its own: here, memory that the runs before have freed would not be counted.
        printed = subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout
        for count, (bare, records, shots) in json.loads(printed.splitlines()[-1]).items():
            note = f"peak over that of the loaded model: {records / 1e6:.0f} MB over {shots / 1e6:.0f} MB; "
            note += f"floor: without records, {bare / 1e6:.0f} MB"
            name = f"context_{form}_memory_over_shots_{count}"
            found.append(Metric(name, records / shots, "ratio of bytes", bare / shots, note))
    return found


def _model(form: str) -> BindLLM:
    context, inject = FORMS[form]
    model = bound_model(context=context, inject=inject).eval()
    torch.nn.init.constant_(model.injection.context_gates, 0.01)
    return model


def _batches(model: BindLLM, count: int) -> tuple[dict[str, Tensor], ...]:
    """Return the inputs of `BindLLM.generate_from` without records, with records, and with shots."""
    bare, shots = few_shot_batch(model, 0), few_shot_batch(model, count)
    # Retrieved shots differ from question to question, so no part of the prompt is shared.
    shots["embeddings"] = torch.nn.functional.normalize(torch.randn_like(shots["embeddings"]), dim=-1)
    return bare, bare | _records(count), shots


def _records(count: int) -> dict[str, Tensor]:
    """The records of one media group in each row, of random texts: the words do not change the time."""
    generator = torch.Generator().manual_seed(0)
    embeddings = torch.randn(ROWS, 1, count, 1280, generator=generator)
    return {
        "context_embeddings": torch.nn.functional.normalize(embeddings, dim=-1),
        "context_scores": torch.ones(ROWS, 1, count),
        "context_ids": torch.randint(100, 40_000, (ROWS, 1, count, TEXT), generator=generator),
    }


def _time(model: BindLLM, form: str, count: int) -> Metric:
    bare, records, shots = _batches(model, count)
    run = partial(model.generate_from, **OPTIONS)
    ratio, a, b = paired(lambda: run(**records), lambda: run(**shots), repeats=3 if count < 16 else 1)
    floor = seconds(lambda: run(**bare))
    read = 2 * 8 if form == "perceivers" else count * TEXT
    tokens = shots["input_ids"].shape[1] - bare["input_ids"].shape[1]
    note = (
        f"{a:.2f} s over {b:.2f} s with shots; floor: without records, {floor:.2f} s. {read} context tokens, "
    )
    note += f"{tokens} tokens of the prompt with shots"
    return Metric(f"context_{form}_over_shots_{count}", ratio, "ratio of seconds", floor / b, note)


def _peak(model: BindLLM, batch: dict[str, Tensor]) -> int:
    """Return the peak memory of a batch of answers beyond the memory in use before."""
    forget_peak()
    before = used_bytes()
    model.generate_from(**batch, **OPTIONS)
    return peak_bytes() - before


if __name__ == "__main__":
    loaded = _model(sys.argv[1])
    # The first run loads kernels.
    _peak(loaded, few_shot_batch(loaded, 0))
    print(json.dumps({n: [_peak(loaded, batch) for batch in _batches(loaded, n)] for n in RECORDS}))
