from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.strategies import DeepSpeedStrategy, SingleDeviceStrategy

from bindllm.training.module import WeightedAccumulation


def trainer(*, processes=1, accumulate=1):
    """One of several processes that hold the same batches: sums over all of them are multiples."""
    strategy = SingleDeviceStrategy()
    strategy.reduce = lambda value, reduce_op: processes * value
    return SimpleNamespace(world_size=processes, accumulate_grad_batches=accumulate, strategy=strategy)


@pytest.mark.parametrize("processes", [1, 4])
def test_the_batches_of_a_step_weigh_what_they_hold(processes):
    """As one batch of all their tokens; the mean of the batches' means is another gradient."""
    torch.manual_seed(0)
    inputs, weight = torch.randn(12, 3), torch.randn(3, requires_grad=True)
    whole = (inputs @ weight).square().mean()
    (expected,) = torch.autograd.grad(whole, weight)
    step, run = WeightedAccumulation(), trainer(processes=processes, accumulate=3)
    gathered = torch.zeros(3)
    for batch in inputs.split([1, 9, 2]):
        loss = (batch @ weight).square().mean()
        (gradient,) = torch.autograd.grad(step.add(loss, len(batch), trainer=run) / 3, weight)
        gathered += gradient
    mean = step.finish([gathered], trainer=run)
    torch.testing.assert_close(gathered, expected)
    torch.testing.assert_close(mean, whole.detach())


def test_the_last_step_of_an_epoch_may_gather_fewer_batches():
    weight, step, run = torch.tensor(2.0, requires_grad=True), WeightedAccumulation(), trainer(accumulate=3)
    (gradient,) = torch.autograd.grad(step.add(5 * weight, 7, trainer=run) / 3, weight)
    assert step.finish([gradient], trainer=run).item() == pytest.approx(10)
    assert gradient.item() == pytest.approx(5)


def test_deepspeed_whose_gradients_cannot_be_scaled_weighs_each_batch_the_same():
    run, step, loss = trainer(processes=2, accumulate=3), WeightedAccumulation(), torch.tensor(0.5)
    strategy = DeepSpeedStrategy.__new__(DeepSpeedStrategy)
    strategy.reduce = run.strategy.reduce
    run.strategy = strategy
    assert step.add(loss, 7, trainer=run) is loss


def test_a_step_of_one_batch_is_left_alone_to_the_bit():
    loss, step, run = torch.tensor(0.1), WeightedAccumulation(), trainer()
    gradient = torch.tensor(0.3)
    assert step.add(loss, 7, trainer=run) is loss
    assert torch.equal(step.finish([gradient], trainer=run), loss)
    assert torch.equal(gradient, torch.tensor(0.3))
