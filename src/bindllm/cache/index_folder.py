"""The folder of an index while it is written: one writer at a time, nothing foreign, and nothing left behind."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from bindllm.cache.factories import limit_threads, reason
from bindllm.cache.manifest import MANIFEST, read_manifest
from bindllm.errors import StoreError

_OURS = ("part-*.faiss", "part-*.keys", "trained-*.faiss", ".part-*.part", ".trained-*.part", "index.faiss")


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Hold the folder as its only writer; before and afterwards, what its manifest does not name is removed.

    The lock is a file beside it that is there for as long as it is held, so that no copy of what surrounds the folder
    (a checkpoint, say) has it.

    Raises:
        StoreError: it holds something else, another process is writing it, or the disk.
    """
    from filelock import FileLock, Timeout

    _refuse_foreign(folder)
    real = folder.resolve()
    try:
        real.parent.mkdir(parents=True, exist_ok=True)
        lock = real.with_name(f".{real.name}.lock")
        with FileLock(lock, timeout=0):
            try:
                limit_threads()
                real.mkdir(exist_ok=True)
                _remove_orphans(real)
                yield
            finally:
                if real.is_dir():
                    _remove_orphans(real)
                    if not any(real.iterdir()):
                        real.rmdir()
                # While it is held: who opens it at this moment sees that it is gone, and makes another.
                with suppress(OSError):
                    lock.unlink()
    except Timeout as error:
        raise StoreError(
            f"{folder}: another process is writing this index; wait until it has ended, then start again"
        ) from error
    except (OSError, RuntimeError) as error:
        raise StoreError(
            f"{folder}: the index cannot be written ({reason(error)}); an earlier one there is whole. "
            "Check the free space and the permissions"
        ) from error


def _remove_orphans(folder: Path) -> None:
    """Remove the files that no manifest names: of a killed writer, or of the index before this one."""
    kept: set[str] = set()
    if (folder / MANIFEST).exists():
        try:
            kept = read_manifest(folder).files()
        except StoreError:
            # Of another format or damaged: only building again takes its place, and that has not happened yet.
            return
    for pattern in (*_OURS, f".{MANIFEST}.*.part"):
        for file in folder.glob(pattern):
            if file.name not in kept:
                file.unlink(missing_ok=True)


def _refuse_foreign(folder: Path) -> None:
    if folder.is_dir():
        ours = (folder / MANIFEST).is_file() or any(file for name in _OURS for file in folder.glob(name))
        if ours or not any(folder.iterdir()):
            return
    elif not folder.exists():
        return
    raise StoreError(
        f"{folder} exists and is not an index of bindllm (no {MANIFEST}); nothing was written. "
        "Choose another folder or empty it"
    )
