"""Verifiable rewards: the quality of an answer, computed from the reference answers of its row."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from bindllm.data.answers import answer_words, is_right, option_letter
from bindllm.data.rows import Row, Sample
from bindllm.errors import InputError, check_choice


class Reward(ABC):
    """Rewards answers. Subclass it, and name the class in a recipe by its import path.

    The instance is created while the recipe is parsed, so constructors only check their arguments.

    Example:
        class Short(Reward):
            def __call__(self, answers, samples):
                return torch.tensor([1.0 if len(text.split()) < 5 else 0.0 for text in answers])
    """

    def check(self, rows: Sequence[Row | Sample]) -> None:  # noqa: B027 (most rewards can judge every row)
        """Refuse rows whose answers cannot be judged; called once, before the decoder is loaded.

        Args:
            rows: all training and validation rows, tokenized or not.

        Raises:
            InputError: names a row and its missing field.
        """

    @abstractmethod
    def __call__(self, answers: Sequence[str], samples: Sequence[Sample]) -> Tensor:
        """Return the reward of each answer.

        Args:
            answers: R texts without control tokens.
            samples: the row of each answer, with ``references``, ``options``, ``type`` and ``conversation``.

        Returns:
            Finite rewards, [R]. Their scale does not matter if GRPO's ``normalize_std`` is on.
        """


class ExactAnswer(Reward):
    """1 for a right answer and 0 for a wrong one, by the rule of held-out answers (`bindllm.data.answers.is_right`)."""

    def __call__(self, answers: Sequence[str], samples: Sequence[Sample]) -> Tensor:
        """Return 0 or 1 for each answer, [R]."""
        pairs = zip(answers, samples, strict=True)
        return torch.tensor([float(is_right(text, row.references, row.choices)) for text, row in pairs])


class OptionLetter(Reward):
    """1 for the letter of the right option of a multiple choice, 0 for another option.

    Args:
        unreadable: reward of an answer that chooses no option; a value below 0 discourages such answers.

    Raises:
        InputError: ``unreadable`` is 1 or more, or not finite.
    """

    def __init__(self, unreadable: float = 0.0) -> None:
        if not -math.inf < unreadable < 1:
            raise InputError(
                f"OptionLetter: unreadable must be finite and below 1, the reward of a right answer, not {unreadable}"
            )
        self.unreadable = unreadable

    def check(self, rows: Sequence[Row | Sample]) -> None:
        """Refuse rows without options, and rows whose reference answers choose none.

        Raises:
            InputError: names one of them.
        """
        # Without a readable reference, every answer would earn the same.
        if lacking := [row.name for row in rows if not _letters(row)]:
            raise InputError(
                f"OptionLetter judges multiple choices, but {len(lacking)} of {len(rows)} rows have no options, or "
                f"no reference answer that chooses one; the first is {lacking[0]}. Use format choice, or ExactAnswer"
            )

    def __call__(self, answers: Sequence[str], samples: Sequence[Sample]) -> Tensor:
        """Return the reward of each answer, [R]."""
        return torch.tensor([self._one(text, sample) for text, sample in zip(answers, samples, strict=True)])

    def _one(self, text: str, sample: Sample) -> float:
        # A wrong option earns 0, which may be more than an answer that chooses none.
        chosen = option_letter(text, sample.choices)
        return self.unreadable if chosen is None else float(chosen in _letters(sample))


class CaptionMetric(Reward):
    """Share of words, 0..1, that an answer has in common with the closest reference answer.

    Args:
        metric: ``rouge_l``, the F-measure of the longest common subsequence of words
            (https://aclanthology.org/W04-1013); or ``words``, the F-measure of the words in any order
            (arXiv 1606.05250, section 6.1).

    Raises:
        InputError: the metric is unknown.
    """

    def __init__(self, metric: Literal["rouge_l", "words"] = "rouge_l") -> None:
        check_choice("metric", metric, _SHARED)
        self.metric = metric

    def __call__(self, answers: Sequence[str], samples: Sequence[Sample]) -> Tensor:
        """Return the share of each answer, [R]."""
        # The closest reference counts, as in evaluation.
        shared = _SHARED[self.metric]
        scores = []
        for text, sample in zip(answers, samples, strict=True):
            words = answer_words(text)
            true = (answer_words(reference) for reference in sample.references)
            scores.append(max((f_measure(words, other, shared(words, other)) for other in true), default=0.0))
        return torch.tensor(scores)


def f_measure(words: Sequence[str], other: Sequence[str], shared: int) -> float:
    """Return the F-measure: the harmonic mean of the shared fraction of ``words`` and of ``other``.

    Examples:
        >>> f_measure(["red"], ["red", "square"], 1)
        0.6666666666666666
    """
    return 2 * shared / (len(words) + len(other)) if shared else 0.0


def longest_common(words: Sequence[str], other: Sequence[str]) -> int:
    """Return the length of the longest common subsequence.

    Examples:
        >>> longest_common("a red cat sat".split(), "red and sat".split())
        2
    """
    # Dynamic programming over prefixes, one row at a time: O(n m) time, O(m) memory.
    row = [0] * (len(other) + 1)
    for word in words:
        above = row
        row = [0]
        for index, candidate in enumerate(other):
            row.append(above[index] + 1 if word == candidate else max(row[-1], above[index + 1]))
    return row[-1]


def _common(words: Sequence[str], other: Sequence[str]) -> int:
    # Intersection of multisets: a repeated word counts as often as both have it.
    return (Counter(words) & Counter(other)).total()


_SHARED: dict[str, Callable[[Sequence[str], Sequence[str]], int]] = {
    "rouge_l": longest_common,
    "words": _common,
}


def _letters(row: Row | Sample) -> set[str]:
    """Return the options that the reference answers of a row choose."""
    return {letter for text in row.references if (letter := option_letter(text, row.choices))}
