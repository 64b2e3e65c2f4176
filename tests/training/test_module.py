import copy
import math
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback

from bindllm.data.collate import collate
from bindllm.data.datamodule import BindData
from bindllm.data.sources import SourceConfig
from bindllm.errors import CheckpointError, TrainingError
from bindllm.model.bind_network import BindConfig
from bindllm.model.decoder import DecoderConfig
from bindllm.model.injection import InjectConfig
from bindllm.training.module import AnyEncoder, BindModule
from bindllm.training.optim import OptimConfig
from bindllm.training.runlog import RunLog
from bindllm.training.state import RunState
from bindllm.verbs.recipe import quiet
from tiny import ColourEncoder
from tiny_run import tiny_parts


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    return tiny_parts(tmp_path_factory.mktemp("parts"))


@pytest.fixture
def make(parts, tmp_path):
    """Return a function that builds a module and its data."""

    def build(**changes):
        options = {
            "encoders": [ColourEncoder()],
            "bind": BindConfig(depth=1),
            "inject": InjectConfig(),
            "optim": OptimConfig(lr=0.02, warmup=2),
            **changes,
        }
        torch.manual_seed(0)
        module = BindModule(DecoderConfig(str(parts / "decoder"), dtype="float32"), **options)
        source = SourceConfig(str(parts / "pictures"))
        data = BindData([source], str(tmp_path / "store"), batch_size=4)
        data.tokenizer, data.encoders = module.tokenizer, module.encoders
        return module, data

    return build


@pytest.fixture
def trainer(tmp_path):
    """Return a function that makes a silent trainer on the CPU."""
    quiet_trainer = partial(
        Trainer,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        default_root_dir=tmp_path,
    )
    with quiet():
        yield quiet_trainer


def test_the_decoder_is_not_loaded_before_the_run(make):
    module, data = make()
    data.setup()
    assert module.model is None


def test_any_class_with_the_methods_is_an_encoder():
    assert issubclass(ColourEncoder, AnyEncoder)
    assert not issubclass(dict, AnyEncoder)


def test_validation_loss_counts_every_token_once_whatever_the_batches(make, trainer):
    """The mean over all tokens: batches of unequal size and captions of unequal length must not weigh in."""
    module, data = make()
    losses = []
    for batch_size in (1, 3, 50):
        data.batch_size = batch_size
        losses.append(trainer().validate(module, data, verbose=False)[0]["val_loss"])
    samples = data.samples("validation")
    total = num_tokens = 0
    for sample in samples:
        output = module.model(**collate([sample], data.lookup, pad_id=0))
        total += torch.nn.functional.cross_entropy(output.logits, output.targets, reduction="sum").item()
        num_tokens += output.targets.numel()
    assert losses == pytest.approx([total / num_tokens] * 3, rel=1e-5)


class Watch(Callback):
    """Notes gradients of each group after the first validation, and modes in training."""

    def __init__(self):
        self.gradients, self.modes, self.validated = {}, set(), False

    def on_validation_end(self, trainer, module):
        self.validated = True

    def on_before_optimizer_step(self, trainer, module, optimizer):
        self.modes.add((module.model.bind.training, module.model.decoder.training))
        if self.validated:
            for name, members in module.model.parameter_groups().items():
                for key, parameter in members:
                    assert parameter.grad is not None, key
                    self.gradients[name] = self.gradients.get(name, 0) + parameter.grad.abs().sum().item()


def test_each_trained_group_has_a_gradient_after_a_validation_and_frozen_tensors_keep_their_bytes(
    make, trainer
):
    module, data = make()
    data.setup()
    module.configure_model()
    before = copy.deepcopy(dict(module.model.decoder.state_dict()))
    watch = Watch()
    trainer(max_epochs=2, callbacks=[watch]).fit(module, data)
    assert watch.gradients.keys() == {"bind", "inject"}
    assert all(value > 0 for value in watch.gradients.values())
    assert watch.modes == {(True, False)}
    after = module.model.decoder.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not any(parameter.requires_grad for parameter in module.model.decoder.parameters())


def test_a_group_that_is_not_named_stays_as_it_was(make, trainer):
    module, data = make(trainable=["inject"])
    module.configure_model()
    before = {name: value.clone() for name, value in module.model.trainable_state().items()}
    trainer(max_epochs=1).fit(module, data)
    after = module.model.trainable_state()
    changed = {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"injection"}


