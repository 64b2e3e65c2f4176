"""Retrieved records as context tokens, against the same records as shots in the prompt: tokens and time by K."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from benchmarks.few_shot import ROWS, few_shot_batch
from benchmarks.measure import Metric, paired, seconds
from benchmarks.parts import bound_model
from bindllm.model.bindllm import BindLLM
from bindllm.model.context import ContextConfig
from bindllm.model.injection import InjectConfig

RECORDS = (1, 4, 16)
TEXT, ANSWER = 8, 8
"""Tokens of a record's text, as a shot of `few_shot_batch` has, and of an answer."""

FORMS = {
    "perceivers": (ContextConfig(latents=8), InjectConfig(kind="attend")),
    "words": (ContextConfig(latents="all"), InjectConfig(kind="cross", layers=10)),
}


def metrics() -> list[Metric]:
    """Time of a batch of answers for each form and number of records, as a share of the time with shots."""
    found = []
    for form, (context, inject) in FORMS.items():
        model = bound_model(context=context, inject=inject).eval()
        for count in RECORDS:
            with_records = few_shot_batch(model, 0) | _records(count)
            shots = few_shot_batch(model, count)
            # Retrieved shots differ from question to question, so no part of the prompt is shared.
            shots["embeddings"] = torch.nn.functional.normalize(torch.randn_like(shots["embeddings"]), dim=-1)
            found.append(_compare(model, form, count, with_records, shots))
    return found


def _records(count: int) -> dict[str, Tensor]:
    """The records of one media group in each row, of random texts: the words do not change the time."""
    generator = torch.Generator().manual_seed(0)
    embeddings = torch.randn(ROWS, 1, count, 1280, generator=generator)
    return {
        "context_embeddings": torch.nn.functional.normalize(embeddings, dim=-1),
        "context_scores": torch.ones(ROWS, 1, count),
        "context_ids": torch.randint(100, 40_000, (ROWS, 1, count, TEXT), generator=generator),
    }


def _compare(
    model: BindLLM, form: str, count: int, ours: dict[str, Tensor], shots: dict[str, Tensor]
) -> Metric:
    run = partial(model.generate_from, max_new_tokens=ANSWER, min_new_tokens=ANSWER)
    ratio, a, b = paired(lambda: run(**ours), lambda: run(**shots), repeats=3 if count < 16 else 1)
    bare = {name: value for name, value in ours.items() if not name.startswith("context")}
    floor = seconds(lambda: run(**bare))
    read = 2 * 8 if form == "perceivers" else count * TEXT
    tokens = shots["input_ids"].shape[1] - bare["input_ids"].shape[1]
    note = (
        f"{a:.2f} s over {b:.2f} s with shots; floor: without records, {floor:.2f} s. {read} context tokens, "
    )
    note += f"{tokens} tokens of the prompt with shots"
    return Metric(f"context_{form}_over_shots_{count}", ratio, "ratio of seconds", floor / b, note)
