"""Figures of a benchmark run: timed as ratios inside one run, since machines differ and are noisy."""

from __future__ import annotations

import gc
import json
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

RESULTS = Path(__file__).parent / "results"


@dataclass
class Figure:
    """One figure; ``floor`` is what physics or the yardstick allows, in the same unit, with its reason in ``note``."""

    name: str
    value: float
    unit: str
    floor: float | None
    note: str


def seconds(run: Callable[[], object]) -> float:
    """Wall time of one call, with the accelerator's queue emptied before and after."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def paired(
    first: Callable[[], object], second: Callable[[], object], *, repeats: int
) -> tuple[float, float, float]:
    """Time two things in turn, A B A B ..., after one uncounted run of each.

    Returns:
        median of the ratios A / B pair by pair, and the median seconds of A and of B.
    """
    first(), second()
    a, b = [], []
    for n in range(repeats):
        # The order alternates, so that a drift of the machine's speed does not favour one side.
        for times, run in ((a, first), (b, second)) if n % 2 else ((b, second), (a, first)):
            times.append(seconds(run))
    ratios = [x / y for x, y in zip(a, b, strict=True)]
    return statistics.median(ratios), statistics.median(a), statistics.median(b)


def run_bindllm(*arguments: str) -> None:
    """Run a command line of bindllm in a process of its own, so that no memory is kept from run to run.

    Raises:
        SystemExit: the command failed; it has said why.
    """
    program = "import sys; from bindllm.cli import main; sys.exit(main())"
    if code := subprocess.run([sys.executable, "-c", program, *arguments]).returncode:
        raise SystemExit(code)


def matrix_rate(rows: int, inner: int, columns: int, dtype: torch.dtype, device: str) -> float:
    """Measured multiply-add rate of one matrix shape, in FLOP per second (best of seven)."""
    left, right = (torch.randn(n, inner, device=device).to(dtype) for n in (rows, columns))
    work = 2 * rows * inner * columns
    repeats = max(3, int(2e9 / work))

    def run() -> None:
        for _ in range(repeats):
            torch.nn.functional.linear(left, right)

    run()
    return work * repeats / min(seconds(run) for _ in range(7))


def forget_peak() -> None:
    """Start measuring the peak anew: loading a model takes more memory than running it."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    else:
        # Linux lets a process reset its own high-water mark; elsewhere this file does not exist, and it raises.
        Path("/proc/self/clear_refs").write_text("5")


def peak_bytes() -> int:
    """Peak memory since `forget_peak`: of the GPU's allocator, or of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) * 1024


def used_bytes() -> int:
    """Memory in use now: of the GPU's allocator, or of this process."""
    # Not above: every process that measures something would import it all.
    from bindllm.training.memory import resident_bytes

    return torch.cuda.memory_allocated() if torch.cuda.is_available() else resident_bytes()


def machine_kind() -> str:
    """Return a file name for this kind of machine: accelerator, or processor and cores."""
    if torch.cuda.is_available():
        name = torch.cuda.get_device_name()
    else:
        cpu = str(torch.cpu.get_capabilities().get("cpu_name", platform.machine()))
        name = f"{cpu} {torch.get_num_threads()} cores"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def write_figures(figures: list[Figure]) -> Path:
    """Merge figures into the results of this machine kind, by name, and return the file."""
    file = RESULTS / f"{machine_kind()}.json"
    kept = {row["name"]: row for row in json.loads(file.read_text())} if file.exists() else {}
    kept |= {figure.name: asdict(figure) for figure in figures}
    RESULTS.mkdir(exist_ok=True)
    file.write_text(json.dumps(list(kept.values()), indent=1) + "\n")
    return file
