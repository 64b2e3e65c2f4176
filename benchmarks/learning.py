"""`python -m benchmarks.learning kinds`: compare both injection kinds, with and without queries, three seeds each.

`python -m benchmarks.learning layers --epochs 3` compares the layers that receive the bind vectors,
`python -m benchmarks.learning words` runs with and without bag-of-words pretraining, and
`python -m benchmarks.learning cross` kind `cross` with an adapter next to runs that lack one of its parts.

Trains the OpenMoji recipe for one epoch per run: 12 runs of about 3 minutes each on 2 cores. Runs in
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

RECIPE = "recipes/openmoji.yaml"
FOLDER = Path("checkpoints/learning")
SEEDS = (0, 1, 2)
LAYERS = {
    "all": None,
    "last half": list(range(15, 30)),
    "last third": list(range(20, 30)),
    "every second": list(range(1, 30, 2)),
    "every second of the last half": list(range(15, 30, 2)),
}
"""Indices of the served layers of SmolLM2-135M, which has 30."""

DEFAULT = {"kind": "value", "queries": True, "layers": "all", "words": 0, "tokens": 1, "adapter": 0}
CROSS = {**DEFAULT, "kind": "cross", "layers": "last third", "words": 4, "tokens": "all", "adapter": 16}
CELLS = {
    "kinds": [
        {**DEFAULT, "kind": kind, "queries": queries}
        for kind in ("value", "residual")
        for queries in (True, False)
    ],
    "layers": [{**DEFAULT, "layers": name} for name in LAYERS],
    "words": [
        {**DEFAULT, "layers": layers, "words": words} for layers in ("all", "last third") for words in (0, 10)
    ],
    "cross": [
        CROSS,
        *({**CROSS, name: DEFAULT[name]} for name in ("words", "tokens", "adapter")),
        {**CROSS, "kind": "value", "tokens": 1},
    ],
}
SHOWN = ("loss", "cider", "exact_match")


def train(
    kind: str,
    queries: bool,
    layers: str,
    words: int,
    tokens: int | str,
    adapter: int,
    seed: int,
    *,
    epochs: int,
) -> dict:
    """Train one cell with one seed and return the metrics of each variant."""
    where = layers.replace(" ", "-")
    output = (
        FOLDER
        / f"{kind}-{'queries' if queries else 'plain'}-{where}-{words}-{tokens}-{adapter}-{seed}-{epochs}"
    )
    tuned = {"rank": adapter, "layers": LAYERS[layers]} if adapter else None
    run_bindllm(
        *("fit", "--config", RECIPE, "--output", str(output), "--seed_everything", str(seed)),
        *("--model.inject.kind", kind, "--model.inject.queries", str(queries).lower()),
        *("--model.inject.layers", json.dumps(LAYERS[layers]), "--model.bag_of_words", str(words)),
        *("--model.bind.tokens", str(tokens), "--model.adapter", json.dumps(tuned)),
        *("--model.trainable", json.dumps(["bind", "inject", *(["adapter"] if adapter else [])])),
        *("--trainer.max_epochs", str(epochs), "--trainer.logger", "false"),
    )
    return json.loads((output / "metrics.json").read_text())["tasks"]["captions"]


def table(rows: list[dict], cells: list[dict]) -> str:
    """Return the mean and the spread (largest less smallest) of each cell as a Markdown table."""
    lines = [
        "| kind | queries | layers | bag of words | bind tokens | adapter | "
        f"{' | '.join(SHOWN)} | loss with shuffled media |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for settings in cells:
        cell = [row for row in rows if settings.items() <= row.items()]
        if not cell:
            continue
        values = [[row["model"][name] for row in cell] for name in SHOWN]
        values.append([row["shuffled_media"]["loss"] for row in cell])
        shown = (f"{statistics.mean(column):.3f} ({max(column) - min(column):.3f})" for column in values)
        queries = "yes" if settings["queries"] else "no"
        parts = (str(settings[name]) for name in ("layers", "words", "tokens", "adapter"))
        row = [settings["kind"], queries, *parts, *shown]
        lines.append(f"| {' | '.join(row)} |")
    return "\n".join(lines)


def main() -> None:
    """Train every cell and print the table after each."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("compare", choices=CELLS)
    parser.add_argument("--epochs", type=int, default=1)
    options = parser.parse_args()
    cells, epochs = CELLS[options.compare], options.epochs
    file = RESULTS / "learning.json"
    rows = json.loads(file.read_text()) if file.exists() else []
    # Seed by seed, so that an interrupted table still compares equal seeds.
    for seed, settings in itertools.product(SEEDS, cells):
        cell = {**settings, "seed": seed, "epochs": epochs}
        if not any(cell.items() <= row.items() for row in rows):
            rows.append({**cell, **train(**settings, seed=seed, epochs=epochs)})
            write_json(file, rows)
        print(table([row for row in rows if row["epochs"] == epochs], cells), flush=True)


if __name__ == "__main__":
    main()
