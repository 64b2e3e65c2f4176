"""``bindllm embed``: fill the embedding store."""

from __future__ import annotations

from rich.console import Console

from bindllm.verbs.recipe import RecipeCLI, quiet


def embed(args: list[str]) -> int:
    """Embed the media of all splits of a recipe, and print what was read and embedded."""
    with quiet():
        data = RecipeCLI("embed", args).datamodule
        data.setup()
    Console().print(data.report)
    return 0
