"""`python -m benchmarks.choices`: what the quickstart's choices of pictures and of learning rate rest on.

Each run trains the quickstart recipe with one thing changed, for the same number of steps, and is judged on the same
held-out pictures, those without skin tones, and for the tones on the held-out toned ones too. About 3 to 6 minutes a
run on 2 cores. Runs that stand in benchmarks/results/choices.json are not done again.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

from benchmarks.measure import RESULTS, run_bindllm
from bindllm.atomic import write_json
from bindllm.data.datamodule import BindData
from bindllm.data.sources import SourceConfig
from bindllm.evaluation.run import evaluate_captions
from bindllm.model.bindllm import BindLLM

RECIPE = "recipes/quickstart.yaml"
FOLDER = Path("checkpoints/choices")
PLAIN, TONES = "data/openmoji/captions.jsonl", "data/openmoji/captions-with-skin-tones.jsonl"
EPOCH = 101
"""Steps of an epoch of the quickstart: 1,592 pictures without skin tones in batches of 16, rounded down by length."""


@dataclass(frozen=True)
class Choice:
    """One run: its name, the table that it trains on, its steps, and what else differs from the recipe."""

    name: str
    table: str = PLAIN
    steps: int = EPOCH
    changes: tuple[str, ...] = ()


CHOICES = (
    Choice("plain pictures, 3 epochs", steps=3 * EPOCH),
    Choice("with skin tones, as many steps", TONES, steps=3 * EPOCH),
    Choice("lr 1e-3"),
    Choice("lr 5e-4", changes=("--model.optim.lr", "5e-4")),
    Choice("lr 2e-3", changes=("--model.optim.lr", "2e-3")),
)


def train(choice: Choice) -> Path:
    """Train one choice and return its folder."""
    output = FOLDER / choice.name.replace(" ", "-").replace(",", "")
    arguments = ["fit", "--config", RECIPE, "--output", str(output), "--trainer.logger", "false"]
    arguments += ["--data.sources", json.dumps([{"path": choice.table}])]
    # An epoch with skin tones has more steps: validation counts steps, not epochs.
    arguments += ["--trainer.max_steps", str(choice.steps), "--trainer.max_epochs", "-1"]
    arguments += ["--trainer.val_check_interval", str(EPOCH), "--trainer.check_val_every_n_epoch", "null"]
    run_bindllm(*arguments, *choice.changes)
    return output


def judge(folder: Path) -> dict[str, dict[str, float | None]]:
    """Measure a trained folder on the held-out plain pictures and on the held-out ones with a skin tone."""
    model = BindLLM.from_pretrained(folder)
    parts = {"tokenizer": model.tokenizer, "encoders": model.encoders}
    plain = BindData([SourceConfig(PLAIN)], **parts)
    toned = BindData([SourceConfig(TONES)], **parts)
    pictures = {
        str(media.source) for sample in plain.samples("test") for group in sample.media for media in group
    }
    rest = [
        sample
        for sample in toned.samples("test")
        if not any(str(media.source) in pictures for group in sample.media for media in group)
    ]
    found = {}
    for name, data, samples in (("plain", plain, plain.samples("test")), ("toned", toned, rest)):
        result = evaluate_captions(model, samples, train_samples=plain.samples("train"), lookup=data.lookup)
        found[name] = {**result.metrics["heldout"], "pictures": len(samples)}
    return found


def main() -> None:
    """Do the runs that are missing and print the table after each."""
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    file = RESULTS / "choices.json"
    rows = json.loads(file.read_text()) if file.exists() else []
    for choice in CHOICES:
        if not any(row["name"] == choice.name for row in rows):
            rows.append({"name": choice.name, "steps": choice.steps, **judge(train(choice))})
            write_json(file, rows)
        print(table(rows), flush=True)


def table(rows: list[dict]) -> str:
    """Return the runs as a Markdown table."""
    lines = [
        "| run | steps | loss | CIDEr | exact match | loss, toned | CIDEr, toned |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        plain, toned = row["plain"], row["toned"]
        cells = (plain["loss"], plain["cider"], plain["exact_match"], toned["loss"], toned["cider"])
        lines.append(f"| {row['name']} | {row['steps']} | {' | '.join(f'{cell:.3f}' for cell in cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
