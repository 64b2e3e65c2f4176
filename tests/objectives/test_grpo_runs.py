"""Whole runs of GRPO through the command line: what they leave, and what a kill costs."""

import csv
import json
from pathlib import Path

import pytest
import yaml

from bindllm.training.module import BindModule
from bindllm.training.run import Run
from tiny import COLORS
from tiny_run import run, tiny_parts, tiny_recipe

pytestmark = pytest.mark.usefixtures("unmeasured")

FILES = ("checkpoints/tiny/bind.safetensors", "runs/tiny/metrics.csv")

MEASURE = Run._measure


class Killed(BaseException):
    """Stands for kill -9: nothing of ours catches it."""


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """The tiny parts, with questions about their pictures."""
    folder = tiny_parts(tmp_path_factory.mktemp("parts"))
    splits = {0: "test", 1: "validation"}
    rows = [
        {
            "image": f"images/{mine}{n}.png",
            "question": "Which colour?",
            "answer": mine,
            "split": splits.get(n, "train"),
        }
        for mine in COLORS
        for n in range(7)
    ]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "pictures/answers.jsonl").write_text(text, encoding="utf-8")
    return folder


def recipe_with(parts, *, steps_per_rollout=1):
    """5 batches of questions in an epoch; a state is saved at every step that allows it."""
    recipe = tiny_recipe(parts, trainer={"log_every_n_steps": 1, "max_epochs": 2 // steps_per_rollout})
    recipe["data"]["sources"] = [{"path": str(parts / "pictures/answers.jsonl"), "format": "vqa"}]
    recipe["model"]["objective"] = {
        "class_path": "bindllm.objectives.GRPO",
        "init_args": {
            "reward": {"class_path": "grpo_parts.LetterClass"},
            "group_size": 4,
            "max_new_tokens": 3,
            "steps_per_rollout": steps_per_rollout,
        },
    }
    return recipe


def ending():
    return {name: Path(name).read_bytes() for name in FILES}


def logged():
    with Path(FILES[1]).open(newline="") as stream:
        return list(csv.DictReader(stream))


# Steps on the same answers, the step that a run dies in, and the steps that the next one takes. A state between two
# steps on the same answers would lack them, so the second run goes on from the one before.
PLACES = [(2, 6, 6), *(pytest.param(*place, marks=pytest.mark.slow) for place in ((1, 4, 7), (2, 7, 4)))]


@pytest.mark.parametrize(("steps_per_rollout", "at", "left"), PLACES)
def test_a_killed_run_goes_on_to_the_same_end(steps_per_rollout, at, left, parts, tmp_path, monkeypatch):
    recipe = recipe_with(parts, steps_per_rollout=steps_per_rollout)
    original, steps, stop = BindModule.training_step, [], None

    def counting(self, batch, *args):
        steps.append(batch["numbers"].tolist())
        if len(steps) == stop:
            raise Killed
        return original(self, batch, *args)

    monkeypatch.setattr(BindModule, "training_step", counting)
    ends = []
    for name in ("whole", "killed"):
        folder = tmp_path / name
        folder.mkdir()
        monkeypatch.chdir(folder)
        if name == "killed":
            assert len(steps) == 10
            assert all(steps[n] == steps[n - n % steps_per_rollout] for n in range(10))
            steps, stop = [], at
            with pytest.raises(Killed):
                run("fit", recipe)
            steps, stop = [], None
        assert run("fit", recipe) == 0
        ends.append(ending())
    assert len(steps) == left
    assert ends[0] == ends[1]
    rows = logged()
    trained = [row for row in rows if row["train_loss"]]
    assert any(float(row["train_useful"]) for row in trained)
    assert float(trained[-1]["train_kl"]) > 0
    assert all(float(row["val_loss"]) == -float(row["val_reward"]) for row in rows if row["val_loss"])


def test_the_recipe_runs_on_tiny_parts(parts, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = yaml.safe_load((Path(__file__).parents[2] / "recipes/easyvqa-grpo.yaml").read_text())
    recipe["model"]["decoder"] |= {"name": str(parts / "decoder"), "dtype": "float32"}
    recipe["model"]["encoders"] = [{"class_path": "tiny.ColorEncoder"}]
    recipe["model"].pop("init_from")
    for source in recipe["data"]["sources"]:
        source["path"] = str(parts / "pictures/answers.jsonl")
    recipe["trainer"] |= {"accelerator": "cpu", "max_steps": 2, "val_check_interval": 2}
    # In two steps all answers may have the same reward.
    monkeypatch.setattr("bindllm.training.optim.ZeroGradientCheck.finish_epoch", lambda self: None)
    monkeypatch.setattr("bindllm.training.run.Run._measure", MEASURE)
    assert run("fit", recipe) == 0
    metrics = json.loads(Path(recipe["output"], "metrics.json").read_text())
    assert metrics["tasks"]["answers"]["model"]["count"] == 4 * len(recipe["data"]["sources"])
    assert Path(recipe["output"], "adapter/adapter_model.safetensors").is_file()
    assert Path(recipe["output"], "report.html").is_file()


def test_a_multiple_choice_reward_refuses_questions_before_the_decoder_is_loaded(
    parts, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("bindllm.training.module.load_decoder", lambda *_, **__: pytest.fail("loaded"))
    recipe = recipe_with(parts)
    reward = {"class_path": "bindllm.objectives.OptionLetter"}
    recipe["model"]["objective"]["init_args"]["reward"] = reward
    assert run("fit", recipe) == 1
    assert (
        "OptionLetter judges multiple choices, but 24 of 24 rows have no options" in capsys.readouterr().err
    )
