import math

import pytest
import torch

from bindllm.errors import InputError
from bindllm.model.bindllm import BindOutput
from bindllm.objectives import NextToken, next_token_loss, unlikelihood_loss


def test_loss_is_the_mean_of_minus_log_probability():
    logits = torch.tensor([[2.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
    first = math.log(math.exp(2) + 2) - 0  # target 1 has logit 0
    second = math.log(math.e + 2) - 1
    loss = next_token_loss(logits, torch.tensor([1, 2]))
    assert loss.item() == pytest.approx((first + second) / 2)


def test_half_precision_logits_are_summed_in_float32():
    logits = torch.full((1, 40_000), 1.0, dtype=torch.bfloat16)
    assert next_token_loss(logits, torch.tensor([3])).item() == pytest.approx(math.log(40_000), rel=1e-6)


def test_a_batch_without_supervised_token_is_an_error_not_nan():
    with pytest.raises(InputError, match="no supervised token"):
        next_token_loss(torch.empty(0, 5), torch.empty(0, dtype=torch.long))


def test_unlikelihood_counts_earlier_tokens_of_the_same_answer():
    torch.manual_seed(0)
    logits = torch.randn(6, 9)
    targets, rows = torch.tensor([3, 5, 3, 7, 3, 3]), torch.tensor([0, 0, 0, 0, 1, 1])
    probabilities, total = logits.softmax(-1), 0.0
    for n in range(6):
        for before in range(n):
            # Not the target itself, and not the words of another row.
            if rows[before] == rows[n] and targets[before] != targets[n]:
                total -= math.log(1 - probabilities[n, targets[before]])
    assert unlikelihood_loss(logits, targets, rows).item() == pytest.approx(total / 6, rel=1e-5)
    assert total > 0


def test_unlikelihood_of_a_certain_repetition_is_finite_and_lowers_its_logit():
    logits = torch.tensor([[0.0, 0.0, 0.0], [40.0, 0.0, 0.0]], requires_grad=True)
    loss = unlikelihood_loss(logits, torch.tensor([0, 1]), torch.tensor([0, 0]))
    loss.backward()
    assert math.isfinite(loss.item())
    assert logits.grad.isfinite().all()
    # A probability that rounds to 1 has no gradient; the cross entropy has.
    logits = torch.tensor([[0.0, 0.0, 0.0], [4.0, 0.0, 0.0]], requires_grad=True)
    unlikelihood_loss(logits, torch.tensor([0, 1]), torch.tensor([0, 0])).backward()
    assert logits.grad[1, 0] > 0 > logits.grad[1, 1]
    assert not logits.grad[0].any()


def test_unlikelihood_is_a_part_of_the_training_loss_only():
    logits, targets, rows = torch.randn(4, 5), torch.tensor([1, 2, 1, 3]), torch.zeros(4, dtype=torch.long)
    batch = {"numbers": torch.tensor([0]), "labels": torch.tensor([[-100, 1, 2, 1, 3]])}

    class Model:
        training = True

        def __call__(self, **_):
            return BindOutput(logits, targets, rows)

    model = Model()
    plain, repeated = next_token_loss(logits, targets), unlikelihood_loss(logits, targets, rows)
    objective = NextToken(unlikelihood=0.5)
    loss, metrics = objective.loss(model, batch)
    assert loss.item() == pytest.approx((plain + 0.5 * repeated).item())
    assert metrics == {"unlikelihood": repeated}
    assert NextToken().loss(model, batch) == (plain, {})
    model.training = False
    assert objective.held_out(model, batch) == (plain, 4, {})
    with pytest.raises(InputError, match="unlikelihood must be finite and above 0"):
        NextToken(unlikelihood=-1)
