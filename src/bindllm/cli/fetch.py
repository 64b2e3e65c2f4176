"""``bindllm fetch``: get the embedded default."""

from __future__ import annotations

from bindllm.cli.usage import Arguments


def fetch(args: list[str]) -> int:
    """Fetch and verify assets, by name or for a recipe."""
    from bindllm.quickstart import ASSETS, fetch_all

    parser = Arguments(
        "fetch", "Fetch and verify models and pictures; what is there already is left as it is."
    )
    parser.add_argument(
        "wanted",
        nargs="*",
        default=["recipes/quickstart.yaml"],
        help=f"names ({', '.join(ASSETS)}) or recipes; by default %(default)s",
    )
    fetch_all(parser.parse_args(args).wanted)
    return 0
