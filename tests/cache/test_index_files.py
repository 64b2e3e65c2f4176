"""The files of an index folder: every damage is named, nothing foreign is touched, a killed writer does no harm."""

import ctypes
import gc
import json
import multiprocessing
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch

from bindllm import EmbeddingStore
from bindllm.cache import factories
from bindllm.cache import index as index_module
from bindllm.cache.folder import MANIFEST, writing
from bindllm.cache.index import VectorIndex
from bindllm.errors import StoreError
from index_stores import extend, file_names, held, holds, image_keys, image_store, made_up
from store_parts import FINGERPRINT

faiss = pytest.importorskip("faiss")

# Of glibc: blocks from this size on are mapped each on its own.
M_MMAP_THRESHOLD = -3


@pytest.fixture
def store(tmp_path):
    return image_store(tmp_path / "store", 20)


@pytest.fixture
def built(tmp_path, store) -> Path:
    VectorIndex.build(tmp_path / "index", store)
    return tmp_path / "index"


def manifest_of(built: Path) -> dict:
    return json.loads((built / MANIFEST).read_text())


@pytest.mark.parametrize("ending", ["faiss", "keys"])
@pytest.mark.parametrize("change", ["truncated", "flipped", "empty", "foreign", "longer"])
def test_a_changed_file_is_named(built, change, ending):
    file = (built / manifest_of(built)["file"]).with_suffix(f".{ending}")
    content = file.read_bytes()
    new = {
        "truncated": content[:-5],
        "flipped": content[:-1] + bytes([content[-1] ^ 1]),
        "empty": b"",
        "foreign": b"x" * len(content),
        "longer": content + b"\0",
    }
    file.write_bytes(new[change])
    with pytest.raises(
        StoreError, match=rf"{file.stem}\.\w+ is not the file that index\.json was written with"
    ):
        VectorIndex.open(built)


def test_a_large_index_is_hashed_on_request_and_before_a_change(built, store, monkeypatch):
    monkeypatch.setattr(index_module, "VERIFY_BYTES", 10)
    file = built / manifest_of(built)["file"]
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert len(VectorIndex.open(built)) == 20
    for act in (
        lambda: VectorIndex.open(built, verify=True),
        lambda: VectorIndex.remove(built, image_keys(1)),
    ):
        with pytest.raises(StoreError, match=f"{file.name} is not the file"):
            act()
    # The same size, but not written by Faiss.
    file.write_bytes(b"x" * len(content))
    with pytest.raises(StoreError, match="foreign or damaged"):
        VectorIndex.open(built)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 4}, "has format 4, this bindllm reads up to 3; update"),
        ({"format": 2}, "has format 2, of an earlier bindllm; build the index again"),
        ({"count": 21}, "is not the file"),
        ({"count": 0}, f"{MANIFEST} is damaged.*count is 0"),
        ({"count": True}, f"{MANIFEST} is damaged"),
        ({"embedding_size": "16"}, f"{MANIFEST} is damaged"),
        ({"embedding_size": 17}, "holds 20 vectors of size 16, expected 20 of size 17"),
        ({"more": 1}, f"{MANIFEST} is damaged"),
        ({"store": "../store"}, f"{MANIFEST} is damaged"),
        ({"store": {"path": "a", "digest": "b", "chosen": 1}}, f"{MANIFEST} is damaged"),
        ({"search": "nprobe=3"}, "index.json asks for a search.*nprobe"),
        ({"search": f"nprobe={'9' * 400}"}, "index.json asks for a search.*up to 1,048,576"),
        ({"search": None}, f"{MANIFEST} is damaged"),
        ({"fingerprint": "../../elsewhere"}, "is not the fingerprint of an encoder"),
        ({"file": "../secret/vectors-0123456789abcdef.faiss"}, "is not the name of an index file"),
        ({"file": "/etc/vectors-0123456789abcdef.faiss"}, "is not the name of an index file"),
        ({"file": "index.faiss"}, "is not the name of an index file"),
        ({"num_bytes": 1}, "is not the file"),
        ({"num_bytes": True}, f"{MANIFEST} is damaged"),
        ({"sha256": "0" * 64}, "is not the file"),
    ],
)
def test_a_changed_manifest_is_named(built, change, message):
    (built / MANIFEST).write_text(json.dumps({**manifest_of(built), **change}))
    with pytest.raises(StoreError, match=message):
        VectorIndex.open(built)


