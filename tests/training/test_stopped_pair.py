"""Two processes of which one or both die, at moments that a seed chooses, go on together to the same end."""

import random
import signal
from pathlib import Path

import pytest

import bindllm.training.state as state
from bindllm.training.module import BindModule
from tiny_run import run, tiny_recipe
from two_processes import kill_in, run_pair, told

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("unmeasured", "work")]

FILES = (
    "checkpoints/tiny/bind.safetensors",
    "checkpoints/tiny/adapter/adapter_model.safetensors",
    "runs/tiny/metrics.csv",
    "runs/tiny/captions.jsonl",
)


@pytest.fixture(scope="module")
def recipe(parts):
    """2 epochs of 3 steps for each process; a state is saved at every step that allows it."""
    return tiny_recipe(
        parts,
        model={
            "trainable": ["bind", "inject", "adapter"],
            "adapter": {"rank": 2},
            "objective": {"class_path": "noisy.Noisy"},
        },
        trainer={"log_every_n_steps": 1, "devices": 2, "strategy": "ddp"},
    )


@pytest.fixture(scope="module")
def uninterrupted(recipe, tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert run_pair(lambda _: run("fit", recipe)) == [0, 0], told("err", 0)
    return ending(folder)


def ending(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in FILES}


def dying(recipe, places):
    """Return what each process does: it dies by kill -9 in the given call of a method, if one is given for it."""

    def work(rank):
        for place in places.get(rank, ()):
            kill_in(*place)
        return run("fit", recipe)

    return work


def check_it_goes_on(recipe, uninterrupted):
    if Path("runs/tiny/last.ckpt").exists():
        state.AtomicCheckpointIO().load_checkpoint("runs/tiny/last.ckpt")
    assert run_pair(lambda _: run("fit", recipe)) == [0, 0], told("err", 0)
    assert ending(Path()) == uninterrupted


PLACES = [
    (BindModule, "training_step", 6),
    (BindModule, "on_before_optimizer_step", 6),
    (BindModule, "validation_step", 2),
    (state.torch, "save", 6),
    (state.RunState, "on_train_epoch_end", 2),
    (state, "write_tensors", 2),
]


@pytest.mark.parametrize("seed", range(5))
def test_pairs_that_die_at_random_moments_go_on_to_the_same_bytes(seed, recipe, uninterrupted):
    """One or both, twice in a row, anywhere: in a step, a validation, a save."""
    choose = random.Random(seed)
    for _ in range(2):
        places = {}
        for rank in choose.choice([[0], [1], [0, 1]]):
            owner, name, last = choose.choice(PLACES if rank == 0 else PLACES[:3])
            places[rank] = [(owner, name, choose.randint(1, last))]
        codes = run_pair(dying(recipe, places))
        assert all(code in (0, 1, -signal.SIGKILL) for code in codes), (places, codes)
        if codes == [0, 0]:
            break
    check_it_goes_on(recipe, uninterrupted)
