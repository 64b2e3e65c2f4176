"""``bindllm generate``: ask a checkpoint folder about pictures, sounds and whatever else its encoders serve."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from bindllm.cli.usage import Arguments, UsageError, add_allow, read_number

SENSES = {
    "image": ("FILE", "a picture"),
    "video": ("FILE", "a video"),
    "audio": ("FILE", "a sound, or a video for its sound"),
    "text": ("WORDS", "a text that the encoder sees, as it sees a picture; the decoder never reads it"),
    "point": ("FILE", "a point cloud or a mesh"),
    "depth": ("FILE", "a depth map"),
    "thermal": ("FILE", "a thermal image"),
    "imu": ("FILE", "the signal of an inertial measurement unit"),
}
"""The options of each modality: what stands behind them, and what it is."""


def generate(args: list[str]) -> int:
    """Print the answer to one prompt."""
    chosen, encoder_options = _read_arguments(args)

    from lightning.pytorch import seed_everything

    from bindllm.cli.media import build_encoder
    from bindllm.model.bindllm import BindLLM

    options = {
        name: value
        for name in ("max_new_tokens", "temperature", "top_p", "num_beams")
        if (value := vars(chosen)[name]) is not None
    }
    media = _chosen_media(chosen)
    model = BindLLM.from_pretrained(
        chosen.checkpoint,
        decoder=chosen.decoder,
        allow=chosen.allow,
        encoders=[build_encoder(text, encoder_options, allow=chosen.allow) for text in chosen.encoder],
        cache=False if chosen.no_cache else chosen.cache,
        quantize=False if chosen.quantize == "none" else chosen.quantize,
    )
    _set_cache(model, chosen)
    seed_everything(chosen.seed, verbose=False)
    if chosen.stream:
        for piece in model.stream(chosen.prompt, media, **options):
            print(piece, end="", flush=True)
        print()
    else:
        print(model.generate(chosen.prompt, media, **options))
    if chosen.show_neighbours:
        from bindllm.cli.neighbours import print_neighbours

        print_neighbours(model, media)
    return 0


def _read_arguments(args: list[str]) -> tuple[Any, list[str]]:
    """Return what was chosen, and the words that belong to a further encoder."""
    parser = Arguments(
        "generate",
        "Ask a checkpoint folder about pictures, sounds and more, as far as its encoders serve them. Several media are "
        "fused into one.",
    )
    parser.add_argument("checkpoint", help="folder that bindllm fit wrote")
    parser.add_argument("prompt", nargs="?", default="Describe this image.", help="by default: %(default)s")
    _add_senses(parser)
    _add_decoding(parser)
    parser.add_argument(
        "--decoder", metavar="FOLDER", help="where the decoder is, if not where it was in training"
    )
    parser.add_argument(
        "--quantize",
        choices=("nf4", "int8", "none"),
        help="hold the decoder in 4 or 8 bits, or in full; by default as in training",
    )
    add_allow(parser)
    _add_cache(parser)
    chosen, encoder_options = parser.parse_known_args(args)
    if any(not option.startswith("--encoder.") for option in encoder_options[:1]):
        parser.error(f"unrecognized arguments: {' '.join(encoder_options)}")
    if encoder_options and len(chosen.encoder) != 1:
        parser.error(f"{encoder_options[0]} needs exactly one --encoder, to which it belongs")
    if chosen.stream and (chosen.num_beams or 1) > 1:
        parser.error("--stream cannot show a search with --num_beams, whose answer is known at its end only")
    return chosen, encoder_options


def _add_decoding(parser: Arguments) -> None:
    """Add how the answer is found."""
    count = read_number(int, "a whole number of at least 1", lambda value: value >= 1)
    above_zero = read_number(
        float, "above 0 (for the most likely answer, leave it out)", lambda value: 0 < value < math.inf
    )
    share = read_number(float, "above 0 and at most 1", lambda value: 0 < value <= 1)
    parser.add_argument("--max_new_tokens", type=count, default=64, help="longest answer (%(default)s)")
    parser.add_argument(
        "--temperature", type=above_zero, help="sample at this temperature; greedy without it"
    )
    parser.add_argument("--top_p", type=share, help="sample from the most likely tokens that sum to this")
    parser.add_argument("--num_beams", type=count, help="search with this many beams")
    parser.add_argument("--seed", type=int, default=0, help="of sampling (%(default)s)")
    parser.add_argument("--stream", action="store_true", help="print the answer while it is made")


def _add_senses(parser: Arguments) -> None:
    """Add an option for each modality, all of which may be repeated."""
    group = parser.add_argument_group("media (each may be repeated)")
    for modality, (metavar, purpose) in SENSES.items():
        group.add_argument(f"--{modality}", action="append", default=[], metavar=metavar, help=purpose)
    group.add_argument(
        "--media",
        action="append",
        default=[],
        metavar="MODALITY:FILE",
        help="media of any other modality that an encoder of the checkpoint serves, such as radar:sweep.npy",
    )


def _add_cache(parser: Arguments) -> None:
    """Add what concerns other senses than pictures: further encoders and the visual cache."""
    count = read_number(int, "a whole number of at least 1", lambda value: value >= 1)
    share = read_number(float, "from 0 to 1", lambda value: 0 <= value <= 1)
    group = parser.add_argument_group("other senses than pictures (docs/cache.md)")
    group.add_argument(
        "--encoder",
        action="append",
        default=[],
        metavar="CLASS_OR_FOLDER",
        help="a further encoder, for a modality that those of the checkpoint do not serve; may be repeated. "
        "--encoder.NAME VALUE are arguments of its constructor",
    )
    cache = group.add_mutually_exclusive_group()
    cache.add_argument(
        "--cache",
        metavar="FOLDER",
        help="mix in the nearest pictures of this visual cache (or Milvus address), instead of the checkpoint's own",
    )
    cache.add_argument("--no_cache", action="store_true", help="mix nothing in")
    group.add_argument("--cache_weight", type=share, help="share of the pictures that are mixed in")
    group.add_argument("--cache_top_k", type=count, help="number of pictures that are mixed in")
    group.add_argument(
        "--show_neighbours", action="store_true", help="print which pictures were mixed in, after the answer"
    )


def _set_cache(model: Any, chosen: Any) -> None:
    """Change how the model's cache is mixed in, as far as the command line says so.

    Raises:
        UsageError: there is none.
    """
    settings = {"weight": chosen.cache_weight, "top_k": chosen.cache_top_k}
    asked = {name: value for name, value in settings.items() if value is not None}
    if model.cache is None and (asked or chosen.show_neighbours):
        option = f"--cache_{next(iter(asked))}" if asked else "--show_neighbours"
        raise UsageError(
            f"{option} needs a visual cache, and {chosen.checkpoint} names none: give --cache FOLDER"
        )
    if asked:
        model.cache.settings = replace(model.cache.settings, **asked)


def _chosen_media(chosen: Any) -> list[Any]:
    """Return the media of a command line, in the order of the modalities."""
    from bindllm.cli.media import read_media
    from bindllm.media import Media

    named = [Media(modality, source) for modality in SENSES for source in vars(chosen)[modality]]
    return named + [read_media(text) for text in chosen.media]
