"""A finished run is continued or kept, never replaced without a word; its weights are those that were measured."""

import csv
import math
import shutil
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from safetensors.torch import load_file

from bindllm.objectives import Objective
from bindllm.training.module import BindModule
from tiny_run import run, tiny_recipe

pytestmark = pytest.mark.usefixtures("unmeasured", "work")

WEIGHTS = Path("checkpoints/tiny/bind.safetensors")
# With these a run of one epoch takes the same steps as the first epoch of a longer one.
STEADY = {"lr": 0.01, "warmup": 0, "final_lr": 1.0}


@pytest.fixture(scope="module")
def finished(parts, tmp_path_factory):
    """A finished run of one epoch, and the bytes of its weights."""
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert run("fit", one_epoch(parts)) == 0
        return folder, WEIGHTS.read_bytes()


@pytest.fixture
def again(finished, parts, tmp_path, monkeypatch):
    """Return a function that runs the finished recipe with further options in a copy of its folder."""
    shutil.copytree(finished[0], tmp_path / "work")
    monkeypatch.chdir(tmp_path / "work")
    return lambda *options: run("fit", one_epoch(parts), *options)


def one_epoch(parts):
    return tiny_recipe(parts, model={"optim": STEADY}, trainer={"max_epochs": 1, "log_every_n_steps": 1})


def rates() -> list[tuple[int, float]]:
    with Path("runs/tiny/metrics.csv").open(newline="") as stream:
        return [(int(row["step"]), float(row["lr"])) for row in csv.DictReader(stream) if row["lr"]]


def test_the_same_command_says_that_it_is_done(again, finished, capsys):
    assert again() == 0
    assert "trained by this recipe already" in capsys.readouterr().out
    assert again("--output", "./checkpoints/tiny/") == 0
    assert WEIGHTS.read_bytes() == finished[1]


@pytest.mark.parametrize(
    "options",
    [
        ("--model.optim.lr", "0.02"),
        ("--resume", "false"),
        ("--seed_everything", "1"),
        ("--trainer.max_steps", "3"),
    ],
)
def test_another_run_does_not_replace_a_finished_one(options, again, finished, capsys):
    assert again(*options) == 1
    assert "--overwrite" in capsys.readouterr().err
    assert WEIGHTS.read_bytes() == finished[1]
    # Nothing was set aside: the run can still be continued.
    assert again() == 0


def test_overwrite_replaces_it(again, finished):
    assert again("--model.optim.lr", "0.02", "--overwrite") == 0
    assert WEIGHTS.read_bytes() != finished[1]


def test_a_rehearsal_saves_nothing(again, capsys):
    def files() -> dict[Path, int]:
        found = (path for folder in ("checkpoints", "runs") for path in Path(folder).rglob("*"))
        return {path: path.stat().st_mtime_ns for path in found if path.is_file() and path.suffix != ".lock"}

    before = files()
    assert again("--trainer.fast_dev_run", "true") == 0
    assert "nothing was saved" in capsys.readouterr().out
    assert files() == before


@pytest.mark.parametrize(
    "option", ["--trainer.max_epochs=0", "--trainer.max_steps=0", "--trainer.limit_train_batches=0"]
)
def test_a_run_without_steps_is_refused(option, parts, capsys):
    assert run("fit", one_epoch(parts), option) == 1
    assert "no step would be taken" in capsys.readouterr().err
    assert not WEIGHTS.exists()


def test_more_epochs_continue_a_finished_run_as_if_it_had_been_asked_for_them(
    again, parts, tmp_path, monkeypatch, capsys
):
    steps = []
    original = BindModule.training_step
    monkeypatch.setattr(BindModule, "training_step", lambda *args: steps.append(1) or original(*args))
    assert again("--trainer.max_epochs", "2") == 0
    assert len(steps) == 5
    assert "trainer.max_epochs: 1 -> 2" in " ".join(capsys.readouterr().out.split())
    continued = WEIGHTS.read_bytes()
    (tmp_path / "whole").mkdir()
    monkeypatch.chdir(tmp_path / "whole")
    assert run("fit", one_epoch(parts), "--trainer.max_epochs", "2") == 0
    assert WEIGHTS.read_bytes() == continued


def test_more_steps_continue_a_run_that_ended_within_an_epoch(parts, tmp_path, monkeypatch):
    recipe, ends = one_epoch(parts), []
    recipe["trainer"]["max_epochs"] = -1
    for name, lengths in {"whole": (12,), "continued": (7, 12)}.items():
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        for steps in lengths:
            assert run("fit", recipe, "--trainer.max_steps", str(steps)) == 0
        ends.append(WEIGHTS.read_bytes())
    assert ends[0] == ends[1]


