"""``bindllm fit``, ``embed``, ``validate`` and ``test``: the commands that run a recipe.

`launch` starts a process for each device, for work that trains nothing. Lightning's Fabric finds the devices, the
nodes, and the launcher that has started the processes (SLURM, torchrun, a user). Without a launcher,
torch.multiprocessing starts the processes of this machine and ends all of them if one fails.
"""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.fabric import Fabric
from lightning.fabric.plugins.environments import ClusterEnvironment
from lightning.fabric.strategies import DDPStrategy
from lightning.pytorch import Trainer
from rich.console import Console
from torch import distributed, multiprocessing
from torch.multiprocessing import ProcessExitedException, ProcessRaisedException

from bindllm.cli import print_error
from bindllm.cli.recipes.recipe import RecipeCLI, listed, quiet
from bindllm.errors import BindLLMError, InputError, StoreError
from bindllm.imports import find_named_modules
from bindllm.model.checkpoint import MANIFEST
from bindllm.parallel import Processes, RunContext
from bindllm.training.callbacks import ParameterTable, RunLog, RunProgress, SampleCaptions
from bindllm.training.loggers import make_loggers
from bindllm.training.run import Run, lock_output, run_folder
from bindllm.training.state import AtomicCheckpointIO, RunState

REPORT_PACKAGES = ("torchmetrics", "matplotlib")

PATIENCE = timedelta(days=1)
"""How long processes wait for the slowest one; a process that has ended is noticed at once."""

GRACE_SECONDS = 60.0
"""Time in which a process that is asked to stop must have written its results."""

RESUME = "Finished work is stored: run the same command again, with any number of processes"

# Set for the processes that Lightning starts from the first one.
_STARTED_LATER = "BINDLLM_STARTED_LATER"

# Launchers pass the number of processes in these; Lightning reads them only if the recipe asks for that many.
_LAUNCHED_COUNTS = ("WORLD_SIZE", "SLURM_STEP_NUM_TASKS")


def fit(args: list[str]) -> int:
    """Train a model from a recipe, and write a checkpoint folder with its report."""
    console = Console(highlight=False)
    # Said before hours of training; the model itself needs none of them.
    if missing := [name for name in REPORT_PACKAGES if importlib.util.find_spec(name) is None]:
        console.print(
            f"{', '.join(missing)} not installed: the model will be trained and saved, but its report will be "
            "incomplete. For the report: pip install 'bindllm[report]'",
            markup=False,
        )
    with quiet():
        cli = RecipeCLI("fit", args)
        if not cli.model.trainable:
            raise InputError(
                "model.trainable is empty: nothing would be trained; name groups, such as [bind, inject]"
            )
        config = cli.config
        folder = run_folder(config.output, store=config.data.store, init_from=config.model.init_from)
        rehearses = bool(cli.trainer_options.get("fast_dev_run"))
        if rehearses:
            # A rehearsal must not touch the state of a real run.
            folder = folder.with_name(f".{folder.name}.fast_dev_run")
        state = RunState(folder, RunLog(folder), every_seconds=config.save_every_seconds)
        trainer = _trainer(cli, state)
        output = Path(config.output)
        # From here on no second command can rename or continue this run. A rehearsal writes only its own folder.
        with lock_output(folder if rehearses else output):
            run = Run(cli.model, cli.datamodule, trainer, state, output, cli.resolved(), console)
            if rehearses:
                folder.mkdir(parents=True, exist_ok=True)
                return run.rehearse()
            return run.train(resume=config.resume, overwrite=config.overwrite, wait=wait_for_rank_zero)


def embed(args: list[str]) -> int:
    """Embed the media of all splits of a recipe, and print how much was read and embedded.

    The recipe's trainer chooses devices and nodes. A stopped command resumes, with any number of processes.
    """
    with quiet(), graceful_stop():
        cli = RecipeCLI("embed", args)
        data = cli.datamodule
        if data.store is None:
            raise InputError(
                "data.store is null, so no embedding is kept: set data.store to a folder, or run bindllm fit"
            )
        # Problems of the sources are reported once, before there are further processes to report them too.
        data.read()
        # The other processes run this command again, from its start.
        first = launch(cli.trainer_options, data.embed, again=partial(embed, args))
        if not first:
            return 0
        # Only rank 0 reads the store again, to print what all processes have done.
        data.setup()
    Console().print(data.report)
    return 0


def validate(args: list[str]) -> int:
    """Print the loss on the validation split."""
    return _measure("validate", "validation", args)


def test(args: list[str]) -> int:
    """Print the loss on the test split."""
    return _measure("test", "test", args)


def _measure(command: str, split: str, args: list[str]) -> int:
    """Measure the loss of a trained model: the checkpoint that the recipe writes, or one that the command names."""
    with quiet():
        cli = RecipeCLI(command, args)
        module = cli.model
        # The recipe's own init_from names the weights before training, not the trained ones.
        if not any(option.partition("=")[0] == "--model.init_from" for option in args):
            module.init_from = cli.config.output
        if not (Path(module.init_from) / MANIFEST).is_file():
            raise InputError(
                f"{module.init_from} holds no trained model: run bindllm fit first, or name another checkpoint "
                "folder with --model.init_from"
            )
        trainer = cli.make_trainer(
            logger=False, enable_checkpointing=False, enable_progress_bar=sys.stdout.isatty()
        )
        # Through the same loop as the validations of a run, so the losses can be compared.
        run = trainer.validate if command == "validate" else trainer.test
        losses = run(module, cli.datamodule, verbose=False)
    if not losses or not losses[0]:
        raise InputError(
            f"there are no rows to {command} with: no source of the recipe has any rows of split {split}. Name such a "
            f"split in its rows, hold some out (held_out), or add a source with split: {split}"
        )
    for name, loss in losses[0].items() if trainer.is_global_zero else ():
        print(f"{name} {loss:.4f}")
    return 0


def _trainer(cli: RecipeCLI, state: RunState) -> Trainer:
    """Build the recipe's trainer with the callbacks and loggers of every run."""
    options = cli.trainer_options
    captions = SampleCaptions(state.run_log)
    callbacks = [ParameterTable(), captions, state]
    if options.get("enable_progress_bar") is not False:
        # After the captions, which it prints; before the state, which Lightning runs last in any case.
        callbacks.insert(2, RunProgress(captions))
    return cli.make_trainer(
        callbacks=callbacks,
        default_root_dir=state.folder,
        enable_checkpointing=True,
        logger=[state.run_log, *make_loggers(options.get("logger"), state.folder)],
        # A recipe may add plugins, such as a cluster environment, next to ours for states.
        plugins=[*listed(options.get("plugins")), AtomicCheckpointIO()],
    )


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
        # A spawned process would put the working directory first on its path, before the standard library.
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
        print_error(f"error in process {index}", error)
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
    plugins = listed(options.get("plugins"))
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
                f"{count} processes were started ({name}), but the command asks for one device on one node, so each "
                "would do all of the work; set --trainer.devices and --trainer.num_nodes (bindllm generate: --devices)"
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
