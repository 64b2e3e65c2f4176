"""Aligned encoders: a tower and a head that `bindllm align` trained into another encoder's joint space.

The head is a norm and a linear map, as ImageBind ends each of its towers (arXiv 2305.05665, section 3.3), or a small
MLP. The folder holds JSON and safetensors only, and is written whole or not at all:

    align.json          format, modality, joint space, the tower by class path and fingerprint, hashes of the weights
    head.safetensors    the head
    tower.safetensors   a trained tower; a frozen tower is only named, never copied
    metrics.json, README.md, recipe.yaml   results, model card and recipe of the run that made it
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bindllm.atomic import (
    atomic_folder,
    check_replaceable,
    file_sha256,
    read_json,
    read_tensors,
    write_json,
    write_tensors,
)
from bindllm.encoders import fingerprint, once
from bindllm.encoders.trainable import build_tower, is_trainable
from bindllm.errors import EncoderError, InputError, fetch_hint
from bindllm.imports import resolve_path
from bindllm.media import Media

# Raise the number when older versions of bindllm cannot read a new folder.
FORMAT = 1
MANIFEST = "align.json"
HEAD = "head.safetensors"
TOWER = "tower.safetensors"

# Raise the number when other numbers come out for the same media: stored embeddings are then computed again.
_REVISION = "aligned 1"

_CPU_BATCH, _ACCELERATOR_BATCH = 8, 64


@dataclass
class HeadConfig:
    """Shape of the head."""

    depth: int = 2
    """Number of linear maps: 1 is a linear head, 2 an MLP with one hidden layer."""

    width: int = 1024
    """Width of the hidden layers; unused at depth 1."""

    dropout: float = 0.1
    """Share of hidden values that a training step leaves out, 0 to below 1."""

    def __post_init__(self) -> None:
        # How to read this: name, value, whether it is in range, and the range for the message.
        for name, value, fits, expected in (
            ("depth", self.depth, self.depth >= 1, "at least 1"),
            ("width", self.width, self.width >= 1, "at least 1"),
            ("dropout", self.dropout, 0 <= self.dropout < 1, "from 0 to below 1"),
        ):
            if not fits:
                raise InputError(f"head.{name} is {value}, expected {expected}")


class Head(nn.Module):
    """Norm, hidden layers with GELU, a linear map, and unit length.

    Args:
        inputs: W, the width of the tower's vectors.
        outputs: E, the embedding width of the joint space.
        config: its shape.

    Examples:
        >>> import torch
        >>> Head(8, 16, HeadConfig(depth=1)).eval()(torch.ones(3, 8)).shape
        torch.Size([3, 16])
    """

    def __init__(self, inputs: int, outputs: int, config: HeadConfig) -> None:
        super().__init__()
        # The norm first: towers differ in the scale of their vectors, and the head should not depend on it.
        layers: list[nn.Module] = [nn.LayerNorm(inputs)]
        width = inputs
        for _ in range(config.depth - 1):
            layers += [nn.Linear(width, config.width), nn.GELU(), nn.Dropout(config.dropout)]
            width = config.width
        self.layers = nn.Sequential(*layers, nn.Linear(width, outputs))

    def forward(self, vectors: Tensor) -> Tensor:
        """Return unit embeddings [B, E] of a tower's vectors [B, W]."""
        return F.normalize(self.layers(vectors), dim=-1)


