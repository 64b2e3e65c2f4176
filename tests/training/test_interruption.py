"""An interrupted run that goes on ends in the same bytes as one that was never interrupted."""

import errno
import json
import multiprocessing
import os
import shutil
import signal
from pathlib import Path

import pytest
from PIL import Image

import bindllm.atomic as atomic
import bindllm.model.checkpoint as checkpoint
import bindllm.training.state as state
from bindllm import BindLLM
from bindllm.model import bind_network
from bindllm.training.module import BindModule
from tiny import save_tiny_decoder
from tiny_run import Killed, count_calls, die, run, run_and_die, tiny_recipe, with_bind_tokens

pytestmark = pytest.mark.usefixtures("unmeasured", "work")

FILES = ("checkpoints/tiny/bind.safetensors", "runs/tiny/metrics.csv", "runs/tiny/captions.jsonl")
ADAPTER = "checkpoints/tiny/adapter/adapter_model.safetensors"


@pytest.fixture(scope="module")
def recipe(parts):
    """2 epochs of 5 steps; a state is saved at every step that allows it."""
    return tiny_recipe(parts, trainer={"log_every_n_steps": 1})


@pytest.fixture(scope="module")
def uninterrupted(recipe, tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert run("fit", recipe) == 0
    return ending(folder)


@pytest.fixture(scope="module")
def earlier(recipe, tmp_path_factory):
    """The folder of a finished run with another learning rate."""
    folder = tmp_path_factory.mktemp("earlier")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert run("fit", recipe, "--model.optim.lr", "0.001") == 0
    return folder


def ending(folder: Path) -> dict[str, bytes]:
    """What a finished run leaves that must not depend on interruptions."""
    return {name: (folder / name).read_bytes() for name in FILES}


def check_resumes(recipe, uninterrupted, monkeypatch, *, steps=None):
    """Run the same command again: it takes the steps that are left, and ends in the same bytes."""
    taken = count_calls(monkeypatch, BindModule, "training_step")
    assert run("fit", recipe) == 0
    assert steps is None or len(taken) == steps
    assert ending(Path()) == uninterrupted


# Where a run dies: method, call, whether before or after its work, and the steps that are left for the next run.
PLACES = {
    "in the first step": (BindModule, "training_step", 1, "before", 10),
    "in the middle of an epoch": (BindModule, "training_step", 3, "before", 8),
    "between gradient and optimizer": (BindModule, "on_before_optimizer_step", 4, "before", 7),
    "in the last step of an epoch": (BindModule, "training_step", 5, "after", 6),
    "in a validation": (BindModule, "validation_step", 1, "before", 6),
    "after a validation": (state.RunState, "on_validation_end", 1, "after", 6),
    "at the end of an epoch": (state.RunState, "on_train_epoch_end", 1, "after", 5),
    "in the second epoch": (BindModule, "training_step", 8, "before", 3),
    "when all steps are done": (state.RunState, "on_train_epoch_end", 2, "after", 0),
    "while the best weights are read back": (state.RunState, "best_weights", 1, "before", 0),
}


# Others say as much of these.
SLOW_PLACES = (
    "in the first step",
    "in the last step of an epoch",
    "after a validation",
    "in the second epoch",
    "when all steps are done",
)


@pytest.mark.parametrize(
    "place", [pytest.param(name, marks=pytest.mark.slow if name in SLOW_PLACES else ()) for name in PLACES]
)
def test_a_killed_run_goes_on_to_the_same_end(place, recipe, uninterrupted, monkeypatch):
    owner, name, at, when, left = PLACES[place]
    run_and_die(recipe, monkeypatch, owner, name, at=at, when=when)
    assert not Path("checkpoints/tiny").exists()
    check_resumes(recipe, uninterrupted, monkeypatch, steps=left)


RHYTHMS = {
    "validation within the epoch": {"val_check_interval": 2},
    "validation every second epoch": {
        "check_val_every_n_epoch": 2,
        "max_epochs": 4,
        "limit_train_batches": 3,
    },
    "gradients of two batches": {"accumulate_grad_batches": 2},
    "both": {"accumulate_grad_batches": 2, "val_check_interval": 3},
    "a number of steps, in mixed precision": {"max_steps": 7, "max_epochs": -1, "precision": "bf16-mixed"},
    "a part of the epoch": {"limit_train_batches": 4},
    "no validation": {"limit_val_batches": 0},
    "validation every third batch of the run": {"check_val_every_n_epoch": None, "val_check_interval": 3},
}


# Others say as much of these.
SLOW = (
    "validation within the epoch",
    "gradients of two batches",
    "a part of the epoch",
    "no validation",
    "validation every third batch of the run",
)


@pytest.mark.parametrize(
    "rhythm", [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in RHYTHMS]
)
def test_any_rhythm_of_validation_and_optimizer_goes_on_to_the_same_end(
    rhythm, recipe, tmp_path, monkeypatch
):
    changed = {**recipe, "trainer": {**recipe["trainer"], **RHYTHMS[rhythm]}}
    ends = []
    for killed_at in ((), (4, 3) if rhythm == "both" else (4,)):
        (tmp_path / str(len(ends))).mkdir()
        monkeypatch.chdir(tmp_path / str(len(ends)))
        for at in killed_at:
            run_and_die(changed, monkeypatch, at=at)
        assert run("fit", changed) == 0
        weights, *logs = (Path(name).read_bytes() for name in FILES if Path(name).exists())
        # Lightning counts a row's step one too high after an epoch's end, if the run's length is given in steps.
        ends.append((weights, [log.count(b"\n") for log in logs]))
    assert ends[0] == ends[1]


def test_bind_tokens_that_are_dropped_at_random_go_on_to_the_same_end(recipe, tmp_path, monkeypatch):
    """The number of bind tokens of a step is drawn from torch's generator, which a state holds."""
    changed = with_bind_tokens(recipe, 6)
    drawn = count_calls(monkeypatch, bind_network, "draw_count")
    ends = []
    for killed_at in ((), (4,)):
        folder = tmp_path / str(len(killed_at))
        folder.mkdir()
        monkeypatch.chdir(folder)
        for at in killed_at:
            run_and_die(changed, monkeypatch, at=at)
        assert run("fit", changed) == 0
        ends.append(ending(folder))
    assert ends[0] == ends[1]
    assert len(drawn) == 20


def test_a_second_stage_that_draws_random_numbers_goes_on_to_the_same_end(recipe, tmp_path, monkeypatch):
    """Adapter, a loss of random weight, gathered gradients: killed, it goes on with the next random number."""
    stage = {
        "trainable": ["adapter"],
        "adapter": {"rank": 2},
        "objective": {"class_path": "noisy.Noisy"},
        "optim": {"lr": 0.01},
    }
    changed = {**recipe, "model": {**recipe["model"], **stage}}
    changed["trainer"] = {**recipe["trainer"], "max_epochs": 1, "accumulate_grad_batches": 2}
    ends = []
    for folder in (tmp_path / "whole", tmp_path / "killed"):
        folder.mkdir()
        monkeypatch.chdir(folder)
        if ends:
            run_and_die(changed, monkeypatch, at=4)
            assert Path("runs/tiny/last.ckpt").exists()
        assert run("fit", changed) == 0
        ends.append([Path(name).read_bytes() for name in (ADAPTER, *FILES)])
    assert ends[0] == ends[1]


@pytest.mark.parametrize("file", [".last.ckpt.", ".best-", ".tiny."])
def test_a_full_disk_loses_nothing(file, earlier, recipe, uninterrupted, tmp_path, monkeypatch, capsys):
    """Full at the second save of the state, of the best weights, of the checkpoint folder; then there is room."""
    # Of a finished run: the checkpoint folder is there, and the run may replace it.
    recipe = {**recipe, "overwrite": file == ".tiny."}
    if file == ".tiny.":
        shutil.copytree(earlier, tmp_path, dirs_exist_ok=True)
        before = ending(tmp_path)[FILES[0]]
    original, saves = atomic._sync, []

    def full(path):
        saves.append(path)
        if file in str(path) and (
            file == ".tiny." or len([path for path in saves if file in str(path)]) == 2
        ):
            raise OSError(errno.ENOSPC, "No space left on device")
        original(path)

    with monkeypatch.context() as patch:
        patch.setattr(atomic, "_sync", full)
        assert run("fit", recipe) == 1
    error = capsys.readouterr().err
    assert "No space left on device" in error
    assert "free some disk space" in error
    if file == ".tiny.":
        assert Path(FILES[0]).read_bytes() == before
    check_resumes(recipe, uninterrupted, monkeypatch)


@pytest.mark.parametrize(
    ("name", "at", "left"), [("training_step", 3, 7), ("validation_step", 1, 5), ("validation_step", 2, 0)]
)
def test_ctrl_c_saves_first_and_nothing_is_lost(name, at, left, recipe, uninterrupted, monkeypatch, capsys):
    slow = {**recipe, "save_every_seconds": 1000}
    handler = signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patch:
        count_calls(patch, BindModule, name, at=at, before=lambda: os.kill(os.getpid(), signal.SIGINT))
        assert run("fit", slow) == 130
    assert signal.getsignal(signal.SIGINT) is handler
    assert "the same command resumes the run" in capsys.readouterr().out
    check_resumes(slow, uninterrupted, monkeypatch, steps=left)


def run_killed(recipe: dict, monkeypatch, arm) -> None:
    """Run in a process of its own that ``arm(patch)`` lets die: by kill -9, so that nothing is cleaned up."""

    def start() -> None:
        arm(monkeypatch)
        run("fit", recipe)

    process = multiprocessing.get_context("fork").Process(target=start)
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_half_written(owner, name, *, at):
    """Arms a function that writes a file: the given call of it leaves half of the file."""

    def arm(patch):
        original, calls = getattr(owner, name), []

        def dying(*args, **options):
            original(*args, **options)
            path = next(value for value in args if isinstance(value, str | Path))
            calls.append(path)
            if len(calls) == at:
                os.truncate(path, os.path.getsize(path) // 2)
                kill()

        patch.setattr(owner, name, dying)

    return arm


def die_between_the_renames(patch):
    """Arms the renaming of folders: the earlier one is aside, the new one not in its place yet."""
    original = os.replace

    def dying(source, target):
        original(source, target)
        if str(target).endswith(".tiny.old"):
            kill()

    patch.setattr(os, "replace", dying)


@pytest.mark.parametrize(
    ("owner", "name", "at", "left"), [(state.torch, "save", 3, 8), (state, "write_tensors", 2, 1)]
)
def test_kill_9_inside_a_save_of_the_run_goes_on_from_the_state_before(
    owner, name, at, left, recipe, uninterrupted, monkeypatch
):
    """In a save of the state, and of the best weights."""
    run_killed(recipe, monkeypatch, die_half_written(owner, name, at=at))
    assert [file.suffix for file in Path("runs/tiny").glob(".*")] == [".part"], (
        "it died in the middle of a write"
    )
    check_resumes(recipe, uninterrupted, monkeypatch, steps=left)
    assert not list(Path("runs/tiny").glob(".*"))


@pytest.mark.parametrize(
    ("arm", "name"),
    [(die_half_written(checkpoint, "write_tensors", at=1), "tiny"), (die_between_the_renames, ".tiny.old")],
    ids=["in a file", "between the two renames"],
)
def test_kill_9_inside_a_save_of_the_checkpoint_folder_keeps_the_earlier_one(
    arm, name, earlier, recipe, uninterrupted, tmp_path, monkeypatch
):
    recipe = {**recipe, "overwrite": True}
    shutil.copytree(earlier, tmp_path, dirs_exist_ok=True)
    before = Path("checkpoints/tiny/bind.safetensors").read_bytes()
    run_killed(recipe, monkeypatch, arm)
    assert Path("checkpoints", name, "bind.safetensors").read_bytes() == before != uninterrupted[FILES[0]]
    BindLLM.from_pretrained(Path("checkpoints", name), device="cpu", allow=["tiny.ColorEncoder"])
    check_resumes(recipe, uninterrupted, monkeypatch, steps=0)
    assert os.listdir("checkpoints") == ["tiny"]


@pytest.mark.parametrize(
    ("owner", "name", "signals", "left"),
    [
        (state.torch, "save", 1, 7),
        (state, "write_tensors", 2, 6),
        pytest.param(state.torch, "save", 2, 8, marks=pytest.mark.slow),
        pytest.param(state, "write_tensors", 1, 5, marks=pytest.mark.slow),
    ],
)
def test_ctrl_c_inside_a_save_waits_for_it_and_a_second_one_keeps_the_state_before(
    owner, name, signals, left, recipe, uninterrupted, monkeypatch
):
    """The third save of the state, and the first of the best weights."""

    def interrupt():
        for _ in range(signals):
            signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        count_calls(patch, owner, name, at=3 if name == "save" else 1, after=interrupt)
        assert run("fit", recipe) == 130
    assert not list(Path("runs/tiny").glob(".*"))
    check_resumes(recipe, uninterrupted, monkeypatch, steps=left)


def test_ctrl_c_inside_a_save_of_the_checkpoint_folder_keeps_the_earlier_one(
    earlier, recipe, uninterrupted, tmp_path, monkeypatch
):
    recipe = {**recipe, "overwrite": True}
    shutil.copytree(earlier, tmp_path, dirs_exist_ok=True)
    before = Path("checkpoints/tiny/bind.safetensors").read_bytes()
    with monkeypatch.context() as patch:
        count_calls(
            patch, checkpoint, "write_tensors", at=1, after=lambda: signal.raise_signal(signal.SIGINT)
        )
        assert run("fit", recipe) == 130
    assert Path("checkpoints/tiny/bind.safetensors").read_bytes() == before != uninterrupted[FILES[0]]
    assert os.listdir("checkpoints") == ["tiny"]
    check_resumes(recipe, uninterrupted, monkeypatch, steps=0)


def test_a_run_in_the_background_does_not_hear_the_ctrl_c_of_the_foreground(
    recipe, uninterrupted, tmp_path, monkeypatch
):
    earlier = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with monkeypatch.context() as patch:
            interrupt = lambda: signal.raise_signal(signal.SIGINT)  # noqa: E731
            count_calls(patch, BindModule, "training_step", at=3, before=interrupt)
            assert run("fit", recipe) == 0
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, earlier)
    assert ending(tmp_path) == uninterrupted


def test_early_stopping_is_remembered_by_a_run_that_goes_on(recipe, monkeypatch, capsys):
    """Stopped early, then killed before the folder was written: not one more step may be taken."""
    stopping = {
        "class_path": "EarlyStopping",
        "init_args": {"monitor": "val_loss", "patience": 1, "min_delta": 100},
    }
    early = {**recipe, "trainer": {**recipe["trainer"], "max_epochs": 5, "callbacks": [stopping]}}
    with monkeypatch.context() as patch:
        first = count_calls(patch, BindModule, "training_step")
        count_calls(patch, state.RunState, "best_weights", at=1, before=die)
        with pytest.raises(Killed):
            run("fit", early)
    assert len(first) == 10
    steps = count_calls(monkeypatch, BindModule, "training_step")
    capsys.readouterr()
    assert run("fit", early) == 0
    assert "early stopping, ended the run at step 10" in capsys.readouterr().out
    # More epochs do not undo its decision.
    assert run("fit", early, "--trainer.max_epochs", "8") == 0
    assert "early stopping, ended the run at step 10" in capsys.readouterr().out
    assert steps == []


def test_a_changed_recipe_starts_afresh_and_says_what_changed(recipe, monkeypatch, capsys):
    run_and_die(recipe, monkeypatch, at=4)
    steps = count_calls(monkeypatch, BindModule, "training_step")
    assert run("fit", recipe, "--model.optim.lr", "0.02") == 0
    assert len(steps) == 10
    assert "model.optim.lr: 0.01 -> 0.02" in " ".join(capsys.readouterr().out.split())
    assert Path("runs/tiny.previous/last.ckpt").exists()
    # The command of the run that was set aside resumes it.
    steps.clear()
    assert run("fit", recipe, "--overwrite") == 0
    assert len(steps) == 7


@pytest.mark.parametrize(
    ("split", "change"),
    [
        ("train", "image"),
        ("validation", "caption"),
        pytest.param("train", "caption", marks=pytest.mark.slow),
    ],
)
def test_changed_content_of_as_many_rows_is_noticed(split, change, recipe, monkeypatch, capsys):
    shutil.copytree(recipe["data"]["sources"][0]["path"], "pictures")
    own = {**recipe, "data": {**recipe["data"], "sources": [{"path": "pictures"}]}}
    run_and_die(own, monkeypatch, at=4)
    table = Path("pictures/captions.jsonl")
    rows = [json.loads(line) for line in table.read_text().splitlines()]
    changed = next(row for row in rows if row["split"] == split)
    if change == "image":
        Image.new("RGB", (24, 24)).save(Path("pictures", changed["image"]))
    else:
        # As many tokens as before.
        changed["caption"] = changed["caption"].replace("square", "circle")
    table.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert run("fit", own) == 1
    assert "rows or media of pictures are as many, but not the same" in capsys.readouterr().err


@pytest.mark.parametrize("changed", ["decoder decoder", "checkpoint start"])
def test_a_state_meets_only_the_decoder_and_the_start_that_it_was_saved_with(
    changed, recipe, monkeypatch, capsys
):
    shutil.copytree(recipe["model"]["decoder"]["name"], "decoder")
    own = {**recipe, "model": {**recipe["model"], "decoder": {"name": "decoder", "dtype": "float32"}}}
    base = {**own, "output": "start"}
    if changed == "checkpoint start":
        assert run("fit", base, "--trainer.max_epochs", "1") == 0
        own["model"]["init_from"] = "start"
    run_and_die(own, monkeypatch, at=4)
    if changed == "checkpoint start":
        base["model"] = {name: value for name, value in own["model"].items() if name != "init_from"}
        assert run("fit", base) == 0
    else:
        save_tiny_decoder(Path("decoder"), seed=1)
    assert run("fit", own) == 1
    assert f"another {changed} is in its place" in " ".join(capsys.readouterr().err.split())


def test_changed_data_are_not_trained_on_as_if_they_were_the_same(recipe, monkeypatch, capsys):
    shutil.copytree(recipe["data"]["sources"][0]["path"], "pictures")
    own = {**recipe, "data": {**recipe["data"], "sources": [{"path": "pictures"}]}}
    run_and_die(own, monkeypatch, at=4)
    table = Path("pictures/captions.jsonl")
    whole = table.read_text()
    table.write_text("".join(whole.splitlines(keepends=True)[:-1]))
    assert run("fit", own) == 1
    told = capsys.readouterr().err
    assert "runs/tiny/last.ckpt (step 3)" in told
    assert "pictures: 28 images, 28 captions then, 27 images, 27 captions now" in told
    # The advice keeps the state: with the rows restored, the run resumes.
    assert run("fit", own, "--output", "checkpoints/other") == 0
    table.write_text(whole)
    steps = count_calls(monkeypatch, BindModule, "training_step")
    assert run("fit", own) == 0
    assert len(steps) == 7
