"""A checkpoint folder as a card reads it, with evaluation folders of it."""

import json
from pathlib import Path

import torch
import yaml
from PIL import Image
from safetensors.torch import save_file

from bindllm.atomic import file_sha256
from bindllm.evaluation.benchmarks.bootstrap import by_group, intervals, media_sentence
from bindllm.evaluation.benchmarks.folder import FORMAT
from bindllm.evaluation.benchmarks.metrics import YES_NO
from bindllm.model.checkpoint import fingerprint_checkpoint, read_manifest, read_weights


def write_checkpoint(home: Path) -> Path:
    """Write a checkpoint with a recipe and its data, and return its folder."""
    data = home / "data" / "shapes"
    data.mkdir(parents=True)
    rows = []
    for n, split in enumerate(("train", "train", "train", "test", "test")):
        # The last test image has the content of the first training image.
        Image.new("RGB", (4, 4), (40 * (n % 4), 0, 0)).save(data / f"{n}.png")
        rows.append({"image": f"{n}.png", "caption": f"shape {n}", "split": split})
    (data / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_json(data / "SOURCE.json", {"packages": [{"license": "CC BY-SA 4.0"}]})
    decoder = home / "models" / "decoder"
    decoder.mkdir(parents=True)
    (decoder / "README.md").write_text("---\nlicense: apache-2.0\n---\n# A decoder\n")

    folder = home / "checkpoints" / "shapes"
    (folder / "report").mkdir(parents=True)
    save_file({"injection.gates": torch.ones(3)}, folder / "bind.safetensors")
    write_json(
        folder / "bindllm.json",
        {
            "format": 1,
            "decoder": {"name": "models/decoder", "fingerprint": "cd" * 32},
            "encoders": [{"class_path": "my_lab.Encoder", "init_args": {}, "fingerprint": "ef" * 32}],
            "bind": {"depth": 3, "expansion": 4},
            "inject": {"kind": "value", "queries": True},
            "origin": "",
            "weights_sha256": file_sha256(folder / "bind.safetensors"),
            "root": "../..",
        },
    )
    source = {"path": "data/shapes", "format": "caption", "modality": "image"}
    recipe = {"seed_everything": 7, "model": {"optim": {"lr": 0.01}}, "data": {"sources": [source]}}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    counts = {**source, "num_rows": 5, "media": {"image": 5}, "skipped": {"counts": {"empty | caption": 2}}}
    facts = {"data": {"sources": [counts], "rows": {"train": 3, "test": 2}}, "problems": {}, "device": "cpu"}
    write_json(folder / "report" / "facts.json", facts)
    return folder


def write_held_out(folder: Path) -> None:
    """Write the metrics of ten held-out questions."""
    shares = {"model": 0.8, "no_media": 0.0, "shuffled_media": 0.5, "majority_answer": 0.9}
    empty = {"by_type": {}, "count_by_type": {}, "count": 10}
    tasks = {"answers": {name: {"accuracy": share, **empty} for name, share in shares.items()}}
    seconds = {"train": 3.5}
    write_json(folder / "metrics.json", {"tasks": tasks, "seconds": seconds, "trainable_parameters": 1234})


def write_evaluation(folder: Path, checkpoint: Path, *, fingerprint: str | None = None) -> Path:
    """Write an evaluation of 40 yes-no questions: the model answers yes to all, of which half are right."""
    folder.mkdir(parents=True)
    manifest = read_manifest(checkpoint)
    own = fingerprint or fingerprint_checkpoint(manifest, read_weights(checkpoint, manifest))
    lines = {}
    for variant, count in (("model", 40), ("no_media", 20)):
        for n in range(count):
            target = "yes" if n % 2 else "no"
            answer = "Yes." if variant == "model" else target
            parsed = None if variant == "model" and n == 0 else answer.lower().rstrip(".")
            lines.setdefault(variant, []).append(
                {"id": f"q{n}", "question": "?", "media": [f"{n}.png"], "target": target, "unit": f"q{n}"}
                | {"groups": {"split": "ab"[n % 4 // 2]}, "variant": variant, "prompt_sha256": "0" * 64}
                | {"parser": "yes_no", "answer": answer, "parsed": parsed, "score": float(parsed == target)}
            )
    texts = [json.dumps(line) + "\n" for part in lines.values() for line in part]
    (folder / "items.jsonl").write_text("".join(texts))
    counts = {"listed": 41, "items": 40, "missing_media": 1, "skipped": 1, "duplicate_ids": 0, "unparsed": 1}
    write_json(
        folder / "evaluation.json",
        {
            "format": FORMAT,
            "benchmark": "pope",
            "title": "POPE, object hallucination",
            "metric": "yes_no",
            "checkpoint_fingerprint": own,
            "data": "data/shapes",
            "settings": {"limit": 40, "parser": "yes_no", "unparsed": "wrong"},
            "counts": counts,
            "skipped": {},
            "notes": [],
            "scores": {name: intervals(part, YES_NO) for name, part in lines.items()},
            "groups": by_group(lines["model"], YES_NO),
            "media": media_sentence(lines, YES_NO),
            "seconds": 1.0,
            "complete": True,
        },
    )
    return folder


def write_json(file: Path, content) -> None:
    file.write_text(json.dumps(content))
