"""The same shots before all questions of a batch: computed once, against once for each question."""

from __future__ import annotations

import sys
from unittest.mock import patch

import torch

from benchmarks.measure import Metric, paired, seconds
from benchmarks.parts import bound_model
from bindllm import Conversation, Media, Message, Shot
from bindllm.model.bindllm import BindLLM
from bindllm.model.generation import render_prompts, shared
from bindllm.shots import add_shots

SHOTS, ROWS = 8, 32
ANSWERS = (8, 32)
"""Tokens of an answer: that of a name or a short caption, and the longest one of a caption."""


def few_shot_batch(model: BindLLM, shots: int) -> dict[str, torch.Tensor]:
    """Return the inputs of `BindLLM.generate_from`: an image of its own in each row, after the same shots."""
    examples = [
        Shot("Describe this image.", f"a drawing of thing number {n}", media=[Media.image(b"")])
        for n in range(shots)
    ]
    question = Conversation((Message("user", [Media.image(b""), "Describe this image."]),))
    ids, mask, index = render_prompts([add_shots(question, examples)] * ROWS, model.tokenizer)
    embeddings = torch.nn.functional.normalize(torch.randn(ROWS, shots + 1, 1280), dim=-1)
    embeddings[:, :shots] = embeddings[:1, :shots]
    return {"input_ids": ids, "attention_mask": mask, "media_index": index, "embeddings": embeddings}


def metrics() -> list[Metric]:
    """Measure answers of two lengths; embeddings are computed before, because encoding is measured separately."""
    model, found = bound_model().eval(), []
    batch, without = few_shot_batch(model, SHOTS), few_shot_batch(model, 0)
    for tokens in ANSWERS:
        options = {"max_new_tokens": tokens, "min_new_tokens": tokens}

        def once(options=options) -> None:
            model.generate_from(**batch, **options)

        def each_time(options=options) -> None:
            with patch.object(shared, "MIN_SAVED", sys.maxsize):
                model.generate_from(**batch, **options)

        ratio, a, b = paired(each_time, once, repeats=3)
        floor = seconds(lambda options=options: model.generate_from(**without, **options))
        name = "support_reuse_speedup" + ("" if tokens == ANSWERS[0] else f"_{tokens}")
        note = f"{SHOTS} shots, {ROWS} questions, answers of {tokens} tokens: {b:.1f} s over {a:.1f} s; "
        note += f"at least 3; the limit, without shots: {floor:.1f} s"
        found.append(Metric(name, ratio, "ratio of seconds", a / floor, note))
    return found
