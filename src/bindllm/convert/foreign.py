"""Read published weights: files of torch and safetensors, and folders of safetensors files.

A torch file is a pickle. It is opened with ``weights_only``, which builds tensors and plain containers and refuses
everything else, so nothing in the file is ever executed. Tensors stay on the disk until they are used.
"""

from __future__ import annotations

import argparse
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bindllm.atomic import open_tensors, require_file
from bindllm.errors import CheckpointError

# Entries under which training scripts usually keep the weights.
_CONTAINERS = ("model", "state_dict")


def read_foreign(file: str | Path) -> dict[str, Tensor]:
    """Read the tensors of a published checkpoint by their names in it.

    Args:
        file: a file of `torch.save` or safetensors. If it is a dictionary with the tensors under ``model`` or
            ``state_dict``, its other entries (optimizer, settings) are skipped.

    Raises:
        CheckpointError: no such file, a damaged one, one that would run code, or one that holds no tensors by name.
    """
    file = Path(file)
    require_file(file, CheckpointError, "give the published file itself, such as imagebind_huge.pth")
    if file.suffix == ".safetensors":
        with open_tensors(file, CheckpointError, "download it again") as stream:
            return {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118 (not a dictionary)
    return _find_tensors(_read_torch(file), file)


def _read_torch(file: Path) -> Any:
    """Read a file of torch; untrusted bytes may make torch raise anything, so every error means a damaged file."""
    try:
        # Files from before torch 1.6 are not archives, and cannot be mapped.
        is_archive = zipfile.is_zipfile(file)
        packed = 0
        if is_archive:
            with zipfile.ZipFile(file) as archive:
                packed = sum(entry.file_size for entry in archive.infolist())
        # A small file that unpacks to a huge one would fill the memory before any check of its content.
        if packed > file.stat().st_size:
            raise ValueError(f"a compressed archive of {packed:,} bytes; torch never writes one")
        # Training checkpoints of many projects keep their command line; its class holds only plain values.
        with torch.serialization.safe_globals([argparse.Namespace]):
            # Mapped, so that an optimizer state next to the weights is never read.
            return torch.load(file, map_location="cpu", weights_only=True, mmap=is_archive)
    except Exception as error:
        # Torch's message advises to open such a file without protection; only the line with the reason is repeated.
        lines = [line.strip() for line in str(error).splitlines()]
        reasons = (
            [line for line in lines if "GLOBAL" in line or line.startswith("Unsupported")] or lines or [""]
        )
        if isinstance(error, pickle.UnpicklingError) and "GLOBAL" in reasons[0]:
            raise CheckpointError(
                f"{file} is not a plain file of tensors, and was refused ({reasons[0][:200]}). It could run code when "
                "opened; nothing in it was run. If you need its tensors, ask its authors for safetensors"
            ) from error
        raise CheckpointError(
            f"{file} cannot be read as a file of torch ({type(error).__name__}: {reasons[0][:150]}); download it again"
        ) from error


def _find_tensors(content: Any, file: Path) -> dict[str, Tensor]:
    # Plain state dicts first, then the usual containers of training checkpoints.
    for candidate in (content, *(content.get(name) for name in _CONTAINERS if isinstance(content, Mapping))):
        if isinstance(candidate, Mapping) and candidate:
            kinds = {(type(name), isinstance(value, Tensor)) for name, value in candidate.items()}
            if kinds == {(str, True)}:
                return dict(candidate)
    found = f"a {type(content).__name__}"
    if isinstance(content, Mapping):
        entries = [f"{name} ({type(value).__name__})" for name, value in content.items()]
        found = f"a dictionary of {', '.join(entries[:10]) or 'nothing'}"
    raise CheckpointError(f"{file} holds {found}; expected tensors by name, at the top or under 'model'")


class SafetensorsFolder:
    """The tensors of a folder's safetensors files, each read on access.

    Args:
        folder: folder of a Hugging Face model, in one file or in shards.

    Raises:
        CheckpointError: the folder has no safetensors file, or one cannot be read.
    """

    def __init__(self, folder: str | Path) -> None:
        self._folder = Path(folder)
        # Tensor name -> its file; no tensor is read yet.
        self._files: dict[str, Path] = {}
        files = sorted(self._folder.glob("*.safetensors"))
        if not files:
            raise CheckpointError(
                f"{folder} holds no *.safetensors file; give a Hugging Face folder in safetensors"
            )
        for file in files:
            with open_tensors(file, CheckpointError) as stream:
                self._files |= dict.fromkeys(stream.keys(), file)

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._files:
            raise CheckpointError(f"{self._folder} has no tensor {name}: it is another kind of model")
        # Opened for each tensor, so that one base model does not stay in memory.
        with open_tensors(self._files[name], CheckpointError) as stream:
            return stream.get_tensor(name)
