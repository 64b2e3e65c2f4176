"""Reference log-probabilities: computed once, kept with a fingerprint, the same in all parts of a run."""

import threading

import pytest
import torch
from lightning.pytorch.callbacks import Checkpoint
from safetensors import safe_open
from safetensors.torch import load_file

from bindllm.data.collate import collate
from bindllm.errors import TrainingError
from bindllm.model.bind_network import BindConfig
from bindllm.model.injection import InjectConfig
from bindllm.objectives import DPO, KTO
from bindllm.objectives.base import answer_log_probs
from bindllm.objectives.reference import _arranged, _compute
from bindllm.parallel import Processes, RunContext
from preference_parts import Preferences, build, lookup, pairs, row
from tiny import TokenEncoder
from tiny_run import make_trainer

pytestmark = pytest.mark.usefixtures("silent")


@pytest.fixture
def computed(monkeypatch):
    """Collects the number of rows of each batch whose reference is computed."""
    rows = []

    def counting(model, batch):
        rows.append(len(batch["labels"]))
        return answer_log_probs(model, batch)

    monkeypatch.setattr("bindllm.objectives.reference.answer_log_probs", counting)
    return rows


def fit(decoder, folder, samples=None, objective=None, *, state=None, lookup=lookup, epochs=1, **changes):
    module = build(decoder, objective or DPO(), **changes)
    data = Preferences(pairs() if samples is None else samples, lookup=lookup)
    trainer = make_trainer(folder, max_epochs=epochs)
    trainer.fit(module, data, ckpt_path=state)
    return module, trainer


def test_they_are_those_of_the_model_as_it_started_whatever_has_been_learnt_since(decoder, tmp_path):
    module, _ = fit(decoder, tmp_path, epochs=3)
    start = build(decoder, None)
    start.configure_model()
    samples = pairs()
    batch = collate(samples, lookup, pad_id=0)
    with torch.no_grad():
        expected = answer_log_probs(start.model.eval(), batch)[0]
        trained = answer_log_probs(module.model.eval(), batch)[0]
    found = module.objective.add_reference(batch, "validation")["reference"]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    assert (found - trained).abs().max() > 0.1
    kept = load_file(tmp_path / "reference.safetensors")
    assert {name: list(value.shape) for name, value in kept.items()} == {
        "train": [12, 2],
        "validation": [12, 2],
    }
    with safe_open(tmp_path / "reference.safetensors", framework="pt") as stream:
        assert len(stream.metadata()["fingerprint"]) == 64


def test_a_second_run_of_the_same_rows_and_weights_computes_nothing(decoder, tmp_path, computed):
    first, _ = fit(decoder, tmp_path)
    # Both splits, two answers each, in batches of twice the rows of a training batch.
    assert computed == [12] * 4
    second, _ = fit(decoder, tmp_path)
    assert computed == [12] * 4
    for name, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[name])


@pytest.mark.parametrize("what", ["answer", "picture", "order", "weights", "file"])
def test_other_rows_or_weights_are_computed_afresh(what, decoder, tmp_path, computed, monkeypatch):
    fit(decoder, tmp_path)
    before, samples, options = len(computed), pairs(), {}
    if what == "answer":
        samples[3] = row(3, "green", "green", "gray")
    elif what == "picture":
        options["lookup"] = lambda groups: lookup(groups, turn=1)
    elif what == "order":
        samples = [row(n, *key) for n, key in enumerate([("red", "red", "blue"), *[("blue", "a", "b")] * 11])]
    elif what == "weights":
        monkeypatch.setenv("PL_GLOBAL_SEED", "5")
    else:
        file = tmp_path / "reference.safetensors"
        file.write_bytes(file.read_bytes()[:-9])
    fit(decoder, tmp_path, samples, **options)
    assert len(computed) == 2 * before


class Stop(Exception):
    pass


class StopAfterEpoch(Checkpoint):
    """Saves a state after the first epoch, and dies in the second."""

    def __init__(self, file):
        self.file = file

    def on_train_epoch_end(self, trainer, module):
        if trainer.current_epoch == 0:
            trainer.save_checkpoint(self.file)

    def on_train_batch_start(self, trainer, *_):
        if trainer.current_epoch == 1:
            raise Stop


