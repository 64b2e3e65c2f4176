"""An index whose writer is killed, that two want to write, or that is larger than the memory it may take."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bindllm import EmbeddingStore
from bindllm.cache import index_writer
from bindllm.cache.index import VectorIndex
from bindllm.cache.manifest import MANIFEST
from bindllm.errors import StoreError
from index_stores import extend, file_names, held, made_up, picture_keys, picture_store
from store_parts import FINGERPRINT

pytest.importorskip("faiss")

HERE = Path(__file__).parent
PATHS = os.pathsep.join((str(HERE), str(HERE.parent), str(HERE.parents[1] / "src")))


def start(*command: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, *command],
        # Freed memory goes back at once, so that what is weighed is what is held.
        env={**os.environ, "PYTHONPATH": PATHS, "MALLOC_MMAP_THRESHOLD_": "65536"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def test_a_writer_killed_at_any_change_to_the_disk_leaves_the_index_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(index_writer, "PART_BYTES", 10 * 16 * 4)
    store = picture_store(tmp_path / "store", 20)
    old = held(VectorIndex.build(tmp_path / "index", store, factory="Flat", keys=picture_keys(*range(18))))
    everything = held(VectorIndex.build(tmp_path / "all", store, factory="Flat"))
    new = {
        "build": everything,
        "update": everything,
        "remove": {key: row for key, row in old.items() if key not in picture_keys(0, 5, 11)},
    }
    process = start(str(HERE / "index_killer.py"), str(tmp_path))
    counts = json.loads(process.communicate(timeout=300)[0])
    assert process.returncode == 0
    for name, count in counts.items():
        states = []
        for point in range(count):
            folder = tmp_path / f"{name}-{point}"
            # What a killed writer leaves is no hindrance to a reader, ...
            found = held(VectorIndex.open(folder))
            states.append([old, new[name]].index(found))
            # ... nor to the next writer, who cleans up.
            if point % 10 == 0:
                VectorIndex.build(folder, store, factory="Flat")
            VectorIndex.update(folder, store, keys=list(everything))
            index = VectorIndex.open(folder)
            assert held(index) == everything
            assert file_names(folder) == {MANIFEST} | index.info.files()
        # One moment in which the new takes the place of the old.
        assert states == sorted(states)
        assert set(states) == {0, 1}
    assert min(counts.values()) > 8


def test_the_first_build_is_killed_and_the_next_one_succeeds(tmp_path):
    store = picture_store(tmp_path / "store", 20)
    folder = tmp_path / "index"
    folder.mkdir()
    for name in (".part-12345678.part", "part-0123456789abcdef.keys", "part-0123456789abcdef.faiss"):
        (folder / name).write_bytes(b"half")
    with pytest.raises(StoreError, match="not the folder of an index"):
        VectorIndex.open(folder)
    VectorIndex.build(folder, store)
    assert len(file_names(folder)) == 3


WAITING = """
import sys
from pathlib import Path
from store_parts import FINGERPRINT
from bindllm import EmbeddingStore
from bindllm.cache import index_writer
from bindllm.cache.index import VectorIndex

write = index_writer.write_index
def waiting(*args, **options):
    print("writing", flush=True)
    sys.stdin.readline()
    return write(*args, **options)

index_writer.write_index = waiting
base = Path(sys.argv[1])
VectorIndex.build(base / "index", EmbeddingStore(base / "store", FINGERPRINT, 16))
"""


def test_of_two_processes_that_build_one_succeeds_and_the_other_is_told_at_once(tmp_path):
    store = picture_store(tmp_path / "store", 20)
    process = start("-c", WAITING, str(tmp_path))
    assert process.stdout.readline() == "writing\n"
    extend(store, 30)
    with pytest.raises(StoreError, match="another process is writing this index"):
        VectorIndex.build(tmp_path / "index", store)
    process.communicate("go\n", timeout=60)
    assert process.returncode == 0
    assert sorted(held(VectorIndex.open(tmp_path / "index"))) == sorted(picture_keys(*range(20)))
    assert VectorIndex.update(tmp_path / "index", store).added == 1


WEIGHED = """
import sys
from pathlib import Path
from store_parts import FINGERPRINT
from bindllm import EmbeddingStore
from bindllm.cache import index_writer
from bindllm.cache.index import VectorIndex

def private():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) >> 10

write, seen = index_writer.write_index, []
def weighed(*args, **options):
    # The part is whole now, and all that it was made of is still there.
    seen.append(private())
    return write(*args, **options)

index_writer.write_index = weighed
index_writer.CHUNK = 1024
base = Path(sys.argv[1])
store = EmbeddingStore(base / "store", FINGERPRINT, 256)
# The first time is not looked at: libraries load and set up what they need once.
for part_bytes in (4 << 20, 4 << 20, 1 << 30):
    index_writer.PART_BYTES = part_bytes
    before = private()
    VectorIndex.build(base / "index", store, factory="Flat")
    print(len(seen), max(seen) - before, flush=True)
    seen.clear()
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_a_build_weighs_a_part_and_not_the_store(tmp_path):
    store = EmbeddingStore(tmp_path / "store", FINGERPRINT, 256)
    count = 48 << 10
    keys = [f"{n:064x}" for n in range(count)]
    rows = torch.randn(count, 256, generator=torch.Generator().manual_seed(0))
    store.append(keys, rows, made_up(*range(count)))
    process = start("-c", WEIGHED, str(tmp_path))
    _, small, whole = (line.split() for line in process.communicate(timeout=120)[0].splitlines())
    assert process.returncode == 0
    # 48 MiB of vectors: in parts of 4 MiB, and in one.
    assert int(small[0]) == 12
    assert int(whole[0]) == 1
    assert int(whole[1]) >= 48
    assert int(small[1]) <= 24
