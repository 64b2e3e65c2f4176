"""A run on episodes, from the recipe to the report: it resumes, and its controls are in the metrics and on the page."""

import json
import re
from pathlib import Path

import pytest

from bindllm.cli import main
from episode_parts import label_table
from tiny_run import run, run_and_die, tiny_recipe


@pytest.fixture(scope="module")
def recipe(parts, tmp_path_factory):
    table = label_table(tmp_path_factory.mktemp("episodes") / "set")
    episodes = {
        "shots": [1, 2],
        "strategy": "mix",
        "count": 8,
        "held_out_count": 3,
        "test_shots": [0, 2],
        "negatives": "hard",
    }
    sources = [
        {"path": str(table), "episodes": episodes},
        {"path": str(parts / "pictures"), "split": "train"},
    ]
    return tiny_recipe(parts, data={"sources": sources, "max_length": 400, "batch_size": 4})


def test_episodes_are_trained_on_and_measured(recipe, work, monkeypatch):
    assert run("fit", recipe, figures=True) == 0
    tasks = json.loads(Path("checkpoints/tiny/metrics.json").read_text())["tasks"]
    assert tasks.keys() == {"episodes"}
    assert tasks["episodes"]["model"]["by_subset"].keys() == {"0 shots", "2 shots"}
    assert tasks["episodes"]["wrong_support"]["count"] == 3
    rows = [
        json.loads(line) for line in Path("checkpoints/tiny/report/episodes.jsonl").read_text().splitlines()
    ]
    assert len(rows) == 6
    page = Path("checkpoints/tiny/report.html").read_text()
    for text in (
        "names exchanged",
        "shots without images",
        "last name",
        "By the metric of arXiv 2308.07891",
        "2 shots",
    ):
        assert text in page
    assert main(["report", "checkpoints/tiny"]) == 0
    assert Path("checkpoints/tiny/report.html").read_text() == page
    check_the_example_of_the_page(recipe, monkeypatch)


def check_the_example_of_the_page(recipe, monkeypatch):
    """It measures the checkpoint that was trained."""
    page = (Path(__file__).parents[2] / "docs/link-context.md").read_text(encoding="utf-8")
    names: dict = {}
    exec(re.findall(r"^```python\n(.*?)^```", page, flags=re.MULTILINE | re.DOTALL)[-1], names)
    load = names["BindLLM"].from_pretrained
    monkeypatch.setattr(
        names["BindLLM"], "from_pretrained", lambda folder: load(folder, allow=["tiny.ColorEncoder"])
    )
    episodes = {"shots": 1, "count": 1, "held_out_count": 3, "test_shots": [2]}
    found = names["measure"]("checkpoints/tiny", recipe["data"]["sources"][0]["path"], **episodes)
    assert found["model"]["count"] == 3


# After the run that is measured.
@pytest.mark.usefixtures("unmeasured")
def test_an_interrupted_run_resumes_to_the_same_weights(recipe, work, monkeypatch):
    run_and_die(recipe, monkeypatch, at=5)
    assert run("fit", recipe) == 0
    weights = Path("checkpoints/tiny/bind.safetensors").read_bytes()
    assert run("fit", {**recipe, "output": "checkpoints/whole"}) == 0
    assert Path("checkpoints/whole/bind.safetensors").read_bytes() == weights
