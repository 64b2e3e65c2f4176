"""The cost of more than one bind token: a training step and a generation of kind attend, against one bind vector."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.generation import NEW_TOKENS, options_of, prompt_batch
from benchmarks.measure import Metric, paired
from benchmarks.parts import bound_model, training_batch
from benchmarks.train_step import ON_GPU, SHAPE, whole_step
from bindllm.model.bind_network import BindConfig
from bindllm.model.bindllm import BindLLM
from bindllm.model.injection import InjectConfig

NUM_TOKENS = {16: 1.10, 64: 1.25}
"""Numbers of bind tokens, and the ratio of a training step that is the aim."""

GRID_TOKENS = 49
"""Tokens of an image of EfficientNet-Lite0: 7 x 7."""


def metrics() -> list[Metric]:
    """Training steps with all bind tokens, which are the slowest: on average, dropping makes them faster."""
    value = bound_model()
    batch = training_batch(value.decoder, **SHAPE)
    step = whole_step(value, batch)
    shape = f"batch {SHAPE['rows']} x {SHAPE['tokens']} tokens"
    found = []
    for count, aim in NUM_TOKENS.items():
        attend = _attending(count)
        tokens = _tokens(SHAPE["rows"], attend)
        attend_step = whole_step(attend, {**batch, "tokens": tokens})
        ratio, ours, theirs = paired(attend_step, step, repeats=5 if ON_GPU else 9)
        trained = sum(p.numel() for p in attend.bind.resampler.parameters())
        found.append(
            Metric(
                f"attend_step_over_value_n{count}", ratio, "ratio", 1.0,
                f"{shape}, {GRID_TOKENS} tokens per image; {ours * 1e3:.0f} ms over {theirs * 1e3:.0f} ms with AdamW, "
                f"resampler of {trained / 1e6:.1f} M parameters; at most {aim:.2f}",
            )
        )  # fmt: skip
    return [*found, _generation(attend.eval(), max(NUM_TOKENS))]


def _attending(count: int) -> BindLLM:
    model = bound_model(bind=BindConfig(tokens=count), inject=InjectConfig(kind="attend"))
    model.bind.drops_tokens = False
    return model


def _tokens(rows: int, model: BindLLM) -> Tensor:
    return torch.randn(rows, 1, GRID_TOKENS, model.bind.resampler.projection.in_features, device=model.device)


def _generation(model: BindLLM, count: int) -> Metric:
    """Tokens per second with all bind tokens over those with one, in the same model."""
    inputs = {**prompt_batch(model, 1), "tokens": _tokens(1, model)}

    def generate(num_tokens: int) -> None:
        model.bind.num_tokens = num_tokens
        model.generate_from(**inputs, **options_of(model))

    ratio, one, several = paired(lambda: generate(1), lambda: generate(count), repeats=5)
    return Metric(
        f"generate_n{count}_over_n1", ratio, "ratio of tokens/s", 1.0,
        f"{NEW_TOKENS / several:.1f} tokens/s over {NEW_TOKENS / one:.1f}, batch 1; at least 0.90",
    )  # fmt: skip
