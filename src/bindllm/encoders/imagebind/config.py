"""Sizes of ImageBind's six trunks, and which modality goes through which of them.

The published model is "huge" (https://arxiv.org/abs/2305.05665, section 4 and appendix B). How a trunk cuts
its input (patches, windows, positions) is fixed, see `bindllm.encoders.imagebind.network`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bindllm.atomic import read_json
from bindllm.errors import EncoderError

# Images and video share one trunk, so six trunks serve seven modalities.
TRUNK_OF = {
    "image": "vision",
    "video": "vision",
    "text": "text",
    "audio": "audio",
    "depth": "depth",
    "thermal": "thermal",
    "imu": "imu",
}
"""The trunk of each modality; an image is a video of two equal frames."""

TRUNKS = tuple(dict.fromkeys(TRUNK_OF.values()))

CONFIG = "config.json"
KIND = "imagebind"
"""Value of ``model`` in the ``config.json`` of a converted folder."""


@dataclass(frozen=True)
class TrunkConfig:
    """Size of one trunk.

    Args:
        width: D, features of a token.
        num_blocks: transformer blocks.
        num_heads: attention heads; divides ``width``.
    """

    width: int
    num_blocks: int
    num_heads: int


@dataclass(frozen=True)
class ImageBindConfig:
    """Sizes of a whole model.

    Args:
        embedding_size: E, the width of the joint space.
        trunks: size of each trunk that there is, by the names of `TRUNKS`.
    """

    embedding_size: int
    trunks: Mapping[str, TrunkConfig]

    @property
    def modalities(self) -> tuple[str, ...]:
        """The modalities that these trunks serve."""
        return tuple(modality for modality, trunk in TRUNK_OF.items() if trunk in self.trunks)

    def sizes(self, trunk: str) -> dict[str, int]:
        """Return the settings of a trunk that affect its embeddings in addition to its weights, as plain JSON."""
        return {"embedding_size": self.embedding_size, **asdict(self.trunks[trunk])}


# A converted folder states its own sizes; these are the ones of the published file.
HUGE = ImageBindConfig(
    embedding_size=1024,
    trunks={
        "vision": TrunkConfig(width=1280, num_blocks=32, num_heads=16),
        "text": TrunkConfig(width=1024, num_blocks=24, num_heads=16),
        "audio": TrunkConfig(width=768, num_blocks=12, num_heads=12),
        "depth": TrunkConfig(width=384, num_blocks=12, num_heads=8),
        "thermal": TrunkConfig(width=768, num_blocks=12, num_heads=12),
        "imu": TrunkConfig(width=512, num_blocks=6, num_heads=8),
    },
)
"""The published model: 1.2 billion parameters."""


def read_config(folder: Path) -> ImageBindConfig:
    """Read the sizes of a converted folder.

    Raises:
        EncoderError: the folder or its ``config.json`` is missing, or it does not describe ImageBind.
    """
    file = folder / CONFIG
    entries = read_json(file, EncoderError, f"no converted ImageBind here. {how_to_convert(folder)}")
    if not isinstance(entries, dict) or entries.get("model") != KIND:
        raise EncoderError(f"{file}: this is the folder of another model. {how_to_convert(folder)}")
    try:
        # How to read this: every size is checked at this border, so that the modules need no checks.
        trunks = {name: _trunk(name, sizes) for name, sizes in entries["trunks"].items()}
        return ImageBindConfig(_count(entries["embedding_size"]), trunks)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise EncoderError(
            f"{file}: does not describe ImageBind's trunks ({error!r}). {how_to_convert(folder)}"
        ) from error


def how_to_convert(folder: Path) -> str:
    """Return the sentence that describes how to make a folder with the weights."""
    return (
        f"`bindllm convert imagebind imagebind_huge.pth --output {folder}` makes it from the published weights; "
        "or set `weights` to a folder made so"
    )


def _trunk(name: str, sizes: Mapping[str, Any]) -> TrunkConfig:
    if name not in TRUNKS:
        raise ValueError(f"unknown trunk {name}")
    trunk = TrunkConfig(**sizes)
    for count in (trunk.width, trunk.num_blocks, trunk.num_heads):
        _count(count)
    if trunk.width % trunk.num_heads:
        raise ValueError(f"{name}: {trunk.num_heads} heads do not divide the width {trunk.width}")
    return trunk


def _count(value: Any) -> int:
    # `type` and not isinstance: JSON's true is an int in Python.
    if type(value) is not int or value < 1:
        raise ValueError(f"{value!r} is not a whole number above 0")
    return value
