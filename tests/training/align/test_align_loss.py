"""The contrastive loss against a plain loop, and the bounds of the temperature."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn.functional import normalize

from bindllm.errors import InputError
from bindllm.training.align.module import Temperature, TemperatureConfig, contrastive_loss


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
