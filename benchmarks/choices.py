"""`python -m benchmarks.choices`: compare images with and without skin tones, and learning rates, for OpenMoji.

Each run trains it with one option changed, for the same number of steps. All are evaluated on the
same held-out images: those without versions in skin tones, and those with a skin tone. A run takes about 3 to 6
minutes on 2 cores. Runs in benchmarks/results/choices.json are not repeated.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

from benchmarks.measure import RESULTS, run_bindllm
from bindllm.atomic import write_json
from bindllm.data.datamodule import BindData
from bindllm.data.rows import Sample
from bindllm.data.sources import SPLITS, SourceConfig
from bindllm.evaluation.captions import captions_task
from bindllm.evaluation.task import MODEL, evaluate
from bindllm.model.bindllm import BindLLM

RECIPE = "recipes/openmoji.yaml"
FOLDER = Path("checkpoints/choices")
PLAIN, TONES = "data/openmoji/captions.jsonl", "data/openmoji/captions-with-skin-tones.jsonl"
TONE = "skin tone"
EPOCH = 101
"""Steps of an epoch of the recipe: 1,592 images without skin tones in batches of 16, rounded down by length."""


@dataclass(frozen=True)
class Choice:
    """One run: its name, its training table, its number of steps, and other changes to the recipe."""

    name: str
    table: str = PLAIN
    steps: int = EPOCH
    changes: tuple[str, ...] = ()


CHOICES = (
    Choice("plain images, 3 epochs", steps=3 * EPOCH),
    Choice("with skin tones, as many steps", TONES, steps=3 * EPOCH),
    Choice("lr 1e-3"),
    Choice("lr 5e-4", changes=("--model.optim.lr", "5e-4")),
    Choice("lr 2e-3", changes=("--model.optim.lr", "2e-3")),
)


def train(choice: Choice) -> Path:
    """Train one choice unless its folder is complete, and return the folder."""
    output = FOLDER / choice.name.replace(" ", "-").replace(",", "")
    if (output / "metrics.json").is_file():
        return output
    arguments = ["fit", "--config", RECIPE, "--output", str(output), "--trainer.logger", "false"]
    arguments += ["--data.sources", json.dumps([{"path": choice.table}])]
    # An epoch with skin tones has more steps: validation counts steps, not epochs.
    arguments += ["--trainer.max_steps", str(choice.steps), "--trainer.max_epochs", "-1"]
    arguments += ["--trainer.val_check_interval", str(EPOCH), "--trainer.check_val_every_n_epoch", "null"]
    run_bindllm(*arguments, *choice.changes)
    return output


def judge(folder: Path) -> dict[str, dict[str, float | None]]:
    """Evaluate a trained folder on two groups of held-out images: those without toned versions, and the toned ones.

    Images with toned versions in the training split are left out, because a copy in another color would count as right.
    """
    model = BindLLM.from_pretrained(folder)
    data = BindData([SourceConfig(TONES)], tokenizer=model.tokenizer, encoders=model.encoders)
    held_out = data.samples("test")
    captions = [
        caption for split in SPLITS for sample in data.samples(split) for caption in sample.references
    ]
    people = {caption.split(", ")[0] for caption in captions if TONE in caption}
    groups = {
        "toneless": [
            sample for sample in held_out if people.isdisjoint(sample.references) and not toned(sample)
        ],
        "toned": [sample for sample in held_out if toned(sample)],
    }
    found = {}
    for name, samples in groups.items():
        task = captions_task(samples, train_samples=[], lookup=data.lookup, tokenizer=model.tokenizer)
        result = evaluate(model, [task], lookup=data.lookup, variants=[MODEL])
        found[name] = {**result.metrics["captions"][MODEL], "images": len(task.items)}
    return found


def toned(sample: Sample) -> bool:
    """Return whether a caption of the image names a skin tone."""
    return any(TONE in reference for reference in sample.references)


def main() -> None:
    """Do the missing runs and print the table after each."""
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
        "| run | steps | loss | CIDEr | exact match | toned: loss | toned: CIDEr |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        plain, tones = row["toneless"], row["toned"]
        cells = (plain["loss"], plain["cider"], plain["exact_match"], tones["loss"], tones["cider"])
        lines.append(f"| {row['name']} | {row['steps']} | {' | '.join(f'{cell:.3f}' for cell in cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
