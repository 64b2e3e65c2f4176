"""The trainable groups of a model: bind network, injection, adapter and context."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import nn

from bindllm.errors import InputError, did_you_mean

if TYPE_CHECKING:
    from bindllm.model.bindllm import BindLLM


def parameter_groups(model: BindLLM) -> dict[str, list[tuple[str, nn.Parameter]]]:
    """Return the groups of a `BindLLM`: names, and the parameters under the names of the checkpoint."""
    groups = {
        "bind": [(f"bind.{name}", value) for name, value in model.bind.named_parameters()],
        "inject": [(f"injection.{name}", value) for name, value in model.injection.named_parameters()],
    }
    groups |= {} if model.adapter is None else {"adapter": [*model.adapter.parameters().items()]}
    if model.context is not None:
        members = [*groups["inject"], *((f"context.{n}", p) for n, p in model.context.named_parameters())]
        # The group has gates of its own, so it can be trained without changing the rest.
        groups |= {"inject": [], "context": []}
        for name, value in members:
            is_own = name.startswith(("context.", "injection.context_"))
            groups["context" if is_own else "inject"].append((name, value))
    return groups


def set_trainable(model: BindLLM, names: Sequence[str]) -> None:
    """Let the named groups of a `BindLLM` be trained and freeze everything else.

    Raises:
        InputError: a name is unknown.
    """
    groups = parameter_groups(model)
    for name in names:
        if name not in groups:
            example = {"adapter": "adapter: {rank: 16}", "context": "context: {records: 3}"}.get(name)
            hint = f"Give the model one, such as {example}. " if example else ""
            raise InputError(f"unknown parameter group {name!r}. {hint}{did_you_mean(name, groups)}")
    # Freeze first: the groups below are the only parameters that may get gradients.
    model.requires_grad_(False)
    for name in names:
        for _, parameter in groups[name]:
            parameter.requires_grad_(True)