def test_the_rates_of_a_continued_run_are_those_of_a_run_of_its_length(again, parts, tmp_path, monkeypatch):
    decaying = ("--model.optim.final_lr", "0.1")
    assert again(*decaying, "--overwrite") == 0
    assert again(*decaying, "--trainer.max_epochs", "2") == 0
    continued = rates()
    (tmp_path / "whole").mkdir()
    monkeypatch.chdir(tmp_path / "whole")
    assert run("fit", one_epoch(parts), *decaying, "--trainer.max_epochs", "2") == 0
    assert continued[5:] == rates()[5:]
    assert continued[:5] != rates()[:5]


def test_a_lost_checkpoint_is_written_again_from_the_state(again, finished):
    shutil.rmtree("checkpoints")
    assert again() == 0
    assert WEIGHTS.read_bytes() == finished[1]


def test_best_weights_that_are_lost_are_named(again, monkeypatch, capsys):
    Path("runs/tiny/best-5.safetensors").unlink()
    monkeypatch.setattr(Objective, "held_out", lambda *_: (torch.tensor(99.0), 1, {}))
    assert again("--trainer.max_epochs", "2") == 1
    message = capsys.readouterr().err
    assert "best-5.safetensors" in message
    assert "weights with the lowest validation loss" in message


@pytest.mark.parametrize("output", ["notes.txt", "notes.txt/model"])
def test_an_output_that_cannot_be_written_is_refused_before_training(output, again, monkeypatch, capsys):
    Path("notes.txt").write_text("mine")
    monkeypatch.setattr(BindModule, "training_step", None)
    assert again("--output", output) == 1
    assert output in capsys.readouterr().err


def test_paths_of_a_recipe_may_start_at_the_home_folder(parts, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    recipe = one_epoch(parts) | {"output": "~/model"}
    recipe["data"]["store"] = "~/store"
    assert run("fit", recipe, "--data.sources", f"[{{path: {parts / 'pictures'}, limit: 8}}]") == 0
    assert (tmp_path / "home/model/bind.safetensors").is_file()
    assert list((tmp_path / "home/store").iterdir())
    assert not Path("~").exists()


def test_an_output_that_is_a_link_is_continued(parts):
    Path("checkpoints").mkdir()
    Path("checkpoints/tiny").symlink_to("../disk/tiny")
    for epochs in ("1", "2"):
        assert run("fit", one_epoch(parts), "--trainer.max_epochs", epochs) == 0
    assert Path("checkpoints/tiny").is_symlink()
    assert Path("disk/tiny/bind.safetensors").is_file()


class Shift(Callback):
    """Exchanges the gates during each validation, as an average of the weights would."""

    def on_validation_epoch_start(self, trainer, pl_module):
        pl_module.state_dict()["injection.gates"].add_(1)

    def on_validation_epoch_end(self, trainer, pl_module):
        pl_module.state_dict()["injection.gates"].sub_(1)


def with_callback(recipe, path, **arguments):
    callback = {"class_path": path, "init_args": arguments}
    return {**recipe, "trainer": {**recipe["trainer"], "callbacks": [callback]}}


def test_the_saved_weights_are_those_that_were_validated(again, parts, finished):
    recipe = with_callback(one_epoch(parts), "training.test_finished_runs.Shift")
    assert run("fit", recipe, "--overwrite") == 0
    shifted = load_file(WEIGHTS)["injection.gates"]
    assert torch.allclose(shifted, load_file(finished[0] / WEIGHTS)["injection.gates"] + 1)


@pytest.mark.parametrize("rhythm", [{}, pytest.param({"limit_val_batches": 0}, marks=pytest.mark.slow)])
def test_an_average_of_the_weights_is_measured_saved_and_resumed(rhythm, parts, tmp_path, monkeypatch):
    recipe = with_callback(one_epoch(parts), "bindllm.training.callbacks.AverageWeights", decay=0.5)
    recipe["trainer"] |= rhythm
    ends, kept = [], []
    original = BindModule.training_step

    def step(self, batch, number):
        kept.append(self.state_dict()["injection.gates"].clone())
        if len(kept) == 4 and len(ends) == 1:
            raise KeyboardInterrupt
        return original(self, batch, number)

    monkeypatch.setattr(BindModule, "training_step", step)
    for name in ("whole", "stopped"):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        kept.clear()
        if ends:
            assert run("fit", recipe) == 130
        assert run("fit", recipe) == 0
        ends.append(WEIGHTS.read_bytes())
        if len(ends) == 1:
            trained = kept.copy()
    assert ends[0] == ends[1]
    average = trained[0]
    for gates in trained[1:]:
        average = average.lerp(gates, 0.5)
    assert run("validate", recipe, "--trainer.limit_val_batches", "1.0") == 0
    last = load_file(WEIGHTS)["injection.gates"]
    # The trained gates after the last step are not known here; the average contains half of them.
    assert torch.allclose(last.sub(average * 0.5).mul(2).sign(), trained[-1].sign())


@pytest.mark.parametrize(
    "rhythm",
    [
        {"max_steps": 7, "max_epochs": -1},
        {"check_val_every_n_epoch": 2},
        {"val_check_interval": 2},
        {"check_val_every_n_epoch": None, "val_check_interval": 3},
    ],
)
def test_the_last_step_is_always_validated(rhythm, parts, capsys):
    recipe = one_epoch(parts)
    recipe["trainer"] |= rhythm
    last = rhythm.get("max_steps", 5)
    assert run("fit", recipe) == 0
    with Path("runs/tiny/metrics.csv").open(newline="") as stream:
        validated = [int(row["step"]) for row in csv.DictReader(stream) if row["val_loss"]]
    assert validated[-1] == last - 1
    assert f"(step {last} of {last}: the lowest validation loss" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("value", "stops"),
    [
        (math.nan, True),
        (-math.inf, False),
        pytest.param(math.nan, False, marks=pytest.mark.slow),
        pytest.param(-math.inf, True, marks=pytest.mark.slow),
    ],
)
def test_a_validation_loss_that_is_not_finite_is_never_the_best(value, stops, parts, monkeypatch, capsys):
    """With early stopping it ends the run: with an error, and the best weights before it."""
    recipe = one_epoch(parts)
    recipe["trainer"]["max_epochs"] = 3
    if stops:
        recipe = with_callback(recipe, "EarlyStopping", monitor="val_loss")
    losses = iter((2.0, value, 1.0))
    monkeypatch.setattr(Objective, "held_out", lambda *_: (torch.tensor(next(losses)), 1, {}))
    code = run("fit", recipe)
    told = capsys.readouterr()
    step = 5 if stops else 15
    assert f"(step {step} of" in " ".join(told.out.split())
    assert code == (1 if stops else 0)
    assert ("training has diverged" in told.err) == stops


