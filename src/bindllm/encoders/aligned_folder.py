"""The folder of an aligned encoder: JSON and safetensors only, written whole or not at all.

align.json          format, what it serves, its space, the tower by class path and fingerprint, hashes of the weights
head.safetensors    the head
tower.safetensors   the tower, where it was trained; a frozen one is named, never copied
metrics.json, README.md, recipe.yaml   what the run that made it measured, says and was told
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from bindllm.atomic import atomic_folder, file_sha256
from bindllm.encoders.head import HeadConfig
from bindllm.errors import EncoderError, InputError, fetch_hint

FORMAT = 1
MANIFEST = "align.json"
HEAD = "head.safetensors"
TOWER = "tower.safetensors"


@dataclass(frozen=True, kw_only=True)
class AlignedManifest:
    """Content of ``align.json``.

    Args:
        modality: what the encoder serves.
        embedding_size: E, that of the target.
        space: name of the target's joint space.
        tower: ``class_path`` and ``init_args``; ``fingerprint`` of a frozen one, ``revision`` of a trained one.
        tower_size: W, the width of the tower's vectors.
        head: shape of the head.
        target: ``class_path``, ``init_args`` and ``fingerprint`` of the encoder that it was aligned with.
        sha256: of each weights file.
        root: the working directory of the run, relative to the folder: paths of ``init_args`` start there.
        format: number of the layout.
    """

    modality: str
    embedding_size: int
    space: str
    tower: dict[str, Any]
    tower_size: int
    head: HeadConfig
    target: dict[str, Any]
    sha256: dict[str, str]
    root: str = "."
    format: int = FORMAT

    @property
    def trained(self) -> bool:
        """Whether the tower was trained, so that its weights are in the folder."""
        return "revision" in self.tower


def read_aligned(folder: str | Path) -> AlignedManifest:
    """Read and check ``align.json``.

    Raises:
        EncoderError: no such folder, another one, a newer format or a damaged file.
    """
    file = Path(folder) / MANIFEST
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        place = "" if file.is_absolute() else f" in {Path.cwd()}"
        what = (
            f"has no {MANIFEST}, so it holds no aligned encoder" if file.parent.is_dir() else "does not exist"
        )
        raise EncoderError(
            f"the folder {str(folder)!r}{place} {what}. Make one with: bindllm align --config FILE.{fetch_hint(folder)}"
        ) from error
    except (OSError, ValueError) as error:
        raise EncoderError(f"{file} cannot be read: {error}") from error
    number = content.get("format") if isinstance(content, dict) else None
    if isinstance(number, int) and number > FORMAT:
        raise EncoderError(f"{file} has format {number}, this bindllm reads up to {FORMAT}: upgrade bindllm")
    try:
        manifest = AlignedManifest(**{**content, "head": HeadConfig(**content["head"])})
        entry, sizes = manifest.tower, (manifest.embedding_size, manifest.tower_size)
        words = manifest.modality, manifest.space, entry["class_path"]
        # Looked at here, so that a damaged file is found here.
        fits = all(isinstance(word, str) for word in words) and all(type(size) is int for size in sizes)
        files = {HEAD, TOWER} if manifest.trained else {HEAD}
        if not (
            fits and isinstance(entry["init_args"], dict) and min(sizes) > 0 and files == set(manifest.sha256)
        ):
            raise TypeError("a value of a wrong type")
    except (TypeError, KeyError, AttributeError, InputError) as error:
        raise EncoderError(f"{file} is not the description of an aligned encoder ({error!r})") from error
    return manifest


def read_tensors(folder: str | Path, name: str, manifest: AlignedManifest) -> dict[str, Tensor]:
    """Read one weights file, checked against its hash.

    Raises:
        EncoderError: it is missing, damaged or another one.
    """
    file = Path(folder) / name
    if not file.is_file():
        raise EncoderError(f"{folder} has no {name}: copy the whole folder")
    if file_sha256(file) != manifest.sha256.get(name):
        raise EncoderError(f"{file} is not the file that {MANIFEST} was written with: damaged or exchanged")
    try:
        return load_file(file)
    except SafetensorError as error:
        raise EncoderError(f"{file} cannot be read: {error}") from error


def write_aligned(
    folder: str | Path,
    manifest: AlignedManifest,
    weights: Mapping[str, Mapping[str, Tensor]],
    *,
    metrics: Mapping[str, Any],
    texts: Mapping[str, str],
) -> None:
    """Write the folder in one step; an aligned encoder there is replaced, anything else refused.

    Args:
        folder: where it goes.
        manifest: its ``sha256`` and ``root`` are filled in here.
        weights: tensors by the name of their file, `HEAD` and perhaps `TOWER`.
        metrics: content of ``metrics.json``.
        texts: further files by name, such as ``README.md``.

    Raises:
        InputError: the folder holds something else.
    """
    folder = Path(folder)
    refuse_other_content(folder)
    with atomic_folder(folder) as part:
        for name, tensors in weights.items():
            contiguous = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
            save_file(contiguous, part / name, metadata={"format": "pt"})
        content = asdict(manifest) | {
            "sha256": {name: file_sha256(part / name) for name in weights},
            "root": os.path.relpath(Path.cwd(), folder.resolve()),
        }
        for name, value in ((MANIFEST, content), ("metrics.json", metrics)):
            text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
            (part / name).write_text(text, encoding="utf-8")
        for name, text in texts.items():
            (part / name).write_text(text, encoding="utf-8")


def refuse_other_content(folder: Path) -> None:
    """Refuse to replace a folder that holds something else than an aligned encoder.

    Raises:
        InputError: says what is missing in it.
    """
    if (
        folder.exists()
        and (not folder.is_dir() or any(folder.iterdir()))
        and not (folder / MANIFEST).is_file()
    ):
        raise InputError(
            f"output {folder} holds other content (no {MANIFEST}); choose another folder or empty it"
        )
