"""One process for each device of a recipe, for work that trains nothing.

Lightning's Fabric finds the devices, the nodes, and the launcher that has started the processes (SLURM, torchrun, a
user). Without a launcher, torch.multiprocessing starts the processes of this machine and ends all of them if one fails.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
from lightning.fabric import Fabric
from lightning.fabric.plugins.environments import ClusterEnvironment
from lightning.fabric.strategies import DDPStrategy
from torch import distributed, multiprocessing
from torch.multiprocessing import ProcessExitedException, ProcessRaisedException

from bindllm.errors import BindLLMError, InputError, StoreError, printable_lines
from bindllm.imports import find_named_modules
from bindllm.parallel import Processes, RunContext

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

PATIENCE = timedelta(days=1)
"""How long processes wait for the slowest one; a process that has ended is noticed at once."""

GRACE_SECONDS = 60.0
"""Time in which a process that is asked to stop must have written its results."""

RESUME = "Finished embeddings are stored: run the same command again, with any number of processes"

# Set for the processes that Lightning starts from the first one.
_STARTED_LATER = "BINDLLM_STARTED_LATER"

# Launchers pass the number of processes in these; Lightning reads them only if the recipe asks for that many.
_LAUNCHED_COUNTS = ("WORLD_SIZE", "SLURM_STEP_NUM_TASKS")


def launch(
    options: Mapping[str, Any], work: Callable[[RunContext], Any], *, again: Callable[[], int]
) -> bool:
    """Run ``work`` in one process for each device, on every node.

    Args:
        options: options of the recipe's trainer: accelerator, devices, num_nodes, and a cluster environment among the
            plugins. Its strategy is for training and is ignored.
        work: takes the context of its process. No process may return before all others have finished.
        again: the command, which the processes of this machine run; it calls this function as well, and can be pickled.

    Returns:
        Whether this process is rank 0. False in the process that has only started the others.

    Raises:
        InputError: options that contradict each other, this machine, or the launcher.
        StoreError: a process has ended before its work was done.
    """
    # How to read this: one device, or a launcher that has started every process, works right here. Otherwise this
    # process starts one for each device of this machine, and each runs the command again and gets here by itself.
    fabric = _fabric(options)
    strategy = fabric.strategy
    if not isinstance(strategy, DDPStrategy) or strategy.cluster_environment.creates_processes_externally:
        return _connect(fabric, work)
    # The port is chosen here once: processes that choose for themselves would not meet.
    environment = strategy.cluster_environment
    variables = {
        "MASTER_ADDR": environment.main_address,
        "MASTER_PORT": str(environment.main_port),
        "NODE_RANK": str(environment.node_rank()),
        # A spawned process would put the working directory first on its path, ahead of the standard library.
        "PYTHONSAFEPATH": "1",
    }
    try:
        with _environment(variables):
            started = multiprocessing.spawn(_run_again, (again,), nprocs=strategy.num_processes, join=False)
        # Torch asks all processes to stop if one of them fails.
        # join() returns False when one process has ended and others still run.
        while not started.join():
            pass
    except (ProcessRaisedException, ProcessExitedException) as error:
        raise StoreError(f"{error}. {RESUME}") from error
    except KeyboardInterrupt:
        # SIGTERM lets each write its results (`graceful_stop`); one that does not end is killed.
        processes = multiprocessing.active_children()
        for process in processes:
            process.terminate()
        for process in processes:
            process.join(GRACE_SECONDS)
            process.kill()
        raise
    return False


def _run_again(index: int, again: Callable[[], int]) -> None:
    """Run the command in one of the processes of this machine; its exit code is that of the process."""
    # With a local rank Lightning takes this process for one that a launcher has started.
    os.environ["LOCAL_RANK"] = str(index)
    # The spawned interpreter has not run `main`, which does this for the command.
    find_named_modules()
    try:
        code = again()
    except Exception as error:
        if not isinstance(error, BindLLMError | OSError):
            traceback.print_exc()
        lines = [f"error in process {index}: {error}", *getattr(error, "__notes__", ())]
        print(printable_lines("\n".join(lines)), file=sys.stderr)
        code = 1
    sys.exit(code)


def wait_for_rank_zero(trainer: Trainer) -> None:
    """Wait for rank 0 if a launcher has started all processes.

    If Lightning starts the other processes, it does so later, when rank 0 has made the run's folder ready.
    """
    if trainer.world_size == 1 or os.environ.get(_STARTED_LATER):
        return
    # A launcher: all processes are at this line, and can meet.
    if trainer.strategy.cluster_environment.creates_processes_externally:
        trainer.strategy.setup_environment()
        trainer.strategy.barrier()
    else:
        os.environ[_STARTED_LATER] = "1"


@contextmanager
def graceful_stop() -> Iterator[None]:
    """Treat SIGTERM like Ctrl-C, and ignore further SIGTERMs while the first one is handled."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    # Restored at the end, whatever it was: the caller may be a test or a notebook.
    interrupt = signal.getsignal(signal.SIGINT)

    # The second Ctrl-C has its usual effect, so a user can still end a process that hangs while it stops.
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
        # First alone, to find how many devices there are; a strategy is needed only for several.
        fabric = Fabric(**chosen)
        if fabric.world_size > 1:
            fabric = Fabric(**chosen, strategy="ddp")
    except (RuntimeError, ValueError, ImportError, TypeError) as error:
        raise InputError(f"trainer: {error}") from error
    # Without this check each of the launched processes would embed every file.
    for name in _LAUNCHED_COUNTS:
        count = os.environ.get(name, "1")
        if fabric.world_size == 1 and count.isdecimal() and int(count) > 1:
            raise InputError(
                f"{count} processes were started ({name}), but the recipe asks for one device on one node, so each "
                f"would do all of the work; set --trainer.devices and --trainer.num_nodes"
            )
    return fabric


