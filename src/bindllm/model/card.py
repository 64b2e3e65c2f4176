"""The model card: what a checkpoint is, what it was trained on, and under which licenses it may be used."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

UNKNOWN_LICENSE = "see its own page"

_LIMITS = """\
The model says what is likely, not what is true. It has learnt from {data} and from nothing else, so it
confuses things that look alike, names things that are not there, and knows no picture style outside its data. Do not
use it where a wrong description can hurt somebody.
"""


def write_card(manifest: dict[str, Any], *, data: list[str] | None = None) -> str:
    """Return the text of the card.

    Args:
        manifest: content of ``bindllm.json``.
        data: folders or tables that the model was trained on; their ``SOURCE.json`` gives the license.
    """
    decoder, adapter = manifest["decoder"], manifest.get("adapter")
    tuned = ", and an adapter that tunes that model" if adapter else ""
    lines = [
        f"# {decoder['name'].rstrip('/').rsplit('/', 1)[-1]} with new senses",
        "",
        "Trained parts of a [bindllm](https://arxiv.org/abs/2309.03905) model: a bind network and the gates that add",
        f"its output to the tokens of a frozen language model{tuned}. The frozen parts are named here, not contained.",
        "",
        "| part | is | license |",
        "|---|---|---|",
        *(f"| {row['part']} | `{row['name']}` | {row['license']} |" for row in licenses(manifest, data=data)),
        "",
        f"Bind network: depth {manifest['bind']['depth']}, expansion {manifest['bind']['expansion']}. "
        f"Injection: kind `{manifest['inject']['kind']}`, queries {manifest['inject']['queries']}.",
        *_adapter_lines(adapter),
        *([f"Trained on the decoder in {kind}."] if (kind := decoder.get("quantize")) else []),
        *(("", "## Origin", "", manifest["origin"]) if manifest.get("origin") else ()),
        "",
        "## Use",
        "",
        "```python",
        "from bindllm import BindLLM, Media",
        "",
        'model = BindLLM.from_pretrained("THIS_FOLDER")',
        'model.generate("Describe this image.", media=[Media.image("picture.png")])',
        "```",
        "",
        "## Limits",
        "",
        _LIMITS.format(data="the data named above" if data else "its training data"),
        "Code of bindllm: Apache-2.0. The weights here derive from the parts in the table: their licenses, and those",
        "of the training data, hold for them as well.",
    ]
    return "\n".join(lines) + "\n"


def _adapter_lines(adapter: dict[str, Any] | None) -> list[str]:
    """Say what of the decoder is tuned; nothing where nothing is."""
    if not adapter:
        return []
    root = math.sqrt(adapter["rank"]) if adapter.get("rslora") else adapter["rank"]
    scale = 1.0 if adapter["alpha"] is None else adapter["alpha"] / root
    kind = "DoRA" if adapter.get("dora") else "LoRA"
    return [
        f"Adapter, in `adapter/` as peft reads it: {kind} of rank {adapter['rank']} and scale {scale:g}, new biases "
        f"{adapter['bias']}, tuned norms {adapter['norm']}."
    ]


def licenses(manifest: dict[str, Any], *, data: list[str] | None = None) -> list[dict[str, str]]:
    """Return a row ``part``, ``name``, ``license`` for each part that a model stands on; arguments as for the card."""
    decoder = manifest["decoder"]["name"]
    rows = [("decoder", decoder, decoder)]
    for encoder in manifest["encoders"]:
        weights = str(encoder["init_args"].get("weights", ""))
        rows.append(("encoder", f"{encoder['class_path']} {weights}".rstrip(), weights))
    rows += [("training data", folder, folder) for folder in data or []]
    return [{"part": part, "name": name, "license": license_of(folder)} for part, name, folder in rows]


def license_of(folder: str) -> str:
    """Return the licenses of the packages that a folder, or that of a table, was made from, as its SOURCE.json says."""
    place = Path(folder)
    file = (place.parent if place.is_file() else place) / "SOURCE.json"
    if not folder or not file.is_file():
        return UNKNOWN_LICENSE
    try:
        packages = json.loads(file.read_text(encoding="utf-8"))["packages"]
        return ", ".join(dict.fromkeys(str(package["license"]) for package in packages)) or UNKNOWN_LICENSE
    except (KeyError, TypeError, ValueError):
        # Somebody else's file of that name: no reason to lose a trained model.
        return UNKNOWN_LICENSE
