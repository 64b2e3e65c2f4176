"""Two processes take the steps of one that gathers the gradients of two batches: averaged, spread, or interrupted."""

import csv
import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from bindllm import BindLLM
from bindllm.model import bind_network
from bindllm.training.callbacks import SampleCaptions
from bindllm.training.module import BindModule
from bindllm.training.state import AtomicCheckpointIO, RunState
from tiny_run import run, tiny_recipe, with_bind_tokens, write_recipe
from two_processes import kill_in, run_pair, told

pytestmark = pytest.mark.usefixtures("work")

DDP = {"devices": 2, "strategy": "ddp"}
SHARDED = {
    "devices": 2,
    "strategy": {"class_path": "bindllm.training.strategies.ShardedDecoder"},
}
WEIGHTS = ("checkpoints/tiny/bind.safetensors", "checkpoints/tiny/adapter/adapter_model.safetensors")


@pytest.fixture(scope="module")
def recipe(parts):
    """20 training rows in 4 batches of 5, two for each device; their captions differ in length."""
    recipe = tiny_recipe(
        parts,
        model={
            "trainable": ["bind", "inject", "adapter"],
            "adapter": {"rank": 2},
            "checkpoint_activations": True,
        },
        trainer={"log_every_n_steps": 1},
    )
    recipe["model"]["optim"]["lr"] = 0.003
    recipe["data"]["batch_size"] = 5
    return recipe


def with_trainer(recipe, **options):
    return {**recipe, "trainer": {**recipe["trainer"], **options}}


def print_answer(run):
    """In place of the measurement: whether the first process has a whole decoder that answers."""
    model = run.module.model
    names = {type(value).__name__ for value in model.decoder.parameters()}
    print(sorted(names), repr(model.generate("Describe.", max_new_tokens=3)))
    return 0


