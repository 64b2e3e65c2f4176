"""Rows and batches without a token to learn from, through a whole run: never a loss of NaN."""

import csv
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import bindllm.data.datamodule as datamodule
from bindllm.data.rows import IGNORE
from tiny_run import run, tiny_recipe

pytestmark = pytest.mark.usefixtures("work")


@pytest.fixture(scope="module")
def recipe(parts):
    return tiny_recipe(parts, trainer={"max_epochs": 1, "log_every_n_steps": 1})


def logged(name):
    with Path("runs/tiny/metrics.csv").open(newline="") as stream:
        return [float(row[name]) for row in csv.DictReader(stream) if row[name]]


def test_rows_whose_prompt_leaves_no_room_are_counted_and_the_run_goes_on(recipe, capsys):
    (usual,) = recipe["data"]["sources"]
    sources = [usual, {**usual, "prompt": "What is this? " * 20}]
    assert run("fit", {**recipe, "data": {**recipe["data"], "sources": sources, "max_length": 64}}) == 0
    losses = logged("train_loss")
    assert len(losses) == 5
    assert all(math.isfinite(loss) for loss in losses)
    facts = json.loads(Path("checkpoints/tiny/report/facts.json").read_text())
    ((reason, count),) = facts["data"]["skipped"]["counts"].items()
    assert reason.startswith("the prompt leaves no room for an answer in max_length=64 tokens")
    assert count == 28
    assert facts["data"]["rows"] == {"train": 20, "validation": 4, "test": 4}
    assert "skipped: 28 x the prompt leaves no room" in capsys.readouterr().out


def test_a_run_of_which_no_row_has_an_answer_stops_with_the_reason(recipe, capsys):
    assert run("fit", recipe, "--data.max_length", "16") == 1
    error = capsys.readouterr().err
    assert "no row of the data can be used: " in error
    assert "max_length=16" in error


@pytest.mark.usefixtures("unmeasured")
def test_a_batch_without_a_token_to_learn_from_stops_the_run_and_names_its_rows(recipe, monkeypatch, capsys):
    """As after a fault in memory: the run stops, and goes on from its state once that is mended."""
    original, made = datamodule.collate, []

    def faulty(samples, *args, **options):
        made.append(samples)
        if len(made) == 3:
            mute = replace(samples[0], labels=np.full_like(samples[0].labels, IGNORE))
            samples = [mute, *samples[1:]]
        return original(samples, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(datamodule, "collate", faulty)
        assert run("fit", recipe) == 1
    assert "1 rows of a batch have no token to learn from: captions.jsonl line " in capsys.readouterr().err
    before = logged("train_loss")
    assert 0 < len(before) < 5
    assert run("fit", recipe) == 0
    assert "resuming the interrupted run" in capsys.readouterr().out
    losses = logged("train_loss")
    assert len(losses) == 5
    assert losses[: len(before)] == before
    assert all(math.isfinite(loss) for loss in losses)
