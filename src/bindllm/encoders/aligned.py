"""An encoder that `bindllm align` has taught to another encoder's joint space: a tower, a head, and a folder."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from bindllm.encoders import fingerprint
from bindllm.encoders.aligned_folder import HEAD, TOWER, AlignedManifest, read_aligned, read_tensors
from bindllm.encoders.head import Head
from bindllm.encoders.trainable import build_tower, is_trainable
from bindllm.errors import EncoderError, InputError
from bindllm.media import Media

# Raise the number when other numbers come out for the same media: stored embeddings are then made anew.
_REVISION = "aligned 1"

_CPU_BATCH, _ACCELERATOR_BATCH = 8, 64


class Aligned:
    """One modality in the joint space of another encoder, as `bindllm align` has trained it.

    A frozen tower is the encoder that the folder names, with the fingerprint that it had in training; a trained one
    is in the folder. Its embeddings are those of the target's space, so a model that was trained on pictures through
    the target takes them as they are.

    Args:
        weights: folder that `bindllm align` wrote.
        allow: import paths of tower classes outside bindllm that may be imported; they run code from there.
            Loading ignores the value in a file: each caller decides again.

    Raises:
        InputError: ``allow`` is not a list of import paths.

    Example:
        Aligned("checkpoints/align-text").modalities
    """

    _loading = threading.RLock()

    def __init__(self, weights: str = "checkpoints/align-text", *, allow: list[str] | None = None) -> None:
        if not isinstance(allow, list | tuple | None) or not all(
            isinstance(path, str) for path in allow or ()
        ):
            raise InputError(
                f"allow must be a list of import paths such as ['my_lab.RadarTower'], not {allow!r}"
            )
        self.config: dict[str, Any] = {"weights": str(weights)} | ({"allow": list(allow)} if allow else {})
        self._folder, self._allow = Path(weights), tuple(allow or ())
        self._device = torch.device("cpu")
        self._read: AlignedManifest | None = None
        self._built: Any = None
        self._head: Head | None = None
        self._fingerprint: str | None = None

    @property
    def modalities(self) -> tuple[str, ...]:
        """The one modality that was taught; reads the folder's description."""
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
            for name in manifest.sha256:
                read_tensors(self._folder, name, manifest)
            settings = {"modality": manifest.modality, "depth": manifest.head.depth}
            parts: list[str | Path] = [_REVISION, self._folder / HEAD]
            if manifest.trained:
                shape = json.dumps(manifest.tower["init_args"], sort_keys=True)
                parts += [manifest.tower["class_path"], shape, self._tower.revision, self._folder / TOWER]
            else:
                parts.append(self._checked_tower().fingerprint())
            self._fingerprint = fingerprint(settings, *parts)
        return self._fingerprint

    def to(self, device: torch.device | str) -> Self:
        """Move tower and head, now or once they are loaded, to a device."""
        self._device = torch.device(device)
        if self._head is not None:
            self._tower.to(self._device)
            self._head.to(self._device)
        return self

    def prepare(self, media: Media) -> Tensor:
        """Return one media as its tower prepares it.

        Raises:
            MediaError: it cannot be read; the message names it.
            InputError: a modality that was not taught.
        """
        self._refuse_others(media.modality)
        return self._tower.prepare(media)

    @torch.no_grad()
    def embed(self, modality: str, inputs: Sequence[Tensor]) -> Tensor:
        """Return the embeddings of prepared media: [B, E], float32, unit norm.

        Raises:
            InputError: a modality that was not taught.
            EncoderError: weights are missing or damaged, or the frozen tower is not the one of the training.
        """
        self._refuse_others(modality)
        head = self._loaded()
        return torch.cat([head(vectors) for vectors in self._vectors(modality, inputs)])

    @property
    def _manifest(self) -> AlignedManifest:
        if self._read is None:
            self._read = read_aligned(self._folder)
        return self._read

    @property
    def _tower(self) -> Any:
        """The tower, built but not loaded."""
        with self._loading:
            if self._built is None:
                entry = self._manifest.tower
                arguments = {name: self._resolved(value) for name, value in entry["init_args"].items()}
                # A network draws initial weights, which are replaced: the caller's chance is left as it was.
                with torch.random.fork_rng(devices=[]):
                    tower = build_tower(entry["class_path"], arguments, allow=self._allow)
                if is_trainable(tower) != self._manifest.trained or (
                    tower.embedding_size != self._manifest.tower_size
                ):
                    raise EncoderError(
                        f"{self._folder}: the tower {entry['class_path']} is not what it was in training "
                        f"({self._manifest.tower_size} numbers); install the version of it that was used then"
                    )
                self._built = tower.eval() if isinstance(tower, nn.Module) else tower
            return self._built

    def _checked_tower(self) -> Any:
        """The frozen tower, after a look at its fingerprint."""
        expected, found = self._manifest.tower["fingerprint"], self._tower.fingerprint()
        if found != expected:
            raise EncoderError(
                f"{self._folder} was aligned with the tower {self._manifest.tower['class_path']} of fingerprint "
                f"{expected[:16]}; the one here, {self._tower.config}, has {found[:16]}. Bring the weights that were "
                "used then, or align again"
            )
        return self._tower

    def _loaded(self) -> Head:
        with self._loading:
            if self._head is None:
                manifest = self._manifest
                if manifest.trained:
                    self._load(self._tower, TOWER)
                else:
                    self._checked_tower()
                with torch.random.fork_rng(devices=[]):
                    head = Head(manifest.tower_size, manifest.embedding_size, manifest.head)
                self._load(head, HEAD)
                self._tower.to(self._device)
                self._head = head.eval().to(self._device)
            return self._head

    def _load(self, module: nn.Module, name: str) -> None:
        """Fill a module from its file, every tensor accounted for; freeze it."""
        try:
            module.load_state_dict(read_tensors(self._folder, name, self._manifest))
        except RuntimeError as error:
            raise EncoderError(f"{self._folder / name} does not fit: {error}") from error
        module.requires_grad_(False)

    def _vectors(self, modality: str, inputs: Sequence[Tensor]) -> Iterator[Tensor]:
        """Yield the tower's vectors, some rows at a time: [b, W]."""
        size = _CPU_BATCH if self._device.type == "cpu" else _ACCELERATOR_BATCH
        if not self._manifest.trained:
            # A frozen encoder has its own way with batches.
            yield self._tower.embed(modality, inputs).to(self._device)
            return
        for start in range(0, len(inputs), size):
            yield self._tower([tensor.to(self._device) for tensor in inputs[start : start + size]])

    def _refuse_others(self, modality: str) -> None:
        if modality not in self.modalities:
            raise InputError(f"{self._folder} embeds {self._manifest.modality} media, not {modality!r}")

    def _resolved(self, value: Any) -> Any:
        """Return a path of the manifest as it is reached from here, so that a moved project still loads."""
        if not isinstance(value, str) or not {"/", os.sep} & set(value) or os.path.exists(value):
            return value
        beside = self._folder / self._manifest.root / value
        return os.path.relpath(beside) if beside.exists() else value