@pytest.fixture(scope="module", autouse=True)
def _unmeasured():
    """Long answers, and the measurement, are not what these tests are about."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("bindllm.training.run.Run._measure", print_answer)
        patch.setattr("bindllm.cli.recipes.fit.SampleCaptions", partial(SampleCaptions, max_new_tokens=4))
        yield


@pytest.fixture(scope="module")
def folders(recipe, tmp_path_factory):
    """The folders of one process and of two that are never stopped, and one that nothing has run in."""
    folders = {name: tmp_path_factory.mktemp(name) for name in ("one", "ddp", "sharded")}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folders["one"])
        assert run("fit", with_trainer(recipe, accumulate_grad_batches=2)) == 0
        patch.chdir(folders["ddp"])
        codes = run_pair(lambda _: run("fit", with_trainer(recipe, **DDP)))
        assert codes == [0, 0], told("err", 0)
    return folders


def logged(folder, name):
    with (folder / "runs/tiny/metrics.csv").open(newline="") as stream:
        return [float(row[name]) for row in csv.DictReader(stream) if row[name]]


def test_two_processes_take_the_steps_of_one_with_gathered_gradients(folders):
    one, two = folders["one"], folders["ddp"]
    assert len(logged(two, "train_loss")) == 4
    for name in ("train_loss", "val_loss"):
        assert logged(two, name) == pytest.approx(logged(one, name), abs=1e-5)
    assert logged(two, "gradient_norm") == pytest.approx(logged(one, "gradient_norm"), rel=1e-4)
    for file in WEIGHTS:
        ours, theirs = (load_file(folder / file) for folder in (two, one))
        assert ours.keys() == theirs.keys()
        for name in ours:
            torch.testing.assert_close(ours[name], theirs[name], atol=1e-4, rtol=1e-4)
    assert load_file(two / WEIGHTS[0])["injection.gates"].abs().max() > 0


def test_a_pair_that_shares_the_decoder_and_loses_one_ends_in_the_bytes_of_ddp(recipe, folders, monkeypatch):
    """One is killed in the last step, and the other fails; started again, they end as if nothing had happened."""
    monkeypatch.chdir(folders["sharded"])
    sharded = with_trainer(recipe, **SHARDED)

    def work(rank):
        if rank == 1:
            kill_in(BindModule, "training_step", 4)
        return run("fit", sharded)

    assert run_pair(work) == [1, -signal.SIGKILL], told("err", 0)
    assert AtomicCheckpointIO().load_checkpoint("runs/tiny/last.ckpt")["global_step"] == 3
    assert run_pair(lambda _: run("fit", sharded)) == [0, 0], told("err", 0)
    assert "resuming the interrupted run" in told("out", 0)
    for file in (*WEIGHTS, "runs/tiny/metrics.csv", "runs/tiny/captions.jsonl"):
        assert Path(file).read_bytes() == (folders["ddp"] / file).read_bytes(), file
    # The first process alone saves and measures, and does so with a whole decoder.
    assert told("out", 0).count("['Parameter']") == 1
    assert "Parameter" not in told("out", 1)
    assert Path("runs/tiny/finished").exists()


@pytest.mark.parametrize("tokens", [4, "all"])
def test_processes_may_drop_different_numbers_of_bind_tokens(tokens, recipe, tmp_path, monkeypatch):
    """Every trained tensor has a gradient in each, or DDP would wait for it; a shared decoder changes no bit."""
    several, ends = with_bind_tokens(recipe, tokens), []

    def work(rank, changed):
        bind_network.draw_count = lambda most: most if rank else 1
        bind_network.draw_alone = lambda shape: torch.full(shape, not rank)
        return run("fit", changed)

    # What is shared is the decoder, whatever the number of bind tokens.
    for name, options in {"ddp": DDP, **({"sharded": SHARDED} if tokens == "all" else {})}.items():
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        changed = with_trainer(several, max_epochs=1, **options)
        assert run_pair(partial(work, changed=changed)) == [0, 0], told("err", 0)
        ends.append([Path(file).read_bytes() for file in WEIGHTS])
    assert ends[0] == ends[-1]
    weights = load_file(tmp_path / "ddp" / WEIGHTS[0])
    assert weights["injection.gates"].abs().max() > 0


def test_bag_of_words_with_a_sharded_decoder_is_refused(recipe):
    pretrained = {**recipe, "model": {**recipe["model"], "bag_of_words": 1}}
    assert run_pair(lambda _: run("fit", with_trainer(pretrained, **SHARDED))) == [1, 1]
    assert "does not work with DeepSpeed or a sharded decoder" in told("err", 0)


def test_two_processes_measure_the_same_loss_as_one_and_one_of_them_says_it(
    recipe, folders, monkeypatch, capsys
):
    monkeypatch.chdir(folders["ddp"])
    assert run("test", recipe) == 0
    alone = capsys.readouterr().out
    assert alone.startswith("test_loss ")
    assert run_pair(lambda _: run("test", with_trainer(recipe, **DDP))) == [0, 0], told("err", 0)
    assert (told("out", 0), told("out", 1)) == (alone, "")


def test_a_loss_that_is_not_finite_on_one_device_stops_all_and_one_of_them_keeps_the_weights(recipe):
    original = BindModule.training_step

    def work(rank):
        def broken(self, batch, number):
            if rank == 1 and self.global_step == 1:
                batch["embeddings"] = batch["embeddings"] * float("nan")
            return original(self, batch, number)

        BindModule.training_step = broken
        if rank == 1:
            BindLLM.save_pretrained = lambda *_, **__: pytest.fail("two processes write one folder")
        return run("fit", with_trainer(recipe, **DDP))

    assert run_pair(work) == [1, 1]
    for rank in (0, 1):
        assert told("err", rank).count("error: ") == 1, told("err", rank)
        assert "the loss is not finite at step 2; the weights from before it are kept in" in told("err", rank)
    kept = load_file("runs/tiny.last_good/bind.safetensors")
    assert all(value.isfinite().all() for value in kept.values())


def test_a_run_that_diverged_fails_only_in_the_process_that_saves_its_best_weights(recipe):
    """A launcher kills all processes as soon as one of them has failed."""

    def work(_):
        RunState.problem = lambda *_: "training has diverged"
        return run("fit", with_trainer(recipe, max_epochs=1, **DDP))

    assert run_pair(work) == [1, 0]
    assert [told("err", rank).count("diverged") for rank in (0, 1)] == [1, 0]
    assert Path(WEIGHTS[0]).exists()


@pytest.mark.slow
def test_an_adapter_that_is_left_as_it_is_stays_whole_beside_a_shared_decoder(recipe):
    frozen = {**recipe, "model": {**recipe["model"], "trainable": ["bind", "inject"]}}
    assert run_pair(lambda _: run("fit", with_trainer(frozen, max_epochs=1, **SHARDED))) == [0, 0], told(
        "err", 0
    )
    tuned = load_file(WEIGHTS[1])
    assert {
        tuple(value.shape) for name, value in tuned.items() if name.endswith("down_proj.lora_A.weight")
    } == {(2, 64)}


@pytest.mark.slow
def test_processes_that_lightning_starts_end_in_the_same_bytes(recipe, folders):
    command = [
        sys.executable,
        "-m",
        "bindllm.cli",
        "fit",
        "--config",
        str(write_recipe(with_trainer(recipe, **DDP))),
    ]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    for file in WEIGHTS:
        assert Path(file).read_bytes() == (folders["ddp"] / file).read_bytes(), file
    assert done.stdout.count("trained model:") == 1, "one process alone saves and measures"
    assert Path("checkpoints/tiny/report.html").is_file()