def test_it_learns_to_tell_colours_apart(make, trainer):
    """A random decoder cannot spell, so the loss keeps a floor; what it says must still follow the picture."""
    module, data = make()
    zero_gates = trainer().validate(module, data, verbose=False)[0]["val_loss"]
    trainer(max_epochs=12).fit(module, data)
    trained = trainer().validate(module, data, verbose=False)[0]["val_loss"]
    assert trained < 0.75 * zero_gates
    model = module.model.eval()
    pictures = [group for sample in data.samples("test") for group in sample.media]
    captions = model.generate(["Describe this image."] * 4, media=pictures, max_new_tokens=8)
    assert len(set(captions)) == 4, captions


def test_saved_states_hold_trainable_tensors_alone_and_load_strictly(make):
    module, _ = make()
    module.configure_model()
    state = module.state_dict()
    assert {name.split(".")[0] for name in state} == {"bind", "injection"}
    changed = {name: value + 1 for name, value in state.items()}
    module.load_state_dict(changed)
    assert torch.equal(module.model.injection.gates, torch.ones_like(module.model.injection.gates))
    with pytest.raises(CheckpointError, match=r"missing injection.gates.*unexpected extra"):
        module.load_state_dict(
            {"extra": torch.zeros(1), **{k: v for k, v in state.items() if k != "injection.gates"}}
        )


def test_initial_weights_do_not_depend_on_what_was_drawn_before(make, monkeypatch):
    monkeypatch.setenv("PL_GLOBAL_SEED", "3")
    states = []
    for draws in (0, 7):
        module, _ = make()
        torch.randn(draws)
        module.configure_model()
        states.append(module.state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_step_that_is_not_finite_keeps_the_weights_from_before(what, make, trainer, tmp_path, monkeypatch):
    module, data = make()
    original, seen = BindModule.training_step, []

    def broken(self, batch, batch_idx):
        seen.append({name: value.clone() for name, value in self.state_dict().items()})
        loss = original(self, batch, batch_idx)
        if len(seen) < 3:
            return loss
        if what == "gradient":
            # A finite loss whose gradient is not: sqrt has an infinite slope at 0.
            return loss + (self.model.injection.gates * 0).sum().sqrt()
        batch["embeddings"] = batch["embeddings"] * math.nan
        return original(self, batch, batch_idx)

    monkeypatch.setattr(BindModule, "training_step", broken)
    with pytest.raises(TrainingError, match=rf"the {what} is not finite at step 3.*--model.start_from"):
        trainer(max_epochs=1).fit(module, data)
    fresh, _ = make(start_from=f"{tmp_path}.last_good")
    fresh.configure_model()
    kept = fresh.state_dict()
    assert all(torch.equal(kept[name], seen[-1][name]) for name in kept)
    assert any(not torch.equal(seen[0][name], kept[name]) for name in kept)


def test_a_validation_loss_that_is_not_a_number_is_never_the_best(tmp_path):
    kept = RunState(tmp_path, RunLog(tmp_path))
    module = SimpleNamespace(state_dict=lambda: {"a": torch.zeros(1)})
    for step, loss in enumerate([math.nan, 3.0, math.nan, 2.0, 2.5, math.inf]):
        trainer = SimpleNamespace(
            callback_metrics={"val_loss": torch.tensor(loss)},
            sanity_checking=False,
            global_step=step,
            is_global_zero=True,
        )
        kept.on_validation_end(trainer, module)
    assert (kept.best_loss, kept.best_step) == (2.0, 3)


def test_starting_from_a_folder_of_other_parts_is_refused(make, tmp_path):
    module, _ = make()
    module.configure_model()
    module.model.save_pretrained(tmp_path / "folder")
    other, _ = make(encoders=[ColourEncoder(grid=3)], start_from=str(tmp_path / "folder"))
    with pytest.raises(CheckpointError, match="other encoders"):
        other.configure_model()


def test_checkpointed_activations_train_the_same_weights(make, trainer):
    states = []
    for checkpoint_activations in (False, True):
        module, data = make(checkpoint_activations=checkpoint_activations)
        trainer(max_epochs=1).fit(module, data)
        states.append(module.state_dict())
    for name in states[0]:
        torch.testing.assert_close(states[0][name], states[1][name], rtol=1e-4, atol=1e-6)
