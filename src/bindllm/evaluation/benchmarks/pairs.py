"""Counterfactual pairs: the same question with one attribute of its media or its text swapped.

If the true answer is the same for all questions of a pair, an answer that changes depends on the attribute.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from bindllm.data.answers import answer_words, same_answer
from bindllm.evaluation.benchmarks.benchmark import Benchmark, Entry, Item, right_or_wrong
from bindllm.evaluation.benchmarks.metrics import PAIRS
from bindllm.evaluation.benchmarks.vqa import read_questions


def read_pairs(folder: Path) -> Iterator[Entry]:
    """Read a table ``pairs``, such as ``pairs.jsonl``, with a row for each question.

    Columns are those of a table of questions, and ``pair``, the name that all questions of a pair share,
    ``attribute``, which differs between them, and ``value``, its value in this question.
    """
    entries = list(read_questions(folder, names=("pairs",)))
    sizes = Counter(entry.record.get("pair") for entry in entries)
    for entry in entries:
        pair, labels = entry.record.get("pair"), ("attribute", "value")
        groups = {label: str(entry.record[label]) for label in labels if entry.record.get(label)}
        alone = "" if pair and sizes[pair] > 1 else "no other question of its pair"
        yield replace(
            entry, unit=str(pair or ""), groups={**entry.groups, **groups}, problem=entry.problem or alone
        )


def _words(text: str, item: Item) -> str | None:
    """Return the words by which answers are compared."""
    return " ".join(answer_words(text)) or None


BENCHMARKS = (
    Benchmark(
        "pairs",
        "counterfactual pairs",
        read_pairs,
        {"words": _words},
        PAIRS,
        right_or_wrong(lambda item, parsed: same_answer(parsed, item.references)),
        max_new_tokens=32,
    ),
)