@pytest.mark.parametrize("ending", [".faiss", ".keys", MANIFEST])
@pytest.mark.parametrize("kind", ["fifo", "device"])
def test_only_regular_files_are_opened(built, ending, kind):
    """Opening a FIFO waits forever, and a device has no end."""
    file = next(file for file in built.iterdir() if file.name.endswith(ending))
    facts = manifest_of(built)
    file.unlink()
    if kind == "fifo":
        os.mkfifo(file)
    else:
        file.symlink_to("/dev/zero")
    if ending == ".faiss":
        # A FIFO and a device have the size 0.
        (built / MANIFEST).write_text(json.dumps({**facts, "num_bytes": 0}))
    with pytest.raises(StoreError, match="is not the file|not a regular file"):
        VectorIndex.open(built)


def test_missing_files_are_named(built):
    file = built / manifest_of(built)["file"]
    file.with_suffix(".keys").unlink()
    with pytest.raises(StoreError, match=f"has no {file.stem}.keys: copy the whole folder"):
        VectorIndex.open(built)
    file.unlink()
    with pytest.raises(StoreError, match=f"has no {file.name}"):
        VectorIndex.open(built)
    short = {name: value for name, value in manifest_of(built).items() if name != "search"}
    damaged = [b"\xff{", b"", b"{}", b"[1]", b'{"format": 3', b'{"format": Infinity}', b"[" * 10**6]
    for content in (*damaged, json.dumps(short).encode()):
        (built / MANIFEST).write_bytes(content)
        with pytest.raises(StoreError, match="damaged|cannot be read as JSON"):
            VectorIndex.open(built)
    (built / MANIFEST).unlink()
    with pytest.raises(StoreError, match="not the folder of an index"):
        VectorIndex.open(built)


def test_a_damaged_index_is_not_written_to_but_may_be_built_again(built, store):
    file = built / manifest_of(built)["file"]
    file.write_bytes(b"")
    extend(store, 20)
    for change in (
        lambda: VectorIndex.remove(built, store.keys()[:1]),
        lambda: VectorIndex.add(built, store, store.keys()),
    ):
        with pytest.raises(StoreError, match=f"{file.name} is not the file"):
            change()
    (built / MANIFEST).write_text("{")
    before = file_names(built)
    with pytest.raises(StoreError, match="damaged"):
        VectorIndex.update(built, store)
    assert file_names(built) == before
    VectorIndex.build(built, store)
    assert holds(VectorIndex.open(built), store, *range(21))
    assert len(file_names(built)) == 3


def test_a_folder_of_something_else_is_not_touched(tmp_path, store):
    (tmp_path / "index").mkdir()
    (tmp_path / "index" / "thesis.txt").write_text("precious")
    (tmp_path / "file").write_text("precious")
    for place in ("index", "file"):
        with pytest.raises(StoreError, match="not an index of bindllm"):
            VectorIndex.build(tmp_path / place, store)
    assert file_names(tmp_path / "index") == {"thesis.txt"}
    assert file_names(tmp_path) == {"index", "store", "file"}


def test_other_files_in_the_folder_stay(built, store):
    (built / "notes.txt").write_text("mine")
    (built / "vectors-of-mine.faiss.txt").write_text("mine")
    VectorIndex.build(built, store, factory="SQfp16")
    assert {"notes.txt", "vectors-of-mine.faiss.txt"} <= file_names(built)
    assert len(file_names(built)) == 5


def test_a_reader_sees_the_new_index_when_a_writer_replaces_it_meanwhile(built, store, monkeypatch):
    map_files, calls = index_module.map_files, []
    smaller = store.keys()[:5]

    def replaced(folder, info, **options):
        if not calls:
            calls.append(info)
            VectorIndex.build(built, store, keys=smaller)
        return map_files(folder, info, **options)

    monkeypatch.setattr(index_module, "map_files", replaced)
    assert sorted(held(VectorIndex.open(built))) == smaller


