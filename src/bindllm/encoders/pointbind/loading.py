"""Loading a converted folder: variant and sizes from its config, and every tensor of its weights checked."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch

from bindllm.atomic import open_tensors, read_json
from bindllm.encoders import shape_problems
from bindllm.encoders.pointbind.blocks import fold_norms
from bindllm.encoders.pointbind.i2pmae import I2PMAE, I2PMAESizes
from bindllm.encoders.pointbind.pointbert import PointBert, PointBertSizes
from bindllm.errors import EncoderError, did_you_mean

CONFIG, WEIGHTS = "config.json", "model.safetensors"

_VARIANTS = {"point-bert": (PointBert, PointBertSizes), "i2p-mae": (I2PMAE, I2PMAESizes)}


def read_config(folder: Path) -> dict[str, Any]:
    """Return the content of ``config.json``: ``variant``, and ``sizes`` where they are not the published ones.

    Raises:
        EncoderError: the converted folder does not exist, or its config does not describe a network.
    """
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise EncoderError(
                f"{folder / name}: no weights of Point-Bind here. Make them from the published file with "
                f"`bindllm convert pointbind FILE --output {folder}`, or set `weights` to the folder that holds "
                f"{CONFIG} and {WEIGHTS}"
            )
    config = read_json(folder / CONFIG, EncoderError, "convert the weights again")
    # A config is untrusted: every entry is checked before a class is built from it.
    variant = config.get("variant") if isinstance(config, dict) else None
    if not isinstance(variant, str) or variant not in _VARIANTS:
        raise EncoderError(
            f"{folder / CONFIG}: the variant {variant!r} is unknown. {did_you_mean(str(variant), _VARIANTS)}"
        )
    if not isinstance(config.get("sizes", {}), dict):
        raise EncoderError(f"{folder / CONFIG}: sizes must be an object of names and numbers")
    return config


def build_network(config: dict[str, Any], *, source: str) -> PointBert | I2PMAE:
    """Build the network that a config describes, without memory for its weights.

    Raises:
        EncoderError: unknown or impossible sizes.
    """
    network, kind = _VARIANTS[config["variant"]]
    sizes = config.get("sizes", {})
    known = [field.name for field in dataclasses.fields(kind)]
    try:
        for name in sizes:
            if name not in known:
                raise EncoderError(
                    f"{source}: the size {name!r} is unknown. {did_you_mean(str(name), known)}"
                )
        # Built without memory: initial weights would be thrown away, and drawing them would disturb a seeded run.
        with torch.device("meta"):
            return network(kind(**{name: _as_tuples(value) for name, value in sizes.items()}))
    except (TypeError, ValueError, RuntimeError) as error:
        raise EncoderError(f"{source}: no network can have the sizes {sizes!r} ({error})") from error


def load_network(folder: Path, dtype: torch.dtype) -> PointBert | I2PMAE:
    """Build the network of a converted folder and fill it.

    Raises:
        EncoderError: the folder is missing, damaged, or its parts do not fit each other.
    """
    config = read_config(folder)
    network = build_network(config, source=str(folder / CONFIG))
    # Tensors made in inference mode could not be moved later, outside it.
    with torch.inference_mode(False), torch.no_grad():
        with open_tensors(folder / WEIGHTS, EncoderError, "convert it again") as stream:
            tensors = {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118 (not a dictionary)
        # The file holds the norms separately; the network has them folded in.
        tensors = fold_norms(tensors)
        shapes = (
            {name: value.shape for name, value in part.items()} for part in (network.state_dict(), tensors)
        )
        if problems := shape_problems(*shapes):
            raise EncoderError(
                f"{folder / WEIGHTS}: these are not the weights of Point-Bind's {config['variant']} variant: "
                f"{'; '.join(problems)}"
            )
        network.load_state_dict({name: tensor.to(dtype) for name, tensor in tensors.items()}, assign=True)
    return network.eval().requires_grad_(False)


def _as_tuples(value: Any) -> Any:
    return tuple(map(_as_tuples, value)) if isinstance(value, list) else value