def test_a_resumed_run_uses_the_kept_ones_and_ends_in_the_same_bytes(decoder, tmp_path, computed):
    """Its weights are no longer those at the start, from which they could be computed."""
    whole, _ = fit(decoder, tmp_path / "whole", epochs=3)
    stop = StopAfterEpoch(tmp_path / "state.ckpt")
    part = make_trainer(tmp_path / "part", max_epochs=3, callbacks=[stop], enable_checkpointing=True)
    with pytest.raises(Stop):
        part.fit(build(decoder, DPO()), Preferences(pairs()))
    num_computed = len(computed)
    resumed, _ = fit(decoder, tmp_path / "part", epochs=3, state=tmp_path / "state.ckpt")
    assert len(computed) == num_computed
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
    (tmp_path / "part/reference.safetensors").unlink()
    with pytest.raises(TrainingError, match=r"reference\.safetensors is missing.*--resume false"):
        fit(decoder, tmp_path / "part", epochs=3, state=tmp_path / "state.ckpt")


def test_a_start_that_gives_no_number_is_refused_and_nothing_is_kept(decoder, tmp_path):
    with pytest.raises(TrainingError, match="a reference log-probability is not finite"):
        fit(decoder, tmp_path, lookup=lambda groups: lookup(groups) * float("nan"))
    assert not list(tmp_path.iterdir())


def test_a_disk_without_room_is_told(decoder, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("bindllm.objectives.reference.save_file", full)
    with pytest.raises(
        TrainingError, match=r"reference\.safetensors cannot be written.*free some disk space"
    ):
        fit(decoder, tmp_path)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_processes_share_the_work_and_all_get_every_value(world_size, monkeypatch):
    """Each process is played by a thread."""
    plan = [[4, 0], [1, 3], [2, 5], [6]]
    batches = [lambda rows=rows: {"rows": torch.tensor(rows)} for rows in plan]
    values, barrier = [None] * world_size, threading.Barrier(world_size)
    seen, results = [[] for _ in range(world_size)], {}

    def log_probs(rank, batch):
        seen[rank].append(batch)
        return 100.0 + batch["rows"], None

    monkeypatch.setattr("bindllm.objectives.reference.answer_log_probs", log_probs)

    def work(rank):
        def gather(value):
            values[rank] = value
            barrier.wait()
            return list(values)

        context = RunContext(Processes(rank, world_size, gather=gather))
        results[rank] = _compute(rank, plan, batches, 7, context)

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [result.tolist() for result in results.values()] == [[100.0 + n for n in range(7)]] * world_size
    # As many batches for each, or a sharded decoder would wait for a process that is done.
    assert len({len(batches) for batches in seen}) == 1


def test_values_are_put_beside_the_row_that_they_belong_to():
    a, b, c = pairs()[:3]
    columns = {"train": [[a, b], [None, c]], "validation": [[c], [None]]}
    tables = _arranged(torch.tensor([1.0, 2.0, 3.0, 4.0]), columns)
    assert tables["train"].nan_to_num(-1).tolist() == [[1.0, -1.0], [2.0, 3.0]]
    assert tables["validation"].nan_to_num(-1).tolist() == [[4.0, -1.0]]


def test_a_fixed_partner_makes_the_mismatched_values_ones_that_can_be_kept(decoder, tmp_path, computed):
    fit(decoder, tmp_path, objective=KTO())
    # Three answers of each row: chosen, rejected, mismatched.
    assert sum(computed) == 2 * 3 * 12
    fit(decoder, tmp_path, objective=KTO(beta=0.3))
    assert sum(computed) == 2 * 3 * 12


class WithTokens:
    """The embedding of each color, and tokens from a seed."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def __call__(self, groups):
        return lookup(groups)

    def tokens(self, groups):
        own = torch.randn(16, 3, 8, generator=torch.Generator().manual_seed(self.seed))
        return own[lookup(groups).argmax(1)]


@pytest.mark.parametrize("objective", [DPO, KTO])
def test_references_depend_on_the_tokens(objective, decoder, tmp_path, computed):
    options = {"encoders": [TokenEncoder()], "inject": InjectConfig(kind="attend")}

    def values(seed: int, **changes):
        module, _ = fit(
            decoder, tmp_path, objective=objective(), lookup=WithTokens(seed), **options, **changes
        )
        assert module.objective.drops_tokens is False
        return load_file(tmp_path / "reference.safetensors")["train"]

    bind = BindConfig(depth=1, tokens=3)
    first, count = values(0, bind=bind), len(computed)
    assert torch.equal(values(0, bind=bind).nan_to_num(), first.nan_to_num())
    assert len(computed) == count
    values(1, bind=bind)
    assert len(computed) == 2 * count
