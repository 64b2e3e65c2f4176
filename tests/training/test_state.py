import io
import os
import pickle
import random
import resource
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import bindllm.training.state as state
from bindllm.errors import CheckpointError, InputError, TrainingError
from bindllm.parallel import Processes
from bindllm.training.callbacks import RunLog
from bindllm.training.state import AtomicCheckpointIO, generator_states, restore_generators


def test_a_state_comes_back_without_unpickling(tmp_path):
    content = {"state_dict": {"a": torch.arange(3)}, "loops": {"step": 4, "names": ["x"]}, "score": None}
    AtomicCheckpointIO().save_checkpoint(content, tmp_path / "last.ckpt")
    back = AtomicCheckpointIO().load_checkpoint(tmp_path / "last.ckpt")
    assert torch.equal(back["state_dict"]["a"], torch.arange(3))
    assert back["loops"] == content["loops"]
    assert os.listdir(tmp_path) == ["last.ckpt"]


class Bomb:
    def __reduce__(self):
        return (os.mkdir, ("exploded",))


def test_code_in_a_state_is_refused_and_never_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": {}, "extra": Bomb()}, "last.ckpt")
    with pytest.raises(CheckpointError, match="--resume false"):
        AtomicCheckpointIO().load_checkpoint("last.ckpt", weights_only=False)
    (tmp_path / "plain.ckpt").write_bytes(pickle.dumps(Bomb(), protocol=2))
    with pytest.raises(CheckpointError):
        AtomicCheckpointIO().load_checkpoint("plain.ckpt")
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("kept", [-400, 0])
def test_a_truncated_state_is_named(kept, tmp_path):
    file = tmp_path / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint({"a": torch.arange(1000)}, file)
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(CheckpointError, match=r"last.ckpt cannot be read"):
        AtomicCheckpointIO().load_checkpoint(file)


@contextmanager
def full_disk():
    """Let the system refuse to write more than 10 kB into a file."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("save", [torch.save, lambda content, path: save_file(content, path)])
def test_the_earlier_file_outlives_a_full_disk(save, tmp_path):
    file = tmp_path / "last"
    with state._writing(file) as part:
        save({"a": torch.zeros(10)}, part)
    before = file.read_bytes()
    with (
        full_disk(),
        pytest.raises(TrainingError, match="free some disk space"),
        state._writing(file) as part,
    ):
        save({"a": torch.zeros(10_000)}, part)
    assert file.read_bytes() == before
    assert os.listdir(tmp_path) == ["last"]


def test_the_state_of_another_number_of_processes_is_refused(tmp_path):
    kept = state.RunState(tmp_path / "mine", RunLog(tmp_path / "mine"))
    saved = kept.state_dict()
    kept.load_state_dict(saved)
    with pytest.raises(InputError, match=r"mine had 8 processes, this one has 1.*--output"):
        kept.load_state_dict({**saved, "num_processes": 8})


def test_a_state_of_another_version_is_refused_with_what_to_do(tmp_path):
    run = state.RunState(tmp_path / "tiny", RunLog(tmp_path))
    earlier = {
        name: value for name, value in run.state_dict().items() if name not in ("rows", "num_processes")
    }
    with pytest.raises(
        CheckpointError, match=r"tiny was saved by another version of bindllm.*--resume false"
    ):
        run.load_state_dict(earlier)


CPU = torch.device("cpu")


def draw():
    return (
        torch.rand(3).tolist(),
        np.random.rand(3).tolist(),
        np.random.randn(),
        random.random(),
        random.gauss(),
    )


def test_generators_go_on_where_they_were_after_a_file():
    file = io.BytesIO()
    draw()  # each kind of normal number leaves a second one behind
    torch.save(generator_states(Processes(), CPU), file)
    first = draw()
    assert draw() != first
    file.seek(0)
    restore_generators(torch.load(file, weights_only=True), Processes(), CPU)
    assert draw() == first


def test_each_process_takes_its_own_state():
    states = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        states += generator_states(Processes(), CPU)
    restore_generators(states, Processes(1, 2), CPU)
    second = torch.rand(3)
    torch.manual_seed(2)
    assert torch.equal(torch.rand(3), second)
