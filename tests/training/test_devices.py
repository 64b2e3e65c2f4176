"""A run on two devices takes the same steps as one device that gathers the gradients of two batches."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tiny_run import tiny_parts, tiny_recipe, write_recipe

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    """20 training rows in 4 batches of 5: two for each device, none repeated."""
    recipe = tiny_recipe(tiny_parts(tmp_path_factory.mktemp("parts")), trainer={"log_every_n_steps": 1})
    recipe["data"]["batch_size"] = 5
    return recipe


def fit(recipe, folder, *options):
    """Run the command line in processes of its own, as Lightning starts further ones from the first."""
    folder.mkdir(exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        command = [
            sys.executable,
            "-m",
            "bindllm.cli",
            "fit",
            "--config",
            str(write_recipe(recipe)),
            *options,
        ]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
        # A machine without a network still has this one.
        environment["GLOO_SOCKET_IFNAME"] = "lo"
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=400, check=False
        )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def logged(folder, name):
    with (folder / "runs/tiny/metrics.csv").open(newline="") as stream:
        return [float(row[name]) for row in csv.DictReader(stream) if row[name]]


def test_two_processes_end_where_one_with_gathered_gradients_ends(recipe, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    fit(recipe, one, "--trainer.accumulate_grad_batches", "2")
    told = fit(recipe, two, "--trainer.devices", "2", "--trainer.strategy", "ddp")
    assert logged(two, "val_loss") == pytest.approx(logged(one, "val_loss"), abs=1e-5)
    assert len(logged(two, "val_loss")) == 2
    assert logged(two, "gradient_norm") == pytest.approx(logged(one, "gradient_norm"), rel=1e-4)
    ours, theirs = (load_file(folder / "checkpoints/tiny/bind.safetensors") for folder in (two, one))
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], atol=1e-5, rtol=1e-4)
    assert ours["injection.gates"].abs().max() > 0
    assert told.count("trained model:") == 1, "one process alone saves and measures"
    assert (two / "checkpoints/tiny/report.html").is_file()
    assert not list((two / "runs/tiny").glob("last.ckpt"))
    assert Path(two / "runs/tiny/captions.jsonl").read_text().count("\n") == 2 * 4
