"""Metrics of benchmarks, as functions of sums over units, so that intervals resample units without scoring again.

A line is one answer, a row of ``items.jsonl``. Each metric turns the lines of a unit into sums, and the sums of all
units into numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from bindllm.evaluation.answering.log import Line
from bindllm.evaluation.ngrams import ORDERS, corpus_bleu

Sums = dict[str, np.ndarray]
"""Sums by name, one value for each resample: [R]. A missing name is 0."""


@dataclass(frozen=True)
class Metric:
    """A metric.

    Args:
        name: name in ``evaluation.json``.
        main: the number that is compared with the controls.
        sums: returns the sums of the lines of one unit.
        values: returns the numbers of sums; NaN: not defined for them.
        notes: returns remarks on the numbers of these lines.
    """

    name: str
    main: str
    sums: Callable[[Sequence[Line]], dict[str, float]]
    values: Callable[[Sums], Sums]
    notes: Callable[[Sequence[Line]], list[str]] = lambda lines: []


def ratio(a: np.ndarray | float, b: np.ndarray | float) -> np.ndarray:
    """Return a / b, NaN for 0 / 0."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray(a, dtype=float) / np.asarray(b, dtype=float)


def _accuracy_sums(lines: Sequence[Line]) -> dict[str, float]:
    return {"count": len(lines), "right": sum(line["score"] for line in lines)}


def _accuracy(sums: Sums) -> Sums:
    return {"accuracy": ratio(sums["right"], sums["count"])}


ACCURACY = Metric("accuracy", "accuracy", _accuracy_sums, _accuracy)
"""Mean score of the questions, 0..1."""


def _yes_no_sums(lines: Sequence[Line]) -> dict[str, float]:
    pairs = [(line["target"], line["parsed"]) for line in lines]
    return {
        **_accuracy_sums(lines),
        "hits": sum(pair == ("yes", "yes") for pair in pairs),
        "yes": sum(parsed == "yes" for _, parsed in pairs),
        "true_yes": sum(target == "yes" for target, _ in pairs),
    }


def _yes_no(sums: Sums) -> Sums:
    return {
        **_accuracy(sums),
        "precision": ratio(sums["hits"], sums["yes"]),
        "recall": ratio(sums["hits"], sums["true_yes"]),
        # 2 PR / (P + R), without its division by zero.
        "f1": ratio(2 * sums["hits"], sums["yes"] + sums["true_yes"]),
        # Of the predictions: the share of true "yes" says nothing about the model.
        "yes_ratio": ratio(sums["yes"], sums["count"]),
    }


YES_NO = Metric("yes_no", "accuracy", _yes_no_sums, _yes_no)
"""Accuracy, precision, recall and F1 of "yes", and the share of "yes" among the answers (POPE, arXiv 2305.10355)."""


PERCEPTION = (
    *("existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork"),
    "OCR",
)
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")


def _mme_sums(lines: Sequence[Line]) -> dict[str, float]:
    task, right = lines[0]["groups"]["task"], [line["score"] for line in lines]
    return {
        **_accuracy_sums(lines),
        "units": 1,
        "both": min(right),
        **{f"{task} count": len(right), f"{task} right": sum(right)},
        **{f"{task} units": 1, f"{task} both": min(right)},
    }


def _mme(sums: Sums) -> Sums:
    def total(tasks: Sequence[str]) -> np.ndarray:
        # 100 for each task in which all questions are right, and 100 more if both of every image are.
        parts = [
            100 * ratio(sums[f"{task} right"], sums[f"{task} count"])
            + 100 * ratio(sums[f"{task} both"], sums[f"{task} units"])
            for task in tasks
            if f"{task} count" in sums
        ]
        # Without any task the score is not defined, unlike a score of 0.
        return np.sum(parts, axis=0) if parts else np.full_like(sums["count"], np.nan, dtype=float)

    return {
        "perception": total(PERCEPTION),
        "cognition": total(COGNITION),
        **_accuracy(sums),
        "accuracy_plus": ratio(sums["both"], sums["units"]),
    }


def _mme_notes(lines: Sequence[Line]) -> list[str]:
    """Return the range of sums over a part of the tasks: a limit or missing images may leave some out."""
    known = {line["groups"]["task"] for line in lines}
    return [
        f"{name} is 0 to {200 * count:,}, as there are questions of {count} of its {len(tasks)} tasks only"
        for name, tasks in (("perception", PERCEPTION), ("cognition", COGNITION))
        if 0 < (count := len(known.intersection(tasks))) < len(tasks)
    ]


