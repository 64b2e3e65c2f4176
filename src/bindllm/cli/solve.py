"""``bindllm solve``: answer a question in several steps, with tools that look at media (docs/solve.md)."""

from __future__ import annotations

import atexit
import os
import sys
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import Any

from bindllm.cli.generate import MediaOptions, ModelOptions
from bindllm.embeddings.datastore import Datastore
from bindllm.errors import InputError, UsageError, printable_lines
from bindllm.reasoning.endpoint import Endpoint
from bindllm.reasoning.eyes import model_tools
from bindllm.reasoning.mcp import McpTools
from bindllm.reasoning.measure import MEDIA_TOOLS
from bindllm.reasoning.schedule import has_running_work
from bindllm.reasoning.solver import Budget, Solver
from bindllm.reasoning.trace import Event, Trace, check_ending, event_lines

_KEY = "BINDLLM_BRAIN_KEY"


@dataclass(frozen=True)
class BrainOptions:
    """Brain and tools."""

    brain: str | None = None
    """address of an OpenAI-compatible API that plans, such as http://localhost:8000/v1 (default: the checkpoint); the
    environment variable BINDLLM_BRAIN_KEY holds its API key. It gets texts, never media"""
    brain_model: str | None = None
    """name of the model at this address"""
    retrieve_from: str | None = None
    """folder of a datastore, for the tool that retrieves similar media"""
    mcp: tuple[str, ...] = ()
    """address or command line of an MCP server, whose tools are added; may be repeated"""


def solve(
    checkpoint: str,
    question: str | None = None,
    *,
    trace: tuple[str, ...] = (),
    media: MediaOptions = MediaOptions(),
    brain: BrainOptions = BrainOptions(),
    budget_: Budget = Budget(),
    model: ModelOptions = ModelOptions(),
    overrides: Sequence[str] = (),
) -> int:
    """Answer a question in several steps: plan calls of tools, run them, decide.

    The steps are printed to stderr, the answer to stdout. Without an answer
    the exit code is 1, and the last line says why.

    Args:
        checkpoint: folder that bindllm fit wrote; or the FILE.jsonl of a trace, to show it again without a model
        question: may name the media by their handles: image1, image2, audio1, ...
        trace: file for the trace, .html, .jsonl or .txt; may be repeated

    Example:
        bindllm solve checkpoints/openmoji "What is the difference?" --image a.png --image b.png --trace trace.html
    """
    try:
        for file in trace:
            check_ending(file)
    except InputError as error:
        raise UsageError(f"--trace {error}") from error
    if checkpoint.endswith(".jsonl"):
        if question is not None or media.read():
            raise UsageError(f"{checkpoint} is a trace, which has its own question and media: give none")
        found = Trace.read(checkpoint)
        print(printable_lines("\n".join(found.lines())))
        _save(found, trace)
        return 0
    if question is None:
        raise UsageError("give a question after the checkpoint")
    if (brain.brain is None) != (brain.brain_model is None):
        raise UsageError(
            "--brain and --brain_model belong together: the address, and the name of a model there"
        )
    with ExitStack() as servers:
        solver = _build(checkpoint, brain, budget_, model, overrides, servers)
        solution = solver.run(question, media.read())
    _save(solution.trace, trace)
    code = 0
    if solution.answer is None:
        # The listener has printed the failure.
        code = 1
    else:
        print(printable_lines(solution.answer))
    if has_running_work():
        atexit.register(_leave, code)
    return code


def _leave(code: int) -> None:
    """End the process if work that was given up still runs: inside of torch, Python's own end would abort it."""
    if has_running_work():
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError):
                stream.flush()
        os._exit(code)


def _build(
    checkpoint: str,
    options: BrainOptions,
    budget: Budget,
    model: ModelOptions,
    overrides: Sequence[str],
    servers: ExitStack,
) -> Solver:
    """Return the solver; connections to MCP servers close with ``servers``."""
    # Everything that may fail at once comes before the model, whose loading takes long.
    tools = [*MEDIA_TOOLS]
    store = None if options.retrieve_from is None else Datastore.open(options.retrieve_from)
    planner: Any = None
    if options.brain is not None:
        planner = Endpoint(options.brain, str(options.brain_model), key=os.environ.get(_KEY))
    for server in options.mcp:
        tools += servers.enter_context(McpTools(server)).tools
    eyes = model.load(checkpoint, overrides, cache=None)
    tools = [*model_tools(eyes, datastore=store), *tools]
    return Solver(eyes if planner is None else planner, tools, budget=budget, listener=_print_event)


def _print_event(event: Event) -> None:
    """Print a step while it happens; the answer itself goes to stdout."""
    if event["kind"] != "answer":
        for line in event_lines(event):
            print(printable_lines(line), file=sys.stderr, flush=True)


def _save(trace: Trace, files: Sequence[str]) -> None:
    for file in files:
        trace.save(file)
        print(f"trace: {file}", file=sys.stderr)