def test_a_lock_file_of_a_killed_writer_does_not_block_the_next_one(built, store):
    lock = built.with_name(f".{built.name}.lock")
    lock.touch()
    assert VectorIndex.remove(built, store.keys()[:1]).removed == 1
    assert not lock.exists()


def test_a_second_writer_gets_an_error_at_once_and_a_reader_does_not(built, store):
    with writing(built):
        for write in (
            lambda: VectorIndex.build(built, store),
            lambda: VectorIndex.update(built, store),
            lambda: VectorIndex.remove(built / ".." / "index", store.keys()[:1]),
        ):
            with pytest.raises(StoreError, match="another process is writing this index"):
                write()
        assert len(VectorIndex.open(built)) == 20
    assert VectorIndex.remove(built, store.keys()[:1]).removed == 1


# As Python, as Faiss, and as a user stops it.
STOPS = [OSError(28, "No space left"), RuntimeError("in write: Error: No space left"), KeyboardInterrupt()]


@pytest.mark.parametrize("error", STOPS, ids=["disk", "faiss", "user"])
@pytest.mark.parametrize("factory", ["Flat", "IVF2,Flat"])
def test_a_build_that_fails_while_writing_leaves_the_old_index(
    tmp_path, built, store, monkeypatch, error, factory
):
    before = file_names(built)
    write = faiss.write_index

    def stopped(index, path):
        write(index, path)
        raise error

    monkeypatch.setattr(faiss, "write_index", stopped)
    with pytest.raises(StoreError if isinstance(error, Exception) else KeyboardInterrupt):
        VectorIndex.build(built, image_store(tmp_path / "b", 30), factory=factory)
    assert holds(VectorIndex.open(built), store, *range(20))
    assert file_names(built) == before
    assert file_names(tmp_path) == {"store", "b", "index"}


# ---- Processes that are killed, that compete, or that are weighed


