"""Stages: a run goes on from the checkpoint folder of another one, if that was made for the same base.

The first stage trains bind network and gates; the second (ImageBind-LLM, arXiv 2309.03905, section 3.3) adds an adapter
and trains that alone; further ones go on with it. The trained tensors mean something on their own base alone, so
whatever changes what they compute is compared, even where every name and shape would fit.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bindllm.errors import CheckpointError
from bindllm.model.adapter import PREFIX, AdapterConfig
from bindllm.model.bind_network import BindConfig
from bindllm.model.checkpoint import read_manifest, read_weights
from bindllm.model.decoder import DecoderConfig, fingerprint_decoder
from bindllm.model.injection import InjectConfig
from bindllm.model.pretrained import encoder_fingerprints, read_configs

if TYPE_CHECKING:
    from bindllm.encoders import Encoder
    from bindllm.model.bindllm import BindLLM

# Changes the embedding of several media in one message, and nothing else; the released weights have another one.
_NOT_COMPARED = ("fusion",)


def init_from_checkpoint(model: BindLLM, folder: str | Path) -> None:
    """Take over the trained tensors of a checkpoint folder.

    An adapter that the folder does not have stays as it is: it starts by changing nothing.

    Raises:
        CheckpointError: the folder was made for another base; says what differs, and what to do.
    """
    warnings = check_base(
        folder,
        decoder=model.config,
        encoders=model.encoders,
        bind=model.bind_config,
        inject=model.inject_config,
        adapter=None if model.adapter is None else model.adapter.config,
    )
    for warning in warnings:
        logging.getLogger("bindllm").warning(warning)
    manifest = read_manifest(folder)
    # What is trained on from somebody's weights stays under their license.
    model.origin = manifest.get("origin", "")
    tensors = read_weights(folder, manifest)
    if not manifest.get("adapter"):
        own = model.trainable_state().items()
        tensors |= {name: value for name, value in own if name.startswith(PREFIX)}
    model.load_trainable_state(tensors, source=str(folder))


def check_base(
    folder: str | Path,
    *,
    decoder: DecoderConfig,
    encoders: Sequence[Encoder],
    bind: BindConfig,
    inject: InjectConfig,
    adapter: AdapterConfig | None,
) -> list[str]:
    """Compare what a checkpoint folder was made for with what a recipe describes; no weights are loaded.

    Args:
        folder: the checkpoint of the stage before.
        decoder: the recipe's, as all that follows.
        encoders: in their order.
        bind: shape of the bind network.
        inject: kind of injection.
        adapter: what of the decoder is tuned; None: nothing.

    Returns:
        sentences about what differs and may.

    Raises:
        CheckpointError: other decoder, encoders, bind network, injection or adapter, or an adapter that the recipe
            leaves out.
    """
    manifest = read_manifest(folder)
    saved = read_configs(folder, manifest)
    _check_frozen(folder, manifest, decoder, encoders)
    differing = [*_differences("bind", saved["bind"], bind), *_differences("inject", saved["inject"], inject)]
    if saved["adapter"] is not None:
        if adapter is None:
            raise CheckpointError(
                f"{folder} has an adapter, on which all that it learned rests, and this recipe has none: its decoder "
                f"would be another. Go on with the same one: model.adapter: {_as_yaml(saved['adapter'])}"
            )
        differing += _adapter_differences(saved["adapter"], adapter)
    if differing:
        raise CheckpointError(
            f"{folder} was made for another base than this recipe describes: {'; '.join(differing)}. Take these values "
            f"from {Path(folder) / 'recipe.yaml'} or bindllm.json there, or train the stage before with these here"
        )
    return _remarks(folder, manifest, saved["bind"], decoder, bind)


def _check_frozen(
    folder: str | Path, manifest: dict[str, Any], decoder: DecoderConfig, encoders: Sequence[Encoder]
) -> None:
    """Compare decoder and encoders by their fingerprints."""
    saved = manifest.get("decoder", {})
    compared = {
        "decoder": (saved.get("fingerprint"), fingerprint_decoder(decoder.folder())),
        "encoders": (encoder_fingerprints(folder, manifest), [encoder.fingerprint() for encoder in encoders]),
    }
    theirs = {
        "decoder": str(saved.get("name")),
        "encoders": ", ".join(str(entry.get("class_path")) for entry in manifest["encoders"]),
    }
    for what, (found, expected) in compared.items():
        if found != expected:
            raise CheckpointError(
                f"{folder} was trained with another {what} than this recipe names: use the recipe.yaml in it "
                f"({what} there: {theirs[what]}, as it was then)"
            )


def _differences(section: str, there: Any, here: Any) -> list[str]:
    """Name the settings of a section that differ."""
    return [
        f"{section}.{field.name} is {_shown(getattr(there, field.name))} there and "
        f"{_shown(getattr(here, field.name))} here"
        for field in fields(there)
        if field.name not in _NOT_COMPARED and getattr(there, field.name) != getattr(here, field.name)
    ]


def _adapter_differences(there: AdapterConfig, here: AdapterConfig) -> list[str]:
    """Name the settings of an adapter that change what it computes: alpha and rslora count by their scale."""
    told = [
        difference
        for difference in _differences("adapter", there, here)
        if not difference.startswith(("adapter.alpha ", "adapter.rslora "))
    ]
    if not math.isclose(there.scale, here.scale):
        told.append(
            f"adapter.alpha is {_alpha(there)} there, which makes the scale {there.scale:g}, and {_alpha(here)} here, "
            f"which makes it {here.scale:g}"
        )
    return told


def _alpha(config: AdapterConfig) -> str:
    return f"{_shown(config.alpha)}{' with rslora' if config.rslora else ''}"


def _remarks(
    folder: str | Path, manifest: dict[str, Any], there: BindConfig, decoder: DecoderConfig, bind: BindConfig
) -> list[str]:
    """Say what differs and may.

    Quantization is a rounding of the same decoder: a first stage in bfloat16 and a second one on 4 bits is how QLoRA is
    used, and what was trained on the one works on the other.
    """
    remarks, saved = [], manifest["decoder"]
    quantized = saved.get("quantize")
    for setting in ("template", "system"):
        before, now = saved.get(setting), getattr(decoder, setting)
        if before != now:
            remarks.append(
                f"{folder} was trained with decoder.{setting} {_shown(before)}, this run has {_shown(now)}: its "
                "prompts read differently, so the loss may start higher"
            )
    if quantized != decoder.quantize:
        remarks.append(
            f"{folder} was trained with decoder.quantize {_shown(quantized)}, this run has "
            f"{_shown(decoder.quantize)}: the same decoder, rounded differently, so the loss may start higher"
        )
    if there.fusion != bind.fusion:
        remarks.append(
            f"{folder} fuses several media of one message with bind.fusion {there.fusion}, this run with "
            f"{bind.fusion}; single media are the same in both"
        )
    return remarks


def _as_yaml(config: AdapterConfig) -> str:
    values = {field.name: getattr(config, field.name) for field in fields(config)}
    told = (f"{name}: {_shown(value)}" for name, value in values.items() if value is not None)
    return f"{{{', '.join(told)}}}"


def _shown(value: Any) -> str:
    """Write a setting as recipes do."""
    return value if isinstance(value, str) and value else json.dumps(value)
