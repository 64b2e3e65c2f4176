"""Reading one trunk's weights: straight into the wanted precision and device, every tensor accounted for."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from bindllm.encoders.imagebind.config import ImageBindConfig, how_to_convert
from bindllm.encoders.imagebind.network import Trunk
from bindllm.errors import EncoderError


def trunk_file(folder: Path, trunk: str) -> Path:
    """Return the file with the weights of a trunk, which need not exist."""
    return folder / f"{trunk}.safetensors"


def require_trunk(folder: Path, trunk: str) -> Path:
    """Return the file with the weights of a trunk.

    Raises:
        EncoderError: there is none.
    """
    file = trunk_file(folder, trunk)
    if not file.is_file():
        raise EncoderError(f"{file}: no weights of ImageBind's {trunk} trunk here. {how_to_convert(folder)}")
    return file


# Tensors made in inference mode could never take part in training, even long after the first use.
@torch.inference_mode(False)
def load_trunk(
    folder: Path, trunk: str, config: ImageBindConfig, *, dtype: torch.dtype, device: torch.device
) -> Trunk:
    """Build a trunk from its file, frozen.

    Raises:
        EncoderError: the file is missing, damaged, or has other tensors than the config asks for; lists them all.
    """
    file = require_trunk(folder, trunk)
    # Built without memory: initial weights would be thrown away, and drawing them would disturb a seeded run.
    with torch.device("meta"):
        network = Trunk(trunk, config.trunks[trunk], config.embedding_size)
    expected = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    try:
        with safe_open(file, framework="pt", device="cpu") as tensors:
            found = {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
            if problems := _compare(expected, found):
                raise EncoderError(
                    f"{file}: these are not the weights of ImageBind's {trunk} trunk in the size that config.json "
                    f"states: {'; '.join(problems)}. {how_to_convert(folder)}"
                )
            # The scale is a logarithm of up to 100: half precision would change the published result visibly.
            state = {
                name: tensors.get_tensor(name).to(device, torch.float32 if name == "log_scale" else dtype)
                for name in expected
            }
    except (SafetensorError, OSError) as error:
        raise EncoderError(f"{file}: not a readable safetensors file ({error}); convert it again") from error
    network.load_state_dict(state, assign=True)
    return network.requires_grad_(False).eval()


def _compare(expected: dict[str, tuple[int, ...]], found: dict[str, tuple[int, ...]]) -> list[str]:
    """Return what is missing, unexpected or of another shape."""
    missing = [f"missing {name}" for name in expected if name not in found]
    unexpected = [f"unexpected {name}" for name in found if name not in expected]
    misshaped = [
        f"{name} has shape {list(found[name])}, not {list(shape)}"
        for name, shape in expected.items()
        if found.get(name, shape) != shape
    ]
    return missing + unexpected + misshaped