def forked(act) -> int:
    """Run something in a copy of this process; return its exit status, or minus the signal that killed it."""
    child = os.fork()
    if child == 0:
        try:
            act()
            os._exit(0)
        finally:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def die_at(point: int) -> None:
    """Kill this process before its n-th replacing or removing, or in the middle of writing a file of Faiss."""
    left, write = [point], faiss.write_index

    def tick() -> None:
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        left[0] -= 1

    def before(function):
        def hooked(*args, **options):
            tick()
            return function(*args, **options)

        return hooked

    def half_written(index, path):
        write(index, path)
        content = Path(path).read_bytes()
        Path(path).write_bytes(content[: len(content) // 2])
        tick()
        Path(path).write_bytes(content)

    os.replace, os.unlink, faiss.write_index = before(os.replace), before(os.unlink), half_written


CHANGES = {
    "build": lambda folder, store: VectorIndex.build(folder, store),
    "update": lambda folder, store: VectorIndex.update(folder, store, keys=store.keys("image")),
    "remove": lambda folder, store: VectorIndex.remove(folder, image_keys(0, 5, 11)),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_writer_killed_at_any_change_to_the_disk_leaves_the_index_whole(tmp_path, store, name):
    old = held(VectorIndex.build(tmp_path / "index", store, keys=image_keys(*range(18))))
    everything = held(VectorIndex.build(tmp_path / "all", store))
    kept = {key: row for key, row in old.items() if key not in image_keys(0, 5, 11)}
    new = kept if name == "remove" else everything

    def killed(folder: Path, point: int) -> None:
        die_at(point)
        CHANGES[name](folder, EmbeddingStore(store.root, FINGERPRINT, 16))

    states = []
    for point in range(100):
        folder = tmp_path / str(point)
        shutil.copytree(tmp_path / "index", folder)
        if (status := forked(lambda folder=folder, point=point: killed(folder, point))) == 0:
            break
        assert status == -signal.SIGKILL
        # Leftovers of a killed writer do not disturb a reader, ...
        states.append([old, new].index(held(VectorIndex.open(folder))))
        # ... nor the next writer, which removes them.
        VectorIndex.update(folder, store, keys=list(everything))
        index = VectorIndex.open(folder)
        assert held(index) == everything
        assert file_names(folder) == {MANIFEST, index.info.file, index.info.keys_file}
    # There is one moment at which the new index replaces the old one.
    assert states == sorted(states)
    assert set(states) == {0, 1}
    assert 5 < len(states) < 99


def test_the_first_build_is_killed_and_the_next_one_succeeds(tmp_path, store):
    folder = tmp_path / "index"
    folder.mkdir()
    for name in (".vectors-12345678.part", "vectors-0123456789abcdef.keys", "vectors-0123456789abcdef.faiss"):
        (folder / name).write_bytes(b"half")
    with pytest.raises(StoreError, match="not the folder of an index"):
        VectorIndex.open(folder)
    VectorIndex.build(folder, store)
    assert len(file_names(folder)) == 3


def test_of_two_processes_that_build_one_succeeds_and_the_other_fails_at_once(tmp_path, store):
    context, publish = multiprocessing.get_context("fork"), index_module.publish
    writing_now, may_finish = context.Event(), context.Event()

    def waiting(*args) -> None:
        writing_now.set()
        may_finish.wait(60)
        publish(*args)

    def build() -> None:
        index_module.publish = waiting
        VectorIndex.build(tmp_path / "index", EmbeddingStore(store.root, FINGERPRINT, 16))

    process = context.Process(target=build)
    process.start()
    assert writing_now.wait(60)
    extend(store, 30)
    with pytest.raises(StoreError, match="another process is writing this index"):
        VectorIndex.build(tmp_path / "index", store)
    may_finish.set()
    process.join(60)
    assert process.exitcode == 0
    assert sorted(held(VectorIndex.open(tmp_path / "index"))) == sorted(image_keys(*range(20)))
    assert VectorIndex.update(tmp_path / "index", store).added == 1


def weighed_builds(store: EmbeddingStore, folder: Path) -> list[tuple[int, int]]:
    """Build in several kinds; return for each how often the store was read, and the growth of memory in MiB."""
    # Large blocks are mapped, and returned when they are freed: only memory in use is weighed.
    libc = ctypes.CDLL(None)
    libc.mallopt(M_MMAP_THRESHOLD, 1 << 16)

    def private() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) >> 10

    seen, get, found = [], store.get, []
    store.get = lambda keys: seen.append(private()) or get(keys)
    # The first time is ignored: libraries load and allocate things once.
    for factory in ("Flat", "Flat", "IVF4,Flat"):
        seen.clear()
        # Free blocks of earlier work would be used first, and hide the growth.
        gc.collect()
        libc.malloc_trim(0)
        before = private()
        VectorIndex.build(folder, store, factory=factory)
        found.append((len(seen), max(seen) - before))
    return found


@pytest.mark.skipif(
    not (Path("/proc/self/status").exists() and hasattr(ctypes.CDLL(None), "mallopt")),
    reason="memory is read from /proc, with the allocator of glibc",
)
def test_building_an_exact_index_holds_a_chunk_in_memory_and_not_the_store(tmp_path, monkeypatch):
    monkeypatch.setattr(factories, "CHUNK", 1024)
    report = tmp_path / "report.json"

    def fill() -> None:
        count = 48 << 10
        rows = torch.randn(count, 256, generator=torch.Generator().manual_seed(0))
        keys = [f"{n:064x}" for n in range(count)]
        EmbeddingStore(tmp_path / "store", FINGERPRINT, 256).append(keys, rows, made_up(*range(count)))

    def weigh() -> None:
        store = EmbeddingStore(tmp_path / "store", FINGERPRINT, 256)
        report.write_text(json.dumps(weighed_builds(store, tmp_path / "index")))

    # Filled in a process of its own, whose memory is gone when the builds are weighed.
    assert forked(fill) == 0
    assert forked(weigh) == 0
    _, exact, lists = json.loads(report.read_text())
    # 48 MiB of vectors, of which lists hold most at once.
    assert exact[0] == 48
    assert lists[1] >= 30
    assert exact[1] <= 16
