"""The files of an index folder: written under new names, then published by replacing the manifest in one step.

index.json           facts about the index and the names of its files: the only file that is ever replaced
vectors-<id>.faiss   the vectors as Faiss writes them, memory-mapped
vectors-<id>.keys    content hashes of the vectors, 32 bytes each, in the same order

A killed writer leaves the earlier index, and files that the next writer removes. Readers that have mapped a removed
file keep using it.
"""

from __future__ import annotations

import errno
import os
import re
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from bindllm.atomic import atomic_file, check_replaceable, file_sha256, locked, read_json, write_json
from bindllm.cache.factories import limit_threads, load_faiss, reason
from bindllm.embeddings.shards import KEY, KEY_BYTES
from bindllm.errors import StoreError

FORMAT = 3
"""Version of the layout; other versions are refused."""

MANIFEST = "index.json"

_OURS = ("vectors-*.faiss", "vectors-*.keys", ".vectors-*.part")
_VECTORS = re.compile(r"vectors-[0-9a-f]{16}\.faiss")


@dataclass(frozen=True)
class StoreState:
    """The embedding store that an index was built from.

    Attributes:
        path: From the index folder to the encoder's folder in the store.
        digest: `bindllm.embeddings.shards.shards_digest` at the time of building.
        chosen: The index holds chosen keys instead of all embeddings of the modality.
    """

    path: str
    digest: str
    chosen: bool


@dataclass(frozen=True)
class IndexInfo:
    """The manifest of an index.

    Attributes:
        fingerprint: Of the encoder that made the vectors, in hex.
        factory: Kind of index as in Faiss's ``index_factory``; "" if unknown.
        search: Settings of Faiss's ``ParameterSpace``, such as ``"nprobe=32"``.
        modality: Of the media that were embedded.
        store: Where the vectors came from; None if unknown.
        file: Name of the Faiss file; "" for an index without a folder.
        sha256: Over the keys and then the Faiss file, in hex.
    """

    fingerprint: str
    count: int
    embedding_size: int
    factory: str = ""
    search: str = ""
    modality: str = "image"
    store: StoreState | None = None
    file: str = ""
    num_bytes: int = 0
    sha256: str = ""

    @property
    def keys_file(self) -> str:
        """Name of the file with the content hashes."""
        return self.file.removesuffix(".faiss") + ".keys"


def read_manifest(folder: Path) -> IndexInfo:
    """Read the manifest of an index folder.

    Raises:
        StoreError: Missing, damaged or of another format.
    """
    path = folder / MANIFEST
    if not path.exists():
        raise StoreError(f"{folder} is not the folder of an index (no {MANIFEST}); build one there")
    found = read_json(path, StoreError, "build the index again")
    try:
        number = int(found.pop("format"))
        if number > FORMAT:
            raise StoreError(f"{path} has format {number}, this bindllm reads up to {FORMAT}; update bindllm")
        if number < FORMAT:
            raise StoreError(f"{path} has format {number}, of an earlier bindllm; build the index again")
        return _parse(found)
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise StoreError(f"{path} is damaged ({error!r}); build the index again") from error


def write_manifest(folder: Path, info: IndexInfo) -> None:
    """Replace the manifest in one step."""
    write_json(folder / MANIFEST, {"format": FORMAT, **asdict(info)})


def _parse(found: dict[str, Any]) -> IndexInfo:
    """Check every name and type: a manifest may be damaged or untrusted."""
    # Exactly these names: an unknown one may be a setting that this version would ignore.
    if set(found) != {field.name for field in fields(IndexInfo)}:
        raise ValueError(f"it holds {', '.join(sorted(found))}")
    if found["store"] is not None:
        found["store"] = StoreState(**found["store"])
        _check_types(found["store"], str, str, bool)
    info = IndexInfo(**found)
    _check_types(replace(info, store=None), str, int, int, str, str, str, type(None), str, int, str)
    if not re.fullmatch("[0-9a-f]{16,}", info.fingerprint):
        raise ValueError(f"{info.fingerprint!r} is not the fingerprint of an encoder")
    # The name must stay inside the folder.
    if not _VECTORS.fullmatch(info.file):
        raise ValueError(f"{info.file!r} is not the name of an index file")
    if info.count < 1:
        raise ValueError(f"count is {info.count}")
    return info


