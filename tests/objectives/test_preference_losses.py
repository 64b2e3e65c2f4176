"""Each objective's loss against its paper's formula, written out with probabilities in float64."""

import math

import pytest
import torch

from bindllm.errors import InputError
from bindllm.objectives import DPO, KTO, ORPO, dpo_loss, kto_loss, log_odds


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


# Probabilities of whole answers: trained chosen, trained rejected, reference chosen, reference rejected.
PAIRS = [(0.2, 0.1, 0.1, 0.1), (0.01, 0.3, 0.02, 0.2), (0.5, 0.5, 0.25, 0.75), (1e-6, 1e-9, 1e-5, 1e-8)]


def gaps(**options) -> torch.Tensor:
    p = torch.tensor(PAIRS, dtype=torch.float64, **options).log()
    return (p[:, 0] - p[:, 2]) - (p[:, 1] - p[:, 3])


@pytest.mark.parametrize("beta", [0.1, 2.0])
@pytest.mark.parametrize("epsilon", [0.0, 0.2])
def test_dpo_is_equation_7_and_its_smoothed_form(beta, epsilon):
    expected = []
    for pi_w, pi_l, ref_w, ref_l in PAIRS:
        inner = beta * math.log(pi_w / ref_w) - beta * math.log(pi_l / ref_l)
        expected.append(
            -(1 - epsilon) * math.log(sigmoid(inner)) - epsilon * math.log(sigmoid(-inner)),
        )
    found = dpo_loss(gaps(), beta=beta, label_smoothing=epsilon)
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("tau", [0.1, 0.5])
def test_ipo_is_equation_17(tau):
    expected = []
    for pi_w, pi_l, ref_w, ref_l in PAIRS:
        h = math.log((pi_w * ref_l) / (pi_l * ref_w))
        expected.append((h - 1 / tau / 2) ** 2)
    found = dpo_loss(gaps(), beta=tau, kind="ipo")
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))


# Token probabilities of an answer: odds are of their geometric mean.
ANSWERS = [([0.5, 0.4, 0.9], [0.3]), ([0.1], [0.2, 0.6, 0.7, 0.01])]


def test_orpo_odds_are_equations_3_to_5():
    for answers in ANSWERS:
        for tokens in answers:
            mean = math.prod(tokens) ** (1 / len(tokens))
            log_prob = torch.tensor([math.log(p) for p in tokens], dtype=torch.float64).mean()
            assert log_odds(log_prob).item() == pytest.approx(math.log(mean / (1 - mean)), rel=1e-12)


def test_odds_of_a_certain_answer_are_large_and_finite():
    certain = torch.zeros(1, requires_grad=True)
    odds = log_odds(certain)
    odds.backward()
    assert 10 < odds.item() < 20
    assert certain.grad.isfinite().all()


@pytest.mark.parametrize("weights", [(1.0, 1.0), (1.5, 0.5)])
@pytest.mark.parametrize("point", [0.0, 0.7])
def test_kto_is_equation_8(weights, point):
    lambda_d, lambda_u = weights
    rows = [(0.2, 0.1, True), (0.01, 0.3, True), (0.5, 0.25, False), (1e-4, 1e-3, False)]
    beta, expected = 0.3, []
    for pi, ref, desirable in rows:
        r = math.log(pi / ref)
        v = lambda_d * sigmoid(beta * (r - point)) if desirable else lambda_u * sigmoid(beta * (point - r))
        expected.append((lambda_d if desirable else lambda_u) - v)
    found = kto_loss(
        torch.tensor([math.log(pi / ref) for pi, ref, _ in rows], dtype=torch.float64),
        torch.tensor(point, dtype=torch.float64),
        torch.tensor([desirable for *_, desirable in rows]),
        beta=beta,
        weights=weights,
    )
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DPO(beta=0.0), "beta must be finite and above 0, not 0.0"),
        (lambda: DPO(beta=math.nan), "beta must be finite"),
        (lambda: DPO(label_smoothing=0.5), "label_smoothing must be from 0 to below 0.5, not 0.5"),
        (lambda: DPO(loss="hinge"), "unknown loss 'hinge'"),
        (lambda: DPO(loss="ipo", label_smoothing=0.1), "remove it with ipo"),
        (lambda: ORPO(weight=-1.0), "weight must be finite and above 0"),
        (lambda: KTO(undesirable_weight=0.0), "undesirable_weight must be finite and above 0"),
    ],
)
def test_options_outside_their_range_are_refused(make, message):
    with pytest.raises(InputError, match=message):
        make()
