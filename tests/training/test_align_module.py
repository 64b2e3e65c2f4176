"""One step of an alignment: where the gradient goes, what stays as it is, and that it learns."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch import Trainer, seed_everything

from align_parts import BeatTower, FrozenModule, LetterEncoder, patchwork_table, radar_table
from bindllm.encoders.head import HeadConfig
from bindllm.errors import EncoderError, InputError, TrainingError
from bindllm.training.align import AlignModule
from bindllm.training.align_data import AlignData
from bindllm.training.align_loss import TemperatureConfig
from bindllm.training.align_pairs import PairSource
from bindllm.training.optim import OptimConfig
from bindllm.verbs.recipe import quiet
from tiny import ColourEncoder


def train(
    folder,
    tower,
    source: PairSource,
    *,
    epochs: int = 2,
    temperature=None,
    batch_size=8,
    kind=AlignModule,
    **model,
):
    """Align in a few steps; return the module and the data."""
    seed_everything(0, verbose=False)
    data = AlignData(
        [source], store=str(folder / "store"), tower=tower, target=ColourEncoder(), batch_size=batch_size
    )
    head = HeadConfig(**{"depth": 2, "width": 32, "dropout": 0.0, **model.pop("head", {})})
    optim = OptimConfig(**{"lr": 0.01, **model.pop("optim", {})})
    module = kind(tower, data.target, head, temperature or TemperatureConfig(), optim, **model)
    with quiet():
        trainer = Trainer(
            max_epochs=epochs,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(module, data)
    return module, data


@pytest.fixture
def texts(tmp_path):
    """Pictures that differ, each with a caption of its own: 16 to train with, 4 and 4 held out."""
    return PairSource(str(patchwork_table(tmp_path / "pictures")))


@pytest.fixture
def radar(tmp_path):
    return PairSource(str(radar_table(tmp_path / "radar")), modality="radar")


def test_a_few_pairs_are_learnt_by_heart(texts, tmp_path):
    module, data = train(tmp_path, LetterEncoder(), texts, epochs=60, batch_size=16)
    found = module.measure(data, "train")
    assert found["text_to_image"]["recall@1"] == 1
    assert found["image_to_text"]["recall@1"] == 1
    assert found["text_to_image"]["queries"] == 16


def test_a_trained_tower_is_learnt_with_the_head(radar, tmp_path):
    module, data = train(tmp_path, BeatTower(), radar, epochs=40, batch_size=24, optim={"lr": 0.03})
    # The signals tell the colour, and no more: any picture of the colour is as good.
    ways = module.measure(data, "test")
    assert ways["radar_to_image"]["recall@1"] == 1
    assert ways["radar_to_image"]["chance@1"] == 0.25


def test_the_gradient_reaches_head_and_tower_and_frozen_bytes_stay(texts, radar, tmp_path):
    tower = BeatTower()
    before = tower.layer.weight.clone()
    module, _ = train(tmp_path, tower, radar, epochs=1)
    assert not torch.equal(tower.layer.weight, before)
    assert {name for name, _ in module.named_parameters()} >= {
        "trained_tower.layer.weight",
        "head.layers.0.weight",
    }

    frozen = FrozenModule()
    bytes_before = frozen.weight.detach().numpy().tobytes()
    module, _ = train(tmp_path, frozen, texts, epochs=1)
    assert frozen.weight.detach().numpy().tobytes() == bytes_before
    assert frozen.weight.grad is None
    assert all(name.startswith(("head.", "temperature.")) for name, _ in module.named_parameters())
    gradients = [p.grad.abs().sum() for name, p in module.head.named_parameters() if p.grad is not None]
    assert len(gradients) == 6
    assert all(total > 0 for total in gradients)


def test_a_learnt_temperature_moves_and_a_fixed_one_stays(texts, tmp_path):
    start = TemperatureConfig(start=0.5)
    module, _ = train(tmp_path, LetterEncoder(), texts, temperature=start)
    assert abs(1 / module.temperature().item() - 0.5) > 1e-3
    fixed = TemperatureConfig(start=0.5, learned=False)
    module, _ = train(tmp_path, LetterEncoder(), texts, temperature=fixed)
    assert 1 / module.temperature().item() == 0.5


class Scripted(AlignModule):
    """Measures what the test says, and notes the weights of each epoch."""

    losses = (3.0, 1.0, 2.0, 1.0)

    def measure(self, data, split):
        self.weights = [*vars(self).get("weights", []), self.head.layers[1].weight.clone()]
        return {
            "loss": self.losses[len(self.weights) - 1],
            "way": dict.fromkeys(("recall@1", "recall@5", "recall@10"), 0),
        }


def test_the_best_epoch_is_kept(texts, tmp_path):
    module, _ = train(tmp_path, LetterEncoder(), texts, epochs=4, kind=Scripted, best="loss")
    best = module.take_best()
    assert best.epoch == 2
    assert torch.equal(module.head.layers[1].weight, module.weights[1])
    assert not torch.equal(module.weights[1], module.weights[3])


def test_without_validation_the_last_epoch_is_kept(texts, tmp_path):
    texts.split = "train"
    module, data = train(tmp_path, LetterEncoder(), texts, epochs=3)
    best = module.take_best()
    assert (best.epoch, best.metrics) == (3, None)
    assert module.measure(data, "test") is None


def test_measuring_leaves_the_mode_and_is_free_of_chance(radar, tmp_path):
    module, data = train(tmp_path, BeatTower(), radar, head={"dropout": 0.5})
    module.train()
    first, again = module.measure(data, "validation"), module.measure(data, "validation")
    assert module.training
    assert module.trained_tower.training
    assert first == again


def test_the_same_seed_gives_the_same_weights(radar, tmp_path):
    states = []
    for _ in range(2):
        torch.manual_seed(0)
        module, _ = train(tmp_path, BeatTower(), radar)
        states.append(module.state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_a_loss_that_is_not_finite_ends_the_run(texts, tmp_path):
    with pytest.raises(TrainingError, match=r"not finite at step \d+; .*--model\.optim\.lr"):
        train(tmp_path, LetterEncoder(), texts, epochs=9, optim={"lr": 1e30, "warmup": 0.0})


class Half:
    """Neither an encoder nor a tower."""

    modality, embedding_size = "text", 3

    def prepare(self, media):
        raise NotImplementedError


def test_what_is_no_tower_is_refused():
    parts = (ColourEncoder(), HeadConfig(), TemperatureConfig(), OptimConfig())
    with pytest.raises(
        EncoderError, match="Half is no tower. As a frozen encoder it lacks modalities, config"
    ):
        AlignModule(Half(), *parts)


@pytest.mark.parametrize("wrong", [{"depth": 0}, {"width": 0}, {"dropout": 1.0}])
def test_a_head_that_cannot_be_is_refused(wrong):
    with pytest.raises(InputError, match=rf"head\.{next(iter(wrong))} is .*, expected"):
        HeadConfig(**wrong)
