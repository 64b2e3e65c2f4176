"""Published benchmarks, each read in the layout of its authors and scored as its paper says (docs/benchmarks.md)."""

from __future__ import annotations

from bindllm.errors import InputError, did_you_mean
from bindllm.evaluation.benchmarks import captions, choice, pairs, shots, vqa, yes_no
from bindllm.evaluation.benchmarks.benchmark import Benchmark, Entry, Item, right_or_wrong
from bindllm.evaluation.layouts import LAYOUTS

__all__ = ["BENCHMARKS", "Benchmark", "Entry", "Item", "find_benchmark", "right_or_wrong"]

BENCHMARKS: dict[str, Benchmark] = {
    benchmark.name: benchmark
    for family in (yes_no, vqa, choice, captions, shots, pairs)
    for benchmark in family.BENCHMARKS
}
"""All benchmarks by name."""


def find_benchmark(name: str) -> Benchmark:
    """Return a benchmark by its name.

    Raises:
        InputError: it is unknown, or is measured from embeddings.
    """
    if name in BENCHMARKS:
        return BENCHMARKS[name]
    if name in LAYOUTS:
        raise InputError(f"{name} is measured from embeddings only: bindllm zero_shot {name} FOLDER")
    raise InputError(f"unknown benchmark {name!r}. {did_you_mean(name, BENCHMARKS)}")
