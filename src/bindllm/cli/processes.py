"""One process for each device of a recipe, for work that trains nothing.

Lightning's Fabric finds the devices, the nodes, and what has started the processes (SLURM, torchrun, a user by hand).
Where nothing has, those of this machine are started here, in the way that Lightning knows as started by hand: its own
launcher ends all processes by SIGKILL as soon as one of them fails, and so loses what they have not written yet.
"""

from __future__ import annotations

import json
import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
from lightning.fabric import Fabric
from lightning.fabric.plugins.environments import ClusterEnvironment
from lightning.fabric.strategies import DDPStrategy
from torch import distributed

from bindllm.errors import BindLLMError, InputError, StoreError
from bindllm.imports import find_named_modules
from bindllm.parallel import Processes, RunContext

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

PATIENCE = timedelta(days=1)
"""Processes wait this long for the slowest one. One that has ended is noticed at once; this is for one that hangs."""

GRACE_SECONDS = 60.0
"""Time in which a process that is told to stop must have written what it holds."""

NOTICE_SECONDS = 10.0
"""Time from which on nobody waits to hear how another process has ended."""

STOPPED = 130
"""Exit code of a process that was asked to stop."""

GO_ON = "What is embedded is stored: run the same command again, with any number of processes, and it goes on"

# Set for the processes that Lightning starts from the first one.
_STARTED_LATER = "BINDLLM_STARTED_LATER"

# How launchers tell a process how many there are; Lightning heeds them only where the recipe asks for so many.
_TOLD_COUNT = ("WORLD_SIZE", "SLURM_STEP_NUM_TASKS")


class ProcessEnded(StoreError):
    """Another process of this run has ended before its work was done."""


def launch(
    options: Mapping[str, Any],
    work: Callable[[RunContext], Any],
    *,
    again: Callable[[], int],
) -> bool:
    """Run ``work`` in one process for each device, on every node.

    Args:
        options: of the recipe's trainer: accelerator, devices, num_nodes, and a cluster environment among the
            plugins. Its strategy says how to train, and is not looked at.
        work: takes the device of its process, and which one of all it is; any process may end only where all others do.
        again: what further processes on this machine run; it comes to this function as well, and can be pickled.

    Returns:
        Whether this process is the first of all.

    Raises:
        InputError: options that contradict each other, this machine, or what has started the processes.
        ProcessEnded: another process has ended before its work was done.
    """
    fabric = _fabric(options)
    if (
        not isinstance(fabric.strategy, DDPStrategy)
        or fabric.strategy.cluster_environment.creates_processes_externally
    ):
        return _launch(fabric, work)
    environment = fabric.strategy.cluster_environment
    by_hand = {
        "MASTER_ADDR": environment.main_address,
        "MASTER_PORT": str(environment.main_port),
        "NODE_RANK": str(environment.node_rank()),
        "LOCAL_RANK": "0",
        # A spawned process would put the working directory first on its path, ahead of the standard library.
        "PYTHONSAFEPATH": "1",
    }
    with _environment(by_hand), _Others(fabric.strategy.num_processes - 1, again):
        return _launch(fabric, work)


def wait_for_rank_zero(trainer: Trainer) -> None:
    """Wait for the first process of a run, where all of them were started from outside.

    Further processes that Lightning itself starts come later, when the first one has done what they rely on.
    """
    if trainer.world_size == 1 or os.environ.get(_STARTED_LATER):
        return
    if trainer.strategy.cluster_environment.creates_processes_externally:
        trainer.strategy.setup_environment()
        trainer.strategy.barrier()
    else:
        os.environ[_STARTED_LATER] = "1"


@contextmanager
def graceful_stop() -> Iterator[None]:
    """Treat the system's request to end like a Ctrl-C, and let neither disturb what the first one has begun."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    interrupt = signal.getsignal(signal.SIGINT)

    def stop(number: int, frame: Any) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signal.signal(signal.SIGINT, interrupt)
        raise KeyboardInterrupt

    terminate = signal.signal(signal.SIGTERM, stop)
    if interrupt is signal.default_int_handler:
        signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, interrupt)
        signal.signal(signal.SIGTERM, terminate or signal.SIG_DFL)


def _fabric(options: Mapping[str, Any]) -> Fabric:
    """Find devices, nodes and launcher as the recipe's trainer would."""
    plugins = options.get("plugins") or []
    plugins = plugins if isinstance(plugins, list) else [plugins]
    chosen = {name: options[name] for name in ("accelerator", "devices", "num_nodes") if options.get(name)}
    chosen["plugins"] = [plugin for plugin in plugins if isinstance(plugin, ClusterEnvironment)]
    try:
        fabric = Fabric(**chosen)
        if fabric.world_size > 1:
            fabric = Fabric(**chosen, strategy="ddp")
    except (RuntimeError, ValueError, ImportError, TypeError) as error:
        raise InputError(f"trainer: {error}") from error
    for name in _TOLD_COUNT:
        told = os.environ.get(name, "1")
        if fabric.world_size == 1 and told.isdecimal() and int(told) > 1:
            raise InputError(
                f"{told} processes were started ({name}), but the recipe asks for one device on one node, so each "
                f"would do all of the work; add --trainer.devices and --trainer.num_nodes to say what they are"
            )
    return fabric