def test_a_run_whose_validation_is_never_finite_saves_nothing(parts, monkeypatch, capsys):
    monkeypatch.setattr(Objective, "held_out", lambda *_: (torch.tensor(math.nan), 1, {}))
    # The same command resumes a run that has no step left, and must find the same.
    for _ in range(2):
        assert run("fit", one_epoch(parts)) == 1
        assert "The validation loss was never finite. Nothing was saved" in capsys.readouterr().err
    assert not WEIGHTS.exists()


def test_gradients_that_are_zero_in_every_step_end_the_run(parts, capsys):
    """The bind network acts through gates that are zero and frozen."""
    assert run("fit", one_epoch(parts), "--model.trainable", "[bind]") == 1
    assert "exactly zero in all 5 steps" in capsys.readouterr().err
    assert not WEIGHTS.exists()


@pytest.mark.parametrize(
    ("option", "told"),
    [
        ("--trainer.accumulate_grad_batches=-1", "trainer.accumulate_grad_batches is -1"),
        ("--trainer.gradient_clip_val=-0.5", "trainer.gradient_clip_val is -0.5"),
        ("--trainer.devices=[0, 1]", "trainer: `devices` selected with `CPUAccelerator`"),
    ],
)
@pytest.mark.parametrize("command", ["fit", "check"])
def test_options_of_the_trainer_that_cannot_work_are_refused(command, option, told, parts, capsys):
    assert run(command, one_epoch(parts), option) == 1
    assert told in " ".join(" ".join(capsys.readouterr()).split())


def test_a_misspelled_metric_ends_the_run_after_one_step(parts, capsys):
    recipe = with_callback(one_epoch(parts), "EarlyStopping", monitor="val_los")
    assert run("fit", recipe) == 1
    assert "monitors val_los, which is not measured. Did you mean 'val_loss'?" in capsys.readouterr().err
    assert not Path("runs/tiny/last.ckpt").exists()


@pytest.mark.parametrize("command", ["fit", "check"])
def test_a_logger_that_is_not_installed_is_one_line(command, parts, capsys):
    recipe = one_epoch(parts)
    recipe["trainer"]["logger"] = {"class_path": "WandbLogger", "init_args": {"project": "x"}}
    assert run(command, recipe) == 1
    told = " ".join(" ".join(capsys.readouterr()).split())
    assert "wandb" in told
    assert "Traceback" not in told
