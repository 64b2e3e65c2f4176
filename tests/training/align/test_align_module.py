"""One step of an alignment: where the gradient goes, what stays as it is, and that it learns."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch import seed_everything

from align_parts import BeatTower, FrozenModule, LetterEncoder, patchwork_table, radar_table
from bindllm.cli.recipe import quiet
from bindllm.encoders.aligned import HeadConfig
from bindllm.errors import EncoderError, InputError, TrainingError
from bindllm.training.align.data import AlignData, PairSource
from bindllm.training.align.module import AlignModule, TemperatureConfig, contrastive_loss
from bindllm.training.optim import OptimConfig
from tiny import ColorEncoder, color_images
from tiny_run import make_trainer


def train(
    folder,
    tower,
    source: PairSource,
    *,
    epochs: int = 2,
    temperature=None,
    batch_size=8,
    kind=AlignModule,
    precision="32-true",
    **model,
):
    """Align in a few steps; return the module and the data."""
    seed_everything(0, verbose=False)
    data = AlignData(
        [source], store=str(folder / "store"), tower=tower, target=ColorEncoder(), batch_size=batch_size
    )
    head = HeadConfig(**{"depth": 2, "width": 32, "dropout": 0.0, **model.pop("head", {})})
    optim = OptimConfig(**{"lr": 0.01, **model.pop("optim", {})})
    module = kind(tower, data.target, head, temperature or TemperatureConfig(), optim, **model)
    with quiet():
        make_trainer(folder, max_epochs=epochs, precision=precision).fit(module, data)
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


class Holed(BeatTower):
    """Makes numbers that are not finite of long signals, in evaluation."""

    def forward(self, inputs):
        rows = super().forward(inputs)
        wrong = torch.tensor([not self.training and len(signal) > 40 for signal in inputs])
        return rows.masked_fill(wrong[:, None], torch.nan)


def test_embeddings_that_are_not_finite_are_no_hits_but_an_error(radar, tmp_path):
    with pytest.raises(TrainingError, match=r"2\d\.npy: its embedding is not finite; nothing was written"):
        train(tmp_path, Holed(), radar)


def test_media_and_targets_may_be_of_one_modality(radar, tmp_path):
    """Such as the pictures of a smaller encoder in the space of a larger one."""
    pictures = PairSource(radar.path, modality="image")
    module, data = train(tmp_path, ColorEncoder(), pictures, epochs=20)
    found = module.measure(data, "test")
    assert found["aligned_image_to_image"]["recall@1"] == found["image_to_aligned_image"]["recall@1"] == 1


def test_a_run_without_an_epoch_is_an_error(texts, tmp_path):
    module, _ = train(tmp_path, LetterEncoder(), texts, epochs=0)
    with pytest.raises(TrainingError, match=r"no epoch was finished.*trainer\.max_epochs"):
        module.take_best()


def test_weights_are_trained_in_single_precision(texts, tmp_path):
    with pytest.raises(InputError, match=r"trainer\.precision is bf16-true; expected 32-true, bf16-mixed"):
        train(tmp_path, LetterEncoder(), texts, precision="bf16-true")


def test_the_measured_loss_leaves_out_what_belongs_together(tmp_path):
    """Of 32 pictures, 8 each have the same caption."""
    pictures = PairSource(str(color_images(tmp_path / "pictures", per_color=8)), split="train")
    module, data = train(tmp_path, LetterEncoder(), pictures, epochs=1, batch_size=32)
    pairs = data.pairs("train")
    captions = pairs.links[:, 0]
    rows = module.embed_media(data, pairs)[captions], data.target_rows(pairs, pairs.links[:, 1])
    with torch.no_grad():
        expected = contrastive_loss(*rows, captions[:, None] == captions, module.temperature())
        plain = contrastive_loss(*rows, torch.eye(len(captions), dtype=torch.bool), module.temperature())
    assert module.measure(data, "train")["loss"] == pytest.approx(float(expected), abs=1e-3)
    assert abs(float(plain) - float(expected)) > 0.1


def test_the_best_epoch_is_chosen_on_the_validation_split(texts, tmp_path, monkeypatch):
    asked = []
    measure = AlignModule.measure
    monkeypatch.setattr(
        AlignModule, "measure", lambda self, data, split: asked.append(split) or measure(self, data, split)
    )
    module, data = train(tmp_path, LetterEncoder(), texts, epochs=2)
    assert asked == ["validation"] * 2
    module.take_best()
    assert module.measure(data, "validation") == module.best.metrics


def test_what_is_no_matrix_is_not_decayed(radar, tmp_path):
    module, _ = train(tmp_path, BeatTower(), radar, epochs=1, optim={"weight_decay": 0.3})
    (optimizer,) = module.trainer.optimizers
    decayed = {
        id(one) for group in optimizer.param_groups if group["weight_decay"] for one in group["params"]
    }
    names = {name for name, one in module.named_parameters() if id(one) in decayed}
    assert names == {"trained_tower.layer.weight", "head.layers.1.weight", "head.layers.4.weight"}


class Heated(AlignModule):
    """Its temperature leaves its bounds in each step."""

    def training_step(self, batch, batch_idx):
        self.temperature.log_scale.data.fill_(9.0)
        return super().training_step(batch, batch_idx)


def test_the_temperature_is_brought_back_after_each_step(texts, tmp_path):
    module, _ = train(tmp_path, LetterEncoder(), texts, kind=Heated)
    assert module.temperature().item() == pytest.approx(100.0)


def test_a_loss_that_is_not_finite_ends_the_run(texts, tmp_path):
    with pytest.raises(TrainingError, match=r"not finite at step \d+; .*--model\.optim\.lr"):
        train(tmp_path, LetterEncoder(), texts, epochs=9, optim={"lr": 1e30, "warmup": 0.0})


class Half:
    """Neither an encoder nor a tower."""

    modality, embedding_size = "text", 3

    def prepare(self, media):
        raise NotImplementedError


def test_what_is_no_tower_is_refused():
    parts = (ColorEncoder(), HeadConfig(), TemperatureConfig(), OptimConfig())
    with pytest.raises(
        EncoderError, match="Half is not a tower. As a frozen encoder it lacks modalities, config"
    ):
        AlignModule(Half(), *parts)


@pytest.mark.parametrize("wrong", [{"depth": 0}, {"width": 0}, {"dropout": 1.0}])
def test_a_head_that_cannot_be_is_refused(wrong):
    with pytest.raises(InputError, match=rf"head\.{next(iter(wrong))} is .*, expected"):
        HeadConfig(**wrong)
