"""Tests for the log-probabilities of chosen tokens."""

from __future__ import annotations

import pytest
import torch

from bindllm.objectives import log_probs as module
from bindllm.objectives.log_probs import log_probs


@pytest.fixture(params=[1, 24, 2**19], ids=["a row at a time", "three rows", "all rows"])
def _chunk(request, monkeypatch):
    monkeypatch.setattr(module, "_CPU_CHUNK", request.param)


@pytest.mark.usefixtures("_chunk")
def test_values_and_gradients_are_those_of_log_softmax():
    torch.manual_seed(0)
    logits = torch.randn(7, 8, dtype=torch.float64, requires_grad=True)
    # The same token twice at a position, as for a caption that says a word twice.
    tokens = torch.tensor([[0, 3, 3]]).expand(7, 3)
    assert torch.autograd.gradcheck(lambda x: log_probs(x, tokens), logits)
    torch.testing.assert_close(log_probs(logits, tokens), logits.log_softmax(-1).gather(-1, tokens))


@pytest.mark.usefixtures("_chunk")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_half_precision_is_summed_in_float32_and_its_gradient_rounded_once(dtype):
    torch.manual_seed(0)
    logits = (30 * torch.randn(7, 40)).to(dtype).requires_grad_()
    exact = logits.detach().double().requires_grad_()
    tokens = torch.randint(40, (7, 2))
    found, expected = log_probs(logits, tokens), exact.log_softmax(-1).gather(-1, tokens)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-5)
    weights = torch.rand(7, 2)
    (found * weights).sum().backward()
    (expected * weights).sum().backward()
    assert logits.grad.dtype == dtype
    torch.testing.assert_close(
        logits.grad.double(), exact.grad, rtol=max(torch.finfo(dtype).eps, 1e-5), atol=1e-6
    )


def test_no_positions_have_no_log_probabilities():
    assert log_probs(torch.empty(0, 8), torch.empty(0, 1, dtype=torch.long)).shape == (0, 1)


def test_an_id_outside_of_the_vocabulary_is_refused():
    with pytest.raises((IndexError, RuntimeError), match="out of"):
        log_probs(torch.zeros(1, 8), torch.tensor([[8]]))
