"""Writes a task of lmms-eval over a local Parquet file, and runs it; run by tests/lmms."""

import json
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

TASK = """\
task: {name}
dataset_path: parquet
dataset_kwargs: {{data_files: {{test: {table}}}}}
test_split: test
output_type: {kind}
doc_to_visual: !function functions.images
doc_to_text: question
doc_to_target: {target}
{more}
metric_list:
  - {{metric: {metric}, aggregation: mean, higher_is_better: true}}
"""
KINDS = {
    "generate_until": {
        "target": "answer",
        "more": "generation_kwargs: {max_new_tokens: 3, temperature: 0, until: ['.']}",
        "metric": "exact_match",
    },
    "multiple_choice": {"target": "number", "more": "doc_to_choice: choices", "metric": "acc"},
}
FUNCTIONS = """\
import io

from PIL import Image


def images(doc):
    return [Image.open(io.BytesIO(doc["image"]["bytes"])).convert("RGB")]
"""


def write_tasks(folder: Path, images: list[Path]) -> None:
    """Write one task of each kind about images."""
    folder.mkdir()
    choices = ["red", "green"]
    rows = [
        {"image": {"bytes": image.read_bytes()}, "question": "Which color?", "answer": choices[n % 2]}
        | {"number": n % 2, "choices": choices}
        for n, image in enumerate(images)
    ]
    pq.write_table(pa.Table.from_pylist(rows), folder / "rows.parquet")
    (folder / "functions.py").write_text(FUNCTIONS)
    for kind, keys in KINDS.items():
        text = TASK.format(name=f"colors_{kind}", table=folder / "rows.parquet", kind=kind, **keys)
        (folder / f"{kind}.yaml").write_text(text)


def main(checkpoint: str, tasks: str, kind: str) -> None:
    """Run a task through the entry point, and print its results as JSON."""
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.tasks import TaskManager

    found = simple_evaluate(
        model="bindllm",
        model_args=f"pretrained={checkpoint},allow=tiny.ColorEncoder",
        tasks=[f"colors_{kind}"],
        task_manager=TaskManager(include_path=tasks, include_defaults=False, model_name="bindllm"),
        batch_size=2,
        device="cpu",
        force_simple=kind == "multiple_choice",
        log_samples=True,
    )
    answers = [sample["filtered_resps"] for sample in found["samples"][f"colors_{kind}"]]
    print("RESULT", json.dumps([found["results"][f"colors_{kind}"], answers], default=str))


if __name__ == "__main__":
    main(*sys.argv[1:])
