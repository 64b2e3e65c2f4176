"""`bindllm embed` in two processes against one: whether the stores are bit-equal, and the speedup."""

from __future__ import annotations

import os
import statistics
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa

from benchmarks.measure import Metric, run_bindllm, seconds

RECIPE, DATA = "recipes/openmoji.yaml", "data/openmoji"
IMAGES = 384
REPEATS = 2
PROCESSES = (1, 2)


def embed(store: str, processes: int) -> float:
    """Embed the images with this number of processes and return the seconds."""
    options = {
        "--config": RECIPE,
        "--data.store": store,
        "--data.sources": f"[{{path: {DATA}, format: caption, limit: {IMAGES}}}]",
        "--trainer.accelerator": "cpu",
        "--trainer.devices": str(processes),
    }
    return seconds(lambda: run_bindllm("embed", *(word for option in options.items() for word in option)))


def rows(store: str) -> tuple[list[bytes], np.ndarray]:
    """Return the sorted keys of all shards, and the bits of their embeddings [N, E]; duplicates are kept."""
    shards = [pa.ipc.open_file(str(file)).read_all() for file in Path(store).rglob("embeddings-*.arrow")]
    table = pa.concat_tables(shards).sort_by("key").combine_chunks()
    embeddings = table["embedding"].combine_chunks().flatten().to_numpy()
    return table["key"].to_pylist(), embeddings.view(np.uint32).reshape(len(table), -1)


def metrics() -> list[Metric]:
    """Fill new stores in turn; the time of the same command on a complete store is subtracted."""
    taken: dict[int, list[float]] = {processes: [] for processes in PROCESSES}
    equal = True
    for n in range(REPEATS):
        found = {}
        # The order alternates, so that a drift of the machine's speed does not favor one side.
        for processes in PROCESSES[:: -1 if n % 2 else 1]:
            with tempfile.TemporaryDirectory() as store:
                whole = embed(store, processes)
                found[processes] = rows(store)
                taken[processes].append(whole - embed(store, processes))
        (keys, bits), (other_keys, other_bits) = found.values()
        equal &= keys == other_keys and np.array_equal(bits, other_bits)
    one, two = (statistics.median(taken[processes]) for processes in PROCESSES)
    ratios = [a / b for a, b in zip(taken[1], taken[2], strict=True)]
    return [
        Metric(
            "extraction_2_processes_equal", float(equal), "share", 1.0,
            f"1: the stores of {len(keys)} rows that 1 and 2 processes fill have the same rows, each once, bit-equal",
        ),
        Metric(
            "extraction_2_over_1_throughput", statistics.median(ratios), "ratio", 1.0,
            f"{len(keys) / two:.0f} over {len(keys) / one:.0f} images/s without the start, on the same "
            f"{os.cpu_count()} cores; floor: if 1 process keeps them all busy. It nearly "
            "does, because SVGs are drawn in a process of their own",
        ),
    ]  # fmt: skip
