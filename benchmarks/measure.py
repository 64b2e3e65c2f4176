"""Metrics of a benchmark run. Times are compared as ratios within one run, because machines differ and are noisy."""

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
class Metric:
    """One metric; ``floor`` is the limit set by hardware or the reference, in the same unit, explained in ``note``."""

    name: str
    value: float
    unit: str
    floor: float | None
    note: str


def seconds(run: Callable[[], object]) -> float:
    """Return the wall time of one call; the accelerator is synchronized before and after."""
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
    """Time two functions in turn, A B B A ..., after one uncounted run of each.

    Returns:
        median of the ratios A / B pair by pair, and the median seconds of A and of B.
    """
    first(), second()
    a, b = [], []
    for n in range(repeats):
        # The order alternates, so that a drift of the machine's speed does not favor one side.
        for times, run in ((a, first), (b, second)) if n % 2 else ((b, second), (a, first)):
            times.append(seconds(run))
    ratios = [x / y for x, y in zip(a, b, strict=True)]
    return statistics.median(ratios), statistics.median(a), statistics.median(b)


def run_bindllm(*arguments: str) -> None:
    """Run a bindllm command in its own process, so that no memory is kept between runs.

    Raises:
        SystemExit: the command failed; it has printed the reason.
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
    """Reset the peak: loading a model takes more memory than running it."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    else:
        # Linux lets a process reset its own peak. On other systems this file does not exist, and writing raises.
        Path("/proc/self/clear_refs").write_text("5")


def peak_bytes() -> int:
    """Return the peak memory since `forget_peak`, of the GPU's allocator or of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) * 1024


def used_bytes() -> int:
    """Return the memory in use now, of the GPU's allocator or of this process."""
    # Imported here, because every measuring process imports this module.
    from bindllm.model.memory import resident_bytes

    return torch.cuda.memory_allocated() if torch.cuda.is_available() else resident_bytes()


def machine_kind() -> str:
    """Return a file name for this kind of machine: accelerator, or processor and cores."""
    if torch.cuda.is_available():
        name = torch.cuda.get_device_name()
    else:
        found = torch.cpu.get_capabilities()
        # One name of a processor stands for models with and without matrix units.
        cpu = f"{found.get('cpu_name', platform.machine())}{' amx' if found.get('amx_bf16') else ''}"
        name = f"{cpu} {torch.get_num_threads()} cores"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def write_metrics(metrics: list[Metric]) -> Path:
    """Merge metrics into the results of this machine kind, by name, and return the file."""
    file = RESULTS / f"{machine_kind()}.json"
    kept = {row["name"]: row for row in json.loads(file.read_text())} if file.exists() else {}
    kept |= {metric.name: asdict(metric) for metric in metrics}
    RESULTS.mkdir(exist_ok=True)
    file.write_text(json.dumps(list(kept.values()), indent=1) + "\n")
    return file
