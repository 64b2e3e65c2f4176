"""The model card: what a checkpoint is, what it was trained on, and under which licences it may be used."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

_LIMITS = """\
The model says what is likely, not what is true. It has learnt from the data named above and from nothing else, so it
confuses things that look alike, names things that are not there, and knows no picture style outside its data. Do not
use it where a wrong description can hurt somebody.
"""


def write_card(manifest: dict[str, Any], *, data: list[str] | None = None) -> str:
    """Return the text of the card.

    Args:
        manifest: content of ``bindllm.json``.
        data: folders or tables that the model was trained on; their ``SOURCE.json`` gives the licence.
    """
    decoder = manifest["decoder"]
    lines = [
        f"# {decoder['name'].rstrip('/').rsplit('/', 1)[-1]} with new senses",
        "",
        "Trained parts of a [bindllm](https://arxiv.org/abs/2309.03905) model: a bind network and the gates that add",
        "its output to the tokens of a frozen language model. The frozen parts are named here, not contained.",
        "",
        "| part | is | licence |",
        "|---|---|---|",
        f"| decoder | `{decoder['name']}` | {_licence(decoder['name'])} |",
    ]
    for encoder in manifest["encoders"]:
        weights = str(encoder["init_args"].get("weights", ""))
        lines.append(f"| encoder | `{encoder['class_path']}` `{weights}` | {_licence(weights)} |")
    lines += [f"| training data | `{folder}` | {_licence(folder)} |" for folder in data or []]
    lines += [
        "",
        f"Bind network: depth {manifest['bind']['depth']}, expansion {manifest['bind']['expansion']}. "
        f"Injection: kind `{manifest['inject']['kind']}`, queries {manifest['inject']['queries']}.",
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
        _LIMITS,
        "Code of bindllm: Apache-2.0. The weights here derive from the parts in the table: their licences, and those",
        "of the training data, hold for them as well.",
    ]
    return "\n".join(lines) + "\n"


def _licence(folder: str) -> str:
    """Return the licence that a folder's SOURCE.json states."""
    file = Path(folder) / "SOURCE.json"
    if not folder or not file.is_file():
        return "see its own page"
    return str(json.loads(file.read_text(encoding="utf-8")).get("licence", "see its own page"))
