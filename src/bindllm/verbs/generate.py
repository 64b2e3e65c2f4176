"""``bindllm generate``: ask a checkpoint folder about pictures, sounds and whatever else its encoders serve."""

from __future__ import annotations

import math
from typing import Any

from bindllm.verbs.usage import Arguments, read_number

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
    parser = Arguments(
        "generate",
        "Ask a checkpoint folder about pictures, sounds and more, as far as its encoders serve them. Several media are "
        "fused into one.",
    )
    count = read_number(int, "a whole number of at least 1", lambda value: value >= 1)
    above_zero = read_number(
        float, "above 0 (for the most likely answer, leave it out)", lambda value: 0 < value < math.inf
    )
    share = read_number(float, "above 0 and at most 1", lambda value: 0 < value <= 1)
    parser.add_argument("checkpoint", help="folder that bindllm fit wrote")
    parser.add_argument("prompt", nargs="?", default="Describe this image.", help="by default: %(default)s")
    _add_senses(parser)
    parser.add_argument("--max_new_tokens", type=count, default=64, help="longest answer (%(default)s)")
    parser.add_argument(
        "--temperature", type=above_zero, help="sample at this temperature; greedy without it"
    )
    parser.add_argument("--top_p", type=share, help="sample from the most likely tokens that sum to this")
    parser.add_argument("--num_beams", type=count, help="search with this many beams")
    parser.add_argument("--seed", type=int, default=0, help="of sampling (%(default)s)")
    parser.add_argument("--stream", action="store_true", help="print the answer while it is made")
    parser.add_argument(
        "--decoder", metavar="FOLDER", help="where the decoder is, if not where it was in training"
    )
    parser.add_argument(
        "--allow",
        action="append",
        default=[],
        metavar="CLASS",
        help="import path of an encoder outside bindllm",
    )
    chosen = parser.parse_args(args)
    if chosen.stream and (chosen.num_beams or 1) > 1:
        parser.error("--stream cannot show a search with --num_beams, whose answer is known at its end only")

    from lightning.pytorch import seed_everything

    from bindllm.model.bindllm import BindLLM

    options = {
        name: value
        for name in ("max_new_tokens", "temperature", "top_p", "num_beams")
        if (value := vars(chosen)[name]) is not None
    }
    media = _chosen_media(chosen)
    model = BindLLM.from_pretrained(chosen.checkpoint, decoder=chosen.decoder, allow=chosen.allow)
    seed_everything(chosen.seed, verbose=False)
    if chosen.stream:
        for piece in model.stream(chosen.prompt, media, **options):
            print(piece, end="", flush=True)
        print()
    else:
        print(model.generate(chosen.prompt, media, **options))
    return 0


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


def _chosen_media(chosen: Any) -> list[Any]:
    """Return the media of a command line, in the order of the modalities."""
    from bindllm.media import Media
    from bindllm.verbs.media import read_media

    named = [Media(modality, source) for modality in SENSES for source in vars(chosen)[modality]]
    return named + [read_media(text) for text in chosen.media]
