"""One step of a cell of the cache table: `python -m benchmarks.cache_cell STEP ARGUMENTS`.

Each step runs in its own process, so that the measured memory belongs to one index only. Prints one line of JSON at
the end.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from benchmarks.clusters import CHUNK, ClusteredVectors
from benchmarks.measure import seconds
from bindllm import EmbeddingStore, Media, VisualCache
from bindllm.cache.index import VectorIndex

SIZE, FINGERPRINT = 1024, "c1" * 32
TOP, JUDGED, BATCH = 10, 512, 256
"""Neighbors per query, number of queries for recall, and the larger batch size."""

SECONDS, LEAST = 2.0, {1: 5, BATCH: 2}
"""Time to measure a speed for, and the minimum number of batches."""


def open_store(folder: Path) -> EmbeddingStore:
    """Open or create the store of synthetic images."""
    return EmbeddingStore(folder, FINGERPRINT, SIZE)


def keys_of(start: int, stop: int) -> list[str]:
    """Return the keys of rows, spread like content hashes."""
    return [hashlib.sha256(str(n).encode()).hexdigest() for n in range(start, stop)]


def fill(folder: Path, count: int) -> dict[str, float]:
    """Extend a store to at least ``count`` rows; rows of an interrupted run are kept.

    Returns:
        bytes of a row on disk, and the seconds spent writing (without generating the vectors).
    """
    store, space, writing = open_store(folder), ClusteredVectors(SIZE), 0.0
    step = 4 * CHUNK
    # Rows are written in order, so their count is the position where an interrupted run stopped.
    for start in range(len(store) // step * step, count, step):
        stop = min(start + step, count)
        keys = keys_of(start, stop)
        rows = torch.from_numpy(space.rows(start, stop))
        media = [Media.image(f"datasets/{n // 10_000:05}/{n:09}.jpg") for n in range(start, stop)]
        writing += seconds(lambda keys=keys, rows=rows, media=media: store.append(keys, rows, media))
    size = sum(file.stat().st_size for file in store.folder.glob("embeddings-*.arrow"))
    return {"bytes_per_row": size / len(store), "seconds": writing}


def build(folder: Path, store_folder: Path, count: int, factory: str) -> dict[str, object]:
    """Build the index of the first rows of a store."""
    store = open_store(store_folder)
    keys = None if len(store) == count else keys_of(0, count)
    started = time.perf_counter()
    index = VectorIndex.build(folder, store, factory=factory, keys=keys)
    taken = time.perf_counter() - started
    size = sum(file.stat().st_size for file in folder.iterdir())
    return {
        "count": len(index),
        "factory": index.info.factory,
        "search": index.info.search,
        "build_seconds": taken,
        "bytes": size,
    }


def measure(folder: Path, truth: Path) -> dict[str, float]:
    """Open an index and search it.

    The exact index is measured first and writes its neighbors to ``truth``. Recall of the others is relative to them.
    """
    queries = ClusteredVectors(SIZE).queries(JUDGED)
    # Python and the libraries allocate memory at first use, which must not count as memory of the cache.
    _warm_up(queries)
    before = resident_bytes()
    started = time.perf_counter()
    cache = VisualCache.open(folder)
    opening = time.perf_counter() - started
    opened = resident_bytes()
    index = cache.index
    found = index.search(queries, TOP)
    speeds = {size: queries_per_second(index.search, queries, size) for size in (1, BATCH)}
    cache.blend(torch.from_numpy(queries[:BATCH]))
    if index.info.factory == "Flat":
        np.save(truth, found)
    exact = np.load(truth)
    hits = sum(len(set(ours) & set(theirs)) for ours, theirs in zip(found, exact, strict=True))
    return {
        "open_seconds": opening,
        "opened_bytes": opened - before,
        "resident_bytes": resident_bytes() - before,
        "queries_per_second_b1": speeds[1],
        f"queries_per_second_b{BATCH}": speeds[BATCH],
        "recall10": hits / exact.size,
    }


def queries_per_second(
    search: Callable[[np.ndarray, int], object], queries: np.ndarray, batch_size: int
) -> float:
    """Search batches for `SECONDS` and return the rate."""
    done, started = 0, time.perf_counter()
    while (taken := time.perf_counter() - started) < SECONDS or done < LEAST[batch_size] * batch_size:
        start = done % (len(queries) - batch_size + 1)
        search(queries[start : start + batch_size], TOP)
        done += batch_size
    return done / taken


def resident_bytes() -> int:
    """Memory of this process, including the touched pages of memory-mapped files (Linux only)."""
    status = Path("/proc/self/status").read_text()
    return 1024 * sum(int(re.search(rf"{name}:\s+(\d+) kB", status)[1]) for name in ("RssFile", "RssAnon"))


def _warm_up(queries: np.ndarray) -> None:
    import faiss

    faiss.omp_set_num_threads(torch.get_num_threads())
    index = faiss.IndexFlatIP(SIZE)
    index.add(queries)
    index.search(queries, TOP)


def main(step: str, *arguments: str) -> None:
    """Run one of the three steps and print its result."""
    match step:
        case "fill":
            found = fill(Path(arguments[0]), int(arguments[1]))
        case "build":
            found = build(Path(arguments[0]), Path(arguments[1]), int(arguments[2]), arguments[3])
        case _:
            found = measure(Path(arguments[0]), Path(arguments[1]))
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
