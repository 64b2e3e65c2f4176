"""Group relative policy optimization: answers with more reward than others to the same question become likelier.

DeepSeekMath (arXiv 2402.03300), section 4.1: equation 3 with outcome supervision and the KL estimator of equation 4.
Dr. GRPO (arXiv 2503.20783), section 3.2, omits two of its divisions.

Shapes: `B` prompts, `G` answers to each, `R = B * G`, `N` tokens of all answers.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.func import functional_call

from bindllm.conversation import NO_MEDIA
from bindllm.data.collate import Batch, prompt_batch
from bindllm.data.datamodule import BindData
from bindllm.data.rows import IGNORE, Row, Sample
from bindllm.data.source_config import SPLITS, SourceConfig
from bindllm.errors import InputError
from bindllm.model.bindllm import BindLLM
from bindllm.objectives.base import Metrics, Needs, Objective, check_positive, sum_by_row, token_log_probs
from bindllm.objectives.rewards import ExactAnswer, Reward
from bindllm.parallel import RunContext

# Batches in a row without a useful group after which a run warns that it does not learn.
_PATIENCE = 10


@dataclass
class Rollout:
    """Sampled answers with their advantages, and the log-probabilities that the loss compares with.

    Attributes:
        batch: inputs of the model, R rows.
        advantages: advantage of each answer within its group, [R].
        reference: log-probabilities of the tokens under the initial model, [N]; None if ``beta`` is 0.
        old: log-probabilities of the tokens when they were sampled, [N]; set at the first use.
        uses: number of steps that have used the answers.
    """

    batch: Batch
    advantages: Tensor
    reference: Tensor | None
    metrics: Metrics
    old: Tensor | None = None
    uses: int = 0


class GRPO(Objective):
    """Learns from its own answers and a verifiable reward, and stays near the initial model.

    The model samples a group of answers to each question of a batch. Answers with more reward than the mean of their
    group become likelier, the others less likely. The rows need reference answers, whose wording is never imitated.

    Args:
        reward: reward of an answer; null: `ExactAnswer`.
        group_size: answers per question, at least 2; a step learns from ``data.batch_size * group_size``.
        beta: weight of the KL divergence from the initial model, at least 0. With 0 no initial weights are kept, one
            forward pass is saved, and answers with an advantage of 0 skip the second one.
        clip: largest distance from 1 of the ratio of a token's probability to its probability at sampling; matters
            from the second step on the same answers.
        temperature: sampling temperature; 1 samples from the model's own distribution.
        max_new_tokens: longest answer, including its end token. Longer ones are truncated, and judged as they are.
        steps_per_rollout: optimizer steps on the answers to one batch of questions.
        normalize_std: divide the rewards of a group by their standard deviation. False as in Dr. GRPO: questions that
            are nearly always or nearly never answered right weigh less.
        normalize_length: use the mean over the tokens of an answer. False as in Dr. GRPO: the sum divided by
            ``max_new_tokens``, so that long wrong answers are not favored.

    Raises:
        InputError: a value is out of range.
    """

    needs: ClassVar[Needs] = "prompts"
    drops_tokens: ClassVar[bool] = False

    def __init__(
        self,
        reward: Reward | None = None,
        group_size: int = 8,
        beta: float = 0.04,
        clip: float = 0.2,
        temperature: float = 1.0,
        max_new_tokens: int = 64,
        steps_per_rollout: int = 1,
        normalize_std: bool = True,
        normalize_length: bool = True,
    ) -> None:
        for name, value, least in (
            ("group_size", group_size, 2),
            ("beta", beta, 0),
            ("max_new_tokens", max_new_tokens, 1),
            ("steps_per_rollout", steps_per_rollout, 1),
        ):
            if not least <= value < float("inf"):
                raise InputError(f"GRPO: {name} must be finite and at least {least}, not {value}")
        if not 0 < clip < 1:
            raise InputError(f"GRPO: clip must be between 0 and 1, not {clip}")
        # How to read this: the options, then what belongs to a run: its data, initial weights and held answers.
        self.reward = ExactAnswer() if reward is None else reward
        self.group_size, self.beta, self.clip = group_size, beta, clip
        self.temperature = check_positive("GRPO: temperature", temperature)
        self.max_new_tokens, self.steps_per_rollout = max_new_tokens, steps_per_rollout
        self.normalize_std, self.normalize_length = normalize_std, normalize_length
        self._data: BindData
        self._pad_id = 0
        self._start: dict[str, Tensor] = {}
        self._held: tuple[tuple[int, ...], Rollout] | None = None
        self._useless = 0

    @property
    def can_checkpoint(self) -> bool:
        """False while answers are to be used again: a saved state does not hold them."""
        return self._held is None

    def check(self, data: BindData, stage: str) -> None:
        """Refuse data and options that do not fit together, and keep the data for `add_reference`.

        Raises:
            InputError: names the source, one of its rows, and the missing field; or options exclude each other.
        """
        super().check(data, stage)
        if stage == "fit" and self.steps_per_rollout > 1 and data.trainer.accumulate_grad_batches > 1:
            raise InputError(
                "GRPO: steps_per_rollout above 1 uses a batch again after an optimizer step, and with "
                "trainer.accumulate_grad_batches there would be none between; set one of the two to 1"
            )
        # A batch carries the indices of its rows, by which answers are judged.
        self._data, self._pad_id = data, data.tokenizer.pad_token_id
        data.steps_per_batch = self.steps_per_rollout

    def check_rows(self, rows: Sequence[Row | Sample], sources: Sequence[SourceConfig]) -> None:
        """Refuse rows without reference answers, and rows that the reward cannot judge."""
        super().check_rows(rows, sources)
        self.reward.check(rows)

    def on_start(self, model: BindLLM) -> None:
        """Copy the trained weights, which are the reference, if there is one."""
        # Only trained tensors: the frozen decoder is the same in both models.
        if self.beta:
            trained = {name: value for name, value in model.named_parameters() if value.requires_grad}
            self._start = {name: value.detach().clone() for name, value in trained.items()}

    def prepare(self, model: BindLLM, data: BindData, context: RunContext) -> None:
        """Move the initial weights to the device of the model."""
        self._start = {name: value.to(context.device) for name, value in self._start.items()}

    def on_epoch_start(self) -> None:
        """Drop answers that the last epoch has not used up: the state saved at its end does not hold them."""
        self._held = None

    def add_reference(self, batch: Batch, split: str) -> Batch:
        """Return the prompts of a batch, padded on the left, with ``numbers`` and the ``split`` that they index."""
        numbers = batch["numbers"]
        samples = self._data.samples(split)
        rows = [samples[n] for n in numbers.tolist()]
        prompts = prompt_batch(rows, self._data.lookup, pad_id=self._pad_id)
        # A batch holds tensors only, so the split travels as its index.
        index = torch.tensor(SPLITS.index(split))
        return {
            **{name: value.to(numbers.device) for name, value in prompts.items()},
            "numbers": numbers,
            "split": index,
        }

    def loss(self, model: BindLLM, batch: Batch) -> tuple[Tensor, Metrics]:
        """Sample answers, or use those of the last step again, and return their loss.

        Logs the mean ``reward``, the share of ``useful`` groups (only groups with different rewards have a gradient),
        the mean ``length`` in tokens, the share of ``cut`` answers, and the divergence ``kl`` from the initial model.

        Raises:
            InputError: the reward does not return one finite number for each answer.
        """
        # The loader repeats a batch for each step on the same answers.
        key = tuple(batch["numbers"].tolist())
        if self._held is None or self._held[0] != key:
            self._held = key, self.roll_out(model, batch)
        rollout = self._held[1]
        found = self.learn(model, rollout)
        if rollout.uses == self.steps_per_rollout:
            self._held = None
        return found

    def held_out(self, model: BindLLM, batch: Batch) -> tuple[Tensor, int, Metrics]:
        """Return the negative mean reward of greedy answers: the best weights have the lowest value."""
        # Greedy, so that validation does not depend on chance and does not move the run's random numbers.
        samples = self._samples(batch)
        texts = model.decode(model.generate_from(**_prompts(batch), max_new_tokens=self.max_new_tokens))
        reward = self._judge(texts, samples).mean().to(model.device)
        return -reward, len(samples), {"reward": reward}

    @torch.no_grad()
    def roll_out(self, model: BindLLM, batch: Batch) -> Rollout:
        """Sample a group of answers to each prompt, and judge them."""
        samples = [sample for sample in self._samples(batch) for _ in range(self.group_size)]
        drawn, texts, cut = draw_answers(
            model,
            _prompts(batch),
            group_size=self.group_size,
            temperature=self.temperature,
            max_new_tokens=self.max_new_tokens,
        )
        # One group per prompt: [B, G].
        rewards = self._judge(texts, samples).reshape(-1, self.group_size).to(model.device)
        advantages = group_advantages(rewards, normalize_std=self.normalize_std)
        self._warn_if_useless(rewards, advantages)
        reference = None
        if self.beta:
            # The initial weights replace the parameters for this call only; the parameters never change.
            start = lambda **inputs: functional_call(model, self._start, kwargs=inputs)  # noqa: E731
            reference, _ = token_log_probs(start, drawn, temperature=self.temperature)
        # Autocast of older torch releases would use weights again that were cast without gradients.
        torch.clear_autocast_cache()
        metrics = {
            "reward": rewards.mean(),
            "useful": (advantages != 0).any(1).float().mean(),
            "length": (drawn["labels"] != IGNORE).sum(1).float().mean(),
            "cut": cut.float().mean(),
        }
        return Rollout(drawn, advantages.flatten().float(), reference, metrics)

    def learn(self, model: BindLLM, rollout: Rollout) -> tuple[Tensor, Metrics]:
        """Return the mean loss of judged answers, and values to log.

        If no group is useful and ``beta`` is 0, the loss is zero with a gradient of zeros.
        """
        batch, advantages = rollout.batch, rollout.advantages
        if rollout.reference is None:
            # The others have no gradient. At least one, because devices that share a decoder run it together.
            kept = advantages != 0
            kept[0] |= not kept.any()
            batch, advantages = {name: value[kept] for name, value in batch.items()}, advantages[kept]
        log_probs, rows = token_log_probs(model, batch, temperature=self.temperature)
        # At the first use the model is still the one that sampled, so no extra pass is needed.
        if rollout.old is None:
            rollout.old = log_probs.detach()
        rollout.uses += 1
        surrogate = clipped_surrogate(log_probs, rollout.old, advantages[rows], clip=self.clip)
        metrics = dict(rollout.metrics)
        loss = -surrogate
        if rollout.reference is not None:
            divergence = kl_estimate(log_probs, rollout.reference)
            loss = loss + self.beta * divergence
            sums, lengths = sum_by_row(divergence.detach(), rows, len(advantages))
            metrics["kl"] = (sums / lengths).mean()
        sums, lengths = sum_by_row(loss, rows, len(advantages))
        # Divided by the length of each answer (DeepSeekMath), or by one constant (Dr. GRPO).
        means = sums / (lengths if self.normalize_length else self.max_new_tokens)
        return means.sum() / len(rollout.advantages), metrics

    def _warn_if_useless(self, rewards: Tensor, advantages: Tensor) -> None:
        """Warn once if batch after batch all answers to a question get the same reward: nothing is learned then."""
        self._useless = 0 if bool(advantages.any()) else self._useless + 1
        if self._useless == _PATIENCE:
            logging.getLogger("bindllm").warning(
                "GRPO: in %d batches in a row, all answers to each question had the same reward (mean of the last: "
                "%g), so nothing is learned from it. Check that the reward can tell answers apart, raise group_size "
                "or temperature, or use easier questions",
                _PATIENCE,
                rewards.mean().item(),
            )

    def _samples(self, batch: Batch) -> list[Sample]:
        samples = self._data.samples(SPLITS[int(batch["split"])])
        return [samples[n] for n in batch["numbers"].tolist()]

    def _judge(self, texts: Sequence[str], samples: Sequence[Sample]) -> Tensor:
        # A reward is foreign code: a wrong shape would broadcast, and a NaN would reach the weights.
        rewards = torch.as_tensor(self.reward(texts, samples), dtype=torch.float32)
        name, shape = type(self.reward).__name__, list(rewards.shape)
        if shape != [len(texts)]:
            raise InputError(
                f"{name} returned rewards of shape {shape} for {len(texts)} answers; expected [{len(texts)}]"
            )
        if not bool((good := rewards.isfinite()).all()):
            worst = texts[int(good.long().argmin())]
            raise InputError(
                f"{name} returned a reward that is not finite for the answer {worst!r}; expected a number"
            )
        return rewards


def group_advantages(rewards: Tensor, *, normalize_std: bool = True) -> Tensor:
    """Return the advantage of each answer within its group (section 4.1.2).

    Args:
        rewards: [B, G].
        normalize_std: divide by the population standard deviation of the group.

    Returns:
        Advantages, float64, [B, G]; exactly 0 in a group of equal rewards.

    Examples:
        >>> group_advantages(torch.tensor([[1.0, 0.0, 0.0, 1.0], [1.0, 1.0, 1.0, 1.0]])).tolist()
        [[1.0, -1.0, -1.0, 1.0], [0.0, 0.0, 0.0, 0.0]]
    """
    # In float64: rewards that differ in their last float32 digits still have an order.
    rewards = rewards.double()
    centered = rewards - rewards.mean(1, keepdim=True)
    if normalize_std:
        centered = centered / rewards.std(1, correction=0, keepdim=True)
    # Compare the rewards: the mean of equal numbers may differ from them by a rounding error.
    same = rewards.amax(1, keepdim=True) == rewards.amin(1, keepdim=True)
    return torch.where(same, 0, centered)


def clipped_surrogate(log_probs: Tensor, old: Tensor, advantages: Tensor, *, clip: float) -> Tensor:
    """Return the clipped surrogate of each token (equation 3 without the divergence), which is maximized.

    Args:
        log_probs: log-probabilities of the tokens now, [N].
        old: log-probabilities when the tokens were sampled, without gradient, [N].
        advantages: advantages of the answers that the tokens belong to, [N].
        clip: the paper's epsilon.

    Returns:
        Surrogates, [N].

    Examples:
        >>> now, old = torch.tensor([0.8, 0.8]).log(), torch.tensor([0.4, 0.4]).log()
        >>> clipped_surrogate(now, old, torch.tensor([1.0, -1.0]), clip=0.2)
        tensor([ 1.2000, -2.0000])
    """
    # The minimum removes the gradient of tokens that have already moved far in the direction of their advantage.
    ratio = (log_probs - old).exp()
    return torch.minimum(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages)


def kl_estimate(log_probs: Tensor, reference: Tensor) -> Tensor:
    """Return the unbiased estimate of the divergence from the reference at each token (equation 4).

    Args:
        log_probs: log-probabilities of the tokens now, [N].
        reference: log-probabilities under the reference, without gradient, [N].

    Returns:
        Estimates, at least 0, [N].
    """
    # exp(x) - x - 1 is at least 0 for each token, unlike the plain log ratio.
    ratio = reference - log_probs
    return torch.expm1(ratio) - ratio


def _prompts(batch: Batch) -> Batch:
    return {name: value for name, value in batch.items() if name not in ("numbers", "split")}


def draw_answers(
    model: BindLLM, prompts: Batch, *, group_size: int, temperature: float, max_new_tokens: int
) -> tuple[Batch, list[str], Tensor]:
    """Sample answers, all in one batch with a key/value cache, with torch's global random numbers.

    Args:
        model: in any mode; it generates without gradients.
        prompts: a batch of `bindllm.data.collate.prompt_batch`, B rows.
        temperature: divisor of the logits; 1 samples from the model's own distribution.

    Returns:
        prompts with their answers, R = B * G rows grouped by prompt and padded on the right, as from
        `bindllm.data.collate.answer_batch`; the labels are the sampled tokens, including the end token. The answers
        without control tokens. Whether each reached the maximum length without an end token, bool, [R].
    """
    ids = model.generate_from(
        **prompts,
        do_sample=True,
        temperature=temperature,
        num_return_sequences=group_size,
        max_new_tokens=max_new_tokens,
    )
    ended = torch.isin(ids, torch.tensor(model.settings.eos_token_id, device=ids.device))
    # The first end token belongs to the answer; padding follows it.
    in_answer = ended.cumsum(1) - ended.long() == 0
    batch = _join(prompts, ids, in_answer, group_size)
    return batch, model.decode(ids), ~ended.any(1)


def _join(prompts: Batch, ids: Tensor, in_answer: Tensor, group_size: int) -> Batch:
    """Append answers [R, A] to their prompts, and move all padding to the right."""
    given = {name: value.repeat_interleave(group_size, dim=0) for name, value in prompts.items()}
    mask, index = given["attention_mask"], given["media_index"]
    blank = torch.full_like(ids, IGNORE)
    columns = {
        "input_ids": torch.cat([given["input_ids"], ids], dim=1),
        "attention_mask": torch.cat([mask, in_answer.long()], dim=1),
        # An answer attends to the media of the end of its prompt, as in generation.
        "media_index": torch.cat([index, torch.where(in_answer, index[:, -1:], NO_MEDIA)], dim=1),
        "labels": torch.cat([torch.full_like(mask, IGNORE), torch.where(in_answer, ids, blank)], dim=1),
    }
    # A rotation of each row by its own padding: prompts are padded on the left, training rows on the right.
    width = columns["input_ids"].shape[1]
    padding = mask.shape[1] - mask.sum(1, keepdim=True)
    order = (torch.arange(width, device=ids.device) + padding) % width
    longest = int(columns["attention_mask"].sum(1).max())
    moved = {name: value.gather(1, order)[:, :longest] for name, value in columns.items()}
    return {**moved, **{name: value for name, value in given.items() if name not in columns}}