def _connect(fabric: Fabric, work: Callable[[RunContext], Any]) -> bool:
    """Connect the processes, run the work of this one, and return whether it is rank 0."""
    alone = fabric.world_size == 1
    connected = False

    def part(fabric: Fabric) -> None:
        # Tells errors of connecting, which the user can repair, from errors of the work.
        nonlocal connected
        gather = {} if alone else {"gather": _Gather(fabric.world_size)}
        connected = True
        # The processes of a machine share its cores.
        threads = max(1, (os.cpu_count() or 1) // (1 if alone else fabric.strategy.num_processes))
        processes = Processes(fabric.global_rank, fabric.world_size, threads=threads, **gather)
        progress = processes.is_first and sys.stderr.isatty()
        work(RunContext(processes, fabric.device, progress=progress))

    try:
        fabric.launch(part)
    except (ValueError, RuntimeError) as error:
        if connected:
            raise
        # Before the work has begun: the launcher and the recipe disagree, or the processes cannot reach each other.
        raise InputError(f"trainer: the processes cannot work together ({error})") from error
    finally:
        # A process that waits for this one then fails at once.
        if distributed.is_available() and distributed.is_initialized():
            distributed.destroy_process_group()
    return fabric.global_rank == 0


class _Gather:
    """Returns the values of all processes, through CPU memory whatever the devices are."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._group = distributed.new_group(backend="gloo", timeout=PATIENCE)

    def __call__(self, value: Any) -> list[Any]:
        """Wait for every process.

        Raises:
            StoreError: one of them has ended.
        """
        # JSON: torch's own gather of objects would unpickle bytes from the network.
        content = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        try:
            # A collective call needs equal shapes: lengths first, then all contents at the longest length.
            sizes = torch.cat(self._all(torch.tensor([len(content)]))).tolist()
            padded = torch.nn.functional.pad(content, (0, max(sizes) - len(content)))
            pieces = self._all(padded)
        except RuntimeError as error:
            raise StoreError(f"another process of this run has ended. {RESUME}") from error
        return [json.loads(piece[:size].numpy().tobytes()) for piece, size in zip(pieces, sizes, strict=True)]

    def _all(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        received = [torch.empty_like(tensor) for _ in range(self._count)]
        distributed.all_gather(received, tensor, group=self._group)
        return received


@contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables inside the block."""
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
