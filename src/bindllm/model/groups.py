"""The trainable groups of a model: bind network, injection, adapter, context, decoder and encoders."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import nn

from bindllm.encoders.trainable import tuned_encoders
from bindllm.errors import InputError, did_you_mean

if TYPE_CHECKING:
    from bindllm.model.bindllm import BindLLM

DECODER, ENCODERS = "decoder", "encoders"

_EXAMPLES = {
    "adapter": "adapter: {rank: 16}",
    "context": "context: {records: 3}",
    DECODER: "decoder: {tuned: true}",
    ENCODERS: "an encoder of class bindllm.encoders.Tuned",
}
# peft's names of the parts of a plain model, when an adapter is around them.
_WRAPPED = (".base_layer", ".original_module")


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
    if model.config.tuned:
        own = {id(value) for _, value in groups.get("adapter", ())}
        groups[DECODER] = [
            (f"{DECODER}.{_plain(name)}", value)
            for name, value in model.decoder.named_parameters()
            if id(value) not in own
        ]
    if tuned := tuned_encoders(model.encoders):
        groups[ENCODERS] = [
            (f"{ENCODERS}.{number}.{name}", value)
            for number, encoder in tuned.items()
            for name, value in encoder.parameters().items()
        ]
    return groups


def _plain(name: str) -> str:
    """Return the name of a parameter in the plain decoder, whether an adapter is around it or not."""
    for part in _WRAPPED:
        name = name.replace(part, "")
    return name


def set_trainable(model: BindLLM, names: Sequence[str]) -> None:
    """Let the named groups of a `BindLLM` be trained and freeze everything else.

    Raises:
        InputError: a name is unknown, or the decoder is to be trained in half precision.
    """
    groups = parameter_groups(model)
    for name in names:
        if name not in groups:
            hint = f"Give the model one, such as {_EXAMPLES[name]}. " if name in _EXAMPLES else ""
            raise InputError(f"unknown parameter group {name!r}. {hint}{did_you_mean(name, groups)}")
    if DECODER in names and model.config.dtype not in ("auto", "float32"):
        raise InputError(
            f"model.trainable names the decoder, and decoder.dtype is {model.config.dtype}, in which small steps would "
            "vanish: set it to float32. trainer.precision: bf16-mixed computes in bfloat16"
        )
    # Freeze first: the groups below are the only parameters that may get gradients.
    model.requires_grad_(False)
    for name in names:
        for _, parameter in groups[name]:
            parameter.requires_grad_(True)
