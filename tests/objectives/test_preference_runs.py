"""Whole runs of preference recipes through the command line: what they leave, and what a kill costs."""

import csv
import json
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from bindllm.objectives import reference
from bindllm.training.module import BindModule
from bindllm.training.run import Run
from tiny import COLORS
from tiny_run import run, tiny_parts, tiny_recipe
from two_processes import run_pair, told

pytestmark = pytest.mark.usefixtures("unmeasured")

FILES = ("checkpoints/tiny/bind.safetensors", "runs/tiny/metrics.csv", "runs/tiny/reference.safetensors")

MEASURE = Run._measure


class Killed(BaseException):
    """Stands for kill -9: nothing of ours catches it."""


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """The tiny parts, with pairs about their pictures."""
    folder = tiny_parts(tmp_path_factory.mktemp("parts"))
    rows = []
    for number, mine in enumerate(COLORS):
        for n in range(7):
            other = [colour for colour in COLORS if colour != mine][(number + n) % 3]
            row = {"image": f"images/{mine}{n}.png", "prompt": "Which colour?", "chosen": mine}
            rows.append({**row, "rejected": other, "split": "validation" if n == 0 else "train"})
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "pictures/preferences.jsonl").write_text(text, encoding="utf-8")
    answers = [
        {"image": f"images/{mine}0.png", "question": "Which colour?", "answer": mine, "split": "test"}
        for mine in COLORS
    ]
    text = "".join(json.dumps(row) + "\n" for row in answers)
    (folder / "pictures/answers.jsonl").write_text(text, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def recipe(parts):
    """2 epochs of 6 steps; a state is saved at every step that allows it."""
    recipe = tiny_recipe(parts, trainer={"log_every_n_steps": 1, "max_epochs": 2})
    recipe["data"]["sources"] = [{"path": str(parts / "pictures/preferences.jsonl"), "format": "preference"}]
    recipe["model"]["objective"] = {
        "class_path": "bindllm.objectives.DPO",
        "init_args": {"beta": 0.3},
    }
    return recipe


@pytest.fixture(scope="module")
def uninterrupted(recipe, tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert run("fit", recipe) == 0
    return folder


def ending(folder):
    return {name: (folder / name).read_bytes() for name in FILES}


def test_the_log_of_a_run_holds_margins_and_accuracies(uninterrupted):
    with (uninterrupted / FILES[1]).open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    trained = [row for row in rows if row["train_loss"]]
    assert [float(row["train_loss"]) for row in trained[:1]] == pytest.approx([0.6931], abs=1e-3)
    assert len([row for row in trained if row["train_margin"]]) == 12
    last = [row for row in rows if row["val_loss"]][-1]
    assert float(last["val_loss"]) < 0.69 < 0.6932
    assert float(last["val_accuracy"]) > 0.5
    assert float(last["val_margin"]) > 0
    shapes = {name: list(value.shape) for name, value in load_file(uninterrupted / FILES[2]).items()}
    assert shapes == {"train": [24, 2], "validation": [4, 2]}


PLACES = {
    "while the reference is computed": ("answer_log_probs", 2, 12),
    "in the first epoch": ("training_step", 4, 9),
    "in the first step": ("training_step", 1, 12),
    "in a validation": ("validation_step", 1, 7),
}


def owner_of(name):
    return reference if name == "answer_log_probs" else BindModule


SLOW = ("in the first step", "in a validation")


@pytest.mark.parametrize(
    "place", [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in PLACES]
)
def test_a_killed_run_goes_on_to_the_same_end(place, recipe, uninterrupted, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name, at, left = PLACES[place]
    counts = dict.fromkeys(("answer_log_probs", "training_step", "validation_step"), 0)

    def counting(name, original):
        def work(self, batch, *args):
            counts[name] += 1
            if counts[name] == at == stop:
                raise Killed
            return original(self, batch, *args)

        return work

    stop = at
    with monkeypatch.context() as patch:
        owner = owner_of(name)
        patch.setattr(owner, name, counting(name, getattr(owner, name)))
        with pytest.raises(Killed):
            run("fit", recipe)
    counts, stop = dict.fromkeys(counts, 0), None
    for name in counts:
        owner = owner_of(name)
        monkeypatch.setattr(owner, name, counting(name, getattr(owner, name)))
    state = Path("runs/tiny/last.ckpt").exists()
    assert run("fit", recipe) == 0
    assert counts["training_step"] == left
    assert (counts["answer_log_probs"] == 0) == state, "a run that goes on computes no reference"
    assert ending(tmp_path) == ending(uninterrupted)


def test_the_recipe_runs_on_tiny_parts(parts, tmp_path, monkeypatch):
    """Its sources are pairs to learn from, and test rows with true answers to measure with."""
    monkeypatch.chdir(tmp_path)
    recipe = yaml.safe_load((Path(__file__).parents[2] / "recipes/easyvqa-dpo.yaml").read_text())
    recipe["model"]["decoder"] |= {"name": str(parts / "decoder"), "dtype": "float32"}
    recipe["model"]["encoders"] = [{"class_path": "tiny.ColorEncoder"}]
    recipe["model"].pop("init_from")
    pairs, answers = recipe["data"]["sources"]
    answers |= {"path": str(parts / "pictures/answers.jsonl")}
    recipe["data"]["sources"] = [{**pairs, "path": str(parts / "pictures/preferences.jsonl")}, answers]
    recipe["trainer"] |= {"accelerator": "cpu", "limit_train_batches": 2, "val_check_interval": 2}
    monkeypatch.setattr("bindllm.training.run.Run._measure", MEASURE)
    assert run("fit", recipe) == 0
    metrics = json.loads(Path(recipe["output"], "metrics.json").read_text())
    assert metrics["tasks"]["answers"]["model"]["count"] == 4
    assert Path(recipe["output"], "adapter/adapter_model.safetensors").is_file()
    assert Path("runs/easyvqa-dpo/reference.safetensors").is_file()


def test_data_without_pairs_are_refused_before_the_decoder_is_loaded(
    recipe, parts, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("bindllm.training.module.load_decoder", lambda *_, **__: pytest.fail("loaded"))
    captions = {**recipe["data"], "sources": [{"path": str(parts / "pictures/captions.jsonl")}]}
    assert run("fit", {**recipe, "data": captions}) == 1
    told = capsys.readouterr().err
    assert "DPO learns from pairs" in told
    assert "captions.jsonl" in told
    assert not Path("checkpoints").exists()


@pytest.mark.slow
def test_two_processes_share_the_reference_and_take_the_steps_of_one(recipe, tmp_path, monkeypatch):
    """Each computes half of the reference, and needs all of it: its rows change from epoch to epoch."""
    kto = {"class_path": "bindllm.objectives.KTO", "init_args": {"beta": 0.3}}
    recipe = {**recipe, "model": {**recipe["model"], "objective": kto}}
    folders = [tmp_path / "one", tmp_path / "two"]
    options = ({"accumulate_grad_batches": 2}, {"devices": 2, "strategy": "ddp"})
    codes = []
    for folder, option in zip(folders, options, strict=True):
        folder.mkdir()
        monkeypatch.chdir(folder)
        changed = {**recipe, "trainer": {**recipe["trainer"], **option}}
        codes += run_pair(lambda _, changed=changed: run("fit", changed), count=option.get("devices", 1))
        assert not any(codes), told("err", 0)
    reference = [(folder / FILES[2]).read_bytes() for folder in folders]
    assert reference[0] == reference[1]
    losses = []
    for folder in folders:
        with (folder / FILES[1]).open(newline="") as stream:
            rows = list(csv.DictReader(stream))
        losses.append([float(row["val_loss"]) for row in rows if row["val_loss"]])
        assert len([row for row in rows if row["train_margin"]]) == 2 * 3
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    weights = [load_file(folder / FILES[0]) for folder in folders]
    for name in weights[0]:
        torch.testing.assert_close(weights[0][name], weights[1][name], atol=1e-4, rtol=1e-4)
