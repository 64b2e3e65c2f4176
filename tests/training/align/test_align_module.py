"""An alignment: its loss and metrics against plain loops, where the gradient goes, what stays, and that it learns."""

from __future__ import annotations

import math

import pytest
import torch
from lightning.pytorch import seed_everything
from torch.nn.functional import normalize

from align_parts import BeatTower, FrozenModule, LetterEncoder, patchwork_table, radar_table
from bindllm.cli.recipes.recipe import quiet
from bindllm.encoders.aligned import HeadConfig
from bindllm.errors import EncoderError, InputError, TrainingError
from bindllm.training.align import module as metrics
from bindllm.training.align.data import AlignData, PairSource
from bindllm.training.align.module import (
    AlignModule,
    Temperature,
    TemperatureConfig,
    contrastive_loss,
    retrieval_metrics,
)
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
    with pytest.raises(InputError, match=r"trainer\.precision is bf16-true, .*expected 32-true, bf16-mixed"):
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


def rows(count: int, seed: int) -> torch.Tensor:
    return normalize(torch.randn(count, 7, generator=torch.Generator().manual_seed(seed)), dim=-1)


def loop_loss(media, targets, belongs, scale: float) -> float:
    """The same by hand: each pair against everything on the other side that does not belong to it."""
    total, count = 0.0, len(media)
    for i in range(count):
        own = math.exp(scale * float(media[i] @ targets[i]))
        wrong = sum(math.exp(scale * float(media[i] @ targets[j])) for j in range(count) if not belongs[i][j])
        total -= math.log(own / (own + wrong)) / 2
        wrong = sum(math.exp(scale * float(media[j] @ targets[i])) for j in range(count) if not belongs[j][i])
        total -= math.log(own / (own + wrong)) / 2
    return total / count


def test_the_loss_is_that_of_a_plain_loop_with_duplicates():
    media, targets = rows(6, 0), rows(6, 1)
    # 0 and 1 are captions of one picture; 2 and 3 one caption of two pictures; 4 is a copy of pair 5.
    targets[1], media[3] = targets[0], media[2]
    media[4], targets[4] = media[5], targets[5]
    belongs = torch.eye(6, dtype=torch.bool)
    for i, j in ((0, 1), (2, 3), (4, 5)):
        belongs[i, j] = belongs[j, i] = True
    found = contrastive_loss(media, targets, belongs, torch.tensor(12.0))
    assert float(found) == pytest.approx(loop_loss(media, targets, belongs.tolist(), 12.0), rel=1e-5)
    # The mask matters: without it, the same rows give another number.
    plain = contrastive_loss(media, targets, torch.eye(6, dtype=torch.bool), torch.tensor(12.0))
    assert abs(float(found) - float(plain)) > 0.01


def test_what_belongs_together_is_neither_pulled_nor_pushed():
    media, targets = rows(3, 2).requires_grad_(), rows(3, 3)
    belongs = torch.eye(3, dtype=torch.bool)
    belongs[0, 1] = belongs[1, 0] = True
    contrastive_loss(media, targets, belongs, torch.tensor(5.0)).backward()
    # Row 0 is told from target 2 alone: its gradient lies in the plane of targets 0 and 2.
    basis = torch.linalg.qr(torch.stack([targets[0], targets[2]]).T)[0]
    gradient = media.grad[0]
    assert gradient.norm() > 0.01
    torch.testing.assert_close(basis @ (basis.T @ gradient), gradient, atol=1e-6, rtol=1e-4)


def test_a_batch_of_one_thing_gives_nothing_to_learn():
    media = rows(3, 4).requires_grad_()
    loss = contrastive_loss(media, rows(3, 5), torch.ones(3, 3, dtype=torch.bool), torch.tensor(9.0))
    loss.backward()
    assert loss.item() == 0
    assert media.grad.abs().max() == 0


def test_the_temperature_stays_within_its_bounds():
    temperature = Temperature(TemperatureConfig(start=0.5))
    assert temperature().item() == pytest.approx(2.0)
    for value, clamped in ((9.0, 100.0), (-3.0, 1.0), (math.log(7.0), 7.0)):
        temperature.log_scale.data.fill_(value)
        temperature.clamp()
        assert temperature().item() == pytest.approx(clamped)
    assert not Temperature(TemperatureConfig(learned=False)).log_scale.requires_grad


@pytest.mark.parametrize("start", [0.0, -1.0, 0.009, 1.5, float("nan")])
def test_a_start_outside_of_the_bounds_is_refused(start):
    with pytest.raises(InputError, match=r"temperature\.start is .*, expected 0\.01 to 1"):
        TemperatureConfig(start=start)


def test_recall_and_counts():
    gallery = torch.eye(12)
    queries = gallery[[0, 1, 2, 3]].clone()
    answers = [[0], [5], [2, 7], [3]]
    found = retrieval_metrics(queries, gallery, answers)
    # Query 1 is nearest to a wrong one, and all others tie: its answer is the first of eleven by chance.
    assert found["recall@1"] == 0.75
    assert found["recall@5"] == pytest.approx((3 + 4 / 11) / 4, abs=1e-4)
    assert (found["queries"], found["gallery"], found["median_rank"]) == (4, 12, 1)
    assert found["chance@1"] == pytest.approx((3 / 12 + 2 / 12) / 4, abs=1e-4)


def test_embeddings_that_are_all_alike_get_chance():
    same = normalize(torch.ones(30, 4), dim=-1)
    found = retrieval_metrics(same, same, [[n] for n in range(30)])
    for k in (1, 5, 10):
        assert found[f"recall@{k}"] == found[f"chance@{k}"] == pytest.approx(k / 30, abs=1e-4)
    assert found["median_rank"] == 15.5


def test_many_queries_are_ranked_in_parts(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    gallery = normalize(torch.randn(40, 8, generator=generator), dim=-1)
    queries = normalize(torch.randn(250, 8, generator=generator), dim=-1)
    answers = [[n % 40, (n * 7) % 40] for n in range(250)]
    ranks = []
    for n in range(250):
        scores = (queries[n] @ gallery.T).tolist()
        best = max(scores[a] for a in answers[n])
        ranks.append(1 + sum(s > best for g, s in enumerate(scores) if g not in answers[n]))
    monkeypatch.setattr(metrics, "_SCORES_AT_ONCE", 40 * 64)
    found = retrieval_metrics(queries, gallery, answers)
    for k in (1, 5, 10):
        assert found[f"recall@{k}"] == pytest.approx(sum(rank <= k for rank in ranks) / 250, abs=1e-4)
    assert found["median_rank"] == sorted(ranks)[124]
