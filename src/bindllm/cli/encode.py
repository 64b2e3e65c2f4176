"""``bindllm encode``: print pairwise cosine similarities of files and texts."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bindllm.cli.arguments import refuse_together
from bindllm.cli.options import EncoderOptions, PositiveNumber, build_encoder, print_whole, read_media
from bindllm.errors import EncoderError, InputError, MissingExtraError, UsageError, printable, printable_lines
from bindllm.media import Media

if TYPE_CHECKING:
    from rich.table import Table
    from torch import Tensor

DEFAULT = "checkpoints/imagebind"
"""Folder of the encoder that is used if none is named."""

SCALE = 100.0
"""Factor of the cosines before a softmax: the value that CLIP and ImageBind have learned for texts."""

_LONGEST_NAME = 28


def encode(
    files: tuple[str, ...] = (),
    *,
    text: tuple[str, ...] = (),
    encoders: EncoderOptions = EncoderOptions(),
    softmax: bool | PositiveNumber = False,
    overrides: Sequence[str] = (),
) -> int:
    """Print the cosine similarity of every pair of files and texts.

    1 is the same direction, 0 is nothing in common. The modality of a file
    follows from its ending:

      image   png jpg jpeg webp gif bmp tif tiff svg svgz
      video   mp4 webm mkv avi mov m4v mpg mpeg
      audio   wav mp3 flac ogg oga opus m4a aac
      point   ply obj off stl glb xyz pts

    Name the modality of all others: depth:room.png, thermal:yard.png,
    imu:walk.csv, point:chair.npy, text:a dog.

    Args:
        files: FILE or MODALITY:FILE
        text: a text; may be repeated
        encoders: the encoders (default: ImageBind in checkpoints/imagebind)
        softmax: also print, for each pair of modalities, the softmax over each row of this factor (100 if none is
            given) times the cosines

    Example:
        bindllm encode dog.jpg car.jpg bark.wav --text "a dog" --text "a car" --softmax
    """
    if not (files or text):
        raise UsageError("nothing to encode: give files, or texts with --text")
    refuse_together(encoder=encoders.encoder, checkpoint=encoders.checkpoint)

    from bindllm.encoders.fusion import common_size

    # A file that cannot be read is reported at the end, and the others are compared.
    media: list[Media] = []
    failed: list[str] = []
    for name in files:
        try:
            media.append(read_media(name))
        except UsageError as error:
            failed.append(str(error))
    media += [Media.text(words) for words in text]
    # Before the weights: a wrong device is an error of milliseconds.
    device = encoders.find_device()
    loaded = encoders.load(overrides) or [default_encoder()]
    # Embeddings of different widths cannot be compared: found before the first file is read.
    common_size(loaded)
    # Rows have unit norm, so their products are the cosines.
    kept, rows = embed_files(media, loaded, device=device, failed=failed)
    _print_tables(kept, rows @ rows.T, loaded, scale=SCALE if softmax is True else softmax)
    for message in failed:
        print(f"error: {printable_lines(message)}", file=sys.stderr)
    return 1 if failed else 0


def _print_tables(media: Sequence[Media], cosines: Tensor, encoders: Sequence[Any], *, scale: float) -> None:
    """Print the cosines of media, [N, N], and with a scale the softmax tables."""
    from bindllm.encoders import alignment_warnings

    for warning in alignment_warnings(encoders):
        print(f"warning: {printable_lines(warning)}")
    if not media:
        return
    more = softmax_tables(media, cosines, scale=scale) if scale else ()
    print_whole(_table("cosine", media, media, cosines, numbers=True), *more)


def default_encoder() -> Any:
    """Return ImageBind from its default folder, or raise an EncoderError."""
    if not Path(DEFAULT).is_dir():
        raise EncoderError(
            f"no encoder to use: {DEFAULT} is not in {Path.cwd()}. Make it with `bindllm convert`, use those of "
            "a trained folder with --checkpoint FOLDER, or name one: --encoder bindllm.encoders.HuggingFace "
            "--encoder.name FOLDER"
        )
    return build_encoder("bindllm.encoders.ImageBind", [])


def embed_files(
    media: Sequence[Media], encoders: Sequence[Any], *, device: str, failed: list[str]
) -> tuple[list[Media], Tensor]:
    """Return the media that could be embedded, in their order, and their embeddings, [N, E], unit norm, on the CPU.

    ``failed`` gets a message for each media that cannot be read or embedded, or that no encoder serves.
    """
    import torch

    from bindllm.embeddings.embedder import Embedder

    # Errors of one file, which do not stop the others; any other error is a fault and is raised.
    reported = (InputError, MissingExtraError)
    with Embedder(encoders, device=device, reported=reported) as embedder:
        results = embedder.embed_in_order(media)
    failed += [result.error for result in results if result.error]
    kept = [result for result in results if not result.error]
    rows = [result.embedding for result in kept]
    return [media[result.key] for result in kept], torch.stack(rows) if rows else torch.empty(0, 0)


def softmax_tables(media: Sequence[Media], cosines: Tensor, *, scale: float) -> list[Table]:
    """Return a table for each ordered pair of modalities: which of the second belongs to each of the first.

    ``scale`` is the factor of the cosines, [N, N], before the softmax.
    """
    # Rows and columns of each modality in the table of all cosines; one candidate needs no softmax.
    places: dict[str, list[int]] = {}
    for place, item in enumerate(media):
        places.setdefault(item.modality, []).append(place)
    return [
        _table(
            f"{first} x {second}: softmax of {scale:g} x cosine",
            [media[place] for place in places[first]],
            [media[place] for place in places[second]],
            (cosines[places[first]][:, places[second]] * scale).softmax(-1),
        )
        for first in places
        for second in places
        if first != second and len(places[second]) > 1
    ]


def _table(
    title: str, rows: Sequence[Media], columns: Sequence[Media], values: Tensor, *, numbers: bool = False
) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title, title_justify="left")
    # Names are texts, not markup: a file may be called "[red]".
    table.add_column("")
    for number, item in enumerate(columns, start=1):
        table.add_column(str(number) if numbers else Text(_short(item)), justify="right")
    for number, (item, line) in enumerate(zip(rows, values.tolist(), strict=True), start=1):
        name = f"{number} {item.modality} {_short(item)}" if numbers else _short(item)
        table.add_row(Text(name), *(f"{value:.3f}" for value in line))
    return table


def _short(media: Media) -> str:
    """Return the end of a path or the start of a text."""
    name = printable(media.name if media.modality == "text" else Path(media.name).name)
    return name if len(name) <= _LONGEST_NAME else f"{name[: _LONGEST_NAME - 3]}..."
