"""What training minimises: one small class per objective, named by its import path in a recipe.

model:
  objective: {class_path: bindllm.training.objectives.DPO, init_args: {beta: 0.1}}
"""

from bindllm.training.objectives.base import Figures, Needs, Objective
from bindllm.training.objectives.dpo import DPO, dpo_loss
from bindllm.training.objectives.grpo import GRPO
from bindllm.training.objectives.kto import KTO, kto_loss
from bindllm.training.objectives.log_probs import answer_log_probs
from bindllm.training.objectives.next_token import NextToken, next_token_loss
from bindllm.training.objectives.orpo import ORPO, log_odds
from bindllm.training.objectives.rewards import CaptionMetric, ExactAnswer, OptionLetter, Reward

__all__ = [
    "DPO",
    "GRPO",
    "KTO",
    "ORPO",
    "CaptionMetric",
    "ExactAnswer",
    "Figures",
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
]
