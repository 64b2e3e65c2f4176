"""Held-out rows measured each by its task: captions by metrics, answers by accuracy, conversations by their loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from bindllm.data.collate import Lookup
from bindllm.data.rows import Sample
from bindllm.errors import BindLLMError
from bindllm.evaluation.answers import evaluate_answers
from bindllm.evaluation.chat import evaluate_chat
from bindllm.evaluation.run import evaluate_captions
from bindllm.model.bindllm import BindLLM

KINDS = {"caption": "captions", "answer": "answers", "chat": "chat"}
"""What the figures of each task are called."""


@dataclass
class Measured:
    """What was found of all held-out rows.

    Attributes:
        metrics: of rows of one task, the figures of its variants; of several, those under the name of each kind.
        captions: rows as `CaptionRow`, JSON-able.
        answers: rows as `AnswerRow`, JSON-able.
        problems: what could not be measured, and why.
        seconds: wall time of all.
    """

    metrics: dict[str, Any] = field(default_factory=dict)
    captions: list[dict[str, Any]] = field(default_factory=list)
    answers: list[dict[str, Any]] = field(default_factory=list)
    problems: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0


def held_out_rows(samples: Callable[[str], Sequence[Sample]]) -> dict[str, list[Sample]]:
    """Return the rows of each kind that a run is measured on: the test rows, or where it has none the validation rows.

    Args:
        samples: gives the samples of a split.
    """
    rows = samples("test") or samples("validation")
    of_task = {kind: [row for row in rows if row.task == task] for task, kind in KINDS.items()}
    return {kind: found for kind, found in of_task.items() if found}


def evaluate_held_out(
    model: BindLLM,
    held_out: Mapping[str, Sequence[Sample]],
    *,
    train_samples: Sequence[Sample],
    lookup: Lookup,
    shuffled_limit: int | None = None,
    progress: bool = False,
) -> Measured:
    """Measure a model on held-out rows of any kinds.

    Args:
        model: the trained model; its mode is put back at the end.
        held_out: the rows of each kind, as from `held_out_rows`.
        train_samples: for the baselines that look training rows up.
        lookup: gives the embeddings of media groups.
        shuffled_limit: as for `evaluate_answers`.
        progress: show a bar with a time estimate.

    Raises:
        BindLLMError: a kind that cannot be measured, where it is the only one; of several it is noted as a problem.
    """
    measured, figures = Measured(), {}
    options = {"lookup": lookup, "progress": progress}
    for kind, rows in held_out.items():
        try:
            if kind == "captions":
                found = evaluate_captions(model, rows, train_samples=train_samples, **options)
                measured.captions = found.captions()
            elif kind == "answers":
                found = evaluate_answers(
                    model, rows, train_samples=train_samples, shuffled_limit=shuffled_limit, **options
                )
                measured.answers = found.answers()
            else:
                found = evaluate_chat(model, rows, **options)
        except BindLLMError as error:
            if len(held_out) == 1:
                raise
            measured.problems[kind] = str(error)
            continue
        figures[kind] = found.metrics
        several = len(held_out) > 1
        measured.problems |= {
            f"{kind}: {name}" if several else name: why for name, why in found.problems.items()
        }
        measured.seconds += found.seconds
    measured.metrics = figures if len(held_out) != 1 else next(iter(figures.values()))
    return measured