@dataclass(frozen=True, kw_only=True)
class AlignedManifest:
    """Content of ``align.json``.

    Args:
        modality: the modality that the encoder serves.
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
        # A frozen tower has a fingerprint instead.
        return "revision" in self.tower


def read_aligned(folder: str | Path) -> AlignedManifest:
    """Read and check ``align.json``.

    Raises:
        EncoderError: no such folder, another one, a newer format or a damaged file.
    """
    file = Path(folder) / MANIFEST
    if not file.exists():
        where = "" if file.is_absolute() else f" in {Path.cwd()}"
        reason = (
            f"has no {MANIFEST}, so it holds no aligned encoder" if file.parent.is_dir() else "does not exist"
        )
        raise EncoderError(
            f"the folder {str(folder)!r}{where} {reason}. Make one with: bindllm align --config FILE."
            f"{fetch_hint(folder)}"
        )
    content = read_json(file, EncoderError)
    # The format comes first: a newer layout may lack or rename the other entries.
    number = content.get("format") if isinstance(content, dict) else None
    if isinstance(number, int) and number > FORMAT:
        raise EncoderError(f"{file} has format {number}, this bindllm reads up to {FORMAT}: upgrade bindllm")
    try:
        manifest = AlignedManifest(**{**content, "head": HeadConfig(**content["head"])})
        entry, sizes = manifest.tower, (manifest.embedding_size, manifest.tower_size)
        words = manifest.modality, manifest.space, entry["class_path"]
        # Checked at the border, so that a damaged file fails here and not at the first embedding.
        fits = all(isinstance(word, str) for word in words) and all(type(size) is int for size in sizes)
        files = {HEAD, TOWER} if manifest.trained else {HEAD}
        if not (
            fits and isinstance(entry["init_args"], dict) and min(sizes) > 0 and files == set(manifest.sha256)
        ):
            raise TypeError("a value of a wrong type")
    except (TypeError, KeyError, AttributeError, InputError) as error:
        raise EncoderError(f"{file} is not the description of an aligned encoder ({error!r})") from error
    return manifest


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
        manifest: its ``sha256`` and ``root`` are filled in here.
        weights: tensors by the name of their file, `HEAD` and perhaps `TOWER`.
        texts: further files by name, such as ``README.md``.

    Raises:
        InputError: the folder holds something else.
    """
    folder = Path(folder)
    check_replaceable(folder, MANIFEST, InputError, kind="an aligned encoder")
    # Readers see the old folder or the new one, never a half-written one.
    with atomic_folder(folder) as part:
        for name, tensors in weights.items():
            write_tensors(part / name, tensors)
        content = asdict(manifest) | {
            "sha256": {name: file_sha256(part / name) for name in weights},
            "root": os.path.relpath(Path.cwd(), folder.resolve()),
        }
        for name, value in ((MANIFEST, content), ("metrics.json", metrics)):
            write_json(part / name, value)
        for name, text in texts.items():
            (part / name).write_text(text, encoding="utf-8")


