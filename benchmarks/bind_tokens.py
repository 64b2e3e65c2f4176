"""The cost of more than one bind token: steps of kinds attend and cross, and a generation, against one bind vector."""

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
    """Training steps as they are on average, and with all bind tokens; generation with all and with one."""
    value = bound_model()
    batch = training_batch(value.decoder, **SHAPE)
    step = whole_step(value, batch)
    shape = f"batch {SHAPE['rows']} x {SHAPE['tokens']} tokens, {GRID_TOKENS} encoder tokens per image"
    found = []
    for most, aim in NUM_TOKENS.items():
        # Eval mode drops nothing at random; the gradients are the same.
        model = bound_model(bind=BindConfig(tokens=most), inject=InjectConfig(kind="attend")).eval()
        attend_step = whole_step(model, {**batch, "tokens": _tokens(SHAPE["rows"], model)})
        # Half of the steps have all bind tokens, the others a number in the middle of each half of its logarithm.
        for name, counts in {"": (most, most, most**0.25, most**0.75), "_all": (most,)}.items():

            def steps(counts=counts, model=model, attend_step=attend_step) -> None:
                for count in counts:
                    model.bind.num_tokens = round(count)
                    attend_step()

            def value_steps(counts=counts) -> None:
                for _ in counts:
                    step()

            ratio, ours, theirs = paired(steps, value_steps, repeats=9 if ON_GPU else 6 - len(counts))
            note = f"; at most {aim:.2f}" if not name else "; no step of training is slower"
            found.append(
                Metric(
                    f"attend_step_over_value_n{most}{name}", ratio, "ratio", 1.0,
                    f"{shape}; {ours / len(counts) * 1e3:.0f} ms over {theirs / len(counts) * 1e3:.0f} ms{note}",
                )
            )  # fmt: skip
    for layers in (None, 10):
        model_of_all = bound_model(
            bind=BindConfig(tokens="all"), inject=InjectConfig("cross", layers=layers)
        ).eval()
        cross_step = whole_step(model_of_all, {**batch, "tokens": _tokens(SHAPE["rows"], model_of_all)})
        ratio, ours, theirs = paired(cross_step, step, repeats=9 if ON_GPU else 3)
        found.append(
            Metric(
                f"cross_step_over_value{'' if layers is None else f'_last{layers}'}", ratio, "ratio", 1.0,
                f"{shape}; {ours * 1e3:.0f} ms over {theirs * 1e3:.0f} ms with all layers",
            )
        )  # fmt: skip
    return [*found, _generation(model, most)]


def _tokens(rows: int, model: BindLLM) -> Tensor:
    size = (model.bind.resampler or model.bind.projector).projection.in_features
    return torch.randn(rows, 1, GRID_TOKENS, size, device=model.device)


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
