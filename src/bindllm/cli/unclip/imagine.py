"""``bindllm imagine``: draw media of any modality through an unCLIP pipeline."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

from jsonargparse.typing import PositiveInt

from bindllm.cli.arguments import refuse_together
from bindllm.cli.encode import default_encoder
from bindllm.cli.options import CacheOptions, EncoderOptions, PositiveNumber, read_media
from bindllm.errors import UsageError, printable
from bindllm.media import Media
from bindllm.unclip.settings import DrawSettings, check_output


@dataclass(frozen=True)
class PipelineOptions:
    """Pipeline."""

    revision: str | None = None
    """commit of a pipeline on the hub, whose id is given as the pipeline"""
    map: str | None = None
    """folder of a linear map that bindllm fit_map wrote, for encoders whose space the pipeline does not share"""
    norm: PositiveNumber | None = None
    """length of the image embedding (default: the mean of the pipeline's own embeddings)"""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """type of the pipeline's weights; auto: the fastest of this machine"""


def imagine(
    pipeline: str,
    files: tuple[str, ...],
    *,
    output: Path,
    num_images: PositiveInt = 1,
    overwrite: bool = False,
    weight: tuple[PositiveNumber, ...] = (),
    encoders: EncoderOptions = EncoderOptions(),
    drawing: DrawSettings = DrawSettings(),
    options: PipelineOptions = PipelineOptions(),
    cache: CacheOptions = CacheOptions(),
    overrides: Sequence[str] = (),
) -> int:
    """Draw media of any modality: their embedding is the image embedding of an unCLIP pipeline (docs/imagine.md).

    Needs pip install 'bindllm[imagine]'. Several media are mixed: the
    weighted mean of their unit embeddings. No language model takes part.

    Args:
        pipeline: folder of a StableUnCLIPImg2ImgPipeline of diffusers, or its id on the hub
        files: FILE, MODALITY:FILE or text:WORDS, as for bindllm encode
        output: PNG file; several images are numbered, as in rain-1.png
        num_images: number of images
        overwrite: replace files that exist
        weight: share of a file, in the order of the files; may be repeated (default: equal shares)
        encoders: the encoders (default: ImageBind in checkpoints/imagebind)

    Example:
        bindllm imagine checkpoints/stable-unclip rain.wav street.jpg --weight 2 --weight 1 --output rain.png
    """
    # How to read this: mistakes of the command line first, since loading takes long; then one image after the other.
    refuse_together(encoder=encoders.encoder, checkpoint=encoders.checkpoint)
    media = _read_files(files, weight)
    names = _output_files(output, num_images, overwrite=overwrite)

    from bindllm.unclip.imagine import Imagine

    drawn = Imagine(
        pipeline,
        encoders.load(overrides) or [default_encoder()],
        revision=options.revision,
        linear_map=options.map,
        cache=cache.open(),
        norm=options.norm,
        device=encoders.find_device(),
        dtype=options.dtype,
    )(media, num_images=num_images, **asdict(drawing))
    for name, image in zip(names, drawn, strict=True):
        # Each at once: an error later keeps the images before it.
        image.save(name, overwrite=overwrite)
        facts = image.facts
        print(printable(f"{name}: {facts['width']} x {facts['height']} pixels, seed {facts['seed']}"))
    print(printable(f"license of the pipeline {facts['pipeline']}: {facts['license']['pipeline']}"))
    print(printable(f"license of the encoders: {', '.join(dict.fromkeys(facts['license']['encoders']))}"))
    return 0


def _read_files(files: Sequence[str], weights: Sequence[float]) -> list[Media]:
    """Return the media of files with their weights, if any."""
    media = [read_media(name) for name in files]
    if not weights:
        return media
    if len(weights) != len(media):
        raise UsageError(f"{len(weights)} x --weight for {len(media)} files: give one for each, or none")
    return [replace(item, weight=weight) for item, weight in zip(media, weights, strict=True)]


def _output_files(output: Path, count: int, *, overwrite: bool) -> list[Path]:
    """Return the files of images, checked; several are numbered from 1."""
    numbered = [output.with_stem(f"{output.stem}-{number}") for number in range(1, count + 1)]
    names = [output] if count == 1 else numbered
    for name in names:
        check_output(name, overwrite=overwrite)
    return names
