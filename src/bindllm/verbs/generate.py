"""``bindllm generate``: ask a checkpoint folder about pictures."""

from __future__ import annotations

from bindllm.verbs.usage import Arguments


def generate(args: list[str]) -> int:
    """Print the answer to one prompt."""
    parser = Arguments(
        "generate", "Ask a checkpoint folder about pictures; several of them are fused into one."
    )
    parser.add_argument("checkpoint", help="folder that bindllm fit wrote")
    parser.add_argument("prompt", nargs="?", default="Describe this image.", help="by default: %(default)s")
    parser.add_argument(
        "--image", action="append", default=[], metavar="FILE", help="a picture; may be repeated"
    )
    parser.add_argument("--max_new_tokens", type=int, default=64, help="longest answer (%(default)s)")
    parser.add_argument("--temperature", type=float, help="sample at this temperature; greedy without it")
    parser.add_argument("--top_p", type=float, help="sample from the most likely tokens that sum to this")
    parser.add_argument("--num_beams", type=int, help="search with this many beams")
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