def _launch(fabric: Fabric, work: Callable[[RunContext], Any]) -> bool:
    """Connect the processes, and do this one's part."""
    alone = fabric.world_size == 1
    connected = False

    def part(fabric: Fabric) -> None:
        nonlocal connected
        gather = {} if alone else {"gather": _Gather(fabric.world_size)}
        connected = True
        threads = max(1, (os.cpu_count() or 1) // (1 if alone else fabric.strategy.num_processes))
        processes = Processes(fabric.global_rank, fabric.world_size, threads=threads, **gather)
        progress = processes.is_first and sys.stderr.isatty()
        work(RunContext(processes, fabric.device, progress=progress))

    try:
        fabric.launch(part)
    except (ValueError, RuntimeError) as error:
        if connected:
            raise
        # What has started the processes and what the recipe asks for differ, or they do not reach each other.
        raise InputError(f"trainer: the processes cannot work together ({error})") from error
    finally:
        # A process that waits for this one must learn at once that it is gone.
        if distributed.is_available() and distributed.is_initialized():
            distributed.destroy_process_group()
    return fabric.global_rank == 0


class _Gather:
    """Returns the values of all processes, over the network of the processors whatever the devices are."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._group = distributed.new_group(backend="gloo", timeout=PATIENCE)

    def __call__(self, value: Any) -> list[Any]:
        """Wait for every process.

        Raises:
            ProcessEnded: one of them is gone.
        """
        # As JSON: torch's own way for objects would unpickle what comes from the network.
        content = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        try:
            sizes = torch.cat(self._all(torch.tensor([len(content)]))).tolist()
            padded = torch.nn.functional.pad(content, (0, max(sizes) - len(content)))
            pieces = self._all(padded)
        except RuntimeError as error:
            raise ProcessEnded(f"another process of this run has ended. {GO_ON}") from error
        return [json.loads(piece[:size].numpy().tobytes()) for piece, size in zip(pieces, sizes, strict=True)]

    def _all(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        received = [torch.empty_like(tensor) for _ in range(self._count)]
        distributed.all_gather(received, tensor, group=self._group)
        return received


class _Others:
    """The further processes of this machine: started with the block, ended with it, and watched meanwhile."""

    def __init__(self, count: int, again: Callable[[], int]) -> None:
        context = multiprocessing.get_context("spawn")
        self._processes = [
            context.Process(
                target=_further_process, args=(number, again), name=f"process {number + 1} of {count + 1}"
            )
            for number in range(1, count + 1)
        ]
        self._ending = threading.Event()
        self._watcher = threading.Thread(target=self._watch, daemon=True)
        self._noticed, self._lost = threading.Event(), ""

    def __enter__(self) -> None:
        for process in self._processes:
            process.start()
        self._watcher.start()

    def __exit__(self, kind: type | None, error: BaseException | None, trace: Any) -> None:
        self._ending.set()
        if isinstance(error, ProcessEnded):
            # Its connections close before it leaves its exit code.
            self._noticed.wait(NOTICE_SECONDS)
        lost = self._lost
        if kind is not None:
            for process in self._processes:
                process.terminate()
        self._watcher.join(GRACE_SECONDS)
        for process in self._processes:
            process.kill()
        if lost and (kind is KeyboardInterrupt or isinstance(error, ProcessEnded)):
            raise ProcessEnded(lost) from error

    def _watch(self) -> None:
        """Stop this process when another one fails (in a thread)."""
        left = {process.sentinel: process for process in self._processes}
        while left:
            for sentinel in multiprocessing.connection.wait(list(left)):
                process = left.pop(sentinel)
                process.join()
                if not process.exitcode or self._noticed.is_set():
                    continue
                # One that was asked to stop has nothing to explain.
                if process.exitcode != STOPPED:
                    self._lost = (
                        f"{process.name} on this machine has ended (exit code {process.exitcode}). {GO_ON}"
                    )
                self._noticed.set()
                if not self._ending.is_set():
                    _stop_this_process(self._lost or f"{process.name} was stopped", unless=self._ending)


def _further_process(number: int, again: Callable[[], int]) -> None:
    """Do the part of one more process on this machine; leave with its exit code."""
    os.environ["LOCAL_RANK"] = str(number)
    find_named_modules()
    threading.Thread(target=_watch_parent, daemon=True).start()
    try:
        code = again()
    except (BindLLMError, OSError) as error:
        print(f"error in process {number + 1}: {error}", file=sys.stderr)
        code = 1
    except KeyboardInterrupt:
        code = STOPPED
    sys.exit(code)


def _watch_parent() -> None:
    """Stop this process when the one that has started it is gone (in a thread)."""
    multiprocessing.connection.wait([multiprocessing.parent_process().sentinel])
    _stop_this_process("the first process on this machine has ended", unless=threading.Event())


def _stop_this_process(reason: str, *, unless: threading.Event) -> None:
    """Ask the main thread to stop; one that waits for others inside a library does not hear it, and holds nothing."""
    os.kill(os.getpid(), signal.SIGTERM)
    if not unless.wait(GRACE_SECONDS):
        print(f"error: {reason}", file=sys.stderr, flush=True)
        os._exit(1)


@contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Set variables of the environment for the length of the block."""
    earlier = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in earlier.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