class Aligned:
    """One modality in the joint space of another encoder, as trained by `bindllm align`.

    A frozen tower is an encoder that the folder names with its fingerprint. A trained tower is stored in the folder.
    The embeddings lie in the target's space, so a model that was trained on images through the target needs no change.

    Args:
        weights: folder that `bindllm align` wrote.
        allow: import paths of tower classes outside bindllm that may be imported; they run code from there.
            Loading ignores the value in a file: each caller decides again.

    Raises:
        InputError: ``allow`` is not a list of import paths.

    Example:
        Aligned("checkpoints/align-text").modalities
    """

    def __init__(self, weights: str = "checkpoints/align-text", *, allow: list[str] | None = None) -> None:
        if not isinstance(allow, list | tuple | None) or not all(
            isinstance(path, str) for path in allow or ()
        ):
            raise InputError(
                f"allow must be a list of import paths such as ['my_lab.RadarTower'], not {allow!r}"
            )
        # Nothing is read here: a recipe constructs encoders without their weights.
        self.config: dict[str, Any] = {"weights": str(weights)} | ({"allow": list(allow)} if allow else {})
        self._folder, self._allow = Path(weights), tuple(allow or ())
        self._device = torch.device("cpu")
        self._fingerprint: str | None = None

    @property
    def modalities(self) -> tuple[str, ...]:
        """The one modality that was aligned; reads the manifest."""
        return (self._manifest.modality,)

    @property
    def embedding_size(self) -> int:
        """E, that of the target."""
        return self._manifest.embedding_size

    @property
    def space(self) -> str:
        """Name of the target's joint space."""
        return self._manifest.space

    def fingerprint(self) -> str:
        """Return the sha256 of the head, of the tower, and of the revision of this code.

        Raises:
            EncoderError: files are missing or damaged, or the frozen tower is not the one of the training.
        """
        if self._fingerprint is None:
            manifest = self._manifest
            # Reading checks the hashes, so a fingerprint never describes damaged files.
            for name in manifest.sha256:
                self._read_tensors(name)
            # The path of the folder and the device are not part of it: they do not change an embedding.
            settings = {"modality": manifest.modality, "depth": manifest.head.depth}
            parts: list[str | Path] = [_REVISION, self._folder / HEAD]
            if manifest.trained:
                shape = json.dumps(manifest.tower["init_args"], sort_keys=True)
                # A trained tower: its class, arguments, revision and weights decide.
                parts += [manifest.tower["class_path"], shape, self._tower.revision, self._folder / TOWER]
            else:
                parts.append(self._checked_tower().fingerprint())
            self._fingerprint = fingerprint(settings, *parts)
        return self._fingerprint

    def to(self, device: torch.device | str) -> Self:
        """Move tower and head, now or once they are loaded, to a device."""
        self._device = torch.device(device)
        if "_head" in vars(self):
            self._tower.to(self._device)
            self._head.to(self._device)
        return self

    def prepare(self, media: Media) -> Tensor:
        """Return one media as its tower prepares it.

        Raises:
            MediaError: it cannot be read; the message names it.
            InputError: the encoder was trained for another modality.
        """
        self._refuse_others(media.modality)
        return self._tower.prepare(media)

    @torch.no_grad()
    def embed(self, modality: str, inputs: Sequence[Tensor]) -> Tensor:
        """Return the embeddings of prepared media: [B, E], float32, unit norm.

        Raises:
            InputError: the encoder was trained for another modality.
            EncoderError: weights are missing or damaged, or the frozen tower is not the one of the training.
        """
        self._refuse_others(modality)
        # Loads tower and head at the first use.
        head = self._head
        return torch.cat([head(vectors) for vectors in self._vectors(modality, inputs)])

    @once
    def _manifest(self) -> AlignedManifest:
        return read_aligned(self._folder)

    @once
    def _tower(self) -> Any:
        """The tower, built but not loaded."""
        entry, size = self._manifest.tower, self._manifest.tower_size
        home = self._folder / self._manifest.root
        arguments = {name: resolve_path(value, home) for name, value in entry["init_args"].items()}
        # A network draws initial weights, which are then replaced; the caller's random state must not change.
        with torch.random.fork_rng(devices=[]):
            tower = build_tower(entry["class_path"], arguments, allow=self._allow)
        if (is_trainable(tower), tower.embedding_size) != (self._manifest.trained, size):
            raise EncoderError(
                f"{self._folder}: the tower {entry['class_path']} differs from the one in training ({size} features); "
                "install the version of it that was used then"
            )
        return tower.eval() if isinstance(tower, nn.Module) else tower

    def _checked_tower(self) -> Any:
        """The frozen tower, after its fingerprint was checked."""
        # A frozen tower is only named in the folder, so its weights may have changed since.
        expected, found = self._manifest.tower["fingerprint"], self._tower.fingerprint()
        if found != expected:
            raise EncoderError(
                f"{self._folder} was aligned with the tower {self._manifest.tower['class_path']} of fingerprint "
                f"{expected[:16]}; the one here, {self._tower.config}, has {found[:16]}. Bring the weights that were "
                "used then, or align again"
            )
        return self._tower

    @once
    def _head(self) -> Head:
        """The head, loaded after its tower: whoever has the head has both."""
        manifest = self._manifest
        if manifest.trained:
            self._load(self._tower, TOWER)
        else:
            self._checked_tower()
        with torch.random.fork_rng(devices=[]):
            head = Head(manifest.tower_size, manifest.embedding_size, manifest.head)
        self._load(head, HEAD)
        self._tower.to(self._device)
        return head.eval().to(self._device)

    def _read_tensors(self, name: str) -> dict[str, Tensor]:
        return read_tensors(self._folder / name, self._manifest.sha256[name], EncoderError)

    def _load(self, module: nn.Module, name: str) -> None:
        """Fill a module from its file, every tensor accounted for; freeze it."""
        try:
            # Strict by default: missing and unexpected tensors raise.
            module.load_state_dict(self._read_tensors(name))
        except RuntimeError as error:
            raise EncoderError(f"{self._folder / name} does not fit: {error}") from error
        module.requires_grad_(False)

    def _vectors(self, modality: str, inputs: Sequence[Tensor]) -> Iterator[Tensor]:
        """Yield the tower's vectors, some rows at a time: [b, W]."""
        size = _CPU_BATCH if self._device.type == "cpu" else _ACCELERATOR_BATCH
        if not self._manifest.trained:
            # A frozen encoder chooses its own batch size.
            yield self._tower.embed(modality, inputs).to(self._device)
            return
        for start in range(0, len(inputs), size):
            yield self._tower([tensor.to(self._device) for tensor in inputs[start : start + size]])

    def _refuse_others(self, modality: str) -> None:
        if modality not in self.modalities:
            raise InputError(f"{self._folder} embeds {self._manifest.modality} media, not {modality!r}")
