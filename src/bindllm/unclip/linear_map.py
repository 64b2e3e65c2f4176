"""A linear map from the space of an encoder to the image embeddings of an unCLIP pipeline, fitted on images.

Both encoders embed the same images, and ridge regression predicts the one embedding from the other. It maps all
modalities of the encoder, since they share its space. The folder holds JSON and safetensors only:

    map.json          format, both encoders with their fingerprints, and the quality of the fit
    map.safetensors   weight [E, D] and bias [D]
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from bindllm.atomic import (
    atomic_folder,
    check_replaceable,
    file_sha256,
    read_json,
    read_tensors,
    write_json,
    write_tensors,
)
from bindllm.cache.build import embed_images, find_images
from bindllm.embeddings.store import EmbeddingStore
from bindllm.encoders import Encoder
from bindllm.errors import CheckpointError, InputError
from bindllm.media import Media
from bindllm.unclip.images import PipelineImages

# Raise the number when older versions of bindllm cannot read a new folder.
FORMAT = 1
MANIFEST = "map.json"
WEIGHTS = "map.safetensors"

# Candidates for the penalty, in units of the mean variance of a direction.
_RIDGES = tuple(10.0**power for power in range(-6, 3))
# Images whose embeddings give the length that the pipeline was trained on.
_MEASURED = 64


@dataclass(frozen=True)
class MapFacts:
    """Origin and quality of a map.

    Args:
        encoder: class path of the encoder.
        encoder_fingerprint: fingerprint of the encoder.
        pipeline: name of the pipeline.
        pipeline_fingerprint: fingerprint of its image encoder.
        images: number of images that it was fitted on.
        ridge: the penalty, chosen by leave-one-out error.
        cosine: mean cosine of an image's embedding and its prediction by a map of all other images.
        mean_cosine: the same for the mean of all other images, which needs no map.
        norm: mean length of the pipeline's own embeddings of the images.
    """

    encoder: str
    encoder_fingerprint: str
    pipeline: str
    pipeline_fingerprint: str
    images: int
    ridge: float
    cosine: float
    mean_cosine: float
    norm: float


@dataclass(frozen=True)
class LinearMap:
    """An affine map between two spaces.

    Args:
        weight: float32 [E, D].
        bias: float32 [D].
        facts: origin and quality of the map.
    """

    weight: Tensor
    bias: Tensor
    facts: MapFacts

    @classmethod
    def fit(
        cls,
        images: str | Path | Sequence[str | Path],
        encoder: Encoder,
        pipeline: PipelineImages,
        *,
        store: str | Path = "data/store",
    ) -> Self:
        """Fit a map on images; those that cannot be read are skipped with a warning.

        Args:
            images: a folder, including its subfolders, or paths of images.
            encoder: the encoder whose space is mapped; serves images.
            pipeline: the image encoder of the pipeline.
            store: folder of the embedding store, in which the embeddings of both are kept.

        Raises:
            InputError: fewer than 3 images, or the map predicts no better than the mean of the images.
        """
        media = [Media.image(file) for file in find_images(images)]
        stores = [EmbeddingStore.for_encoder(store, one) for one in (encoder, pipeline)]
        for one, opened in zip((encoder, pipeline), stores, strict=True):
            embed_images([item.source for item in media], one, opened)
        # Keys are content hashes, the same in both stores; each content counts once.
        first, second = (opened.keys_of(media) for opened in stores)
        found = {key: item for item, key in first.items() if item in second}
        keys = list(found)
        if len(keys) < 3:
            raise InputError(
                f"a map needs different images, at least 3 and better thousands, not {len(keys)}"
            )
        fitted = fit_ridge(*(opened.get(keys) for opened in stores))
        # Two standard errors: the best of several penalties wins a little by chance.
        if not fitted.cosine - fitted.mean_cosine > 2 * fitted.error:
            raise InputError(
                f"a map fitted on {len(keys):,} images predicts no better than their mean (cosine {fitted.cosine:.3f}, "
                f"by the mean {fitted.mean_cosine:.3f}, standard error of the difference {fitted.error:.3f}): give "
                "more images, or images of more different things"
            )
        measured = list(found.values())[:: -(-len(keys) // _MEASURED)]
        facts = MapFacts(
            encoder=f"{type(encoder).__module__}.{type(encoder).__qualname__}",
            encoder_fingerprint=encoder.fingerprint(),
            pipeline=pipeline.spec.name,
            pipeline_fingerprint=pipeline.fingerprint(),
            images=len(keys),
            ridge=fitted.ridge,
            cosine=fitted.cosine,
            mean_cosine=fitted.mean_cosine,
            norm=pipeline.mean_norm(measured),
        )
        return cls(fitted.weight, fitted.bias, facts)

    def __call__(self, embeddings: Tensor) -> Tensor:
        """Return the unit embeddings [N, D] of the pipeline that belong to unit embeddings [N, E]."""
        return F.normalize(embeddings @ self.weight + self.bias, dim=-1)

    def save(self, folder: str | Path) -> None:
        """Write the folder in one step; a map there is replaced, anything else refused.

        Raises:
            InputError: the folder holds something else.
        """
        folder = Path(folder)
        check_replaceable(folder, MANIFEST, InputError, kind="a linear map")
        with atomic_folder(folder) as part:
            write_tensors(part / WEIGHTS, {"weight": self.weight, "bias": self.bias})
            content = {"format": FORMAT, **asdict(self.facts), "sha256": file_sha256(part / WEIGHTS)}
            write_json(part / MANIFEST, content)

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """Read a folder that `save` wrote.

        Raises:
            CheckpointError: no such folder, a newer format, or damaged files.
        """
        file = Path(folder) / MANIFEST
        content = read_json(file, CheckpointError, "make a map with bindllm fit_map")
        # The format comes first: a newer layout may lack or rename the other entries.
        number = content.get("format") if isinstance(content, dict) else None
        if isinstance(number, int) and number > FORMAT:
            raise CheckpointError(
                f"{file} has format {number}, this bindllm reads up to {FORMAT}: upgrade bindllm"
            )
        try:
            sha256 = content.pop("sha256")
            facts = MapFacts(**{name: value for name, value in content.items() if name != "format"})
            # Checked at the border, so that a damaged file fails here.
            if not (number == FORMAT and _are_plain(asdict(facts)) and facts.norm > 0):
                raise TypeError("a value of a wrong type")
        except (TypeError, KeyError, AttributeError) as error:
            raise CheckpointError(f"{file} is not the description of a linear map ({error!r})") from error
        tensors = read_tensors(file.with_name(WEIGHTS), sha256, CheckpointError)
        weight, bias = tensors.get("weight"), tensors.get("bias")
        if weight is None or bias is None or weight.dim() != 2 or bias.shape != weight.shape[1:]:
            raise CheckpointError(f"{folder} lacks weight [E, D] or bias [D]; fit the map again")
        return cls(weight, bias, facts)


def _are_plain(values: dict[str, Any]) -> bool:
    kinds = MapFacts.__annotations__
    return all(
        isinstance(value, str) if kinds[name] == "str" else type(value) in (int, float)
        for name, value in values.items()
    )


@dataclass(frozen=True)
class Fitted:
    """A fit: fields of `MapFacts` and `LinearMap`, and the standard error of ``cosine - mean_cosine``."""

    weight: Tensor
    bias: Tensor
    ridge: float
    cosine: float
    mean_cosine: float
    error: float


def fit_ridge(inputs: Tensor, targets: Tensor) -> Fitted:
    """Fit ``targets = inputs @ weight + bias`` by ridge regression.

    The penalty is the one with the smallest leave-one-out error, which has a closed form for linear smoothers
    (Hastie, Tibshirani, Friedman, The Elements of Statistical Learning, 2nd edition, equation 7.64).

    Args:
        inputs: [N, E], N at least 3.
        targets: [N, D].

    Raises:
        InputError: all inputs are the same.
    """
    # How to read this: in the eigenvectors of the covariance the penalty shrinks each direction on its own, so one
    # decomposition serves all penalties. The leverage of a row is its weight in its own prediction.
    inputs, targets = inputs.double(), targets.double()
    count = len(inputs)
    center, mean = inputs.mean(0), targets.mean(0)
    moved, wanted = inputs - center, targets - mean
    values, vectors = torch.linalg.eigh(moved.T @ moved)
    values = values.clamp(min=0)
    if not values.max() > 1e-12:
        raise InputError(f"all {count:,} images have the same embedding: check the images and the encoder")
    rotated = moved @ vectors  # [N, E]
    products = rotated.T @ wanted  # [E, D]
    fits = []
    for ridge in _RIDGES:
        shrunk = 1 / (values + ridge * values.mean())
        leverage = 1 / count + rotated.square() @ shrunk
        residuals = (wanted - rotated @ (shrunk[:, None] * products)) / (1 - leverage)[:, None]
        fits.append((float(residuals.square().mean()), ridge, shrunk, residuals))
    _, ridge, shrunk, residuals = min(fits, key=lambda fit: fit[0])
    weight = vectors @ (shrunk[:, None] * products)
    others = (count * mean - targets) / (count - 1)
    cosines, means = (F.cosine_similarity(rows, targets) for rows in (targets - residuals, others))
    return Fitted(
        weight.float().contiguous(),
        (mean - center @ weight).float(),
        ridge,
        float(cosines.mean()),
        float(means.mean()),
        float((cosines - means).std() / count**0.5),
    )
