"""`python -m benchmarks [NAME ...]`: run the benchmarks, print a table, merge it into benchmarks/results/."""

from __future__ import annotations

import importlib
import sys

from rich.console import Console
from rich.table import Table

from benchmarks.measure import RESULTS, write_metrics
from bindllm.errors import did_you_mean

NAMES = (
    "startup",
    "train_step",
    "generation",
    "serve",
    "few_shot",
    "context",
    "evaluate",
    "bind_tokens",
    "media_cost",
    "store",
    "embed",
    "encoders",
    "points",
    "loading",
    "cache",
    "extraction",
    "memory",
    "lora_step",
    "grouping",
    "streaming",
    "devices",
    "gpu",
)


def main(names: list[str]) -> int:
    """Run the named benchmarks, or all of them."""
    # A file has no width: names and notes must not be cut at 80 columns.
    console = Console(width=None if sys.stdout.isatty() else 160)
    for name in names:
        if name not in NAMES:
            console.print(f"unknown benchmark {name!r}. {did_you_mean(name, NAMES)}")
            return 2
    table = Table("name", "value", "floor", "unit", "note")
    for name in names or NAMES:
        console.print(f"[dim]{name} ...[/dim]")
        try:
            metrics = importlib.import_module(f"benchmarks.{name}").metrics()
        except SystemExit as refusal:
            # A benchmark that cannot run on this machine must not stop the others.
            console.print(str(refusal), markup=False)
            if names:
                return 1
            continue
        for metric in metrics:
            floor = "" if metric.floor is None else f"{metric.floor:.3g}"
            table.add_row(metric.name, f"{metric.value:.3g}", floor, metric.unit, metric.note)
        write_metrics(metrics)
    console.print(table)
    console.print(f"written: {RESULTS}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
