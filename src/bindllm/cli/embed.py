"""``bindllm embed``: precompute embeddings, in one process for each device."""

from __future__ import annotations

from functools import partial

from rich.console import Console

from bindllm.cli.processes import graceful_stop, launch
from bindllm.cli.recipe import RecipeCLI, quiet


def embed(args: list[str]) -> int:
    """Embed the media of all splits of a recipe, and print a report.

    The recipe's trainer specifies devices and nodes. The same command resumes after an interruption, with any number of
    processes.
    """
    with quiet(), graceful_stop():
        cli = RecipeCLI("embed", args)
        data = cli.datamodule
        # Errors of the sources are raised here once, before every process would raise them.
        data.read()
        first = launch(cli.trainer_options, data.embed, again=partial(embed, args))
        if not first:
            return 0
        data.setup()
    Console().print(data.report)
    return 0
