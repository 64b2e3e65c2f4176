"""Stages: a run starts from the checkpoint folder of another run, if both have the same base.

The first stage trains bind network and gates. The second (ImageBind-LLM, arXiv 2309.03905, section 3.3) adds an adapter
and trains only that; further stages continue with it. Trained tensors are only valid on their own base, so every
setting that changes their effect is compared, even if all names and shapes fit.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from torch import nn

from bindllm.encoders.trainable import Tuned
from bindllm.errors import CheckpointError, printable
from bindllm.model.adapter import AdapterConfig
from bindllm.model.bind_network import BindConfig
from bindllm.model.checkpoint import read_manifest, read_weights
from bindllm.model.context import ContextConfig
from bindllm.model.decoder import DecoderConfig, fingerprint_decoder, without_weights
from bindllm.model.groups import DECODER, ENCODERS
from bindllm.model.injection import InjectConfig, served_layers
from bindllm.model.layers import choose_layers, find_layers
from bindllm.model.pretrained import encoder_fingerprints, read_configs

if TYPE_CHECKING:
    from bindllm.encoders import Encoder
    from bindllm.model.bindllm import BindLLM

Settings = TypeVar("Settings", InjectConfig, AdapterConfig)

# It only changes the embedding of several media in one message; the released weights use another one.
_NOT_COMPARED = ("fusion",)


def init_from_checkpoint(model: BindLLM, folder: str | Path) -> None:
    """Load the trained tensors of a checkpoint folder.

    A part that only the recipe trains (adapter, context, decoder, encoders) keeps its initial weights.

    Raises:
        CheckpointError: the folder was made for another base; lists the differences and a remedy.
    """
    # Before a tensor is read: most mistakes differ in a setting, and the message names it.
    warnings = check_base(
        folder,
        decoder=model.config,
        encoders=model.encoders,
        bind=model.bind_config,
        inject=model.inject_config,
        adapter=None if model.adapter is None else model.adapter.config,
        context=None if model.context is None else model.context.config,
    )
    for warning in warnings:
        logging.getLogger("bindllm").warning(printable(warning))
    manifest = read_manifest(folder)
    # Weights that are trained from others stay under their license.
    model.origin = manifest.get("origin", "")
    tensors = read_weights(folder, manifest)
    # A first stage has none: a new adapter or context keeps its initial values, with which it changes nothing.
    held = {group for group in ("adapter", "context") if manifest.get(group)}
    for group, members in model.parameter_groups().items():
        # An encoder may be tuned from here on next to one that was tuned before.
        if group == ENCODERS:
            new = tuple(
                f"{ENCODERS}.{number}."
                for number, entry in enumerate(manifest["encoders"])
                if "base" not in entry
            )
            members = [(name, parameter) for name, parameter in members if name.startswith(new)]
        elif group in (*held, "bind", "inject") or (group == DECODER and manifest["decoder"].get("tuned")):
            continue
        tensors |= {name: parameter.detach() for name, parameter in members}
    model.load_trainable_state(tensors, source=str(folder))


def check_base(
    folder: str | Path,
    *,
    decoder: DecoderConfig,
    encoders: Sequence[Encoder],
    bind: BindConfig,
    inject: InjectConfig,
    adapter: AdapterConfig | None,
    context: ContextConfig | None = None,
) -> list[str]:
    """Compare the base of a checkpoint folder with that of a recipe; no weights are loaded.

    Returns:
        Sentences about differences that are allowed.

    Raises:
        CheckpointError: decoder, encoders, bind network, injection, adapter or context differ, or the recipe lacks a
            part that was trained.
    """
    manifest = read_manifest(folder)
    saved = read_configs(folder, manifest)
    _check_frozen(folder, manifest, decoder, encoders)
    inject = _same_words(saved["inject"], inject, decoder)
    if saved["adapter"] is not None and adapter is not None:
        adapter = _same_words(saved["adapter"], adapter, decoder)
    # All differences at once, because a recipe of another base rarely differs in one value.
    differing = [*_differences("bind", saved["bind"], bind), *_differences("inject", saved["inject"], inject)]
    if saved["adapter"] is not None:
        if adapter is None:
            own = {name: value for name, value in vars(saved["adapter"]).items() if value is not None}
            shown = ", ".join(f"{name}: {_shown(value)}" for name, value in own.items())
            raise CheckpointError(
                f"{folder} was trained with an adapter, and this recipe has none, so its decoder differs. Use the same "
                f"adapter: model.adapter: {{{shown}}}"
            )
        # An adapter that only the recipe has is new, and allowed.
        differing += _adapter_differences(saved["adapter"], adapter)
    if saved["context"] is not None:
        # Another number of records and other draws are allowed: no tensor depends on them.
        there = saved["context"]
        here = context and replace(context, records=there.records, copied=there.copied)
        differing += (
            ["context is null here"] if here is None else _differences("context", saved["context"], here)
        )
    if differing:
        raise CheckpointError(
            f"{folder} was made for another base than this recipe: {'; '.join(differing)}. Copy the values from "
            f"{Path(folder) / 'recipe.yaml'} or bindllm.json there, or train the earlier stage with these values"
        )
    return _remarks(folder, manifest, saved["bind"], decoder, bind)


def _same_words(there: Settings, here: Settings, decoder: DecoderConfig) -> Settings:
    """Return settings with the other ones' words for the same layers: ``2`` may be ``[1, 2]``."""
    if there.layers == here.layers:
        return here
    empty = without_weights(decoder.folder())
    every = find_layers(empty)

    def served(settings: Settings) -> list[nn.Module]:
        if isinstance(settings, InjectConfig):
            return served_layers(empty, settings)[0]
        chosen = choose_layers(every, settings.layers, type(empty).__name__, "adapter.layers")
        return [layer for _, layer in chosen]

    return replace(here, layers=there.layers) if served(there) == served(here) else here


