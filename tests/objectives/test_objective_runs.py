"""Whole runs of DPO, KTO and GRPO through the command line: what they leave, and what a kill costs."""

import csv
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from bindllm.objectives import reference
from bindllm.training.module import BindModule
from tiny import COLORS
from tiny_run import count_calls, run, run_and_die, tiny_parts, tiny_recipe
from two_processes import run_pair, told

pytestmark = pytest.mark.usefixtures("unmeasured", "work")

WEIGHTS, LOG, REFERENCE = (
    "checkpoints/tiny/bind.safetensors",
    "runs/tiny/metrics.csv",
    "runs/tiny/reference.safetensors",
)
GRPO = {"reward": {"class_path": "grpo_parts.LetterClass"}, "group_size": 4, "max_new_tokens": 3}
# Objective, its options, and the epochs of a run with 12 or 10 steps.
RUNS = {
    "dpo": ("DPO", {"beta": 0.3}, 2),
    "grpo": ("GRPO", GRPO, 2),
    "grpo, two steps on the same answers": ("GRPO", {**GRPO, "steps_per_rollout": 2}, 1),
}


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """The tiny parts, with pairs and questions about their images."""
    folder = tiny_parts(tmp_path_factory.mktemp("parts"))
    pairs, questions = [], []
    for number, mine in enumerate(COLORS):
        for n in range(7):
            other = [color for color in COLORS if color != mine][(number + n) % 3]
            asked = {"image": f"images/{mine}{n}.png", "split": "validation" if n == 0 else "train"}
            pairs.append({**asked, "prompt": "Which color?", "chosen": mine, "rejected": other})
            asked["split"] = {0: "test", 1: "validation"}.get(n, "train")
            questions.append({**asked, "question": "Which color?", "answer": mine})
    for name, rows in (("preference", pairs), ("vqa", questions)):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"pictures/{name}.jsonl").write_text(text, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def recipe_of(parts):
    """Makes the recipe of an objective; a state is saved at every step that allows it."""

    def make(kind, options, epochs=2):
        recipe = tiny_recipe(parts, trainer={"log_every_n_steps": 1, "max_epochs": epochs})
        rows = "vqa" if kind == "GRPO" else "preference"
        recipe["data"]["sources"] = [{"path": str(parts / f"pictures/{rows}.jsonl"), "format": rows}]
        recipe["model"]["objective"] = {"class_path": f"bindllm.objectives.{kind}", "init_args": options}
        return recipe

    return make


@pytest.fixture(scope="module")
def uninterrupted(recipe_of, tmp_path_factory):
    """Makes the folder of a whole run, once for each, and the rows of its batches."""
    made = {}

    def make(name):
        if name not in made:
            folder = tmp_path_factory.mktemp("whole")
            with pytest.MonkeyPatch.context() as patch:
                patch.chdir(folder)
                original, rows = BindModule.training_step, []
                patch.setattr(
                    BindModule,
                    "training_step",
                    lambda self, batch, *args: (
                        rows.append(batch["numbers"].tolist()) or original(self, batch, *args)
                    ),
                )
                assert run("fit", recipe_of(*RUNS[name])) == 0
            made[name] = folder, rows
        return made[name]

    return make


def logged(folder):
    with (folder / LOG).open(newline="") as stream:
        return list(csv.DictReader(stream))


def test_a_run_on_pairs_logs_margins_and_accuracies_and_keeps_its_reference(uninterrupted):
    folder, _ = uninterrupted("dpo")
    rows = logged(folder)
    trained = [row for row in rows if row["train_loss"]]
    assert float(trained[0]["train_loss"]) == pytest.approx(0.6931, abs=1e-3)
    assert len([row for row in trained if row["train_margin"]]) == 12
    last = [row for row in rows if row["val_loss"]][-1]
    assert float(last["val_loss"]) < 0.69
    assert float(last["val_accuracy"]) > 0.5
    assert float(last["val_margin"]) > 0
    shapes = {name: list(value.shape) for name, value in load_file(folder / REFERENCE).items()}
    assert shapes == {"train": [24, 2], "validation": [4, 2]}


@pytest.mark.parametrize("name", [name for name in RUNS if name != "dpo"])
def test_a_run_on_its_own_answers_logs_rewards_and_uses_answers_again(name, uninterrupted):
    folder, batches = uninterrupted(name)
    rows, uses = logged(folder), RUNS[name][1].get("steps_per_rollout", 1)
    assert len(batches) == 10
    assert all(batches[n] == batches[n - n % uses] for n in range(10))
    trained = [row for row in rows if row["train_loss"]]
    assert any(float(row["train_useful"]) for row in trained)
    assert float(trained[-1]["train_kl"]) > 0
    assert all(float(row["val_loss"]) == -float(row["val_reward"]) for row in rows if row["val_loss"])


# Run, method and call in which it dies, and the steps that the next one takes. A state between two steps on the same
# answers would lack them, so the second run goes on from the one before.
TWO = "grpo, two steps on the same answers"
PLACES = [
    ("dpo", reference, "answer_log_probs", 2, 12),
    ("dpo", BindModule, "training_step", 4, 9),
    (TWO, BindModule, "training_step", 6, 6),
    pytest.param("dpo", BindModule, "training_step", 1, 12, marks=pytest.mark.slow),
    pytest.param("dpo", BindModule, "validation_step", 1, 7, marks=pytest.mark.slow),
    pytest.param("grpo", BindModule, "training_step", 4, 7, marks=pytest.mark.slow),
    pytest.param(TWO, BindModule, "training_step", 7, 4, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("name", "owner", "method", "at", "left"), PLACES)
def test_a_killed_run_goes_on_to_the_same_end(
    name, owner, method, at, left, recipe_of, uninterrupted, monkeypatch
):
    whole, _ = uninterrupted(name)
    recipe = recipe_of(*RUNS[name])
    run_and_die(recipe, monkeypatch, owner, method, at=at)
    has_state = Path("runs/tiny/last.ckpt").exists()
    steps = count_calls(monkeypatch, BindModule, "training_step")
    computed = count_calls(monkeypatch, reference, "answer_log_probs")
    assert run("fit", recipe) == 0
    assert len(steps) == left
    assert bool(computed) == (name == "dpo" and not has_state), "a run that goes on computes no reference"
    for file in (WEIGHTS, LOG, *([REFERENCE] if name == "dpo" else [])):
        assert Path(file).read_bytes() == (whole / file).read_bytes()


@pytest.mark.parametrize(
    ("kind", "options", "rows", "words"),
    [
        ("DPO", {}, "captions", "DPO learns from pairs"),
        (
            "GRPO",
            {"reward": {"class_path": "bindllm.objectives.OptionLetter"}},
            "vqa",
            "OptionLetter judges multiple choices, but 24 of 24 rows have no options",
        ),
    ],
)
def test_data_that_an_objective_cannot_use_are_refused_before_the_decoder_is_loaded(
    kind, options, rows, words, recipe_of, parts, monkeypatch, capsys
):
    monkeypatch.setattr("bindllm.training.module.load_decoder", lambda *_, **__: pytest.fail("loaded"))
    recipe = recipe_of(kind, options)
    source = {"path": str(parts / f"pictures/{rows}.jsonl"), "format": "caption" if kind == "DPO" else "vqa"}
    recipe["data"]["sources"] = [source]
    assert run("fit", recipe) == 1
    assert words in capsys.readouterr().err
    assert not Path("checkpoints/tiny").exists()
    assert run("check", recipe) == 1
    assert words in " ".join(capsys.readouterr().out.split())


@pytest.mark.slow
def test_two_processes_share_the_reference_and_take_the_steps_of_one(recipe_of, tmp_path, monkeypatch):
    """Each computes half of the reference, and needs all of it: its rows change from epoch to epoch."""
    recipe = recipe_of("KTO", {"beta": 0.3})
    folders = [tmp_path / "one", tmp_path / "two"]
    options = ({"accumulate_grad_batches": 2}, {"devices": 2, "strategy": "ddp"})
    codes = []
    for folder, option in zip(folders, options, strict=True):
        folder.mkdir()
        monkeypatch.chdir(folder)
        changed = {**recipe, "trainer": {**recipe["trainer"], **option}}
        codes += run_pair(lambda _, changed=changed: run("fit", changed), count=option.get("devices", 1))
        assert not any(codes), told("err", 0)
    first, second = ((folder / REFERENCE).read_bytes() for folder in folders)
    assert first == second
    logs = [logged(folder) for folder in folders]
    losses = [[float(row["val_loss"]) for row in rows if row["val_loss"]] for rows in logs]
    assert [len([row for row in rows if row["train_margin"]]) for rows in logs] == [2 * 3, 2 * 3]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    weights = [load_file(folder / WEIGHTS) for folder in folders]
    for name in weights[0]:
        torch.testing.assert_close(weights[0][name], weights[1][name], atol=1e-4, rtol=1e-4)
