"""``bindllm generate``: ask a checkpoint folder about images, audio and every other modality of its encoders."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from jsonargparse.typing import PositiveInt

from bindllm.cli.arguments import refuse_together
from bindllm.cli.options import (
    CacheOptions,
    PositiveNumber,
    Probability,
    build_encoders,
    named_media,
    print_whole,
    read_media,
)
from bindllm.errors import UsageError, printable, printable_lines
from bindllm.media import Media

if TYPE_CHECKING:
    from bindllm.model.bindllm import BindLLM


@dataclass(frozen=True)
class MediaOptions:
    """Media (each option may be repeated)."""

    image: tuple[str, ...] = ()
    """an image file"""
    video: tuple[str, ...] = ()
    """a video file"""
    audio: tuple[str, ...] = ()
    """an audio file, or a video for its audio"""
    text: tuple[str, ...] = ()
    """a text that the encoder embeds like an image; the decoder does not read it"""
    point: tuple[str, ...] = ()
    """a point cloud or a mesh"""
    depth: tuple[str, ...] = ()
    """a depth map"""
    thermal: tuple[str, ...] = ()
    """a thermal image"""
    imu: tuple[str, ...] = ()
    """the signal of an inertial measurement unit"""
    media: tuple[str, ...] = ()
    """MODALITY:FILE, for any other modality that an encoder of the checkpoint serves, such as radar:sweep.npy"""

    def read(self) -> list[Media]:
        """Return the media in the order of the modalities."""
        files = {name: values for name, values in asdict(self).items() if name != "media"}
        # One option per modality of ImageBind; others go through MODALITY:FILE.
        named = [named_media(modality, source) for modality, sources in files.items() for source in sources]
        return named + [read_media(text) for text in self.media]


@dataclass(frozen=True)
class DecodingOptions:
    """Decoding."""

    max_new_tokens: PositiveInt = 64
    """length of the longest answer"""
    temperature: PositiveNumber | None = None
    """sample at this temperature (default: the most likely answer)"""
    top_p: Probability | None = None
    """sample from the most likely tokens that sum to this probability"""
    num_beams: PositiveInt | None = None
    """number of beams of a beam search"""
    seed: int = 0
    """seed of sampling"""
    stream: bool = False
    """print the answer while it is generated"""

    @property
    def given(self) -> dict[str, Any]:
        """The options of `BindLLM.generate` that have a value."""
        # Seed and streaming belong to the command; all others have the names of Hugging Face.
        options = {name: value for name, value in asdict(self).items() if name not in ("seed", "stream")}
        return {name: value for name, value in options.items() if value is not None}


@dataclass(frozen=True)
class ModelOptions:
    """Model."""

    decoder: str | None = None
    """folder of the decoder, if it has moved since training"""
    quantize: Literal["nf4", "int8", "none"] | None = None
    """load the decoder in 4 or 8 bits, or in full (default: as in training)"""
    tokens: PositiveInt | None = None
    """bind tokens of an image, at most as many as in training (default: all)"""
    encoder: tuple[str, ...] = ()
    """import path or folder of a further encoder, for a modality that those of the checkpoint do not serve; may be
    repeated. Arguments of its constructor are given as --encoder.NAME VALUE"""
    allow: tuple[str, ...] = ()
    """import path of a class outside bindllm that the checkpoint may name; may be repeated"""


@dataclass(frozen=True)
class ModelCacheOptions(CacheOptions):
    """Visual cache (docs/cache.md; default: the cache that the checkpoint names)."""

    no_cache: bool = False
    """do not use a visual cache"""
    show_neighbors: bool = False
    """after the answer, print the retrieved images"""


def generate(
    checkpoint: str,
    prompt: str = "Describe this image.",
    *,
    media: MediaOptions = MediaOptions(),
    decoding: DecodingOptions = DecodingOptions(),
    model: ModelOptions = ModelOptions(),
    cache: ModelCacheOptions = ModelCacheOptions(),
    overrides: Sequence[str] = (),
) -> int:
    """Ask a checkpoint about images, audio and other media.

    Several media are fused into one embedding.

    Args:
        checkpoint: folder that bindllm fit wrote
        prompt: the question
        media: files that the question is about
        decoding: how the answer is found
        model: decoder and further encoders
        cache: the visual cache that embeddings are blended with
        overrides: arguments of the further encoder

    Example:
        bindllm generate checkpoints/quickstart "Describe this image." --image cat.png
    """
    # How to read this: contradictions first, since loading takes long; then the answer; then the neighbors.
    refuse_together(cache=cache.cache, no_cache=cache.no_cache)
    if decoding.stream and (decoding.num_beams or 1) > 1:
        raise UsageError("--stream cannot show a beam search: its answer is known only at its end")
    # Files are named here and opened by the encoders.
    shown = media.read()
    loaded = _load(checkpoint, model, cache, overrides)

    # Imported late, so that --help and wrong options answer at once.
    import torch

    # Only sampling uses it.
    torch.manual_seed(decoding.seed)
    if decoding.stream:
        # Control characters are escaped in each piece: a model may print any byte.
        for piece in loaded.stream(prompt, shown, **decoding.given):
            print(printable_lines(piece), end="", flush=True)
        print()
    else:
        print(printable_lines(loaded.generate(prompt, shown, **decoding.given)))
    if cache.show_neighbors:
        _print_neighbors(loaded, shown)
    return 0


def _load(
    checkpoint: str, options: ModelOptions, cache: ModelCacheOptions, overrides: Sequence[str]
) -> BindLLM:
    """Load the checkpoint, and change how its cache is blended in as the options say."""
    from bindllm.model.bindllm import BindLLM

    model = BindLLM.from_pretrained(
        checkpoint,
        decoder=options.decoder,
        allow=options.allow,
        encoders=build_encoders(options.encoder, overrides, allow=options.allow),
        # None: the cache that the checkpoint names.
        cache=False if cache.no_cache else cache.cache,
        quantize=False if options.quantize == "none" else options.quantize,
        tokens=options.tokens,
    )
    # An option without effect would give an answer other than the user expects.
    if model.cache is None and (cache.settings or cache.show_neighbors):
        option = f"--cache_{next(iter(cache.settings))}" if cache.settings else "--show_neighbors"
        raise UsageError(f"{option} needs a visual cache, and {checkpoint} names none: give --cache FOLDER")
    # Only the given settings replace those of the checkpoint.
    if cache.settings:
        model.cache.settings = replace(model.cache.settings, **cache.settings)
    return model


def _print_neighbors(model: BindLLM, media: Sequence[Media]) -> None:
    """Print the images that the model's cache blends into the embedding of media, nearest first."""
    from rich.table import Table
    from rich.text import Text

    from bindllm.cache.visual_cache import nearest_images

    cache = model.cache
    if not media:
        print("no images were retrieved: the prompt has no media")
        return
    if skipped := sorted({item.modality for item in media} & set(cache.settings.skip)):
        print(f"no images were retrieved: media with {', '.join(skipped)} are not blended")
        return
    table = Table(
        title=f"retrieved images, blended with weight {cache.settings.weight:g}", title_justify="left"
    )
    table.add_column("similarity", justify="right")
    table.add_column("image", no_wrap=True)
    # Not blended: the neighbors are those of the media themselves.
    for similarity, name in nearest_images(cache, model.encode([list(media)], cache=False)):
        table.add_row(f"{similarity:.3f}", Text(printable(name)))
    print_whole(table)
