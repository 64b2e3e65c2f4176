"""Point-Bind: point clouds in ImageBind's joint space (https://arxiv.org/abs/2309.00615), in plain torch.

Both published encoders, Point-BERT and I2P-MAE, without compiled operators, and deterministic: the published code
starts its sampling at a random point, and one of the two variants gives other embeddings at every call.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Self, get_args, overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bindllm.encoders import Embedded, fingerprint, once
from bindllm.encoders.pointbind.cloud import fit_cloud
from bindllm.encoders.pointbind.networks import (
    CONFIG,
    EMBEDDING_SIZE,
    I2PMAE,
    WEIGHTS,
    Block,
    PointBert,
    load_network,
    read_config,
    token_width,
)
from bindllm.errors import EncoderError, InputError, check_choice
from bindllm.media import Media
from bindllm.media.points import open_points

Precision = Literal["float32", "bfloat16", "float16"]

# Raise the number when other numbers come out for the same cloud: stored embeddings are then computed again.
_REVISION = "pointbind 2"

# Clouds that pass through the network at once: on a CPU more gain nothing, elsewhere activations must stay bounded.
_CPU_BATCH, _BATCH = 2, 16


class PointBind:
    """Point-Bind's encoder of point clouds, E = 1024, in the same space as `ImageBind`.

    The folder's config names its variant: "i2p-mae" (78.0 % zero-shot on ModelNet40 as published) or "point-bert"
    (76.3 %). The published scale of point embeddings is 1, so these are also the published outputs.

    Args:
        weights: converted folder, with ``config.json`` and ``model.safetensors``.
        dtype: dtype of the network: "float32", "bfloat16" or "float16". Points are always sampled and grouped in
            float32.
        points: how many points a cloud is brought to; both variants were trained on 8192.

    Raises:
        InputError: an unknown dtype, or ``points`` below 1.

    Examples:
        >>> encoder = PointBind("checkpoints/pointbind", dtype="bfloat16")
        >>> encoder.space, encoder.embedding_size
        ('imagebind', 1024)
    """

    modalities = ("point",)
    embedding_size = EMBEDDING_SIZE
    space = "imagebind"

    def __init__(
        self, weights: str = "checkpoints/pointbind", *, dtype: Precision = "float32", points: int = 8192
    ) -> None:
        check_choice("dtype", dtype, get_args(Precision))
        if isinstance(points, bool) or not isinstance(points, int) or points < 1:
            raise InputError(
                f"points={points!r}: expected a number of points, at least 1; 8192 is the published one"
            )
        self.config: dict[str, Any] = {"weights": str(weights), "dtype": dtype, "points": points}
        self._folder = Path(weights)
        self._dtype: torch.dtype = getattr(torch, dtype)
        self._points = points
        self._device = torch.device("cpu")
        self._fingerprint: str | None = None

    @property
    def token_sizes(self) -> dict[str, int]:
        """The width of the network; reads the config of the converted folder."""
        return {"point": token_width(read_config(self._folder), source=str(self._folder / CONFIG))}

    def fingerprint(self) -> str:
        """Return the sha256 of weights, variant, settings and the revision of the preprocessing.

        Raises:
            EncoderError: the converted folder is missing or damaged.
        """
        if self._fingerprint is None:
            network = {name: read_config(self._folder).get(name) for name in ("variant", "sizes")}
            settings = {"dtype": self.config["dtype"], "points": self._points, "network": network}
            self._fingerprint = fingerprint(settings, _REVISION, self._folder / WEIGHTS)
        return self._fingerprint

    def to(self, device: torch.device | str) -> Self:
        """Move the network, now or once it is loaded, to a device."""
        self._device = torch.device(device)
        if "network" in vars(self):
            self.network.to(self._device)
        return self

    def prepare(self, media: Media) -> Tensor:
        """Return a cloud as [points, 3], float32, centered, its largest norm 1; see `fit_cloud`.

        Clouds of one point, or of coincident points, lie at the origin: all of them get the same embedding.

        Raises:
            MediaError: the cloud cannot be read.
        """
        return fit_cloud(open_points(media.source), self._points)

    @once
    def network(self) -> PointBert | I2PMAE:
        """The frozen network, loaded at the first use.

        Raises:
            EncoderError: the converted folder is missing or damaged, or needs more points than a cloud has here.
        """
        network = load_network(self._folder, self._dtype)
        least = network.sizes.least_points
        if self._points < least:
            raise EncoderError(
                f"{self._folder / CONFIG}: this network needs at least {least} points in a cloud, not "
                f"points={self._points}"
            )
        return network.to(self._device)

    # jsonargparse compares the last annotation with `Encoder`; the two overloads describe both results.
    @overload
    def embed(self, modality: str, inputs: Sequence[Tensor], *, tokens: Literal[False] = False) -> Tensor: ...

    @overload
    def embed(self, modality: str, inputs: Sequence[Tensor], *, tokens: Literal[True]) -> Embedded: ...

    def embed(self, modality: str, inputs: Sequence[Tensor], *, tokens: bool = False) -> Tensor:
        """Return the embeddings of prepared clouds: [B, 1024], float32, unit norm, on the encoder's device.

        Args:
            modality: "point".
            inputs: prepared clouds, each [points, 3].
            tokens: also return the group tokens after the last norm, [G, D] for each cloud, in the dtype of the
                network; G and D are 512 and 384 for "point-bert", 64 and 384 for "i2p-mae".

        Raises:
            InputError: a modality other than point, or a cloud of another shape.
            EncoderError: the converted folder is missing or damaged.
        """
        if modality not in self.modalities:
            raise InputError(f"PointBind embeds point media, not {modality!r}")
        for cloud in inputs:
            if cloud.shape != (self._points, 3):
                raise InputError(
                    f"PointBind embeds prepared clouds [{self._points}, 3], not {list(cloud.shape)}; "
                    "call prepare() first"
                )
        network = self.network
        size = _CPU_BATCH if self._device.type == "cpu" else _BATCH
        parts: list[Tensor] = []
        groups: list[Tensor] = []
        # A trainer's autocast would change the embeddings, and the fingerprint would not show it.
        with torch.autocast(self._device.type, enabled=False):
            for start in range(0, len(inputs), size):
                points = torch.stack(list(inputs[start : start + size])).to(self._device, torch.float32)
                feature, rows = network(points, network.group(points))
                embeddings = F.normalize(network.head(feature).float(), dim=-1)
                parts.append(embeddings)
                groups += rows.unbind(0) if tokens else ()
        return Embedded(torch.cat(parts), groups) if tokens else torch.cat(parts)

    def blocks(self, modality: str) -> list[nn.Module]:
        """Return the blocks of the transformer, in order; of I2P-MAE those of all levels."""
        return [part for part in self.network.modules() if isinstance(part, Block)]
