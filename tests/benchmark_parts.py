"""Tiny benchmarks in the layouts of their authors."""

from __future__ import annotations

import base64
import csv
import io
import json
from pathlib import Path

import numpy as np
from PIL import Image

from tiny import COLORS
from tiny_layouts import esc50, modelnet


def image(file: Path, color: str = "red", size: int = 8) -> Path:
    """Write a plain image, and the folders above it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((size, size, 3), COLORS[color], dtype=np.uint8)).save(file)
    return file


def image_base64(color: str) -> str:
    stream = io.BytesIO()
    Image.fromarray(np.full((8, 8, 3), COLORS[color], dtype=np.uint8)).save(stream, "png")
    return base64.b64encode(stream.getvalue()).decode()


def write(file: Path, content: object) -> Path:
    """Write a text, or JSON, or a list of objects as JSON Lines."""
    file.parent.mkdir(parents=True, exist_ok=True)
    if not isinstance(content, str):
        content = json.dumps(content)
    file.write_text(content, encoding="utf-8")
    return file


def pope(folder: Path) -> Path:
    for split in ("random", "popular", "adversarial"):
        rows = []
        for n, color in enumerate(COLORS):
            name = f"COCO_val2014_{n:012d}.jpg"
            image(folder / "val2014" / name, color)
            rows += [
                {
                    "question_id": 2 * n + k,
                    "image": name,
                    "image_id": n,
                    "text": f"Is there a {color} dog?",
                    "label": label,
                }
                for k, label in enumerate(("yes", "no"), start=1)
            ]
        write(folder / f"output/coco/coco_pope_{split}.json", "".join(json.dumps(row) + "\n" for row in rows))
    return folder


def mme(folder: Path) -> Path:
    root = folder / "MME_Benchmark_release_version"
    for task in ("existence", "celebrity", "code_reasoning"):
        for color in ("red", "blue"):
            with_folders = task == "celebrity"
            image(root / task / ("images" if with_folders else "") / f"{color}.png", color)
            texts = root / task / ("questions_answers_YN" if with_folders else "")
            ask = "Is it {}? Please answer yes or no.\t{}\n"
            write(texts / f"{color}.txt", ask.format("red", "Yes") + ask.format("a dog", "No"))
    return folder


def vqav2(folder: Path, prefix: str = "v2_") -> Path:
    asked, known = [], []
    for n, color in enumerate(COLORS):
        image(folder / "val2014" / f"COCO_val2014_{n:012d}.jpg", color)
        asked.append({"image_id": n, "question": "Which color is it?", "question_id": 10 * n})
        answers = [{"answer": color, "answer_confidence": "yes", "answer_id": k} for k in range(1, 9)]
        answers += [{"answer": "brown", "answer_id": 9}, {"answer": None, "answer_id": 10}]
        facts = {"question_type": "which", "answer_type": "other", "question_id": 10 * n, "image_id": n}
        known.append({**facts, "answers": answers, "multiple_choice_answer": color})
    write(folder / f"{prefix}OpenEnded_mscoco_val2014_questions.json", {"info": {}, "questions": asked})
    write(folder / f"{prefix}mscoco_val2014_annotations.json", {"info": {}, "annotations": known})
    return folder


def okvqa(folder: Path) -> Path:
    return vqav2(folder, "")


def textvqa(folder: Path) -> Path:
    rows = []
    for n, color in enumerate(COLORS):
        image(folder / "train_images" / f"{color}7.jpg", color)
        row = {"question": "What is written?", "image_id": f"{color}7", "question_id": n}
        rows.append({**row, "answers": [color] * 10})
    write(folder / "TextVQA_0.5.1_val.json", {"dataset_type": "val", "data": rows})
    return folder


def gqa(folder: Path) -> Path:
    rows = {}
    for n, color in enumerate(COLORS):
        image(folder / "images" / f"n{n}.jpg", color)
        types = {"structural": "query", "semantic": "attr", "detailed": "colorV"}
        rows[f"20{n}"] = {"question": "Which color?", "answer": color, "imageId": f"n{n}", "types": types}
    write(folder / "testdev_balanced_questions.json", rows)
    return folder


def music_avqa(folder: Path) -> Path:
    rows = []
    for n, answer in enumerate(("two", "yes", "piano")):
        write(folder / "videos" / f"000{n}.mp4", f"video {n}")
        row = {"video_id": f"000{n}", "question_id": n, "type": '["Audio-Visual", "Counting"]'}
        row |= {
            "question_content": "How many <Object> are there?",
            "templ_values": '["violin"]',
            "anser": answer,
        }
        rows.append(row)
    write(folder / "json/avqa-test.json", rows)
    return folder


def questions(folder: Path) -> Path:
    rows = []
    for color in COLORS:
        image(folder / "images" / f"{color}.png", color)
        row = {"image": f"images/{color}.png", "question": "Color?", "answer": color, "type": "color"}
        rows += [{**row, "split": "test"}, {**row, "split": "train"}]
    write(folder / "test.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    return folder


def choices(folder: Path) -> Path:
    rows = []
    for n, color in enumerate(COLORS):
        image(folder / f"{color}.png", color)
        # Options that are called None, or are empty.
        row = {"image": f"{color}.png", "question": "Color?", "choices": ["None", color, "", "black"]}
        rows.append({**row, "id": f"q{n}", "answer": 1})
    write(folder / "questions.json", rows)
    return folder


def scienceqa(folder: Path) -> Path:
    problems: dict[str, dict] = {}
    for n, subject in enumerate(("natural science", "social science", "language science", "natural science")):
        row = {"question": "Which?", "choices": ["a rose", "the sea"], "answer": n % 2, "split": "test"}
        row |= {"hint": "Look." if n % 2 else "", "image": "image.png" if n < 2 else None}
        row |= {"task": "closed choice", "grade": f"grade{n + 4}", "subject": subject, "topic": "t"}
        problems[str(n)] = row
        if row["image"]:
            image(folder / f"images/test/{n}/image.png", "red" if n else "blue")
    write(folder / "data/scienceqa/problems.json", problems | {"9": {**problems["0"], "split": "train"}})
    write(folder / "data/scienceqa/pid_splits.json", {"train": ["9"], "test": list(problems)})
    return folder


def mmbench(folder: Path) -> Path:
    columns = "index question hint A B C D answer category image l2-category split"
    rows = [columns.split()]
    for n, color in enumerate(("red", "blue")):
        options = [color, "black", "pink" if n else "", ""]
        hint = 'A hint of\nseveral "lines".' if n else ""
        rows.append(
            [str(n), "Which color?", hint, *options, "A", "color", image_base64(color), "attribute", "dev"]
        )
    # As pandas writes it.
    stream = io.StringIO()
    csv.writer(stream, delimiter="\t", lineterminator="\n").writerows(rows)
    write(folder / "mmbench_dev_en.tsv", stream.getvalue())
    return folder


def seed(folder: Path) -> Path:
    rows = []
    for n, color in enumerate(("red", "blue")):
        file = image(folder / "SEED-Bench-image" / f"{n}_7.png", color)
        file.rename(file.with_suffix(""))
        row = {
            "choice_a": "red",
            "choice_b": "blue",
            "choice_c": "pink",
            "choice_d": "black",
            "answer": "AB"[n],
        }
        row |= {"data_id": f"{n}_7", "data_type": "image", "question": "Which color?"}
        rows.append({**row, "question_id": str(n), "question_type_id": 1})
    write(folder / "SEED-Bench.json", {"question_type": {"Instance Color": 1}, "questions": rows})
    return folder


def _karpathy(file: Path, folder: str) -> Path:
    rows = []
    for n, color in enumerate(COLORS):
        image(file.parent / folder / f"COCO_val2014_{n:012d}.jpg", color)
        row = {"filename": f"COCO_val2014_{n:012d}.jpg", "filepath": folder, "split": "test"}
        rows.append(
            {**row, "sentences": [{"raw": f"a {color} square on a table"}, {"raw": f"one {color} thing"}]}
        )
    write(file, {"images": rows})
    return file.parent


def nocaps(folder: Path) -> Path:
    images, known = [], []
    for n, color in enumerate(COLORS):
        image(folder / "val" / f"{color}.jpg", color)
        domain = ("in-domain", "near-domain", "out-domain", "in-domain")[n]
        images.append({"id": n, "file_name": f"{color}.jpg", "domain": domain})
        known.append({"image_id": n, "caption": f"a {color} square on a table"})
    write(folder / "nocaps_val_4500_captions.json", {"images": images, "annotations": known})
    return folder


def clotho(folder: Path) -> Path:
    lines = ["file_name," + ",".join(f"caption_{n}" for n in range(1, 6))]
    for word in ("rain", "dogs", "bells"):
        write(folder / "evaluation" / f"{word}.wav", word)
        lines.append(f"{word}.wav," + ",".join(f"{word} can be heard {n} times outside" for n in range(5)))
    write(folder / "clotho_captions_evaluation.csv", "\n".join(lines) + "\n")
    return folder


def audiocaps(folder: Path) -> Path:
    lines = ["audiocap_id,youtube_id,start_time,caption"]
    for n, word in enumerate(("rain", "dogs", "bells")):
        write(folder / "test" / f"{n}.wav", word)
        lines += [f"{n},y{n},30,{word} can be heard {k} times outside" for k in range(2)]
    write(folder / "test.csv", "\n".join(lines) + "\n")
    return folder


def pointllm(folder: Path) -> Path:
    rows = []
    for n, word in enumerate(("chair", "lamp", "desk")):
        write(folder / "8192_npy" / f"{word}_8192.npy", word)
        answer = {"from": "gpt", "value": f"a wooden {word} with {n} legs"}
        rows.append(
            {"object_id": word, "conversations": [{"from": "human", "value": "<point>\nCaption it."}, answer]}
        )
    write(folder / "PointLLM_brief_description_val_200_GT.json", rows)
    return folder


def captions(folder: Path) -> Path:
    rows = []
    for color in COLORS:
        image(folder / f"{color}.png", color)
        rows.append({"image": f"{color}.png", "caption": [f"a {color} square on a table"]})
    write(folder / "captions.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    return folder


def vl_icl(folder: Path) -> Path:
    paths = {color: f"open_mi/{color}.png" for color in COLORS}
    for color, path in paths.items():
        image(folder / path, color)
        image(folder / "operator_induction" / f"{color}.png", color)
        # A question is never among its shots.
        for task in ("open_mi", "operator_induction"):
            image(folder / task / f"asked-{color}.png", color, size=9)
    classes = list(paths)
    shown = {color: {"images": [path] * 5, "caption": f"This is a {color}."} for color, path in paths.items()}
    query = {"question": "This is a", "classes": classes, "support": shown}
    write(
        folder / "open_mi/query.json",
        [{**query, "image": [f"open_mi/asked-{color}.png"], "answer": color} for color in classes],
    )
    write(folder / "open_mi/support.json", [])
    rows = [
        {"image": [f"operator_induction/{color}.png"], "question": "What is the result?"} for color in COLORS
    ]
    images = [{"image": [f"operator_induction/asked-{color}.png"]} for color in COLORS]
    asked = [{**rows[n], **images[n], "answer": n, "operator": "-"} for n in range(len(rows))]
    write(folder / "operator_induction/query.json", asked)
    write(
        folder / "operator_induction/support.json",
        [{**row, "answer": [n, 10 + n, 20]} for n, row in enumerate(rows)],
    )
    return folder


def isekai(folder: Path) -> Path:
    for n in range(9):
        image(folder / "ISEKAI-10" / f"pos{n}.png", "red", size=8 + n)
        image(folder / "ISEKAI-10" / f"neg{n}.png", "blue", size=8 + n)
    row = {
        "positive_list": [f"pos{n}.png" for n in range(8)],
        "negative_list": [f"neg{n}.png" for n in range(8)],
    }
    row |= {"positive_promt": "octopus vacuum", "negative_promt": "octopus", "label_name": "octopus vacuum"}
    rows = [{**row, "image_name": "pos8.png"}, {**row, "image_name": "neg8.png", "label_name": "octopus"}]
    write(folder / "ISEKAI-10.json", "".join(json.dumps(row) + "\n" for row in rows))
    return folder


def pairs(folder: Path) -> Path:
    image(folder / "red.png", "red")
    image(folder / "blue.png", "blue")
    rows = [
        {"pair": f"{job}", "attribute": "color of the shirt", "value": color, "image": f"{color}.png"}
        | {"question": f"Is this a {job}?", "answer": "yes"}
        for job, colors in (("nurse", ("red", "blue")), ("pilot", ("blue", "red")))
        for color in colors
    ]
    write(folder / "pairs.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    return folder


BUILDERS = {
    "pairs": pairs,
    "pope": pope,
    "mme": mme,
    "vqav2": vqav2,
    "okvqa": okvqa,
    "textvqa": textvqa,
    "gqa": gqa,
    "music_avqa": music_avqa,
    "easyvqa": questions,
    "questions": questions,
    "scienceqa": scienceqa,
    "mmbench": mmbench,
    "seed": seed,
    "choices": choices,
    "coco": lambda folder: _karpathy(folder / "dataset_coco.json", "val2014"),
    "flickr30k": lambda folder: _karpathy(folder / "dataset_flickr30k.json", "flickr30k-images"),
    "nocaps": nocaps,
    "clotho": clotho,
    "audiocaps": audiocaps,
    "pointllm": pointllm,
    "captions": captions,
    "modelnet40": modelnet,
    "esc50": esc50,
    "vl_icl": vl_icl,
    "isekai": isekai,
}
"""Makes a tiny folder of each benchmark."""
