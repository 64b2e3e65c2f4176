"""`python -m benchmarks.learning`: compare both injection kinds, with and without queries, three seeds each.

Trains the quickstart recipe for one epoch per run: 12 runs of about 3 minutes each on 2 cores. Runs in
benchmarks/results/learning.json are not repeated, so the command can be stopped at any time. Remove a row, or the
file, to measure again. Prints the table of docs/results.md.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
from pathlib import Path

from benchmarks.measure import RESULTS, run_bindllm
from bindllm.atomic import write_json

RECIPE = "recipes/quickstart.yaml"
FOLDER = Path("checkpoints/learning")
KINDS, QUERIES, SEEDS = ("value", "residual"), (True, False), (0, 1, 2)
SHOWN = ("loss", "cider", "exact_match")


def train(kind: str, queries: bool, seed: int, *, epochs: int) -> dict:
    """Train one cell with one seed and return the metrics of each variant."""
    output = FOLDER / f"{kind}-{'queries' if queries else 'plain'}-{seed}-{epochs}"
    run_bindllm(
        *("fit", "--config", RECIPE, "--output", str(output), "--seed_everything", str(seed)),
        *("--model.inject.kind", kind, "--model.inject.queries", str(queries).lower()),
        *("--trainer.max_epochs", str(epochs), "--trainer.logger", "false"),
    )
    return json.loads((output / "metrics.json").read_text())["tasks"]["captions"]


def table(rows: list[dict]) -> str:
    """Return the mean and the spread (largest less smallest) of each cell as a Markdown table."""
    lines = [
        f"| kind | queries | {' | '.join(SHOWN)} | loss with shuffled media |",
        "|---|---|---|---|---|---|",
    ]
    for kind, queries in itertools.product(KINDS, QUERIES):
        cell = [row for row in rows if (row["kind"], row["queries"]) == (kind, queries)]
        if not cell:
            continue
        values = [[row["model"][name] for row in cell] for name in SHOWN]
        values.append([row["shuffled_media"]["loss"] for row in cell])
        shown = (f"{statistics.mean(column):.3f} ({max(column) - min(column):.3f})" for column in values)
        lines.append(f"| {kind} | {'yes' if queries else 'no'} | {' | '.join(shown)} |")
    return "\n".join(lines)


def main() -> None:
    """Train every cell and print the table after each."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--epochs", type=int, default=1)
    epochs = parser.parse_args().epochs
    file = RESULTS / "learning.json"
    rows = json.loads(file.read_text()) if file.exists() else []
    # Seed by seed, so that an interrupted table still compares equal seeds.
    for seed, kind, queries in itertools.product(SEEDS, KINDS, QUERIES):
        cell = {"kind": kind, "queries": queries, "seed": seed, "epochs": epochs}
        if not any(cell.items() <= row.items() for row in rows):
            rows.append({**cell, **train(kind, queries, seed, epochs=epochs)})
            write_json(file, rows)
        print(table([row for row in rows if row["epochs"] == epochs]), flush=True)


if __name__ == "__main__":
    main()
