"""Objectives on a tiny model: the whole loss against one row at a time, what is learnt, and what is refused."""

import math
from functools import partial

import numpy as np
import pytest
import torch

from bindllm.data.collate import collate, model_inputs
from bindllm.data.rows import Row, make_sample
from bindllm.errors import InputError
from bindllm.objectives import DPO, KTO, ORPO, NextToken
from bindllm.objectives.base import answer_log_probs
from bindllm.objectives.kto import mismatch
from preference_parts import (
    TOKENIZER,
    Preferences,
    build,
    conversation,
    judged,
    lookup,
    pairs,
    row,
)
from tiny_run import make_trainer

pytestmark = pytest.mark.usefixtures("silent")


def open_gates(module):
    """Load the model, and let pictures through as after some training."""
    module.configure_model()
    with torch.no_grad():
        module.model.injection.gates.fill_(0.7)
    return module


def log_probs(model, sample, embeddings=lookup) -> list[float]:
    """Log-probability of each learnt token, from the full logits of one row alone in float64."""
    batch = collate([sample], embeddings, pad_id=0)
    inputs = model_inputs(batch)
    labels = inputs.pop("labels")[0]
    with torch.no_grad():
        logits = model(**inputs).logits[0].double()
    return [
        logits[t - 1].log_softmax(-1)[labels[t]].item() for t in range(1, len(labels)) if labels[t] != -100
    ]


def test_log_probabilities_of_a_batch_are_those_of_each_row_alone(decoder):
    model = open_gates(build(decoder, None)).model.eval()
    samples = pairs()[:5]
    sums, counts = answer_log_probs(model, collate(samples, lookup, pad_id=0))
    alone = [log_probs(model, s) for s in [*samples, *(sample.rejected for sample in samples)]]
    assert counts.tolist() == [len(tokens) for tokens in alone]
    assert sums.tolist() == pytest.approx([sum(tokens) for tokens in alone], abs=1e-4)


def moved(decoder, objective, samples, folder):
    """A module whose weights have moved from the start that its objective has noted, and a complete batch."""
    module, data = build(decoder, objective), Preferences(samples)
    trainer = make_trainer(folder, max_epochs=1, limit_val_batches=0)
    trainer.fit(module, data)
    model = module.model.eval()
    start = open_started(decoder)
    rows = [0, 5, 7]
    batch = objective.add_reference(collate([samples[n] for n in rows], lookup, pad_id=0), "train")
    return model, start, [samples[n] for n in rows], batch, rows


def open_started(decoder):
    module = build(decoder, None)
    module.configure_model()
    return module.model.eval()


@pytest.mark.parametrize("normalize_length", [False, True])
def test_the_whole_dpo_loss_is_the_formula_row_by_row(normalize_length, decoder, tmp_path):
    objective = DPO(beta=0.5, normalize_length=normalize_length)
    model, start, samples, batch, _ = moved(decoder, objective, pairs(), tmp_path)
    expected, margins = [], []
    for sample in samples:
        ratios = []
        for side in (sample, sample.rejected):
            trained, reference = log_probs(model, side), log_probs(start, side)
            ratio = sum(trained) - sum(reference)
            ratios.append(ratio / len(trained) if normalize_length else ratio)
        margins.append(0.5 * (ratios[0] - ratios[1]))
        expected.append(-math.log(1 / (1 + math.exp(-margins[-1]))))
    loss, metrics = objective.loss(model, batch)
    assert loss.item() == pytest.approx(np.mean(expected), abs=1e-4)
    assert metrics["margin"].item() == pytest.approx(np.mean(margins), abs=1e-4)
    assert metrics["accuracy"].item() == pytest.approx(np.mean([margin > 0 for margin in margins]))
    assert abs(np.mean(expected) - math.log(2)) > 0.01, "the weights have moved"


def test_the_whole_orpo_loss_is_the_formula_row_by_row(decoder):
    model = open_gates(build(decoder, None)).model.eval()
    samples, expected = pairs()[3:7], []
    for sample in samples:
        chosen, rejected = (np.mean(log_probs(model, side)) for side in (sample, sample.rejected))
        odds = [math.exp(p) / (1 - math.exp(p)) for p in (chosen, rejected)]
        odds_ratio = math.log(odds[0] / odds[1])
        expected.append(-chosen + 0.3 * -math.log(1 / (1 + math.exp(-odds_ratio))))
    loss, count, metrics = ORPO(weight=0.3).held_out(model, collate(samples, lookup, pad_id=0))
    assert (loss.item(), count) == (pytest.approx(np.mean(expected), abs=1e-5), 4)
    assert metrics.keys() == {"margin", "accuracy", "chosen_loss"}


