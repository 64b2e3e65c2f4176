"""The next token of each row: shares, the cut of top_p, and independence from the other rows."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from bindllm.errors import InputError
from bindllm.serving import sampling
from bindllm.serving.sampling import Sampling, check_sampling, choose_tokens

LOGITS = torch.tensor([[0.5, 0.3, 0.1, 0.06, 0.04]]).log()


def drawn(logits=LOGITS, count=4000, **options) -> dict[int, float]:
    """Shares of the tokens that a row draws."""
    row = Sampling.of(**{"temperature": 1.0, "top_p": 1.0, "seed": 5, **options})
    found = Counter(choose_tokens(logits, [row])[0][0] for _ in range(count))
    return {token: number / count for token, number in sorted(found.items())}


def test_tokens_are_drawn_with_their_probability():
    assert drawn() == pytest.approx({0: 0.5, 1: 0.3, 2: 0.1, 3: 0.06, 4: 0.04}, abs=0.03)
    squares = LOGITS.exp() ** 2
    expected = dict(enumerate((squares / squares.sum())[0].tolist()))
    assert drawn(temperature=0.5) == pytest.approx(expected, abs=0.03)


def test_a_temperature_of_zero_or_nearly_takes_the_most_likely():
    assert drawn(temperature=0.0, count=10) == {0: 1.0}
    assert drawn(temperature=1e-300, count=10) == {0: 1.0}
    assert drawn(-LOGITS * 1e30, temperature=1e-30, count=10) == {4: 1.0}


@pytest.mark.parametrize("candidates", [1, 2, 256])
@pytest.mark.parametrize(
    ("top_p", "kept"), [(0.01, [0]), (0.5, [0]), (0.51, [0, 1]), (0.81, [0, 1, 2]), (0.97, [0, 1, 2, 3, 4])]
)
def test_top_p_keeps_the_smallest_set_that_reaches_it(monkeypatch, top_p, kept, candidates):
    monkeypatch.setattr(sampling, "CANDIDATES", candidates)
    shares = LOGITS.exp()[0]
    expected = {token: (shares[token] / shares[kept].sum()).item() for token in kept}
    assert drawn(top_p=top_p, count=1000) == pytest.approx(expected, abs=0.04)


def test_tokens_of_equal_share_are_kept_together():
    assert set(drawn(torch.zeros(1, 4), top_p=0.3, count=100)) == {0, 1, 2, 3}


@pytest.mark.parametrize("candidates", [2, 256])
def test_a_row_does_not_depend_on_the_others(monkeypatch, candidates):
    monkeypatch.setattr(sampling, "CANDIDATES", candidates)
    logits = torch.randn(6, 300, generator=torch.Generator().manual_seed(1)) * 3
    options = [(0.0, 1.0), (1.0, 1.0), (0.7, 0.9), (1.5, 0.3), (2.0, 0.999), (1.0, 0.5)]

    def rows():
        return [Sampling.of(*each, seed=n) for n, each in enumerate(options)]

    together, alone = rows(), rows()
    for _ in range(20):
        expected = [choose_tokens(logits[n : n + 1], [row])[0][0] for n, row in enumerate(alone)]
        assert choose_tokens(logits, together)[0] == expected


def test_a_row_that_is_not_finite_is_reported_and_spoils_no_other():
    logits = torch.stack([LOGITS[0], LOGITS[0], LOGITS[0]])
    logits[0, 3], logits[1, 2] = float("nan"), float("inf")
    tokens, largest = choose_tokens(logits, [Sampling.of(1.0, 0.9, n) for n in range(3)])
    assert [torch.tensor(value).isfinite().item() for value in largest] == [False, False, True]
    assert 0 <= tokens[2] < 5


def test_a_seed_of_64_bits_is_taken():
    for seed in (-(2**63), 0, 2**64 - 1):
        check_sampling(1.0, 1.0, seed)
        Sampling.of(1.0, 1.0, seed)
    with pytest.raises(InputError, match="64 bits"):
        check_sampling(1.0, 1.0, -(2**63) - 1)
