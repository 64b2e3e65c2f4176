"""The optimizer: AdamW or another one, with a linear warm-up and a cosine decay, over named groups of parameters.

Trained parameters are selected by the names of groups, never by a substring of parameter names; `groups_table` shows
the selection before the first step.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pkgutil import resolve_name
from typing import Any

import torch
from lightning.pytorch import Trainer
from rich import box
from rich.table import Table
from torch import Tensor, nn

from bindllm.errors import InputError, TrainingError
from bindllm.imports import name_module

Groups = Mapping[str, Sequence[tuple[str, nn.Parameter]]]
"""Named groups of named parameters, as `BindLLM.parameter_groups` returns them."""

ADAMW = "torch.optim.AdamW"

_ZERO_STEPS = 100
"""Steps after which a run whose gradient is zero ends, if its epochs are longer."""

# Gates and queries start at or near zero, and decay would keep them there. The keys of kind cross come along.
_UNDECAYED = "injection."


@dataclass
class OptimConfig:
    """AdamW (arXiv 1711.05101) and its schedule."""

    lr: float = 1e-3
    """Highest learning rate, reached at the end of the warm-up."""

    betas: tuple[float, float] = (0.9, 0.95)
    """Decay of the running means of the gradient and of its square."""

    weight_decay: float = 0.05
    """Decoupled weight decay of matrices; gates, queries, norms and biases have no decay."""

    warmup: float = 0.05
    """Linear warm-up: a share of all steps if below 1, else a number of steps."""

    final_lr: float = 0.1
    """Learning rate at the last step, as a share of `lr`; the decay is a cosine."""

    optimizer: str = ADAMW
    """Import path of another optimizer, such as torch.optim.NAdam; it gets ``lr`` and the decay of each group."""

    options: dict[str, Any] = field(default_factory=dict)
    """Further arguments of another optimizer."""

    def __post_init__(self) -> None:
        if self.optimizer == ADAMW and self.options:
            raise InputError(
                f"model.optim: options {', '.join(self.options)} are those of another optimizer; AdamW has lr, betas "
                "and weight_decay"
            )
        if self.optimizer != ADAMW and tuple(self.betas) != OptimConfig.betas:
            raise InputError(
                f"model.optim.betas are those of AdamW; give {self.optimizer} its own in model.optim.options"
            )
        # Each group of parameters has its own, and torch would ignore this one.
        if "weight_decay" in self.options:
            raise InputError("model.optim.options has weight_decay: set model.optim.weight_decay instead")
        # Negated comparisons would accept NaN; these refuse it. A warm-up without end would keep the rate at zero.
        wrong = [
            f"{name} is {value}, expected {expected}"
            for name, value, fits, expected in (
                ("lr", self.lr, 0 < self.lr < math.inf, "more than 0"),
                ("betas", self.betas, all(0 <= beta < 1 for beta in self.betas), "two numbers in [0, 1)"),
                ("weight_decay", self.weight_decay, 0 <= self.weight_decay < math.inf, "at least 0"),
                ("warmup", self.warmup, 0 <= self.warmup < math.inf, "at least 0"),
                ("final_lr", self.final_lr, 0 <= self.final_lr <= 1, "0 to 1"),
            )
            if not fits
        ]
        if wrong:
            raise InputError(f"model.optim: {'; '.join(wrong)}")
        if self.optimizer != ADAMW:
            # A name or an argument that is wrong is found when the recipe is read. A run has up to two groups.
            groups = [{"params": [nn.Parameter(torch.zeros(shape))]} for shape in ((1, 1), (1,))]
            _build_other(groups, self)


def is_decayed(name: str, parameter: nn.Parameter) -> bool:
    """Return whether weight decay applies: to matrices, but not to gates, queries, norms and biases."""
    return not name.startswith(_UNDECAYED) and parameter.ndim > 1


def build_optimizer(groups: Groups, config: OptimConfig, *, fused: bool = True) -> torch.optim.Optimizer:
    """Return the optimizer over the parameters that require a gradient.

    Args:
        config: learning rate, betas and decay.
        fused: AdamW takes one pass over memory instead of ten; must be False with Lightning's mixed precision, which
            cannot clip the gradients of a fused optimizer.

    Raises:
        InputError: no parameter is trainable, or another optimizer does not exist, refuses its arguments or has no
            weight decay.
    """
    # Two groups, because weight decay pulls towards zero: right for matrices, wrong for gates, norms and biases.
    decayed, plain = [], []
    for name, parameter in (member for members in groups.values() for member in members):
        if parameter.requires_grad:
            (decayed if is_decayed(name, parameter) else plain).append(parameter)
    if not decayed and not plain:
        raise InputError(
            f"nothing is trainable: name at least one group under model.trainable ({', '.join(groups)})"
        )
    parts = [
        {"params": params, "weight_decay": decay}
        for params, decay in ((decayed, config.weight_decay), (plain, 0.0))
        if params
    ]
    if config.optimizer != ADAMW:
        return _build_other(parts, config)
    return torch.optim.AdamW(parts, lr=config.lr, betas=config.betas, fused=fused)


def _build_other(parts: list[dict[str, Any]], config: OptimConfig) -> torch.optim.Optimizer:
    path = config.optimizer
    # The recipe of the user names it, so its module may be imported, also from the working directory.
    name_module(path)
    try:
        kind = resolve_name(path)
    except Exception as error:
        raise InputError(f"model.optim.optimizer {path} cannot be imported ({error})") from error
    if not (isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer)):
        raise InputError(f"model.optim.optimizer {path} is not a class of torch.optim.Optimizer")
    try:
        made = kind(parts, lr=config.lr, **config.options)
    except (TypeError, ValueError) as error:
        raise InputError(f"model.optim: {path} refuses its arguments ({error})") from error
    # torch keeps unknown settings of a group without an error.
    if config.weight_decay and "weight_decay" not in made.defaults:
        raise InputError(
            f"model.optim: {path} has no weight_decay, and the recipe's is {config.weight_decay:g}: set "
            "model.optim.weight_decay: 0"
        )
    return made


def lr_factor(step: int, *, total: int, config: OptimConfig) -> float:
    """Return the learning rate of a step as a share of ``config.lr``.

    Args:
        step: steps already taken.

    Examples:
        >>> [round(lr_factor(s, total=100, config=OptimConfig(warmup=4)), 2) for s in (0, 3, 52, 100)]
        [0.25, 1.0, 0.55, 0.1]
    """
    # Linear to 1 during the warm-up, then half a cosine from 1 to the final share.
    warmup = config.warmup * total if config.warmup < 1 else config.warmup
    if step < warmup:
        return min(1.0, (step + 1) / warmup)
    progress = min(1.0, (step - warmup) / max(1.0, total - warmup))
    return config.final_lr + (1 - config.final_lr) * 0.5 * (1 + math.cos(math.pi * progress))


def build_schedule(
    optimizer: torch.optim.Optimizer, total: float, config: OptimConfig
) -> torch.optim.lr_scheduler.LambdaLR:
    """Return the schedule over ``total`` steps.

    Raises:
        InputError: the run has no end, so the length of the decay is unknown.
    """
    # A cosine to the last step needs to know the last step.
    if not math.isfinite(total):
        raise InputError(
            "the learning rate decays over the run, so the run needs an end: set trainer.max_epochs or max_steps"
        )
    # A partial of a module function, not a lambda: the state of the schedule then holds no code.
    return torch.optim.lr_scheduler.LambdaLR(optimizer, partial(lr_factor, total=int(total), config=config))


def check_precision(trainer: Trainer) -> None:
    """Refuse a trainer that changes the trained weights themselves to a low precision.

    Raises:
        InputError: names the precisions that fit.
    """
    if not trainer.precision.endswith(("32-true", "mixed")):
        raise InputError(
            f"trainer.precision is {trainer.precision}, in which small training steps would vanish; expected 32-true, "
            "bf16-mixed or 16-mixed. The precision of a frozen decoder is model.decoder.dtype"
        )


def configure_lightning(trainer: Trainer, groups: Groups, config: OptimConfig) -> dict[str, Any]:
    """Return AdamW and a schedule that moves every step, as Lightning's `configure_optimizers` does.

    Raises:
        InputError: no parameter is trainable, the run has no end, or the weights are not float32.
    """
    # A trainer of the user's own reaches only this function.
    check_precision(trainer)
    optimizer = build_optimizer(groups, config, fused=not trainer.precision.endswith("mixed"))
    schedule = build_schedule(optimizer, trainer.estimated_stepping_batches, config)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def set_rates(schedule: torch.optim.lr_scheduler.LambdaLR) -> None:
    """Set the learning rates of the current step: the state of a run with fewer steps holds those of its schedule."""
    # Recomputed from the number of steps; `step()` would also advance it.
    factors = [factor(schedule.last_epoch) for factor in schedule.lr_lambdas]
    rates = [base * factor for base, factor in zip(schedule.base_lrs, factors, strict=True)]
    for group, rate in zip(schedule.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    schedule._last_lr = rates


class ZeroGradientCheck:
    """Ends a run that cannot learn: its gradient was exactly zero in every step so far.

    Attributes:
        steps: number of these steps; None once a gradient was not zero.
    """

    def __init__(self) -> None:
        self.steps: int | None = 0

    def add(self, norm: Tensor) -> None:
        """Count a step with this norm of the gradient.

        Raises:
            TrainingError: it is the last step that is allowed without a gradient.
        """
        if self.steps is not None:
            self.steps = self.steps + 1 if norm == 0 else None
            # An epoch may be endless.
            if self.steps == _ZERO_STEPS:
                self.finish_epoch()

    def finish_epoch(self) -> None:
        """Raise if the run has not learned in an epoch.

        Raises:
            TrainingError: all steps so far had a gradient of zero.
        """
        # 0: no step was taken yet. None: a gradient was not zero.
        if self.steps:
            raise TrainingError(
                f"the gradient was exactly zero in all {self.steps} steps, so nothing can be learned, and nothing was "
                "saved. Usual reasons: trained groups that act only through gates which are zero and frozen (add "
                "inject to model.trainable), or an objective that is constant on these rows"
            )


def describe_groups(groups: Groups) -> list[dict[str, Any]]:
    """Return a row per group: ``group``, ``tensors``, ``parameters``, ``decayed`` (of these), ``trainable``."""
    rows = []
    for group, members in groups.items():
        sizes = [(value.numel(), is_decayed(name, value)) for name, value in members]
        rows.append(
            {
                "group": group,
                "tensors": len(sizes),
                "parameters": sum(size for size, _ in sizes),
                "decayed": sum(size for size, decayed in sizes if decayed),
                # Groups are trained as a whole, so one tensor answers for all.
                "trainable": any(value.requires_grad for _, value in members),
            }
        )
    return rows


def groups_table(groups: Groups, frozen: int) -> Table:
    """Return a table of trained and frozen parameters.

    Args:
        frozen: number of parameters outside of all groups: those of the decoder, unless it is tuned.
    """
    table = Table("group", "tensors", "parameters", "with weight decay", "", box=box.SIMPLE)
    for column in table.columns[1:4]:
        column.justify = "right"
    for row in describe_groups(groups):
        sizes = [f"{row[name]:,}" for name in ("tensors", "parameters", "decayed")]
        table.add_row(row["group"], *sizes, "trained" if row["trainable"] else "frozen")
    if frozen:
        table.add_row("decoder", "", f"{frozen:,}", "", "frozen")
    return table
