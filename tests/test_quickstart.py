"""The model of `make train`: `make test-slow` trains it first when it is not there."""

import json
from pathlib import Path

import pytest

from bindllm import BindLLM, Media

FOLDER = Path("checkpoints/scenes")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def model():
    if not (FOLDER / "bindllm.json").exists():
        pytest.fail(f"{FOLDER} is not trained; run make test-slow from the root of the repository")
    return BindLLM.from_pretrained(FOLDER)


def test_its_metrics_agree_with_the_readme():
    metrics = json.loads((FOLDER / "metrics.json").read_text())["tasks"]["captions"]
    assert metrics["model"]["loss"] < metrics["no_media"]["loss"] / 2
    assert metrics["model"]["loss"] < metrics["shuffled_media"]["loss"] - 1
    assert metrics["model"]["cider"] > 10 * metrics["shuffled_media"]["cider"]


def test_shuffling_the_media_changes_the_answers(model):
    rows = [json.loads(line) for line in (FOLDER / "report/captions.jsonl").read_text().splitlines()]
    media = [[Media.image(row["media"])] for row in rows[::10]]
    prompts = ["Describe this image."] * len(media)
    answers = model.generate(prompts, media=media, max_new_tokens=24)
    shuffled = model.generate(prompts, media=media[1:] + media[:1], max_new_tokens=24)
    assert shuffled == answers[1:] + answers[:1]
    assert sum(a != b for a, b in zip(answers, shuffled, strict=True)) > 0.7 * len(media)
    blind = model.generate(prompts[:1], max_new_tokens=24)[0]
    assert blind not in answers


def test_the_notebook_runs():
    cells = json.loads(Path("examples/quickstart.ipynb").read_text())["cells"]
    names: dict = {}
    for cell in cells:
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), "quickstart.ipynb", "exec"), names)
    assert len(names["rows"]) > 100
    assert names["embeddings"].shape[0] == 3
