"""Startup time: `import bindllm` and `bindllm --help` compared with `import torch`."""

from __future__ import annotations

import subprocess
import sys

from benchmarks.measure import Metric, paired


def metrics() -> list[Metric]:
    """Time whole processes in turn."""

    def process(*arguments: str):
        return lambda: subprocess.run([sys.executable, *arguments], check=True, capture_output=True)

    torch = process("-c", "import torch")
    found = []
    for name, run in (
        ("import_over_torch", process("-c", "import bindllm")),
        ("help_over_torch", process("-m", "bindllm.cli", "--help")),
    ):
        ratio, ours, theirs = paired(run, torch, repeats=5)
        note = f"{ours * 1e3:.0f} ms over {theirs * 1e3:.0f} ms; at most 0.3; floor: an empty Python process"
        _, empty, _ = paired(process("-c", "pass"), process("-c", "pass"), repeats=3)
        found.append(Metric(name, ratio, "ratio", empty / theirs, note))
    return found
