"""Held-out rows by task: captions by metrics, answers and episodes by accuracy, conversations by their loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch

from bindllm.data.collate import Lookup
from bindllm.data.embeddings import RetrievedRecords
from bindllm.data.rows import Sample
from bindllm.errors import BindLLMError, InputError
from bindllm.evaluation.answers import answers_task
from bindllm.evaluation.captions import captions_task
from bindllm.evaluation.context import with_context_variants
from bindllm.evaluation.episodes import episodes_task
from bindllm.evaluation.task import Evaluation, Task, evaluate
from bindllm.model.bindllm import BindLLM

TASKS = {"caption": "captions", "answer": "answers", "episode": "episodes", "chat": "conversations"}
"""Name of the evaluation task of each `Sample.task`."""


def held_out_rows(samples: Callable[[str], Sequence[Sample]]) -> dict[str, list[Sample]]:
    """Return the rows of each task: the test rows or, if there are none, the validation rows.

    Args:
        samples: returns the rows of a split; `BindData.samples`.
    """
    # A small data set may have only a validation split.
    rows = samples("test") or samples("validation")
    by_task = {name: [row for row in rows if row.task == kind] for kind, name in TASKS.items()}
    return {name: found for name, found in by_task.items() if found}


@torch.no_grad()
def evaluate_held_out(
    model: BindLLM,
    held_out: Mapping[str, Sequence[Sample]],
    *,
    train_samples: Sequence[Sample],
    lookup: Lookup,
    shuffled_limit: int | None = None,
    progress: bool = False,
) -> Evaluation:
    """Measure a model on held-out rows.

    Args:
        model: the trained model; its training mode is restored at the end.
        held_out: rows of each task, as `held_out_rows` returns them.
        train_samples: training rows, from which the baselines without a model take their answers.
        lookup: returns the embeddings of media groups; that of a `BindData`.
        shuffled_limit: ask at most this many questions with shuffled media; None: all.
        progress: show a bar for each variant.

    Raises:
        BindLLMError: the only task cannot be measured. If there are several, it is reported as a problem.
    """
    # How to read this: one task for each kind of rows, then one loop that measures all of them.
    tasks, problems = [], {}
    asking = {"tokenizer": model.tokenizer, "shuffled_limit": shuffled_limit}
    make = {
        "captions": partial(
            captions_task, train_samples=train_samples, lookup=lookup, tokenizer=model.tokenizer
        ),
        "answers": partial(answers_task, train_samples=train_samples, **asking),
        "episodes": partial(episodes_task, lookup=lookup, **asking),
        "conversations": conversations_task,
    }
    for name, rows in held_out.items():
        try:
            tasks.append(make[name](rows))
        except BindLLMError as error:
            # One task that cannot be measured must not cost the metrics of the others.
            if len(held_out) == 1:
                raise
            problems[name] = str(error)
    if isinstance(lookup, RetrievedRecords):
        tasks = [with_context_variants(task, lookup, model.tokenizer) for task in tasks]
    result = evaluate(model, tasks, lookup=lookup, progress=progress)
    result.problems = problems | result.problems
    return result


def conversations_task(samples: Sequence[Sample]) -> Task:
    """Return the task of conversations: only their loss, as no metric decides which answer is right.

    Answers that their rows call unwanted are skipped and counted as ``unwanted``: a model that gives them less often
    is not worse. ``count`` and ``with_media`` are the conversations that are measured and those with media.

    Raises:
        InputError: there are no samples, or all answers are unwanted.
    """
    if not samples:
        raise InputError("there are no held-out conversations; give at least one")
    # None means that the row does not say so; its answer counts as wanted.
    wanted = [sample for sample in samples if sample.desirable is not False]
    if not wanted:
        raise InputError(
            f"all {len(samples)} held-out answers are unwanted, so their loss has no meaning; hold out wanted ones too"
        )
    # Text-only conversations stay: the difference between variants then shows how much media matter overall.
    counts = {"count": len(wanted), "with_media": sum(bool(sample.media) for sample in wanted)}
    if unwanted := len(samples) - len(wanted):
        counts["unwanted"] = unwanted
    return Task("conversations", loss_items=wanted, counts=counts)
