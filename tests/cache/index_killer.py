"""Run by test_index_files.py: changes an index, and is killed at the n-th change to the disk.

Forks once for each change, after everything is imported and before any thread runs; prints the number of changes.
"""

import json
import os
import shutil
import signal
import sys
from pathlib import Path

import faiss
import torch

from bindllm import EmbeddingStore
from bindllm.cache.index import VectorIndex
from index_stores import image_keys
from store_parts import FINGERPRINT


def operations(folder: Path, store: EmbeddingStore) -> dict:
    return {
        "build": lambda: VectorIndex.build(folder, store),
        "update": lambda: VectorIndex.update(folder, store, keys=store.keys("image")),
        "remove": lambda: VectorIndex.remove(folder, image_keys(0, 5, 11)),
    }


def die_at(point: int) -> None:
    """Kill this process before its n-th replacing or removing, or in the middle of writing a file of Faiss."""
    left = [point]

    def tick() -> None:
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        left[0] -= 1

    def before(function):
        def hooked(*args, **options):
            tick()
            return function(*args, **options)

        return hooked

    write = faiss.write_index

    def half_written(index, path):
        write(index, path)
        content = Path(path).read_bytes()
        Path(path).write_bytes(content[: len(content) // 2])
        tick()
        Path(path).write_bytes(content)

    os.replace, os.unlink, faiss.write_index = before(os.replace), before(os.unlink), half_written


def main(base: Path) -> None:
    torch.set_num_threads(1)
    counts = {}
    for name in ("build", "update", "remove"):
        for point in range(1000):
            folder = base / f"{name}-{point}"
            shutil.copytree(base / "index", folder)
            child = os.fork()
            if child == 0:
                die_at(point)
                operations(folder, EmbeddingStore(base / "store", FINGERPRINT, 16))[name]()
                os._exit(0)
            status = os.waitpid(child, 0)[1]
            if status == 0:
                counts[name] = point
                break
            assert os.WTERMSIG(status) == signal.SIGKILL, status
    print(json.dumps(counts))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
