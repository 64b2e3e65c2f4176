"""``bindllm embed``: fill the embedding store, in one process for each device."""

from __future__ import annotations

from functools import partial

from rich.console import Console

from bindllm.cli.processes import graceful_stop, launch
from bindllm.cli.recipe import RecipeCLI, quiet


def embed(args: list[str]) -> int:
    """Embed the media of all splits of a recipe, and print what was read and embedded.

    The recipe's trainer says on which devices and nodes. Stopped or killed, the same command goes on, with any
    number of processes.
    """
    with quiet(), graceful_stop():
        cli = RecipeCLI("embed", args)
        data = cli.datamodule
        # What is wrong with the sources is said once, before there are further processes to say it too.
        data.read()
        first = launch(cli.trainer_options, data.embed, again=partial(embed, args))
        if not first:
            return 0
        data.setup()
    Console().print(data.report)
    return 0
