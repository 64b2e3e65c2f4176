"""A checkpoint folder as a card reads it: JSON files only, no weights; and evaluation folders of it."""

import json
from pathlib import Path

import yaml
from PIL import Image

WEIGHTS = "ab" * 32


def write_checkpoint(home: Path) -> Path:
    """Write a checkpoint with a recipe, its data and its held-out rows, and return its folder."""
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
    write_json(
        folder / "bindllm.json",
        {
            "format": 1,
            "decoder": {"name": "models/decoder", "fingerprint": "cd" * 32},
            "encoders": [{"class_path": "my_lab.Encoder", "init_args": {}, "fingerprint": "ef" * 32}],
            "bind": {"depth": 3, "expansion": 4},
            "inject": {"kind": "value", "queries": True},
            "origin": "",
            "weights_sha256": WEIGHTS,
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
    """Write the held-out questions of the training run: ten, of which eight are answered right."""
    hits = [True] * 8 + [False] * 2
    rows = [
        {"question": "?", "references": ["red"], "type": "hue" if n % 2 else "size", "modality": "image"}
        | {"model": "red" if hit else "blue", "right": hit, "no_media": "blue", "shuffled_media": "red"}
        | {"majority_answer": "blue", "subset": "", "media": "0.png"}
        for n, hit in enumerate(hits)
    ]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "report" / "answers.jsonl").write_text(lines)

    def variant(accuracy):
        by_type = {"hue": accuracy, "size": accuracy}
        return {"accuracy": accuracy, "count": 10, "by_type": by_type, "count_by_type": {"hue": 5, "size": 5}}

    shares = {"model": 0.8, "no_media": 0.0, "shuffled_media": 0.5, "majority_answer": 0.9}
    tasks = {"answers": {name: variant(share) for name, share in shares.items()}}
    write_json(
        folder / "metrics.json", {"tasks": tasks, "seconds": {"train": 3.5}, "trainable_parameters": 1234}
    )


def write_evaluation(folder: Path, name: str = "pope", *, fingerprint: str = WEIGHTS) -> Path:
    """Write an evaluation of 40 yes-no questions: the model answers yes to all, of which half are right."""
    folder.mkdir(parents=True)
    lines = []
    for variant, count in (("model", 40), ("no_media", 20)):
        for n in range(count):
            target = "yes" if n % 2 else "no"
            answer = "Yes." if variant == "model" else target
            unread = variant == "model" and n == 0
            lines.append(
                {"id": f"q{n}", "variant": variant, "prompt_sha256": "0" * 64, "parser": "yes or no"}
                | {
                    "answer": answer,
                    "parsed": None if unread else answer.lower().rstrip("."),
                    "target": target,
                }
                | {"score": float(answer.lower().startswith(target)), "groups": {"split": "ab"[n % 4 // 2]}}
            )
    (folder / "items.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    own = {"accuracy": {"value": 0.5, "low": 0.35, "high": 0.65, "n": 40}}
    without = {"accuracy": {"value": 1.0, "low": 1.0, "high": 1.0, "n": 20}}
    write_json(
        folder / "evaluation.json",
        {
            "benchmark": name,
            "fingerprint": fingerprint,
            "settings": {"limit": 40},
            "counts": {"items": 40, "unparsed": 1},
            "scores": {"model": own, "no_media": without},
            "groups": {"split": {"a": own, "b": own}},
        },
    )
    return folder


def write_json(file: Path, content) -> None:
    file.write_text(json.dumps(content))