@pytest.mark.parametrize("samples", [judged(), pairs()], ids=["rows", "pairs"])
def test_the_whole_kto_loss_is_the_formula_row_by_row(samples, decoder, tmp_path):
    objective = KTO(beta=0.5, desirable_weight=1.5, undesirable_weight=0.8)
    model, start, chosen, batch, numbers = moved(decoder, objective, samples, tmp_path)

    def ratio(sample):
        return sum(log_probs(model, sample)) - sum(log_probs(start, sample))

    others = mismatch(samples, seed=0)
    point = max(0.0, np.mean([ratio(others[n]) for n in numbers]))
    rows = [(sample, sample.desirable is not False) for sample in chosen]
    rows += [(sample.rejected, False) for sample in chosen if sample.rejected is not None]
    expected = []
    for sample, desirable in rows:
        ahead = (ratio(sample) - point) * (1 if desirable else -1)
        expected.append((1.5 if desirable else 0.8) * (1 - 1 / (1 + math.exp(-0.5 * ahead))))
    loss, count, metrics = objective.held_out(model, batch)
    assert (loss.item(), count) == (pytest.approx(np.mean(expected), abs=1e-4), len(rows))
    assert metrics["kl"].item() == pytest.approx(point, abs=1e-4)
    assert abs(point) > 1e-3 or point == 0


def test_the_point_of_reference_is_never_below_zero_and_has_no_gradient(decoder):
    module = open_gates(build(decoder, None))
    objective, samples = KTO(), judged()[:4]
    batch = collate(samples, lookup, pad_id=0)
    rows = {f"mismatched_{name}": value for name, value in batch.items()}
    sums = answer_log_probs(module.model, batch)[0].detach()
    for shift, point in ((-3.0, 3.0), (2.0, 0.0)):
        extra = {"reference": sums, "mismatched_reference": sums + shift}
        loss, metrics = objective.loss(module.model, {**batch, **rows, **extra})
        assert metrics["kl"].item() == pytest.approx(point, abs=1e-4)
        module.model.zero_grad()
        loss.backward()
        found = module.model.injection.gates.grad.clone()
        # With the point as a plain number the gradient is the same.
        module.model.zero_grad()
        ratio = answer_log_probs(module.model, batch)[0] - sums
        sign = 2.0 * batch["desirable"].float() - 1
        (1 - torch.sigmoid(0.1 * sign * (ratio - point))).mean().backward()
        torch.testing.assert_close(found, module.model.injection.gates.grad, rtol=1e-4, atol=1e-7)


def test_a_mismatched_answer_follows_its_new_prompt_and_hears_its_picture():
    samples = [row(0, "red", "red", desirable=True), row(1, "", "a long white", desirable=False)]
    first, second = mismatch(samples, seed=0)
    text, start = samples[1], samples[1].prompt_length
    assert first.input_ids.tolist() == [
        *samples[0].input_ids[: samples[0].prompt_length],
        *text.input_ids[start:],
    ]
    assert set(first.media_index.tolist()) == {0}
    assert set(second.media_index.tolist()) == {-1}
    assert first.prompt_length == samples[0].prompt_length
    assert first.num_supervised == samples[1].num_supervised
    assert len(second.input_ids) <= max(len(sample.input_ids) for sample in samples)


def test_a_mismatched_answer_is_cut_to_the_longest_row():
    samples = [row(0, "red", "a very long answer", desirable=True), row(1, "", "x", desirable=True)]
    longest = max(len(sample.input_ids) for sample in samples)
    samples[1] = row(1, "red", "not so long", desirable=True)
    assert [len(sample.input_ids) <= longest for sample in mismatch(samples, seed=0)] == [True, True]


@pytest.mark.parametrize(
    ("objective", "samples", "threshold"),
    [
        (DPO(beta=0.5), pairs(), 1.0),
        (DPO(beta=0.5, loss="ipo", normalize_length=True), pairs(), 1.0),
        (ORPO(weight=1.0), pairs(), 1.0),
        (KTO(beta=0.5), judged(), 0.8),
    ],
    ids=["dpo", "ipo", "orpo", "kto"],
)
def test_preferences_about_pictures_are_learnt_from_the_pictures(
    objective, samples, threshold, decoder, tmp_path
):
    """No answer is better without its picture: each colour is chosen as often as every other one."""
    module = build(decoder, objective)
    trainer = make_trainer(tmp_path, max_epochs=10)
    data = Preferences(samples)
    trainer.fit(module, data)
    last = {name: float(value) for name, value in trainer.callback_metrics.items()}
    assert last["val_accuracy"] >= threshold, last
    assert last["val_margin"] > 0.4, last
    # The same model and the good answers, with a picture of another colour.
    module.model.eval()
    good, margins = [n for n, sample in enumerate(samples) if sample.desirable is not False], []
    for turn in (0, 1):
        batch = collate([samples[n] for n in good], partial(lookup, turn=turn), pad_id=0)
        with torch.no_grad():
            margins.append(
                objective.loss(module.model, objective.add_reference(batch, "train"))[1]["margin"].item()
            )
    assert margins[1] < 0.5 * margins[0], margins


