"""Training objectives: one small class each, named by its import path in a recipe.

model:
  objective: {class_path: bindllm.objectives.DPO, init_args: {beta: 0.1}}
"""

from bindllm.objectives.base import (
    Metrics,
    Needs,
    NextToken,
    Objective,
    answer_log_probs,
    next_token_loss,
    unlikelihood_loss,
)
from bindllm.objectives.grpo import GRPO
from bindllm.objectives.kto import KTO, kto_loss
from bindllm.objectives.pairs import DPO, ORPO, dpo_loss, log_odds
from bindllm.objectives.rewards import CaptionMetric, ExactAnswer, OptionLetter, Reward

__all__ = [
    "DPO",
    "GRPO",
    "KTO",
    "ORPO",
    "CaptionMetric",
    "ExactAnswer",
    "Metrics",
    "Needs",
    "NextToken",
    "Objective",
    "OptionLetter",
    "Reward",
    "answer_log_probs",
    "dpo_loss",
    "kto_loss",
    "log_odds",
    "next_token_loss",
    "unlikelihood_loss",
]
