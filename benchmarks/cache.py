"""`python -m benchmarks.cache [--long]`: caches of 10 thousand to 3 million images, and `blend` against bare Faiss.

The table takes about 15 minutes on 2 idle cores and 13 GB of disk. With ``--long`` (3 million, and graphs of a million)
it takes about 2 hours and 40 GB. Cells in benchmarks/results/cache.json for this kind of machine are not measured
again, so the command can be stopped at any time. Remove the file to measure again. Working files are written to
runs/benchmark-cache and removed at the end. After an interruption the next run resumes from them.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from benchmarks.cache_cell import BATCH, SIZE, fill, keys_of, open_store
from benchmarks.clusters import ClusteredVectors
from benchmarks.measure import RESULTS, Metric, machine_kind, paired
from bindllm import VisualCache
from bindllm.atomic import write_json
from bindllm.cache.factories import choose
from bindllm.cache.index import VectorIndex

WORK = Path("runs/benchmark-cache")
SIZES, LONG_SIZES, TARGET = (10_000, 100_000, 1_000_000), (3_000_000,), 1_000_000
KINDS = ("exact", "half", "graph", "lists")
"""Flat; SQfp16; HNSW over half precision; inverted lists as `choose` selects them for a million."""

GRAPH_AT_MOST = 100_000
"""A graph of more images takes long to build, so it needs ``--long``."""

BLEND_COUNT, BLEND_BATCHES = 100_000, {1: 40, 64: 9, 1024: 3}
"""Images in the cache whose `blend` is timed, and repetitions for each batch size."""

_DISK_PER_ROW = 3 * 4 * SIZE
"""The store, the exact index, and one other index."""


def metrics() -> list[Metric]:
    """Return `blend` over bare Faiss, and the targets at a million images; missing cells of the table are measured."""
    with kept_on_failure(WORK):
        found = [metric for kind in ("auto", "lists") for metric in blend_metrics(kind)]
        rows = {row["kind"]: row for row in measured([TARGET], kinds=("exact", "lists"))}
    ours, exact = rows["lists"], rows["exact"]
    ratios = [ours[name] / exact[name] for name in ("queries_per_second_b1", f"queries_per_second_b{BATCH}")]
    note = f"{ours['factory']}, {ours['search']}, {TARGET:,} x {SIZE}"
    share = 1 / (4 * SIZE * TARGET)
    return [
        *found,
        Metric(
            "cache_1m_recall10", ours["recall10"], "share", 1.0,
            f"{note}; of the 10 nearest, for queries of another modality; at least 0.95",
        ),
        Metric(
            "cache_1m_speedup", min(ratios), "times faster", None,
            f"{note}; than the exact search: {ratios[0]:.0f} at batch 1, {ratios[1]:.0f} at {BATCH}; at least 10",
        ),
        Metric(
            "cache_1m_resident_share", ours["resident_bytes"] * share, "share", ours["opened_bytes"] * share,
            f"{note}; of the vectors in fp32, after all queries; floor: as opened; all of it: "
            f"{ours['bytes'] * share:.2f}; at most 0.5",
        ),
        Metric("cache_1m_open_seconds", ours["open_seconds"], "s", None, f"{note}; memory-mapped; below 1"),
    ]  # fmt: skip


def blend_metrics(kind: str) -> list[Metric]:
    """Time `VisualCache.blend` against its lower bound: Faiss search and gather without the formula."""
    store, folder = open_store(WORK / "store"), WORK / f"blend-{kind}"
    fill(WORK / "store", BLEND_COUNT)
    factory = "auto" if kind == "auto" else factory_of(kind, BLEND_COUNT)
    cache = VisualCache(VectorIndex.build(folder, store, factory=factory, keys=keys_of(0, BLEND_COUNT)))
    bare = bare_search(cache, folder)
    queries = torch.from_numpy(ClusteredVectors(SIZE).queries(max(BLEND_BATCHES)))
    found = []
    for batch, repeats in BLEND_BATCHES.items():
        rows = queries[:batch]
        ratio, ours, theirs = paired(
            lambda rows=rows: cache.blend(rows), lambda rows=rows: bare(rows.numpy()), repeats=repeats
        )
        target = "; at most 1.1" if (kind, batch) == ("auto", 64) else ""
        found.append(
            Metric(
                f"cache_blend_over_faiss_b{batch}" if kind == "auto" else f"cache_blend_over_faiss_lists_b{batch}",
                ratio, "ratio", 1.0,
                f"{BLEND_COUNT:,} images, {cache.index.info.factory}: {1000 * ours:.2f} ms over {1000 * theirs:.2f} "
                f"of search and reconstruct_batch{target}",
            )
        )  # fmt: skip
    shutil.rmtree(folder)
    return found


def bare_search(cache: VisualCache, folder: Path) -> Callable[[np.ndarray], np.ndarray]:
    """Return a bare Faiss search over the same file: the vectors of the ``top_k`` nearest, [N, K, E]."""
    import faiss

    index = faiss.read_index(str(folder / cache.index.info.file), faiss.IO_FLAG_MMAP_IFC)
    if cache.index.info.search:
        faiss.ParameterSpace().set_index_parameters(index, cache.index.info.search)
    if (inverted := faiss.try_extract_index_ivf(index)) is not None:
        inverted.make_direct_map()
    faiss.omp_set_num_threads(torch.get_num_threads())

    def search(queries: np.ndarray) -> np.ndarray:
        numbers = index.search(queries, cache.settings.top_k)[1]
        return index.reconstruct_batch(numbers.reshape(-1)).reshape(*numbers.shape, -1)

    return search


def factory_of(kind: str, count: int) -> str:
    """Return the Faiss factory; the number of inverted lists grows with the square root of the count."""
    if kind != "lists":
        return {"exact": "Flat", "half": "SQfp16", "graph": "HNSW32_SQfp16"}[kind]
    factory, _ = choose(max(count, TARGET), SIZE)
    if count >= TARGET:
        return factory
    lists = int(re.search(r"IVF(\d+)", factory)[1]) * math.sqrt(count / TARGET)
    return re.sub(r"IVF\d+", f"IVF{2 ** round(math.log2(lists))}", factory)


def measured(sizes: list[int], *, kinds: tuple[str, ...] = KINDS, long: bool = False) -> Iterator[dict]:
    """Yield the rows of the table; missing ones are measured and saved one by one."""
    for count in sizes:
        for kind in kinds:
            if kind == "graph" and count > GRAPH_AT_MOST and not long:
                continue
            rows = known_rows()
            cell = {"machine": machine_kind(), "count": count, "kind": kind}
            row = next((row for row in rows if cell.items() <= row.items()), None)
            if row is None:
                row = {**cell, **measure_cell(count, kind)}
                write_json(RESULTS / "cache.json", [*rows, row])
            yield row


def known_rows() -> list[dict]:
    """Return the saved rows of all machines."""
    file = RESULTS / "cache.json"
    return json.loads(file.read_text()) if file.exists() else []


def measure_cell(count: int, kind: str) -> dict:
    """Build and search one index, each in its own process; the exact index first, as the reference for recall."""
    WORK.mkdir(parents=True, exist_ok=True)
    free, needed = shutil.disk_usage(WORK).free, count * _DISK_PER_ROW
    if free < needed:
        raise SystemExit(
            f"{WORK} needs about {needed / 1e9:.0f} GB for {count:,} images; {free / 1e9:.0f} GB are free"
        )
    truth = WORK / f"truth-{count}.npy"
    if kind != "exact" and not truth.exists():
        measure_cell(count, "exact")
    folder = WORK / f"index-{count}-{kind}"
    stored = child("fill", WORK / "store", count)
    built = child("build", folder, WORK / "store", count, factory_of(kind, count))
    found = child("measure", folder, truth)
    shutil.rmtree(folder)
    return {**built, **found, "store_bytes_per_row": stored["bytes_per_row"]}


def child(*arguments: object) -> dict:
    """Run one step in its own process and return its JSON output."""
    command = [sys.executable, "-m", "benchmarks.cache_cell", *map(str, arguments)]
    print(" ".join(command[2:]), file=sys.stderr, flush=True)
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(done.returncode)
    return json.loads(done.stdout.splitlines()[-1])


def table(rows: list[dict]) -> str:
    """Return the rows as Markdown."""
    lines = [
        "| images | index | build, s | on disk, MB | opened, MB | after queries, MB | open, ms | queries/s, 1 | "
        f"queries/s, {BATCH} | recall@10 |",
        "|" + "---|" * 10,
    ]
    for row in rows:
        kind = ", ".join(filter(None, (row["factory"], row["search"])))
        megabytes = (f"{row[name] / 1e6:,.0f}" for name in ("bytes", "opened_bytes", "resident_bytes"))
        speeds = (f"{row[f'queries_per_second_b{size}']:,.{size == 1:d}f}" for size in (1, BATCH))
        lines.append(
            f"| {row['count']:,} | {kind} | {row['build_seconds']:,.1f} | {' | '.join(megabytes)} | "
            f"{1000 * row['open_seconds']:.0f} | {' | '.join(speeds)} | {row['recall10']:.3f} |"
        )
    return "\n".join(lines)


@contextmanager
def kept_on_failure(folder: Path) -> Iterator[None]:
    """Remove a folder at the end. Keep it after an error, so that the next run can resume."""
    folder.mkdir(parents=True, exist_ok=True)
    yield
    shutil.rmtree(folder)


def main() -> None:
    """Measure the missing cells and print the table row by row."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--long", action="store_true", help="also 3 million images, and larger graphs")
    long = parser.parse_args().long
    with kept_on_failure(WORK):
        print(table([]))
        for row in measured([*SIZES, *(LONG_SIZES if long else ())], long=long):
            print(table([row]).splitlines()[-1], flush=True)


if __name__ == "__main__":
    main()
