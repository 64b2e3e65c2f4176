"""Whole fits of GRPO on a tiny model: what is learnt, what changes nothing, and what is refused."""

import math

import numpy as np
import pytest
import torch

from bindllm.errors import InputError
from bindllm.objectives import GRPO, Reward
from grpo_parts import LetterClass, Questions, fitted, started
from preference_parts import TOKENIZER, Preferences, build, lookup, row
from tiny_run import make_trainer

pytestmark = pytest.mark.usefixtures("silent")


def greedy_reward(module, trainer, *, turn=0) -> float:
    data = Questions(lookup=lambda groups: lookup(groups, turn=turn))
    module.objective.check(data, "validate")
    found = []
    for batch in data.val_dataloader():
        loss, count, metrics = module.objective.held_out(
            module.model.eval(), module.objective.add_reference(batch, "validation")
        )
        assert count == len(batch["numbers"])
        assert loss.item() == -metrics["reward"].item()
        found.append(metrics["reward"].item())
    return float(np.mean(found))


@pytest.mark.parametrize(("steps", "epochs"), [(1, 30), (2, 10)])
def test_answers_that_are_rewarded_are_learnt_and_hang_on_the_picture(steps, epochs, decoder, tmp_path):
    objective = GRPO(LetterClass(), group_size=8, max_new_tokens=1, beta=0.0, steps_per_rollout=steps)
    module, trainer = fitted(decoder, tmp_path, objective, max_epochs=epochs)
    assert trainer.global_step == 2 * steps * epochs
    assert greedy_reward(module, trainer) == 1
    assert greedy_reward(module, trainer, turn=1) < 0.3, "another picture, another answer"


def test_activation_checkpointing_changes_nothing(decoder, tmp_path):
    """Answers are drawn with a key/value cache all the same."""
    ends = []
    for checkpointed in (False, True):
        objective = GRPO(LetterClass(), group_size=4, max_new_tokens=3)
        module, _ = fitted(decoder, tmp_path, objective, max_epochs=2, checkpoint_activations=checkpointed)
        ends.append(module.model.trainable_state())
    for name, value in ends[0].items():
        torch.testing.assert_close(value, ends[1][name], msg=name)


def test_under_autocast_the_gradient_reaches_every_trained_tensor(decoder, tmp_path, monkeypatch):
    """Weights that generation has cast without gradients must not be used where they need them."""
    seen = []
    monkeypatch.setattr(
        "bindllm.training.module.BindModule.on_before_optimizer_step",
        lambda self, _: seen.append(
            [value.grad.norm().item() for value in self.parameters() if value.requires_grad]
        ),
    )
    objective = GRPO(LetterClass(), group_size=8, max_new_tokens=2)
    fitted(decoder, tmp_path, objective, max_steps=1, max_epochs=1, precision="bf16-mixed")
    assert min(seen[0]) > 0


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"group_size": 1}, "group_size must be finite and at least 2"),
        ({"beta": -0.1}, "beta must be finite and at least 0"),
        ({"beta": math.nan}, "beta must be finite and at least 0"),
        ({"clip": 0}, "clip must be between 0 and 1"),
        ({"temperature": 0}, "temperature must be finite and above 0"),
        ({"max_new_tokens": 0}, "max_new_tokens must be finite and at least 1"),
        ({"steps_per_rollout": 0}, "steps_per_rollout must be finite and at least 1"),
    ],
)
def test_values_outside_of_their_range_are_refused(options, reason):
    with pytest.raises(InputError, match=reason):
        GRPO(**options)


@pytest.mark.parametrize(
    ("rewards", "reason"),
    [
        (
            lambda count: [1.0] * (count - 1) + [math.nan],
            "returned a reward that is not finite for the answer '",
        ),
        (lambda count: [1.0] * (count - 1), r"of shape \[5\] for 6 answers; expected \[6\]"),
        (lambda count: torch.ones(count, 1), r"of shape \[6, 1\] for 6 answers"),
    ],
)
def test_a_reward_that_gives_no_number_for_an_answer_stops_the_run(rewards, reason, decoder):
    class Broken(Reward):
        def __call__(self, answers, samples):
            return rewards(len(answers))

    objective = GRPO(Broken(), group_size=2, max_new_tokens=2)
    model, batch = started(decoder, objective)
    with pytest.raises(InputError, match=reason):
        objective.roll_out(model, batch)


def test_rows_without_true_answers_and_streams_are_refused(decoder, tmp_path):
    data = Preferences([row(0, "red", "red")])
    data.tokenizer = TOKENIZER
    with pytest.raises(InputError, match="GRPO learns from rows with reference answers.*one is row 0"):
        make_trainer(tmp_path, max_epochs=1).fit(build(decoder, GRPO()), data)
    data.streamed = True
    with pytest.raises(InputError, match="GRPO looks up the reference answers"):
        make_trainer(tmp_path, max_epochs=1).fit(build(decoder, GRPO()), data)


def test_several_steps_on_the_same_answers_and_accumulated_gradients_exclude_each_other(decoder, tmp_path):
    with pytest.raises(InputError, match="set one of the two to 1"):
        fitted(decoder, tmp_path, GRPO(steps_per_rollout=2), accumulate_grad_batches=2)
