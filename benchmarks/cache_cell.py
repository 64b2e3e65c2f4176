"""One cell of the table of caches, in a process of its own: `python -m benchmarks.cache_cell WHAT ARGUMENTS`.

A process of its own so that memory is that of one index alone, and none is kept from cell to cell. Prints one line of
JSON at the end.
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
"""Neighbours that count, queries that recall is taken over, and the larger batch."""

SECONDS, LEAST = 2.0, {1: 5, BATCH: 2}
"""A speed is measured for this long, over this many batches at least."""


def open_store(folder: Path) -> EmbeddingStore:
    """Open or make the store of made-up pictures."""
    return EmbeddingStore(folder, FINGERPRINT, SIZE)


def keys_of(start: int, stop: int) -> list[str]:
    """Return the keys of rows: as spread as content hashes are."""
    return [hashlib.sha256(str(n).encode()).hexdigest() for n in range(start, stop)]


def fill(folder: Path, count: int) -> dict[str, float]:
    """Bring a store to at least so many rows; those that are there from an interrupted run are kept.

    Returns:
        bytes of a row on disk, and the seconds that writing took, without making the vectors up.
    """
    store, space, writing = open_store(folder), ClusteredVectors(SIZE), 0.0
    step = 4 * CHUNK
    # Rows come in order, so that their number says where an interrupted run stopped.
    for start in range(len(store) // step * step, count, step):
        stop = min(start + step, count)
        keys = keys_of(start, stop)
        rows = torch.from_numpy(space.rows(start, stop))
        media = [Media.image(f"pictures/{n // 10_000:05}/{n:09}.jpg") for n in range(start, stop)]
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

    The exact index, which is measured first, writes what it finds to ``truth``; the others are judged by that.
    """
    queries = ClusteredVectors(SIZE).queries(JUDGED)
    # What Python and the libraries take by themselves is no part of the cache: all of them have worked once by now.
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
    """Search batch after batch, as many as fit into `SECONDS`."""
    done, started = 0, time.perf_counter()
    while (taken := time.perf_counter() - started) < SECONDS or done < LEAST[batch_size] * batch_size:
        start = done % (len(queries) - batch_size + 1)
        search(queries[start : start + batch_size], TOP)
        done += batch_size
    return done / taken


def resident_bytes() -> int:
    """Memory of this process, also of the pages of mapped files that it has touched (Linux alone)."""
    status = Path("/proc/self/status").read_text()
    return 1024 * sum(int(re.search(rf"{name}:\s+(\d+) kB", status)[1]) for name in ("RssFile", "RssAnon"))


def _warm_up(queries: np.ndarray) -> None:
    import faiss

    faiss.omp_set_num_threads(torch.get_num_threads())
    index = faiss.IndexFlatIP(SIZE)
    index.add(queries)
    index.search(queries, TOP)


def main(what: str, *arguments: str) -> None:
    """Do one of the three and print what came out."""
    match what:
        case "fill":
            found = fill(Path(arguments[0]), int(arguments[1]))
        case "build":
            found = build(Path(arguments[0]), Path(arguments[1]), int(arguments[2]), arguments[3])
        case _:
            found = measure(Path(arguments[0]), Path(arguments[1]))
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
