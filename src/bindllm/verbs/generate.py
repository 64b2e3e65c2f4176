"""``bindllm generate``: ask a checkpoint folder about pictures."""

from __future__ import annotations

import math

from bindllm.verbs.usage import Arguments, read_number


def generate(args: list[str]) -> int:
    """Print the answer to one prompt."""
    parser = Arguments(
        "generate", "Ask a checkpoint folder about pictures; several of them are fused into one."
    )
    count = read_number(int, "a whole number of at least 1", lambda value: value >= 1)
    above_zero = read_number(
        float, "above 0 (for the most likely answer, leave it out)", lambda value: 0 < value < math.inf
    )
    share = read_number(float, "above 0 and at most 1", lambda value: 0 < value <= 1)
    parser.add_argument("checkpoint", help="folder that bindllm fit wrote")
    parser.add_argument("prompt", nargs="?", default="Describe this image.", help="by default: %(default)s")
    parser.add_argument(
        "--image", action="append", default=[], metavar="FILE", help="a picture; may be repeated"
    )
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

    from bindllm.media import Media
    from bindllm.model.bindllm import BindLLM

    options = {
        name: value
        for name in ("max_new_tokens", "temperature", "top_p", "num_beams")
        if (value := vars(chosen)[name]) is not None
    }
    media = [Media.image(file) for file in chosen.image]
    model = BindLLM.from_pretrained(chosen.checkpoint, decoder=chosen.decoder, allow=chosen.allow)
    seed_everything(chosen.seed, verbose=False)
    if chosen.stream:
        for piece in model.stream(chosen.prompt, media, **options):
            print(piece, end="", flush=True)
        print()
    else:
        print(model.generate(chosen.prompt, media, **options))
    return 0
