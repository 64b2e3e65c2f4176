"""GRPO on a tiny model: the loss against the paper's formula, and what is drawn."""

import math

import numpy as np
import pytest
import torch

from bindllm.model.bind_network import BindConfig
from bindllm.model.injection import InjectConfig
from bindllm.objectives import GRPO, Reward, grpo
from bindllm.objectives.grpo import clipped_surrogate, draw_answers, group_advantages, kl_estimate
from grpo_parts import LetterClass, Questions, started
from preference_parts import COLORS, TOKENIZER, lookup
from tiny import TokenEncoder

pytestmark = pytest.mark.usefixtures("silent")


class Constant(Reward):
    """The same for all answers, a number that float32 rounds."""

    def __call__(self, answers, samples):
        return torch.full((len(answers),), 0.1)


def move(model, seed=3, size=0.05):
    """Let the weights differ from those that answers were drawn with."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in model.parameters():
            if value.requires_grad:
                value.add_(size * torch.randn(value.shape, generator=generator))


def alone(model, rollout, r: int, temperature: float = 1.0) -> np.ndarray:
    """Log-probabilities of the tokens of one answer, from its row alone without padding, in float64."""
    batch = rollout.batch
    length = int(batch["attention_mask"][r].sum())
    names = ("input_ids", "attention_mask", "media_index")
    inputs = {name: batch[name][r : r + 1, :length] for name in names}
    assert inputs["attention_mask"].all(), "padding is on the right"
    with torch.no_grad():
        logits = model(**inputs, embeddings=batch["embeddings"][r : r + 1]).logits[0].double()
    said = logits.div(temperature).log_softmax(-1)
    labels = batch["labels"][r]
    return np.array([said[t - 1, labels[t]].item() for t in range(1, length) if labels[t] != -100])


def said(row: list[int]) -> str:
    """Text of an answer; one that was cut may end inside a character, which is dropped."""
    text = TOKENIZER.decode(row, skip_special_tokens=True)
    return (text if row[-1] == 2 else text.rstrip("\ufffd")).strip()


CASES = {
    "the paper": {},
    "strong": {"beta": 0.5, "clip": 0.02},
    "without reference": {"beta": 0.0, "group_size": 2},
    "cool": {"temperature": 0.7},
    "Dr. GRPO": {"normalize_std": False, "normalize_length": False},
}


@pytest.mark.parametrize("case", CASES)
def test_the_whole_loss_is_the_formula_answer_by_answer(case, decoder):
    options = {"group_size": 6, "beta": 0.04, "clip": 0.2, "max_new_tokens": 5, **CASES[case]}
    objective = GRPO(LetterClass(), **options)
    model, batch = started(decoder, objective)
    start, _ = started(decoder, GRPO(LetterClass(), **options))
    move(model, seed=1)
    torch.manual_seed(0)
    rollout = objective.roll_out(model, batch)
    size = options["group_size"]
    temperature = options.get("temperature", 1.0)
    old = [alone(model, rollout, r, temperature) for r in range(3 * size)]
    first, _ = objective.learn(model, rollout)
    move(model, seed=2)
    loss, metrics = objective.learn(model, rollout)

    labels = rollout.batch["labels"]
    texts = [said(row[row != -100].tolist()) for row in labels]
    truth = [COLORS[n] for n in (0, 1, 2) for _ in range(size)]
    earned = np.array(
        [float(bool(t) and ord(t[0]) % 4 == COLORS.index(c)) for t, c in zip(texts, truth, strict=True)]
    )
    terms, divergences, clipped = [], [], 0
    for r in range(3 * size):
        group = earned[r // size * size :][:size]
        advantage = earned[r] - group.mean()
        if options.get("normalize_std", True):
            advantage = advantage / group.std() if group.std() else 0.0
        now, reference = alone(model, rollout, r, temperature), alone(start, rollout, r, temperature)
        ratio = np.exp(now - old[r])
        kept = np.clip(ratio, 1 - options["clip"], 1 + options["clip"])
        clipped += (kept != ratio).sum()
        divergence = np.exp(reference - now) - (reference - now) - 1
        tokens = np.minimum(ratio * advantage, kept * advantage) - options["beta"] * divergence
        terms.append(tokens.mean() if options.get("normalize_length", True) else tokens.sum() / 5)
        divergences.append(divergence.mean())
    assert loss.item() == pytest.approx(-np.mean(terms), abs=2e-5)
    assert first.item() != pytest.approx(loss.item(), abs=1e-3)
    assert metrics["reward"].item() == pytest.approx(earned.mean())
    useful = [len(set(earned[n * size :][:size])) > 1 for n in range(3)]
    assert metrics["useful"].item() == pytest.approx(np.mean(useful))
    assert any(useful), "the case says something"
    assert case != "without reference" or not all(useful), "and so does this one"
    assert metrics["length"].item() == pytest.approx(np.mean([len(tokens) for tokens in old]))
    assert metrics["cut"].item() == pytest.approx(np.mean([2 not in row for row in labels]))
    if options["beta"]:
        assert metrics["kl"].item() == pytest.approx(np.mean(divergences), abs=1e-5)
    if case == "strong":
        assert clipped


def test_advantages_are_distances_from_the_mean_of_the_group_in_deviations():
    rewards = torch.tensor([[1.0, 2.0, 3.0, 6.0], [0.1, 0.1, 0.1, 0.1]])
    expected = [-2 / math.sqrt(3.5), -1 / math.sqrt(3.5), 0, 3 / math.sqrt(3.5)]
    assert group_advantages(rewards)[0].tolist() == pytest.approx(expected)
    assert group_advantages(rewards, normalize_std=False)[0].tolist() == pytest.approx([-2, -1, 0, 3])
    assert group_advantages(rewards)[1].tolist() == [0, 0, 0, 0]
    thirds = torch.full((1, 7), 1 / 3)
    assert group_advantages(thirds).tolist() == [[0] * 7], "no rounding is taken for a difference"


def test_a_clipped_token_has_no_gradient_where_it_would_go_further():
    now = torch.tensor([1.5, 0.5, 1.1, 1.5, 0.5]).log().requires_grad_()
    advantages = torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0])
    clipped_surrogate(now, torch.zeros(5), advantages, clip=0.2).sum().backward()
    assert now.grad.tolist() == pytest.approx([0, 0, 1.1, -1.5, 0.5])


def test_the_divergence_is_unbiased_and_never_below_zero():
    torch.manual_seed(0)
    mine, other = torch.randn(2, 50, dtype=torch.float64).log_softmax(-1)
    each = kl_estimate(mine, other)
    assert bool((each >= 0).all())
    # Its mean over tokens as the model draws them is the divergence itself.
    assert (mine.exp() * each).sum().item() == pytest.approx((mine.exp() * (mine - other)).sum().item())
    assert kl_estimate(mine, mine).tolist() == [0] * 50


def test_at_the_start_the_divergence_is_zero_and_the_reference_stays_there(decoder):
    objective = GRPO(LetterClass(), group_size=4, max_new_tokens=3, beta=0.1)
    model, batch = started(decoder, objective)
    before = {name: value.clone() for name, value in model.named_parameters()}
    _, metrics = objective.learn(model, objective.roll_out(model, batch))
    assert metrics["kl"].item() == 0
    for name, value in model.named_parameters():
        assert torch.equal(value, before[name]), name
    move(model)
    _, metrics = objective.learn(model, objective.roll_out(model, batch))
    assert metrics["kl"].item() > 1e-4


@pytest.mark.parametrize("beta", [0.0, 0.04])
def test_groups_of_equal_rewards_leave_the_weights_to_the_reference(beta, decoder):
    """Without one the loss is zero, and backward still runs; every trained tensor has a gradient, of zeros."""
    objective = GRPO(Constant(), group_size=4, max_new_tokens=3, beta=beta)
    model, batch = started(decoder, objective)
    move(model)
    loss, metrics = objective.learn(model, objective.roll_out(model, batch))
    loss.backward()
    assert metrics["useful"].item() == 0
    gradients = [value.grad for value in model.parameters() if value.requires_grad]
    assert all(gradient is not None for gradient in gradients)
    assert (loss.item() != 0) == any(bool(gradient.any()) for gradient in gradients) == bool(beta)


@pytest.mark.parametrize(("reward", "warnings"), [(Constant(), 1), (LetterClass(), 0)])
def test_a_reward_that_never_tells_answers_apart_is_reported_once(reward, warnings, decoder, caplog):
    objective = GRPO(reward, group_size=4, max_new_tokens=1, beta=0.0)
    model, batch = started(decoder, objective)
    torch.manual_seed(0)
    with caplog.at_level("WARNING", "bindllm"):
        for _ in range(22):
            objective.roll_out(model, batch)
    assert [record.levelname for record in caplog.records] == ["WARNING"] * warnings
    assert all("10 batches in a row" in message and "0.1" in message for message in caplog.messages)


def test_answers_are_drawn_from_the_whole_distribution_and_end_at_the_first_end_token(decoder):
    """Two hundred answers to a prompt: each token as often as the model says, within chance."""
    objective = GRPO(LetterClass(), group_size=2, beta=0.0)
    model, batch = started(decoder, objective)
    prompts = {name: value for name, value in batch.items() if name not in ("numbers", "split")}
    torch.manual_seed(0)
    drawn, texts, cut = draw_answers(model, prompts, group_size=200, temperature=1.0, max_new_tokens=4)
    labels = drawn["labels"]
    tokens = [row[row != -100].tolist() for row in labels]
    assert all(2 not in row[:-1] for row in tokens)
    assert cut.tolist() == [row[-1] != 2 for row in tokens]
    assert {len(row) for row in tokens if row[-1] != 2} == {4}
    assert texts == [said(row) for row in tokens]
    shares = np.bincount([row[0] for row in tokens[:200]], minlength=259) / 200
    inputs = {name: value[:1] for name, value in prompts.items()}
    with torch.no_grad():
        expected = model(**inputs).logits[0, -1].double().softmax(-1).numpy()
    assert np.abs(shares - expected).max() < 0.12
    assert (shares > 0).sum() > 10


def test_drawn_answers_are_rows_as_training_makes_them(decoder):
    """Prompts of different lengths, then the tokens of the answer, which hear what the question hears."""
    objective = GRPO(LetterClass(), group_size=3, max_new_tokens=4, beta=0.0)
    model, batch = started(decoder, objective)
    assert len(batch["attention_mask"].sum(1).unique()) == 2
    drawn = objective.roll_out(model, batch).batch
    for r in range(9):
        sample = objective._samples(batch)[r // 3]
        length, prompt = int(drawn["attention_mask"][r].sum()), sample.prompt_length
        assert prompt < length <= prompt + 4
        row = {name: value[r, :length].tolist() for name, value in drawn.items() if name != "embeddings"}
        assert row["input_ids"][:prompt] == sample.input_ids[:prompt].tolist()
        assert row["media_index"] == sample.media_index[:prompt].tolist() + [0] * (length - prompt)
        assert row["labels"] == [-100] * prompt + row["input_ids"][prompt:]
        rest = {
            name: set(value[r, length:].tolist()) for name, value in drawn.items() if name != "embeddings"
        }
        assert rest["labels"] <= {-100}
        assert rest["media_index"] <= {-1}
        assert torch.equal(drawn["embeddings"][r], lookup(sample.media))


def test_drawn_answers_keep_the_tokens_of_their_prompts():
    prompts = {
        "input_ids": torch.tensor([[0, 5], [6, 7]]),
        "attention_mask": torch.tensor([[0, 1], [1, 1]]),
        "media_index": torch.tensor([[-1, 0], [0, 0]]),
        "embeddings": torch.randn(2, 1, 4),
        "tokens": torch.randn(2, 1, 3, 8),
    }
    ids = torch.full((4, 1), 9)
    joined = grpo._join(prompts, ids, torch.ones(4, 1, dtype=torch.bool), 2)
    assert torch.equal(joined["tokens"], prompts["tokens"][[0, 0, 1, 1]])
    del prompts["tokens"]
    assert "tokens" not in grpo._join(prompts, ids, torch.ones(4, 1, dtype=torch.bool), 2)


def test_answers_are_drawn_and_learned_from_with_tokens(decoder):
    class WithTokens:
        def __call__(self, groups):
            return lookup(groups)

        def tokens(self, groups):
            return torch.randn(16, 3, 8, generator=torch.Generator().manual_seed(0))[lookup(groups).argmax(1)]

    objective = GRPO(LetterClass(), group_size=4, max_new_tokens=3, beta=0.1)
    options = {
        "encoders": [TokenEncoder()],
        "bind": BindConfig(depth=1, tokens=3),
        "inject": InjectConfig(kind="attend"),
    }
    model, batch = started(decoder, objective, Questions(lookup=WithTokens()), **options)
    objective._start = {name: value.detach().clone() for name, value in model.named_parameters()}
    rollout = objective.roll_out(model.train(), batch)
    assert rollout.batch["tokens"].shape == (12, 1, 3, 8)
    loss, _ = objective.learn(model, rollout)
    # The model is still the one that sampled: nothing has moved, and there is something to learn.
    torch.testing.assert_close(rollout.old, rollout.reference, atol=1e-5, rtol=0)
    loss.backward()
    assert model.bind.resampler.latents.grad.isfinite().all()
