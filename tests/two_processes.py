"""Two processes of one run, as a launcher would start them: forked, so that nothing is imported twice."""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import lightning_utilities.core.rank_zero as utilities
import pytest
from lightning.fabric.utilities import rank_zero

PATIENCE_SECONDS = 240.0
"""A pair that takes longer hangs."""


def run_pair(work: Callable[[int], int | None], *, count: int = 2) -> list[int]:
    """Run ``work(rank)`` in each of two processes, and return their exit codes (-9: killed).

    What they print goes to ``out0``, ``err0``, ``out1`` and ``err1`` in the current folder.
    """
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    sys.stdout.flush()
    sys.stderr.flush()
    children = {}
    for rank in range(count):
        child = os.fork()
        if not child:
            _child(work, rank, port)
        children[child] = rank
    codes = [0] * count
    deadline = time.monotonic() + PATIENCE_SECONDS
    while children:
        for child in list(children):
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                codes[children.pop(child)] = os.waitstatus_to_exitcode(status)
        if time.monotonic() > deadline:
            for child in children:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
            pytest.fail(f"processes {sorted(children.values())} hang: {told('err', 0)} {told('err', 1)}")
        time.sleep(0.05)
    return codes


def told(stream: str, rank: int) -> str:
    """Return what a process of the latest pair has printed to ``out`` or ``err``."""
    return Path(f"{stream}{rank}").read_text()


def kill_in(owner: object, name: str, at: int) -> None:
    """Let this process die by kill -9 in the given call of a method; one that saves leaves half of its file."""
    original, calls = getattr(owner, name), []

    def counting(*args, **kwargs):
        calls.append(name)
        if len(calls) == at:
            if name == "save":
                original(*args, **kwargs)
                os.truncate(args[1], os.path.getsize(args[1]) // 2)
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)

    setattr(owner, name, counting)


def _child(work: Callable[[int], int | None], rank: int, port: int) -> None:
    os.environ.update(
        {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "NODE_RANK": "0",
            "LOCAL_RANK": str(rank),
            # A machine without a network still has this one.
            "GLOO_SOCKET_IFNAME": "lo",
        }
    )
    rank_zero.rank_zero_only.rank = utilities.rank_zero_only.rank = rank
    for number, name in ((1, f"out{rank}"), (2, f"err{rank}")):
        file = os.open(name, os.O_CREAT | os.O_TRUNC | os.O_WRONLY)
        os.dup2(file, number)
    sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
    code = 1
    try:
        code = work(rank) or 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
