"""Questions about coloured pictures, from the recipe to the report: the model learns to look, and it is measured."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bindllm import BindLLM, Media
from bindllm.cli import main
from tiny import COLORS, save_tiny_decoder
from tiny_run import run, tiny_recipe

ASKED = {"what colour?": "color", "is it red?": "yes/no"}


def questions(folder: Path, *, per_color: int = 10) -> Path:
    """Write coloured pictures and two questions about each; return the table."""
    folder.mkdir(parents=True)
    rows, rng = [], np.random.default_rng(0)
    for n in range(per_color):
        for colour, value in COLORS.items():
            pixels = np.clip(rng.normal(value, 12, (8, 8, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / f"{colour}{n}.png")
            answers = (colour[0], "y" if colour == "red" else "n")
            for (question, kind), answer in zip(ASKED.items(), answers, strict=True):
                row = {"image": f"{colour}{n}.png", "question": question, "answer": answer, "type": kind}
                rows.append({**row, "split": {0: "test", 1: "validation"}.get(n, "train")})
    table = folder / "questions.jsonl"
    table.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return table


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder in which a run has ended, and what it printed."""
    folder = tmp_path_factory.mktemp("answers")
    save_tiny_decoder(folder / "decoder")
    table = questions(folder / "pictures")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        recipe = tiny_recipe(
            folder,
            save_every_seconds=1000,
            data={"sources": [{"path": str(table), "format": "vqa"}], "batch_size": 16},
            model={
                "adapter": {"rank": 8, "norm": True},
                "trainable": ["bind", "inject", "adapter"],
                "optim": {"lr": 0.02},
            },
            trainer={"max_epochs": 24, "check_val_every_n_epoch": 12},
        )
        recipe["model"] |= {
            "decoder": {"name": str(folder / "decoder"), "dtype": "float32"},
            "encoders": [{"class_path": "tiny.ColorEncoder"}],
        }
        assert run("fit", recipe, figures=True) == 0
    return folder


def test_it_learns_to_look(trained, monkeypatch):
    monkeypatch.chdir(trained)
    metrics = json.loads(Path("checkpoints/tiny/metrics.json").read_text())
    assert metrics.keys() == {"tasks", "seconds", "trainable_parameters"}
    assert metrics["tasks"].keys() == {"answers"}
    metrics = metrics["tasks"]["answers"]
    assert metrics.keys() == {"model", "no_media", "shuffled_media", "majority_answer"}
    assert metrics["model"]["count_by_type"] == {"color": 4, "yes/no": 4}
    assert metrics["model"]["accuracy"] == 1
    # One of four colours, and three of four are not red.
    assert metrics["majority_answer"]["by_type"] == {"color": 0.25, "yes/no": 0.75}
    assert metrics["shuffled_media"]["accuracy"] < 0.8
    assert metrics["no_media"]["by_type"]["color"] <= 0.25
    model = BindLLM.from_pretrained("checkpoints/tiny", allow=["tiny.ColorEncoder"])
    said = {
        colour: model.generate(
            "what colour?", media=[Media.image(f"pictures/{colour}0.png")], max_new_tokens=4
        )
        for colour in COLORS
    }
    assert said == {colour: colour[0] for colour in COLORS}


def test_the_report_shows_questions_and_can_be_made_again(trained, monkeypatch):
    monkeypatch.chdir(trained)
    folder = Path("checkpoints/tiny")
    page = (folder / "report.html").read_text()
    rows = [json.loads(line) for line in (folder / "report/answers.jsonl").read_text().splitlines()]
    assert [row["question"] for row in rows[:2]] == list(ASKED)
    assert not (folder / "report/captions.jsonl").exists()
    assert "Of 8 held-out questions the model answers 100.0% right." in page
    above_the_recipe = page.split("<details>")[0].split("</style>")[1].replace("figcaption", "")
    assert "caption" not in above_the_recipe
    assert page.count("is it red?") == 4
    (folder / "report.html").unlink()
    assert main(["report", str(folder)]) == 0
    assert (folder / "report.html").read_text() == page
    logged = [json.loads(line) for line in Path("runs/tiny/captions.jsonl").read_text().splitlines()]
    assert {"media", "question", "reference", "model", "step"} == logged[0].keys()
