import copy
import math
from functools import partial

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback

from bindllm.cache.blend import CacheConfig
from bindllm.cli.recipes.recipe import quiet
from bindllm.data.collate import answer_batch
from bindllm.data.datamodule import BindData
from bindllm.data.sources import SourceConfig
from bindllm.errors import CheckpointError, InputError, TrainingError
from bindllm.media import Media
from bindllm.model.adapter import AdapterConfig
from bindllm.model.bind_network import BindConfig
from bindllm.model.checkpoint import read_manifest
from bindllm.model.context import ContextConfig
from bindllm.model.decoder import DecoderConfig
from bindllm.model.injection import InjectConfig
from bindllm.objectives import DPO
from bindllm.training.module import AnyEncoder, BindModule
from bindllm.training.optim import OptimConfig
from tiny import ColorEncoder, TokenEncoder
from tiny_run import make_trainer


@pytest.fixture
def make(parts, tmp_path):
    """Return a function that builds a module and its data."""

    def build(**changes):
        options = {
            "encoders": [ColorEncoder()],
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
    with quiet():
        yield partial(make_trainer, tmp_path)


def test_the_decoder_is_not_loaded_before_the_run(make):
    module, data = make()
    data.setup()
    assert module.model is None


def test_the_layers_are_compiled_if_the_recipe_asks(make, monkeypatch):
    compiled = []
    monkeypatch.setattr("bindllm.training.module.compile_layers", compiled.append)
    for setting in (False, True):
        module, _ = make()
        module.decoder_config.compile = setting
        module.configure_model()
        assert compiled == [module.model.decoder] * setting


def test_any_class_with_the_methods_is_an_encoder():
    assert issubclass(ColorEncoder, AnyEncoder)
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
        output = module.model(**answer_batch([sample], data.lookup, pad_id=0))
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


@pytest.mark.parametrize(
    ("kind", "tokens"),
    [("value", 1), ("attend", 4), ("cross", "all"), pytest.param("cross", 1, marks=pytest.mark.slow)],
)
def test_it_learns_to_tell_colours_apart(kind, tokens, make, trainer):
    """A random decoder cannot spell, so the loss keeps a floor; what it says must still follow the picture."""
    options = {"bind": BindConfig(depth=1, tokens=tokens), "inject": InjectConfig(kind)}
    module, data = make(encoders=[TokenEncoder()], **options)
    data.token_modalities = module.token_modalities
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
    module, data = make(bag_of_words=1)
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
    advice = r"--model.init_from \S+ --model.optim.lr \S+ --model.bag_of_words 0$"
    with pytest.raises(TrainingError, match=rf"the {what} is not finite at step 3.*{advice}"):
        trainer(max_epochs=1).fit(module, data)
    fresh, _ = make(init_from=f"{tmp_path}.last_good")
    fresh.configure_model()
    kept = fresh.state_dict()
    assert all(torch.equal(kept[name], seen[-1][name]) for name in kept)
    assert any(not torch.equal(seen[0][name], kept[name]) for name in kept)


def test_a_second_stage_tunes_the_decoder_and_starts_from_the_first(make, trainer, tmp_path):
    module, _ = make()
    module.configure_model()
    module.model.origin = "Somebody's weights, under their license."
    module.model.save_pretrained(tmp_path / "first")
    first = {name: value.clone() for name, value in module.model.trainable_state().items()}
    options = {
        "adapter": AdapterConfig(rank=2),
        "trainable": ["adapter"],
        "init_from": str(tmp_path / "first"),
    }
    module, data = make(**options)
    data.setup()
    trainer(max_epochs=1).fit(module, data)
    second = module.model.trainable_state()
    assert all(torch.equal(second[name], first[name]) for name in first)
    tuned = [name for name in second if name.endswith("lora_B.weight")]
    assert len(tuned) == 3 * 7
    assert all(second[name].abs().max() > 0 for name in tuned)
    module.model.save_pretrained(tmp_path / "second")
    assert "Somebody's weights" in (tmp_path / "second" / "README.md").read_text()
    again, _ = make(**{**options, "init_from": str(tmp_path / "second")})
    again.configure_model()
    assert all(torch.equal(value, second[name]) for name, value in again.model.trainable_state().items())


def test_the_mean_of_the_released_weights_is_not_for_training(make):
    with pytest.raises(InputError, match=r"bind\.fusion is 'mean'"):
        make(bind=BindConfig(depth=1, fusion="mean"))


class LayerRuns(Callback):
    """Counts how often the first layer of the decoder runs in a training step."""

    def on_train_start(self, trainer, module):
        self.runs, self.steps = [], 0
        first = module.model.decoder.model.layers[0]
        first.mlp.register_forward_pre_hook(lambda *_: self.runs.append(1))

    def on_train_batch_end(self, trainer, *_):
        self.steps += 1


def test_checkpointed_activations_train_the_same_weights(make, trainer):
    states, runs_per_step = [], []
    for checkpoint_activations in (False, True):
        module, data = make(checkpoint_activations=checkpoint_activations)
        count = LayerRuns()
        trainer(max_epochs=1, limit_val_batches=0, callbacks=[count]).fit(module, data)
        states.append(module.state_dict())
        runs_per_step.append(len(count.runs) / count.steps)
    assert runs_per_step == [1, 2], (
        "each layer runs again in the backward pass, and not without checkpointing"
    )
    for name in states[0]:
        torch.testing.assert_close(states[0][name], states[1][name], rtol=1e-4, atol=1e-6)


class NetworkEncoder(ColorEncoder):
    """An encoder with all that training could spoil: weights, dropout and running statistics."""

    def __init__(self, **config):
        super().__init__(**config)
        self.network = torch.nn.Sequential(
            torch.nn.Linear(48, 16), torch.nn.BatchNorm1d(16), torch.nn.Dropout(0.5)
        )
        self.network.eval().requires_grad_(False)

    @torch.no_grad()
    def embed(self, modality, inputs):
        return torch.nn.functional.normalize(self.network(torch.stack(list(inputs))), dim=-1)


class NetworkItself(torch.nn.Module):
    """The same as a module, which whoever holds it as a child would put into training mode."""

    modalities, embedding_size, config = ("image",), 16, {}

    def __init__(self):
        super().__init__()
        self.inner = NetworkEncoder()
        self.network = self.inner.network

    def fingerprint(self):
        return "cd" * 32

    def prepare(self, media):
        return self.inner.prepare(media)

    def embed(self, modality, inputs):
        return self.inner.embed(modality, inputs)


@pytest.mark.parametrize("kind", [NetworkEncoder, NetworkItself])
def test_encoders_keep_their_bytes_and_their_mode_through_a_run(kind, make, trainer):
    encoder = kind()
    module, data = make(encoders=[encoder])
    before = {name: value.numpy().tobytes() for name, value in encoder.network.state_dict().items()}
    modes = set()

    class Modes(Callback):
        def on_train_batch_start(self, *_):
            modes.update(part.training for part in encoder.network.modules())

        on_validation_batch_start = on_train_batch_start

    trainer(max_epochs=2, callbacks=[Modes()]).fit(module, data)
    # A picture that the store does not have is embedded by the trained model.
    module.model.encode([Media.image(np.zeros((9, 9, 3), np.uint8))])
    assert modes == {False}
    assert before == {name: value.numpy().tobytes() for name, value in encoder.network.state_dict().items()}
    assert not any(parameter.requires_grad for parameter in encoder.network.parameters())
    assert all(parameter.grad is None for parameter in encoder.network.parameters())
    trained = {id(p) for group in module.optimizers().param_groups for p in group["params"]}
    assert trained.isdisjoint(id(parameter) for parameter in encoder.network.parameters())
    assert not any("network" in name for name in module.state_dict())


def test_training_no_group_is_refused_with_the_names_of_all(make, trainer):
    module, data = make(trainable=[])
    with pytest.raises(InputError, match=r"nothing is trainable.*model\.trainable.*bind, inject"):
        trainer(max_epochs=1).fit(module, data)
    assert not any(parameter.requires_grad for parameter in module.model.parameters())


def test_the_cache_of_a_recipe_is_named_in_the_checkpoint_and_not_opened(make, tmp_path):
    module, _ = make(cache=CacheConfig("caches/later", weight=0.3))
    module.configure_model()
    assert module.model.cache is None
    module.model.save_pretrained(tmp_path / "folder")
    entry = read_manifest(tmp_path / "folder")["cache"]
    assert (entry["folder"], entry["weight"]) == ("caches/later", 0.3)
    module, _ = make(cache="caches/later")
    assert module.cache_config == CacheConfig("caches/later")


def test_copied_answers_need_an_objective_that_draws_records(make):
    with pytest.raises(InputError, match=r"context.copied is 0\.5, and DPO .*: set it to 0"):
        make(context=ContextConfig(copied=0.5), objective=DPO())