def _check_types(value: Any, *types: type) -> None:
    # Exact types instead of isinstance: JSON's true must not pass as the number 1.
    if [type(one) for one in vars(value).values()] != list(types):
        raise TypeError("values of other types than expected")


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Lock the folder for one writer, and remove unnamed files before and after.

    Raises:
        StoreError: The folder holds something else, another process is writing it, or the disk fails.
    """
    refuse_foreign(folder)
    real = folder.resolve()
    busy = StoreError(
        f"{folder}: another process is writing this index; wait until it has ended, then start again"
    )
    try:
        # No waiting: a build may take hours, so a second writer fails at once.
        with locked(folder, busy):
            try:
                limit_threads()
                real.mkdir(exist_ok=True)
                _remove_unnamed(real)
                yield
            finally:
                # After a failure the folder is as before; a new one that stayed empty is removed.
                if real.is_dir():
                    _remove_unnamed(real)
                    if not any(real.iterdir()):
                        real.rmdir()
    # Faiss raises RuntimeError if the disk is full.
    except (OSError, RuntimeError) as error:
        raise StoreError(
            f"{folder}: the index cannot be written ({reason(error)}); an earlier index there is unchanged. "
            "Check the free space and the permissions"
        ) from error


def _remove_unnamed(folder: Path) -> None:
    """Remove the files of a killed writer, or of the index before this one."""
    kept: set[str] = set()
    if (folder / MANIFEST).exists():
        try:
            info = read_manifest(folder)
        except StoreError:
            # Damaged or of another format: only a new build may replace it, and that has not finished yet.
            return
        kept = {info.file, info.keys_file}
    # Patterns instead of everything: other files in the folder stay.
    for pattern in (*_OURS, f".{MANIFEST}.*.part"):
        for file in folder.glob(pattern):
            if file.name not in kept:
                file.unlink(missing_ok=True)


def refuse_foreign(folder: Path) -> None:
    """Raise a `StoreError` for a folder that holds something else than an index, or the files of a killed build."""
    # Our files without a manifest are those of a killed first build.
    if not any(file for name in _OURS for file in folder.glob(name)):
        check_replaceable(folder, MANIFEST, StoreError, kind="an index of bindllm")


def publish(folder: Path, info: IndexInfo, keys: np.ndarray, write: Callable[[Path], None]) -> None:
    """Write vectors and keys under names that follow from their content, then make them the index.

    Args:
        info: The facts; the file's own are filled in.
        keys: Content hashes of the rows, [rows].

    Raises:
        OSError, RuntimeError: The disk; the earlier index is unchanged.
    """
    # A random name, because the final one follows from the content.
    temporary = folder / f".vectors-{uuid.uuid4().hex[:8]}.part"
    try:
        write(temporary)
        # One hash over both files: the keys of another index do not pass with these vectors.
        digest = file_sha256(temporary, prefix=keys.tobytes())
        info = replace(
            info,
            file=f"vectors-{digest[:16]}.faiss",
            num_bytes=temporary.stat().st_size,
            sha256=digest,
        )
        # The manifest comes last: all files that it names are complete.
        with atomic_file(folder / info.keys_file) as part:
            part.write_bytes(keys.tobytes())
        with atomic_file(folder / info.file) as part:
            os.replace(temporary, part)
    finally:
        temporary.unlink(missing_ok=True)
    write_manifest(folder, info)


def map_files(folder: Path, info: IndexInfo, *, verify: bool) -> tuple[Any, np.ndarray]:
    """Map the Faiss index and the keys of a folder.

    Args:
        verify: Compare the hash as well, which reads both files.

    Raises:
        FileNotFoundError: A file is missing.
        StoreError: Damaged, exchanged or foreign.
    """
    file, keys_file = folder / info.file, folder / info.keys_file
    # Always, because it costs nothing and finds truncated copies.
    for path, size in ((file, info.num_bytes), (keys_file, info.count * KEY_BYTES)):
        if path.stat().st_size != size or not path.is_file():
            raise _exchanged(path)
    keys = np.memmap(keys_file, KEY, mode="r")
    if verify and file_sha256(file, prefix=keys.tobytes()) != info.sha256:
        raise _exchanged(file)
    return read_faiss(file), keys


def read_faiss(file: Path, *, mapped: bool = True) -> Any:
    """Read a Faiss file: map its vectors, or read them into memory.

    Raises:
        FileNotFoundError: The file is missing.
        StoreError: Foreign or damaged.
    """
    faiss = load_faiss()
    try:
        return faiss.read_index(str(file), faiss.IO_FLAG_MMAP_IFC if mapped else 0)
    except (RuntimeError, MemoryError) as error:
        # Faiss raises the same error for a missing file; readers then look at the manifest again.
        if not file.exists():
            raise FileNotFoundError(errno.ENOENT, "a writer has removed it", str(file)) from error
        raise StoreError(
            f"{file} cannot be read as a Faiss index: foreign or damaged ({reason(error)})"
        ) from error


def _exchanged(file: Path) -> StoreError:
    return StoreError(
        f"{file} is not the file that {MANIFEST} was written with: damaged or exchanged; build the index again"
    )
