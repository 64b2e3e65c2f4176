"""``bindllm encode``: how alike files and texts are in an encoder's joint space."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bindllm.cli.usage import Arguments, add_allow, read_number
from bindllm.errors import EncoderError, InputError, MissingExtraError, printable

if TYPE_CHECKING:
    from rich.table import Table
    from torch import Tensor

    from bindllm.media import Media

DEFAULT = "checkpoints/imagebind"
SCALE = 100.0
"""By which cosines are multiplied before a softmax: what CLIP and ImageBind have learnt for texts."""
_LONGEST_NAME = 28


def encode(args: list[str]) -> int:
    """Print the table of cosines; exit code 1 when a file could not be read."""
    chosen, options = _read_arguments(args)

    from rich.console import Console

    from bindllm.cli.media import read_media
    from bindllm.cli.usage import UsageError
    from bindllm.encoders import alignment_warnings
    from bindllm.encoders.fusion import common_size
    from bindllm.media import Media

    media: list[Media] = []
    failed: list[str] = []
    for text in chosen.files:
        try:
            media.append(read_media(text))
        except UsageError as error:
            failed.append(str(error))
    media += [Media.text(text) for text in chosen.text]
    device = find_device(chosen.device)
    encoders = _find_encoders(chosen, options)
    common_size(encoders)
    console = Console(highlight=False, soft_wrap=True)
    for warning in alignment_warnings(encoders):
        console.print(f"warning: {warning}", markup=False)
    kept, rows = embed_files(media, encoders, device=device, failed=failed)
    if kept:
        cosines = rows @ rows.T
        # In a pipe there is no screen to fit: every column is printed.
        console.width = max(console.width, 2 * _LONGEST_NAME + (_LONGEST_NAME + 3) * len(kept))
        console.print(similarity_table(kept, cosines))
        if chosen.softmax is not None:
            for table in softmax_tables(kept, cosines, scale=chosen.softmax):
                console.print(table)
    for message in failed:
        print(f"error: {message}", file=sys.stderr)
    return 1 if failed else 0


def _read_arguments(args: list[str]) -> tuple[Any, list[str]]:
    from bindllm.cli.media import RULES

    parser = Arguments(
        "encode",
        "Print the cosine of every pair of files and texts: 1 is the same direction, 0 is nothing in common.",
    )
    parser.epilog = (
        f"What a file is follows from its ending ({RULES}). Say it for all others: depth:room.png, thermal:yard.png, "
        "imu:walk.csv, point:chair.npy, text:a dog. An encoder's own arguments are --encoder.NAME VALUE. "
        'Example: bindllm encode dog.jpg car.jpg bark.wav --text "a dog" --text "a car" --softmax'
    )
    scale = read_number(float, "a number above 0", lambda value: 0 < value < math.inf)
    parser.add_argument(
        "files", nargs="*", metavar="[MODALITY:]FILE", help="pictures, sounds, videos, ... of any kind"
    )
    parser.add_argument(
        "--text", action="append", default=[], metavar="WORDS", help="a text; may be repeated"
    )
    source = parser.add_mutually_exclusive_group()
    source.add_argument(
        "--encoder",
        metavar="CLASS_OR_FOLDER",
        help=f"import path or folder of an encoder (ImageBind in {DEFAULT})",
    )
    source.add_argument("--checkpoint", metavar="FOLDER", help="take the encoders of a folder of bindllm fit")
    add_allow(parser)
    parser.add_argument(
        "--softmax",
        nargs="?",
        type=scale,
        const=SCALE,
        metavar="SCALE",
        help=f"also print, for each pair of modalities, the softmax of SCALE ({SCALE:g}) x cosine along each row",
    )
    parser.add_argument("--device", help="cpu, cuda, ...: by default the accelerator that torch finds")
    chosen, options = parser.parse_known_args(args)
    if any(not option.startswith("--encoder.") for option in options[:1]) or (options and not chosen.encoder):
        parser.error(f"unrecognized arguments: {' '.join(options)}")
    if not (chosen.files or chosen.text):
        parser.error("nothing to encode: give files, or words with --text")
    return chosen, options


def _find_encoders(chosen: Any, options: Sequence[str]) -> list[Any]:
    """Return the encoders that the command line asks for.

    Raises:
        EncoderError: none was asked for, and the default is not there.
        CheckpointError: a folder or class that cannot be used.
    """
    from bindllm.cli.media import build_encoder

    if chosen.encoder:
        return [build_encoder(chosen.encoder, options, allow=chosen.allow)]
    if chosen.checkpoint:
        return checkpoint_encoders(chosen.checkpoint, chosen.allow)
    if not Path(DEFAULT).is_dir():
        raise EncoderError(
            f"no encoder to use: {DEFAULT} is not in {Path.cwd()}. Make it with `bindllm convert`, take those of "
            "a trained folder with --checkpoint FOLDER, or name one: --encoder bindllm.encoders.HuggingFace "
            "--encoder.name FOLDER"
        )
    return [build_encoder("bindllm.encoders.ImageBind", [])]


def checkpoint_encoders(folder: str, allow: Sequence[str]) -> list[Any]:
    """Build the encoders of a folder of ``bindllm fit``.

    Args:
        folder: the checkpoint.
        allow: import paths of encoders outside bindllm that it may name.

    Raises:
        CheckpointError: it is none, or an encoder of it cannot be built or is not the one it was trained with.
    """
    from bindllm.model.checkpoint import read_manifest
    from bindllm.model.pretrained import read_encoders

    return read_encoders(folder, read_manifest(folder), allow=allow)


def find_device(name: str | None) -> str:
    """Return the name of a device that torch can compute on: this one, or by default the accelerator that it finds.

    Raises:
        UsageError: torch cannot compute there.
    """
    import torch

    from bindllm.cli.usage import UsageError
    from bindllm.model.decoder import default_device

    if name is None:
        return str(default_device())
    try:
        torch.zeros(1, device=name)
    # A driver, a build of torch or a word that is no device: each raises something of its own.
    except Exception as error:
        why = str(error).partition("\n")[0]
        raise UsageError(
            f"--device {name}: torch cannot compute there ({why}); leave it out for {default_device()}"
        ) from error
    return name


def embed_files(
    media: Sequence[Media], encoders: Sequence[Any], *, device: str, failed: list[str]
) -> tuple[list[Media], Tensor]:
    """Embed media; the others are embedded if one cannot be read.

    Args:
        media: of any modalities.
        encoders: the first that serves a modality embeds it.
        device: where the encoders run.
        failed: gets a message for each media that cannot be read or embedded, or that no encoder serves.

    Returns:
        the media that were embedded, in their order, and their embeddings, [N, E], unit norm, on the CPU.
    """
    import torch

    from bindllm.embeddings.embedder import Embedder

    reported = (InputError, MissingExtraError)
    with Embedder(encoders, device=device, reported=reported) as embedder:
        results = embedder.embed_in_order(media)
    failed += [result.error for result in results if result.error]
    kept = [result for result in results if not result.error]
    rows = [result.embedding for result in kept]
    return [media[result.key] for result in kept], torch.stack(rows) if rows else torch.empty(0)


def similarity_table(media: Sequence[Media], cosines: Tensor) -> Table:
    """Return all cosines, [N, N], as a table; its columns are numbered like its rows."""
    return _table("cosine", media, media, cosines, numbers=True)


def softmax_tables(media: Sequence[Media], cosines: Tensor, *, scale: float) -> list[Table]:
    """Return a table for each ordered pair of modalities: which of the second belongs to each of the first.

    Args:
        media: N of them.
        cosines: [N, N].
        scale: of the cosines before the softmax.
    """
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
    table.add_column("")
    for number, item in enumerate(columns, start=1):
        table.add_column(str(number) if numbers else Text(_short(item)), justify="right")
    for number, (item, line) in enumerate(zip(rows, values.tolist(), strict=True), start=1):
        name = f"{number} {item.modality} {_short(item)}" if numbers else _short(item)
        table.add_row(Text(name), *(f"{value:.3f}" for value in line))
    return table


def _short(media: Media) -> str:
    """The end of a path or the start of a text, without what a terminal would obey."""
    name = printable(media.name if media.modality == "text" else Path(media.name).name)
    return name if len(name) <= _LONGEST_NAME else f"{name[: _LONGEST_NAME - 3]}..."
