"""How well a model foresees held-out conversations: by their loss alone, for no metric says which answer is right.

- ``heldout``: the model as it is.
- ``zero_gates``: the same model with nothing added anywhere.
- ``shuffled``: the same model, every picture exchanged for another held-out one.

Conversations without media are the same in all three. Answers that their rows call unwanted are left out: a model that
says them less is no worse.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.progress import Progress

from bindllm.data.collate import Lookup
from bindllm.data.rows import Sample
from bindllm.errors import InputError
from bindllm.evaluation.baselines import blind, exchange
from bindllm.evaluation.measuring import Measuring, evaluating, loss_numbers
from bindllm.model.bindllm import BindLLM

CHAT_VARIANTS = ("heldout", "zero_gates", "shuffled")


@dataclass
class ChatResult:
    """What an evaluation found.

    Attributes:
        metrics: for each of `CHAT_VARIANTS` ``loss`` (nats per supervised token) and ``perplexity``, None where it
            could not be measured or nothing is shown; ``heldout`` has ``count`` and ``with_media``, too, and
            ``unwanted`` where rows were left out for their answers.
        problems: what could not be measured, and why.
        seconds: wall time.
    """

    metrics: dict[str, dict[str, Any]]
    problems: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0


def evaluate_chat(
    model: BindLLM, samples: Sequence[Sample], *, lookup: Lookup, batch_size: int = 32, progress: bool = False
) -> ChatResult:
    """Measure the loss of a model on held-out conversations, of all answers in them.

    Args:
        model: the trained model; its mode is put back at the end.
        samples: held-out samples.
        lookup: gives the embeddings of media groups.
        batch_size: samples at a time.
        progress: show a bar with a time estimate.

    Raises:
        InputError: there are no samples, or none with an answer that is wanted.
    """
    started = time.perf_counter()
    if not samples:
        raise InputError("there are no held-out conversations; give at least one")
    given, samples = samples, [sample for sample in samples if sample.desirable is not False]
    if not samples:
        raise InputError(
            f"all {len(given)} held-out answers are unwanted ones, so their loss says nothing; hold out wanted ones too"
        )
    shown = [sample for sample in samples if sample.media]
    losses: dict[str, float | None] = dict.fromkeys(CHAT_VARIANTS)
    with evaluating(model), Progress(disable=not progress) as bar:
        task = bar.add_task("reading", total=len(samples) * (3 if shown else 1))
        run = Measuring(model, batch_size, 1, lambda done: bar.advance(task, done))
        losses["heldout"] = run.attempt("chat loss", lambda: run.loss(samples, lookup))
        if shown:
            losses["zero_gates"] = run.attempt(
                "chat loss, zero_gates", lambda: run.loss(blind(samples), lookup)
            )
            losses["shuffled"] = run.attempt(
                "chat loss, shuffled", lambda: run.loss(samples, exchange(shown, lookup))
            )
    metrics: dict[str, dict[str, Any]] = {name: loss_numbers(loss) for name, loss in losses.items()}
    metrics["heldout"] |= {"count": len(samples), "with_media": len(shown)}
    if unwanted := len(given) - len(samples):
        metrics["heldout"]["unwanted"] = unwanted
    return ChatResult(metrics, run.problems, time.perf_counter() - started)
