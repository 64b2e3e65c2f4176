"""``bindllm fit_map``: fit a linear map from the space of an encoder to that of an unCLIP pipeline."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from bindllm.cli.arguments import refuse_together
from bindllm.cli.options import EncoderOptions
from bindllm.errors import UsageError


def fit_map(
    output: Path,
    pipeline: str,
    *,
    images: str,
    store: str = "data/store",
    revision: str | None = None,
    encoders: EncoderOptions = EncoderOptions(),
    overrides: Sequence[str] = (),
) -> int:
    """Fit a linear map from an encoder's space to that of an unCLIP pipeline, for bindllm imagine (docs/imagine.md).

    Both embed the same images, and ridge regression predicts one embedding
    from the other. The map serves all modalities of the encoder.

    Args:
        output: folder of the map; an earlier map there is replaced
        pipeline: folder of a StableUnCLIPImg2ImgPipeline of diffusers, or its id on the hub
        images: folder of images, including its subfolders
        store: folder of the embedding store
        revision: commit of a pipeline on the hub

    Example:
        bindllm fit_map maps/lite checkpoints/stable-unclip --images photos --encoder checkpoints/efficientnet-lite0
    """
    refuse_together(encoder=encoders.encoder, checkpoint=encoders.checkpoint)
    if not (encoders.encoder or encoders.checkpoint):
        raise UsageError("which encoder? Give --encoder CLASS_OR_FOLDER or --checkpoint FOLDER")

    from bindllm.atomic import check_replaceable
    from bindllm.encoders import encoder_for
    from bindllm.errors import InputError
    from bindllm.unclip.images import PipelineImages
    from bindllm.unclip.linear_map import MANIFEST, LinearMap

    # Before the images are embedded, which may take hours.
    check_replaceable(output, MANIFEST, InputError, kind="a linear map")
    device = encoders.find_device()
    encoder = encoder_for("image", encoders.load(overrides)).to(device)
    target = PipelineImages(pipeline, revision=revision).to(device)
    fitted = LinearMap.fit(images, encoder, target, store=store)
    fitted.save(output)
    facts = fitted.facts
    print(
        f"map {output}: {facts.images:,} images, {fitted.weight.shape[0]} to {fitted.weight.shape[1]} numbers"
    )
    print(
        f"cosine of an embedding that was left out and its prediction: {facts.cosine:.3f}; by the mean of the images: "
        f"{facts.mean_cosine:.3f}"
    )
    return 0