def test_next_token_learns_the_chosen_answers_of_pairs_alone(decoder):
    model = open_gates(build(decoder, None)).model.eval()
    samples = pairs()[:4]
    loss, count, metrics = NextToken().held_out(model, collate(samples, lookup, pad_id=0))
    tokens = [value for sample in samples for value in log_probs(model, sample)]
    assert (loss.item(), count, metrics) == (pytest.approx(-np.mean(tokens), abs=1e-5), len(tokens), {})


@pytest.mark.parametrize(
    ("objective", "samples", "message"),
    [
        (
            DPO(),
            [row(0, "red", "red", "blue"), row(1, "red", "red")],
            r"DPO.*chosen and a rejected.*2 of the 4 rows of data/colours are not",
        ),
        (ORPO(), judged(), r"ORPO learns from pairs.*32 of the 32 rows.*are not.*row 0"),
        (KTO(), [row(0, "red", "red")], r"KTO.*desirable.*or pairs"),
    ],
)
def test_data_without_what_an_objective_learns_from_are_refused_by_name(
    objective, samples, message, decoder, tmp_path
):
    module = build(decoder, objective)
    with pytest.raises(InputError, match=message) as caught:
        make_trainer(tmp_path, max_epochs=1).fit(module, Preferences(samples))
    assert "data/colours" in str(caught.value)
    assert module.model is None, "before the decoder is loaded"


@pytest.mark.parametrize("desirable", [True, False])
def test_kto_needs_both_kinds_of_answers(desirable):
    sources = Preferences(pairs()).sources
    alike = [row(n, "red", color, desirable=desirable) for n, color in enumerate(("red", "green", "blue"))]
    kind = "desirable" if desirable else "undesirable"
    with pytest.raises(InputError, match=f"all 3 rows are {kind}: add others"):
        KTO().check_rows(alike, sources)
    # One of the other kind, or a pair, which has both.
    KTO().check_rows([*alike, row(3, "red", "white", desirable=not desirable)], sources)
    KTO().check_rows([*alike, *pairs()[:1]], sources)


def test_kto_needs_two_rows_in_each_split_before_the_decoder_is_loaded():
    data = Preferences(pairs())
    data.splits["validation"] = pairs()[:1]
    with pytest.raises(InputError, match=r"at least 2 rows in a split.*row 0 is the only one of validation"):
        KTO().check(data, "fit")


def test_measuring_without_training_is_refused_with_what_to_do(decoder, tmp_path):
    with pytest.raises(InputError, match=r"DPO compares with the initial model.*--model.objective null"):
        make_trainer(tmp_path).validate(build(decoder, DPO()), Preferences(pairs()))


def test_streamed_rows_have_no_reference_and_are_refused_with_what_to_do(decoder, tmp_path):
    data = Preferences(pairs())
    data.streamed = True
    with pytest.raises(InputError, match=r"KTO compares all training rows.*ORPO"):
        make_trainer(tmp_path, max_epochs=1).fit(build(decoder, KTO()), data)


def test_a_streamed_row_that_is_not_a_pair_is_refused_by_orpo(decoder):
    model = open_gates(build(decoder, None)).model
    batch = collate([*pairs()[:2], row(2, "red", "red")], lookup, pad_id=0)
    with pytest.raises(InputError, match="1 of 3 rows of a batch are not pairs"):
        ORPO().loss(model, batch)


def test_a_pair_whose_answers_are_cut_to_the_same_tokens_is_left_out():
    sides = [conversation("red", f"a long {end}") for end in ("yes", "no")]
    pair = Row(sides[0], ("a long yes",), "row 0", rejected=sides[1])
    assert make_sample(pair, TOKENIZER, 64).rejected is not None
    length = make_sample(pair, TOKENIZER, 64).prompt_length
    with pytest.raises(InputError, match="differ only beyond max_length"):
        make_sample(pair, TOKENIZER, length + 6)
