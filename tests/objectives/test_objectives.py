import math

import pytest
import torch

from bindllm.errors import InputError
from bindllm.objectives import next_token_loss


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