def _check_frozen(
    folder: str | Path, manifest: dict[str, Any], decoder: DecoderConfig, encoders: Sequence[Encoder]
) -> None:
    """Compare decoder and encoders by their fingerprints."""
    saved = manifest.get("decoder", {})
    there = encoder_fingerprints(folder, manifest)
    # By content: the same weights may lie in another folder. Of a tuned encoder, only its frozen one can be the same.
    bases = [entry.get("base", own) for entry, own in zip(manifest["encoders"], there, strict=True)]
    here = [encoder.base if isinstance(encoder, Tuned) else encoder for encoder in encoders]
    compared = {
        "decoder": (saved.get("fingerprint"), fingerprint_decoder(decoder.folder())),
        "encoders": (bases, [encoder.fingerprint() for encoder in here]),
    }
    theirs = {
        "decoder": str(saved.get("name")),
        "encoders": ", ".join(str(entry.get("class_path")) for entry in manifest["encoders"]),
    }
    # Trained tensors depend on every bit of both: fingerprints cover weights and preprocessing.
    for what, (found, expected) in compared.items():
        if found != expected:
            raise CheckpointError(
                f"the {what} of {folder} ({theirs[what]}) differ from those of this recipe, by their fingerprint: use "
                f"{Path(folder) / 'recipe.yaml'}"
            )
    if saved.get("tuned") and not decoder.tuned:
        raise CheckpointError(
            f"{folder} was trained with a tuned decoder, and this recipe has the plain one: set model.decoder.tuned: "
            "true. Whether it is trained further is up to model.trainable"
        )
    for entry, encoder in zip(manifest["encoders"], encoders, strict=True):
        # The names of trained tensors count from the first trained block.
        settings = {
            name: value for name, value in entry["init_args"].items() if name not in ("encoder", "allow")
        }
        if "base" in entry and not (isinstance(encoder, Tuned) and encoder.settings == settings):
            raise CheckpointError(
                f"{folder} was trained with an encoder of class bindllm.encoders.Tuned with {_shown(settings)}: use "
                "the same in model.encoders. Whether it is trained further is up to model.trainable"
            )


def _differences(section: str, there: Any, here: Any) -> list[str]:
    """List the settings of a section that differ."""
    return [
        f"{section}.{field.name} is {_shown(getattr(there, field.name))} there and "
        f"{_shown(getattr(here, field.name))} here"
        for field in fields(there)
        if field.name not in _NOT_COMPARED and getattr(there, field.name) != getattr(here, field.name)
    ]


def _adapter_differences(there: AdapterConfig, here: AdapterConfig) -> list[str]:
    """List the settings of an adapter that differ in effect: alpha and rslora are compared by their scale."""
    # rank and targets change the tensors; alpha and rslora only their common factor.
    found = [
        difference
        for difference in _differences("adapter", there, here)
        if not difference.startswith(("adapter.alpha ", "adapter.rslora "))
    ]
    # LoRA adds scale * B A (arXiv 2106.09685, section 4.1): alpha / rank, or alpha / sqrt(rank) with rslora.
    if not math.isclose(there.scale, here.scale):
        found.append(
            f"adapter.alpha is {_alpha(there)} there, which makes the scale {there.scale:g}, and {_alpha(here)} here, "
            f"which makes it {here.scale:g}"
        )
    return found


def _alpha(config: AdapterConfig) -> str:
    return f"{_shown(config.alpha)}{' with rslora' if config.rslora else ''}"


def _remarks(
    folder: str | Path, manifest: dict[str, Any], there: BindConfig, decoder: DecoderConfig, bind: BindConfig
) -> list[str]:
    """Describe the allowed differences.

    Quantization rounds the same decoder. A first stage in bfloat16 and a second one on 4 bits is the usual QLoRA setup.
    """
    remarks = []
    # These change prompts or rounding, not the meaning of the trained tensors.
    effects = dict.fromkeys(("template", "template_options", "system"), "its prompts differ")
    for setting, effect in {**effects, "quantize": "the same decoder, rounded differently"}.items():
        before, now = manifest["decoder"].get(setting), getattr(decoder, setting)
        if before != now:
            remarks.append(
                f"{folder} was trained with decoder.{setting} {_shown(before)}, this run has {_shown(now)}: {effect}, "
                "so the loss may start higher"
            )
    if there.fusion != bind.fusion:
        remarks.append(
            f"{folder} fuses several media of one message with bind.fusion {there.fusion}, this run with "
            f"{bind.fusion}; single media are the same in both"
        )
    return remarks


def _shown(value: Any) -> str:
    """Write a setting as recipes do; of a long text, such as a template, the beginning."""
    if isinstance(value, str) and len(value) > 80:
        return f"{value[:80]!r}..."
    return value if isinstance(value, str) and value else json.dumps(value)
