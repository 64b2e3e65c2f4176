"""BLEU, ROUGE-L and CIDEr-D of captions, as sums that any part of a data set can be scored with.

They equal pycocoevalcap for the same words. The words are those of `caption_words`, not of the PTB tokenizer, which
needs Java; results name it.

BLEU: https://aclanthology.org/P02-1040, ROUGE-L: https://aclanthology.org/W04-1013, CIDEr-D:
https://arxiv.org/abs/1411.5726.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from bindllm.objectives.rewards import longest_common

Words = Sequence[str]
Counts = Counter[tuple[str, ...]]

ORDERS = (1, 2, 3, 4)
"""Lengths of the word sequences that are counted."""

_BETA = 1.2
"""Weight of recall in ROUGE-L, of the COCO caption tools."""
_SIGMA = 6.0
"""Width of CIDEr-D's penalty for another length, in words."""


def count_ngrams(words: Words) -> Counts:
    """Return how often each sequence of one to four words occurs."""
    return Counter(tuple(words[n : n + order]) for order in ORDERS for n in range(len(words) - order + 1))


def bleu_sums(candidate: Words, references: Sequence[Words]) -> dict[str, float]:
    """Return the sums of corpus BLEU: matches and number of n-grams of each order, length, and the closest length."""
    own, best = count_ngrams(candidate), Counter()
    for reference in references:
        best |= count_ngrams(reference)
    # The closest length, of equally close ones the shorter.
    closest = min((abs(len(reference) - len(candidate)), len(reference)) for reference in references)[1]
    sums = {"length": float(len(candidate)), "closest": float(closest)}
    for order in ORDERS:
        sums[f"matches{order}"] = float(
            sum(min(count, best[ngram]) for ngram, count in own.items() if len(ngram) == order)
        )
        sums[f"ngrams{order}"] = float(max(0, len(candidate) - order + 1))
    return sums


def rouge_l(candidate: Words, references: Sequence[Words]) -> float:
    """Return the F-measure of the longest common subsequence, with the best precision and the best recall, 0..1."""
    if not candidate:
        return 0.0
    common = [longest_common(candidate, reference) for reference in references]
    precision = max(length / len(candidate) for length in common)
    recall = max(
        length / max(1, len(reference)) for length, reference in zip(common, references, strict=True)
    )
    if not (precision and recall):
        return 0.0
    return (1 + _BETA**2) * precision * recall / (recall + _BETA**2 * precision)


def corpus_bleu(sums: Mapping[str, np.ndarray], order: int) -> np.ndarray:
    """Return corpus BLEU of the sums of `bleu_sums`, without smoothing, 0..1; 0 without a match of every length."""
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        precisions = [np.divide(sums[f"matches{n}"], sums[f"ngrams{n}"]) for n in ORDERS[:order]]
        # The geometric mean of the precisions, and the penalty for short texts.
        found = np.exp(
            np.mean(np.log(precisions), axis=0)
            + np.minimum(0, 1 - np.divide(sums["closest"], sums["length"]))
        )
    return np.nan_to_num(found)


def ciders(references: Sequence[Sequence[Words]], languages: Sequence[str]) -> dict[str, Cider]:
    """Return the CIDEr-D of each language: words are rare or frequent among the references of their own language."""
    own: dict[str, list[Sequence[Words]]] = {}
    for texts, language in zip(references, languages, strict=True):
        own.setdefault(language, []).append(texts)
    return {language: Cider(texts) for language, texts in own.items()}


class Cider:
    """CIDEr-D: how similar captions are to their references, by n-grams that few images of the set have.

    Args:
        references: words of the references of every item; they determine the weights, so a score belongs to its set.
    """

    def __init__(self, references: Sequence[Sequence[Words]]) -> None:
        frequency: Counter[tuple[str, ...]] = Counter()
        for texts in references:
            frequency.update({ngram for words in texts for ngram in count_ngrams(words)})
        self._frequency, self._log_items = frequency, math.log(max(1, len(references)))

    def score(self, candidate: Words, references: Sequence[Words]) -> float:
        """Return the CIDEr-D of one caption, 0..10."""
        own = self._vectors(candidate)
        return 10 * sum(self._similarity(own, self._vectors(words)) for words in references) / len(references)

    def _vectors(self, words: Words) -> tuple[list[dict[tuple[str, ...], float]], list[float], int]:
        """Return the weighted counts of each order, their norms, and the number of word pairs."""
        vectors: list[dict[tuple[str, ...], float]] = [{} for _ in ORDERS]
        for ngram, count in count_ngrams(words).items():
            rarity = self._log_items - math.log(max(1, self._frequency[ngram]))
            vectors[len(ngram) - 1][ngram] = count * rarity
        norms = [math.sqrt(sum(value**2 for value in vector.values())) for vector in vectors]
        # As the published code: the length is counted in pairs of words.
        return vectors, norms, max(0, len(words) - 1)

    def _similarity(self, own: tuple, other: tuple) -> float:
        """Return the mean over the orders of the clipped cosine, with the penalty for another length."""
        (a, norms_a, length_a), (b, norms_b, length_b) = own, other
        penalty = math.exp(-((length_a - length_b) ** 2) / (2 * _SIGMA**2))
        total = 0.0
        for n in range(len(ORDERS)):
            if norms_a[n] and norms_b[n]:
                product = sum(
                    min(value, b[n].get(ngram, 0.0)) * b[n].get(ngram, 0.0) for ngram, value in a[n].items()
                )
                total += product / (norms_a[n] * norms_b[n])
        return penalty * total / len(ORDERS)
