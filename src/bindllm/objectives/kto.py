"""Kahneman-Tversky optimization (arXiv 2402.01306, eq. 8): desirable and undesirable answers, without pairs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from bindllm.data.collate import Batch, answer_batch
from bindllm.data.datamodule import BindData
from bindllm.data.rows import IGNORE, Row, Sample
from bindllm.data.source_config import SourceConfig
from bindllm.errors import InputError
from bindllm.model.bindllm import BindLLM
from bindllm.objectives.base import Metrics, Needs, Objective, answer_log_probs, check_positive
from bindllm.objectives.reference import References
from bindllm.parallel import RunContext

# Prefix of the entries of a batch that belong to the mismatched answers.
_MISMATCHED = "mismatched_"


class KTO(Objective):
    """Makes desirable answers likelier and undesirable ones less likely, each relative to a reference point.

    The reference point estimates the KL divergence from the initial model: the mean log ratio of mismatched answers,
    at least 0. The paper pairs each prompt of a batch with the answer of the next one. Here every row has one partner
    from its split, drawn once, so that the reference values of mismatched answers are computed once as well.

    A pair (chosen, rejected) counts as a desirable and an undesirable row.

    Args:
        beta: strength of the pull toward the initial model.
        desirable_weight: weight of desirable answers; the paper's lambda_D.
        undesirable_weight: weight of undesirable answers; the paper's lambda_U. The paper recommends that weight times
            number of rows is 1 to 4/3 times as large for desirable rows as for undesirable ones.

    Raises:
        InputError: a value is not above 0.
    """

    needs: ClassVar[Needs] = "labels"
    uses_reference: ClassVar[bool] = True
    drops_tokens: ClassVar[bool] = False

    def __init__(
        self, beta: float = 0.1, desirable_weight: float = 1.0, undesirable_weight: float = 1.0
    ) -> None:
        self.beta = check_positive("KTO: beta", beta)
        self.desirable_weight = check_positive("KTO: desirable_weight", desirable_weight)
        self.undesirable_weight = check_positive("KTO: undesirable_weight", undesirable_weight)
        self._references = References()
        self._mismatched: dict[str, list[Sample]] = {}
        self._make_batch: Callable[[list[Sample]], Batch]

    def check(self, data: BindData, stage: str) -> None:
        """Refuse a split of one row, which has no other answer, in addition to `Objective.check`."""
        super().check(data, stage)
        for split in ("train", "validation"):
            if len(samples := data.samples(split)) == 1:
                raise InputError(
                    f"KTO needs at least 2 rows in a split, for mismatched answers; {samples[0].name} is the only one "
                    f"of {split}"
                )

    def check_rows(self, rows: Sequence[Row | Sample], sources: Sequence[SourceConfig]) -> None:
        """Refuse rows without a label, and rows that all have the same one.

        Raises:
            InputError: names the missing label.
        """
        super().check_rows(rows, sources)
        # With one kind of answers there is nothing to tell apart: their loss falls for any answer to any question.
        kinds = {row.desirable for row in rows if row.rejected is None}
        if len(kinds) == 1 and all(row.rejected is None for row in rows):
            raise InputError(
                f"KTO compares desirable with undesirable answers, and all {len(rows)} rows are "
                f"{'desirable' if kinds == {True} else 'undesirable'}: add others, or use the objective NextToken to "
                "imitate good answers"
            )

    def on_start(self, model: BindLLM) -> None:
        """Record the weights of the reference model."""
        self._references.on_start(model)

    def prepare(self, model: BindLLM, data: BindData, context: RunContext) -> None:
        """Draw the mismatched answers, and compute or read the reference log-probabilities of all answers."""
        # Three columns per split: the answer, the rejected one of a pair, and the mismatched one.
        columns = {}
        for split in ("train", "validation"):
            if samples := data.samples(split):
                self._mismatched[split] = mismatch(samples, seed=data.seed)
                rejected = [sample.rejected for sample in samples]
                columns[split] = [samples, rejected, self._mismatched[split]]
        self._make_batch = partial(answer_batch, lookup=data.lookup, pad_id=model.tokenizer.pad_token_id)
        self._references.prepare(model, data, context, columns)

    def add_reference(self, batch: Batch, split: str) -> Batch:
        """Add the rows of mismatched answers, and the reference log-probabilities of all answers."""
        numbers = batch["numbers"]
        answers, rejected, reference = self._references.of(split, numbers).unbind(1)
        # Rows without a rejected answer hold NaN in that column; the batch has no row for them.
        rows = self._make_batch([self._mismatched[split][n] for n in numbers.tolist()])
        return {
            **batch,
            "reference": torch.cat([answers, rejected[~rejected.isnan()]]),
            f"{_MISMATCHED}reference": reference,
            **{_MISMATCHED + name: value.to(numbers.device) for name, value in rows.items()},
        }

    def loss(self, model: BindLLM, batch: Batch) -> tuple[Tensor, Metrics]:
        """Return the mean loss of the rows; logs the reference point and the distance of the rows from it."""
        # With gradients first: autocast caches cast weights, and those cast without gradients would be used again.
        ratio = answer_log_probs(model, batch)[0] - batch["reference"]
        mismatched = {
            name.removeprefix(_MISMATCHED): value
            for name, value in batch.items()
            if name.startswith(_MISMATCHED)
        }
        with torch.no_grad():
            moved = answer_log_probs(model, mismatched)[0] - mismatched["reference"]
        # z of the paper: an estimate of a divergence, which is never negative.
        point = moved.mean().clamp(min=0)
        # The rejected answers at the end of the batch are undesirable.
        desirable = torch.nn.functional.pad(batch["desirable"], (0, len(ratio) - len(batch["desirable"])))
        loss = kto_loss(
            ratio,
            point,
            desirable,
            beta=self.beta,
            weights=(self.desirable_weight, self.undesirable_weight),
        )
        margin = self.beta * torch.where(desirable, ratio - point, point - ratio).detach()
        metrics = {"margin": margin, "accuracy": margin > 0, "kl": point}
        return loss.mean(), {name: value.float().mean() for name, value in metrics.items()}

    def count(self, batch: Batch) -> int:
        """Return the number of answers; a pair has two."""
        return len(batch["labels"])


def kto_loss(
    ratio: Tensor, point: Tensor, desirable: Tensor, *, beta: float, weights: tuple[float, float] = (1.0, 1.0)
) -> Tensor:
    """Return the loss of each row.

    Args:
        ratio: log ratio (trained / reference) of each answer, [R].
        point: the reference point, a scalar without gradient, at least 0.
        desirable: whether each answer is desirable, bool, [R].

    Returns:
        Losses, [R], each between 0 and its weight.
    """
    # Equation 8: a desirable answer should be above the reference point, an undesirable one below.
    margin = torch.where(desirable, ratio - point, point - ratio)
    weight = torch.where(desirable, *(torch.full_like(ratio, value) for value in weights))
    return weight * (1 - torch.sigmoid(beta * margin))


def mismatch(samples: Sequence[Sample], *, seed: int) -> list[Sample]:
    """Return each of at least two rows with the last answer of another, truncated to the length of the longest row."""
    # A random cycle: no row is its own partner, and every answer is used once.
    order = np.random.default_rng(seed).permutation(len(samples))
    partner = dict(zip(order.tolist(), np.roll(order, 1).tolist(), strict=True))
    longest = max(len(sample.input_ids) for sample in samples)
    return [_with_answer(sample, samples[partner[n]], longest) for n, sample in enumerate(samples)]


def _with_answer(sample: Sample, other: Sample, longest: int) -> Sample:
    start = sample.prompt_length
    answer = other.input_ids[other.prompt_length :][: longest - start]
    blank = np.full(start, IGNORE, dtype=np.int64)
    # The answer attends to the media of the question, as its own first token did.
    index = np.full(len(answer), sample.media_index[start], dtype=np.int64)
    return replace(
        sample,
        input_ids=np.concatenate([sample.input_ids[:start], answer]),
        labels=np.concatenate([blank, answer]),
        media_index=np.concatenate([sample.media_index[:start], index]),
        rejected=None,
    )