MME = Metric("mme", "accuracy", _mme_sums, _mme, _mme_notes)
"""Sum over the tasks of accuracy and accuracy+ (both questions of an image), each times 100 (arXiv 2306.13394)."""


def _circular_sums(lines: Sequence[Line]) -> dict[str, float]:
    return {"count": 1, "right": min(line["score"] for line in lines), "plain": lines[0]["score"]}


def _circular(sums: Sums) -> Sums:
    return {**_accuracy(sums), "plain_accuracy": ratio(sums["plain"], sums["count"])}


CIRCULAR = Metric("circular", "accuracy", _circular_sums, _circular)
"""Share of the questions that are right in all rotations of their options (MMBench, arXiv 2307.06281)."""


def _caption_sums(lines: Sequence[Line]) -> dict[str, float]:
    sums = {name: sum(line["stats"][name] for line in lines) for name in lines[0]["stats"]}
    return {**sums, "count": len(lines)}


def _captions(sums: Sums) -> Sums:
    # Evaluations of an earlier version have no exact matches.
    names = [name for name in ("cider", "rouge_l", "exact_match") if name in sums]
    means = {name: ratio(sums[name], sums["count"]) for name in names}
    found = {**means, **{f"bleu{order}": corpus_bleu(sums, order) for order in ORDERS}}
    if "meteor0" in sums:
        found["meteor"] = meteor(sums)
    if "spice" in sums:
        found["spice"] = ratio(sums["spice"], sums["count"])
        # https://arxiv.org/abs/1612.00370
        found["spider"] = (found["cider"] + found["spice"]) / 2
    return found


# Parameters of METEOR 1.5 for English, of https://aclanthology.org/W14-3348: alpha, beta, gamma, delta, and the weights
# of matches of equal words, stems, synonyms and paraphrases.
_ALPHA, _BETA, _GAMMA, _DELTA = 0.85, 0.2, 0.6, 0.75
_WEIGHTS = (1.0, 0.6, 0.8, 0.6)


def meteor(sums: Sums) -> np.ndarray:
    """Return METEOR of the sums of its 23 statistics, ``meteor0`` and so on, 0..1, as its program does.

    They are the words and the function words of the candidate and of the reference, then for each kind of match the
    content and the function words that match in both, then chunks, 0 for equal texts, and all words that match in both.
    """
    stats = [sums[f"meteor{n}"] for n in range(23)]
    matched, shares = stats[21:23], []
    for side in (0, 1):
        length, function = stats[side], stats[2 + side]
        hits = sum(
            weight * (_DELTA * stats[4 + 4 * n + side] + (1 - _DELTA) * stats[6 + 4 * n + side])
            for n, weight in enumerate(_WEIGHTS)
        )
        shares.append(ratio(hits, _DELTA * (length - function) + (1 - _DELTA) * function))
    precision, recall = shares
    mean = ratio(precision * recall, (1 - _ALPHA) * recall + _ALPHA * precision)
    chunks = ratio(stats[20], (matched[0] + matched[1]) / 2)
    return np.nan_to_num(mean * (1 - _GAMMA * chunks**_BETA))


CAPTIONS = Metric("captions", "cider", _caption_sums, _captions)
"""CIDEr-D (0..10), ROUGE-L, captions of exactly the true words, corpus BLEU, METEOR and SPICE (0..1), see
`bindllm.evaluation.ngrams`; SPIDEr (0..5.5)."""


def _pair_sums(lines: Sequence[Line]) -> dict[str, float]:
    # An answer that could not be parsed differs from all others.
    answers = {line["parsed"] or f"{line['id']} {line['answer']}" for line in lines}
    is_same = len({str(line["target"]) for line in lines}) == 1
    return {**_accuracy_sums(lines), "pairs": is_same, "flips": is_same and len(answers) > 1}


def _pairs(sums: Sums) -> Sums:
    return {**_accuracy(sums), "flip_rate": ratio(sums["flips"], sums["pairs"])}


PAIRS = Metric("pairs", "accuracy", _pair_sums, _pairs)
"""Accuracy, and the share of pairs with one true answer in which the answer of the model changes."""

SCORE = Metric(
    "score",
    "score",
    _accuracy_sums,
    lambda sums: {"score": ratio(sums["right"], sums["count"])},
)
"""Mean score, for evaluations whose metric is not known here."""

METRICS = {metric.name: metric for metric in (ACCURACY, YES_NO, MME, CIRCULAR, CAPTIONS, PAIRS, SCORE)}
