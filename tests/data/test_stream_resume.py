"""A streamed run that is killed and started again ends in the same bytes as one that was never interrupted."""

import csv
import io
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
from contextlib import redirect_stdout, suppress
from pathlib import Path

import pytest

from bindllm.data.datamodule import BindData
from bindllm.training.module import BindModule
from stream_parts import write_shards
from tiny_run import run, tiny_parts, tiny_recipe, write_recipe

FILES = ("checkpoints/tiny/bind.safetensors", "runs/tiny/metrics.csv")
STEPS = 12


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    """12 steps of 4 rows: two passes over 26 samples in 4 shards, in chunks of 12; every step that can is saved."""
    parts = tiny_parts(tmp_path_factory.mktemp("parts"))
    shards = write_shards(parts / "shards", [8, 6, 5, 7])
    held_out = write_shards(parts / "held-out", [5], first=100)
    return tiny_recipe(
        parts,
        data={
            "sources": [
                {"path": str(shards)},
                {"path": str(held_out), "split": "validation", "limit": 4},
            ],
            "chunk": 12,
        },
        trainer={"max_epochs": -1, "max_steps": STEPS, "val_check_interval": 5, "log_every_n_steps": 1},
    )


@pytest.fixture(autouse=True)
def _unmeasured(monkeypatch):
    """What follows the trained folder is not what these tests are about."""
    monkeypatch.setattr("bindllm.training.run.Run._measure", lambda *_: 0)


@pytest.fixture(scope="module")
def uninterrupted(recipe, tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted")
    told = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(told):
        patch.chdir(folder)
        patch.setattr("bindllm.training.run.Run._measure", lambda *_: 0)
        assert run("fit", recipe) == 0
    (folder / "told.txt").write_text(" ".join(told.getvalue().split()))
    return folder


def ending(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in FILES}


def die_at(monkeypatch, step: int, how) -> list[int]:
    """Count the training steps, and act before one of them."""
    original, steps = BindModule.training_step, []

    def counting(module, batch, batch_idx):
        steps.append(batch_idx)
        if len(steps) == step:
            how()
        return original(module, batch, batch_idx)

    monkeypatch.setattr(BindModule, "training_step", counting)
    return steps


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_streamed_run_trains_validates_and_says_what_it_streamed(uninterrupted):
    with (uninterrupted / "runs/tiny/metrics.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert sum(bool(row["train_loss"]) for row in rows) == STEPS
    # After 5 and 10 steps, and after the last one.
    assert sum(bool(row["val_loss"]) for row in rows) == 3
    told = (uninterrupted / "told.txt").read_text()
    assert "4 shards, streamed" in told
    assert "4 validation" in told
    assert "in 12 batches (4 more were ready); the first after" in told
    assert not [thread for thread in threading.enumerate() if thread.name == "stream"]


@pytest.mark.parametrize("step", [4, pytest.param(9, marks=pytest.mark.slow)])
def test_kill_9_then_the_same_command_ends_in_the_same_bytes(
    recipe, uninterrupted, tmp_path, monkeypatch, step
):
    monkeypatch.chdir(tmp_path)

    def start() -> None:
        die_at(monkeypatch, step, kill)
        run("fit", recipe)

    process = multiprocessing.get_context("fork").Process(target=start)
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL
    steps = die_at(monkeypatch, 0, kill)
    assert run("fit", recipe) == 0
    assert len(steps) == STEPS - step + 1
    assert ending(tmp_path) == ending(uninterrupted)


def test_ctrl_c_ends_the_thread_and_loses_nothing(recipe, uninterrupted, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with monkeypatch.context() as patch:
        die_at(patch, 7, lambda: signal.raise_signal(signal.SIGINT))
        assert run("fit", recipe) == 130
    assert not [thread for thread in threading.enumerate() if thread.name == "stream"]
    assert run("fit", recipe) == 0
    assert ending(tmp_path) == ending(uninterrupted)


def test_an_error_in_a_step_ends_the_thread(recipe, tmp_path, monkeypatch):
    class Broken(Exception):
        pass

    def fail():
        raise Broken

    monkeypatch.chdir(tmp_path)
    die_at(monkeypatch, 3, fail)
    with suppress(Broken):
        run("fit", recipe)
    assert not [thread for thread in threading.enumerate() if thread.name == "stream"]


def test_steps_must_be_said(recipe, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    endless = {**recipe, "trainer": {**recipe["trainer"], "max_steps": -1, "max_epochs": 1}}
    assert run("fit", endless) == 1
    assert "a stream has no end: set trainer.max_steps" in " ".join(capsys.readouterr().err.split())
    assert not Path("data/store").exists(), "it is said before anything is embedded"


def test_gathered_gradients_take_as_many_steps(recipe, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    gathered = {**recipe, "trainer": {**recipe["trainer"], "max_steps": 4, "accumulate_grad_batches": 3}}
    seen = die_at(monkeypatch, 0, kill)
    assert run("fit", gathered) == 0
    assert len(seen) == 12


def test_changed_shards_are_not_trained_on_as_if_they_were_the_same(recipe, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shards = write_shards(tmp_path / "own", [8, 6])
    own = {**recipe, "data": {**recipe["data"], "sources": [{"path": str(shards)}]}}
    with monkeypatch.context() as patch:
        die_at(patch, 4, lambda: signal.raise_signal(signal.SIGINT))
        assert run("fit", own) == 130
    write_shards(tmp_path / "own", [3, 6])
    assert run("fit", own) == 1
    assert "runs/tiny/last.ckpt (step 4) cannot resume" in " ".join(capsys.readouterr().err.split())


def test_preview_shows_streamed_rows(recipe):
    from bindllm.data.source_config import SourceConfig
    from tiny import tiny_tokenizer

    sources = [SourceConfig(**entry) for entry in recipe["data"]["sources"]]
    data = BindData(sources, tokenizer=tiny_tokenizer(), encoders=[])
    lines = list(data.preview(2))
    assert "000.tar sample 1 (00000): " in lines[0]
    assert any("learned 'red square 0<|im_end|>'" in line for line in lines)


@pytest.mark.slow
def test_two_processes_continue_after_kill_9_to_the_same_end(recipe, tmp_path):
    """Both processes of a run die; the same command continues in two."""

    def start(folder: Path, *, dying: bool) -> int:
        folder.mkdir(exist_ok=True)
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(folder)
            file = write_recipe(recipe)
        program = folder / "fit.py"
        arm = (
            "import os, signal\n"
            "from bindllm.training.module import BindModule\n"
            "original = BindModule.training_step\n"
            "def step(module, batch, number):\n"
            "    if number == 6: os.kill(os.getpid(), signal.SIGKILL)\n"
            "    return original(module, batch, number)\n"
            "BindModule.training_step = step\n"
        )
        program.write_text(
            (arm if dying else "") + "import sys\nfrom bindllm.cli import main\nsys.exit(main())\n"
        )
        command = [sys.executable, str(program), "fit", "--config", str(file), "--trainer.devices", "2"]
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(sys.path),
            "OMP_NUM_THREADS": "1",
            # A machine without a network still has this one.
            "GLOO_SOCKET_IFNAME": "lo",
        }
        command += ["--trainer.strategy", "ddp"]
        return subprocess.run(command, cwd=folder, env=environment, timeout=400, check=False).returncode

    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert start(whole, dying=False) == 0
    assert start(killed, dying=True) != 0
    assert start(killed, dying=False) == 0
    assert ending(killed) == ending(whole)
