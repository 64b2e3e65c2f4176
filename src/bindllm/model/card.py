"""The model card that every checkpoint folder starts with: its parts and their licenses, its use and its limits.

``bindllm card`` (`bindllm.card`) writes it again, with the results of evaluations.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from bindllm.atomic import read_json
from bindllm.errors import CheckpointError

UNKNOWN_LICENSE = "see its own page"

_MOST_METADATA = 100_000
"""Characters of a card that are searched for its metadata."""

USE = (
    "```python",
    "from bindllm import BindLLM, Media",
    "",
    'model = BindLLM.from_pretrained("THIS_FOLDER")',
    'model.generate("Describe this image.", media=[Media.image("image.png")])',
    "```",
)
"""How a checkpoint folder is used, as lines of Markdown."""

_LIMITS = """\
The model gives likely answers, not verified ones. It has learned from {data} and from nothing else, so it
confuses things that look alike, names things that are not there, and has seen no image style outside its data. Do not
use it if a wrong description can hurt someone.
"""


def write_card(manifest: dict[str, Any], *, data: list[str] | None = None) -> str:
    """Return the text of the card.

    Args:
        data: folders or tables that the model was trained on; their ``SOURCE.json`` gives the license.
    """
    name = manifest["decoder"]["name"].rstrip("/").rsplit("/", 1)[-1]
    lines = [
        f"# {name} with new modalities",
        "",
        *describe(manifest, licenses(manifest, data=data)),
        "",
        "## Use",
        "",
        *USE,
        "",
        "## Limits",
        "",
        _LIMITS.format(data="the data named above" if data else "its training data"),
        "Code of bindllm: Apache-2.0. The weights here derive from the parts in the table: their licenses, and those",
        "of the training data, hold for them as well.",
    ]
    return "\n".join(lines) + "\n"


def describe(manifest: dict[str, Any], rows: list[dict[str, str]]) -> list[str]:
    """Return the lines about the parts of a model: their table, their shape, and where converted weights are from."""
    adapter = manifest.get("adapter")
    tuned = ", and an adapter that tunes that model" if adapter else ""
    kind = "language model, which is tuned" if manifest["decoder"].get("tuned") else "frozen language model"
    return [
        "Trained parts of a [bindllm](https://arxiv.org/abs/2309.03905) model: a bind network and the gates that add",
        f"its output to the tokens of a {kind}{tuned}. The frozen parts are named here, not contained.",
        "",
        "| part | is | license |",
        "|---|---|---|",
        *(f"| {row['part']} | `{row['name']}` | {row['license']} |" for row in rows),
        "",
        f"Bind network: depth {manifest['bind']['depth']}, expansion {manifest['bind']['expansion']}"
        f"{_token_words(manifest['bind'])}. "
        f"Injection: kind `{manifest['inject']['kind']}`, queries {manifest['inject']['queries']}.",
        *_context_lines(manifest.get("context")),
        *_adapter_lines(adapter),
        *_tuned_lines(manifest),
        *([f"Trained on the decoder in {kind}."] if (kind := manifest["decoder"].get("quantize")) else []),
        *(("", "## Origin", "", manifest["origin"]) if manifest.get("origin") else ()),
    ]


def _token_words(bind: dict[str, Any]) -> str:
    """Return the number of bind tokens, or nothing for one."""
    count = bind.get("tokens", 1)
    kinds = ", ".join(bind.get("token_modalities", []))
    if count == "all":
        return f", one bind token of each encoder token of {kinds} media"
    return f", {count} bind tokens of {kinds} media" if count > 1 else ""


def _context_lines(context: dict[str, Any] | None) -> list[str]:
    """Return the sentence about retrieved context, or nothing without any."""
    if not context:
        return []
    latents = context["latents"]
    tokens = (
        "one context token of each token of their texts"
        if latents == "all"
        else f"{2 * latents} context tokens"
    )
    return [
        f"Reads up to {context['records']} records of a datastore for each media ({tokens}); the records of its "
        "training are in `datastore/`."
    ]


def _adapter_lines(adapter: dict[str, Any] | None) -> list[str]:
    """Return the sentence about the adapter, or nothing without one."""
    if not adapter:
        return []
    # rsLoRA divides by the root of the rank, see `AdapterConfig`.
    root = math.sqrt(adapter["rank"]) if adapter.get("rslora") else adapter["rank"]
    scale = 1.0 if adapter["alpha"] is None else adapter["alpha"] / root
    kind = "DoRA" if adapter.get("dora") else "LoRA"
    return [
        f"Adapter, in `adapter/` as peft reads it: {kind} of rank {adapter['rank']} and scale {scale:g}, new biases "
        f"{adapter['bias']}, tuned norms {adapter['norm']}."
    ]


def _tuned_lines(manifest: dict[str, Any]) -> list[str]:
    """Return the sentences about a decoder or encoders that were trained, or nothing if they are frozen."""
    lines = []
    if manifest["decoder"].get("tuned"):
        lines.append(
            "The weights of the language model were trained (`decoder.safetensors`), so text alone no longer has the "
            "output of the base model."
        )
    for entry in manifest["encoders"]:
        if "base" not in entry:
            continue
        settings = entry["init_args"]
        blocks = f"the last {count} blocks" if (count := settings["blocks"]) else "all blocks"
        kind = f"LoRA of rank {rank} in" if (rank := settings["rank"]) else "the weights of"
        modality = f" for {settings['modality']} media" if settings["modality"] else ""
        lines.append(
            f"Encoder `{settings['encoder']['class_path']}`: {kind} {blocks}{modality} were trained "
            "(`encoders.safetensors`)."
        )
    return lines


class Part(NamedTuple):
    """A part that the weights derive from.

    Args:
        part: decoder, encoder or training data.
        folder: its folder or table; empty if it has none.
    """

    part: str
    name: str
    folder: str


def parts_of(manifest: dict[str, Any], *, data: list[str] | None = None) -> list[Part]:
    """Return the parts of a model; arguments as for `write_card`."""
    decoder = manifest["decoder"]["name"]
    parts = [Part("decoder", decoder, decoder)]
    for entry in manifest["encoders"]:
        folder = encoder_folder(entry["init_args"])
        # A tuned encoder is named by the one whose blocks were trained.
        kind = (entry["init_args"]["encoder"] if "base" in entry else entry)["class_path"]
        parts.append(Part("encoder", f"{kind} {folder}".rstrip(), folder))
    return parts + [Part("training data", folder, folder) for folder in data or []]


def encoder_folder(arguments: Mapping[str, Any]) -> str:
    """Return the folder, or id on the hub, that the arguments of an encoder name; empty if they name none."""
    while isinstance(inner := arguments.get("encoder"), Mapping):
        arguments = inner.get("init_args") or {}
    return str(arguments.get("weights") or arguments.get("name") or "")


def licenses(manifest: dict[str, Any], *, data: list[str] | None = None) -> list[dict[str, str]]:
    """Return a row ``part``, ``name``, ``license`` for each part of a model; arguments as for `write_card`."""
    return [
        {"part": part.part, "name": part.name, "license": license_of(part.folder)}
        for part in parts_of(manifest, data=data)
    ]


def license_of(folder: str) -> str:
    """Return the licenses of a folder's (or table's) sources in words, see `licenses_in`."""
    return ", ".join(licenses_in(folder)) or UNKNOWN_LICENSE


def licenses_in(folder: str) -> list[str]:
    """Return the licenses of a folder's (or table's) sources: of its ``SOURCE.json``, or of a card from the Hub.

    Returns:
        the licenses, each once; empty if no file names one.
    """
    if not folder:
        return []
    path = Path(folder)
    path = path.parent if path.is_file() else path
    try:
        if (path / "SOURCE.json").is_file():
            packages = read_json(path / "SOURCE.json", CheckpointError)["packages"]
            return list(dict.fromkeys(str(package["license"]) for package in packages))
        if (path / "README.md").is_file():
            with (path / "README.md").open(encoding="utf-8", errors="replace") as stream:
                return _licenses_of_card(stream.read(_MOST_METADATA))
    except (KeyError, TypeError, OSError, CheckpointError):
        # A foreign file of that name is not a reason to lose a trained model.
        pass
    return []


def _licenses_of_card(text: str) -> list[str]:
    """Return the licenses in the metadata of a card: YAML between two lines of dashes at its start."""
    if not text.startswith("---\n"):
        return []
    try:
        metadata = yaml.safe_load(text[4:].partition("\n---")[0])
    # Deep nesting exceeds the stack.
    except (yaml.YAMLError, ValueError, RecursionError):
        return []
    found = metadata.get("license") if isinstance(metadata, dict) else None
    if found == "other":
        found = metadata.get("license_name")
    return [str(one) for one in (found if isinstance(found, list) else [found]) if one]
