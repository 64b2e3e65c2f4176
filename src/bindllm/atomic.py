"""Files: atomic writing, checksums, and reading recipes, and JSON and tensors of untrusted folders.

A reader sees the old content or the new, never a part of either. Only regular files are opened.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import stat
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bindllm.errors import BindLLMError, InputError, listed

if TYPE_CHECKING:
    from safetensors import safe_open
    from torch import Tensor

# Above this many files, flushing the whole machine at once is far quicker than flushing one after the other.
_MANY = 64
# First bytes of the small text that git-lfs leaves in place of a large file.
_POINTER = b"version https://git-lfs"


def _sync(path: Path) -> None:
    """Flush a file or a folder to the disk, so that a later rename cannot overtake its content."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _make_readable(files: list[Path], *, like: Path) -> None:
    """Give private files the process's default rights: safetensors makes them readable only by the owner."""
    rights = stat.S_IMODE(like.stat().st_mode) & 0o666
    for file in files:
        if file.is_file() and stat.S_IMODE(file.stat().st_mode) == 0o600:
            file.chmod(rights)


def _part_name(path: Path) -> Path:
    """Return a fresh hidden name in the same folder: renames are atomic inside one file system only."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.part")


@contextmanager
def atomic_file(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path; on success it replaces ``path`` in one step, on an error it is removed.

    Examples:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> with atomic_file(folder / "a.txt") as part:
        ...     _ = part.write_text("whole")
        >>> (folder / "a.txt").read_text()
        'whole'
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = _part_name(path)
    try:
        yield part
        # How to read this: content first, then the rename, then the folder that holds the name; in this order no
        # power loss leaves a name without its content.
        _sync(part)
        os.replace(part, path)
        _sync(path.parent)
    finally:
        part.unlink(missing_ok=True)


def set_aside_name(path: str | Path) -> Path:
    """Return the path at which `atomic_folder` keeps the earlier folder while the new one replaces it."""
    # Links are followed: the folder that a link points to is replaced, and the link stays.
    path = Path(path).resolve()
    return path.with_name(f".{path.name}.old")


@contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """Yield a temporary folder; on success it replaces ``path``, on an error it is removed.

    An existing folder is moved aside first, to `set_aside_name`, and removed last: a kill between the two renames
    leaves it there, whole, and the next call brings it back before anything else.
    """
    path = Path(path).resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    part, old = _part_name(path), set_aside_name(path)
    # An earlier call was killed between the two renames: bring the folder back.
    if old.exists() and not path.exists():
        os.replace(old, path)
    shutil.rmtree(old, ignore_errors=True)
    part.mkdir()
    try:
        yield part
        files = sorted(part.rglob("*"))
        _make_readable(files, like=part)
        # One sync of the whole file system is faster than thousands of small ones.
        if len(files) > _MANY:
            os.sync()
        else:
            for file in files:
                _sync(file)
        _sync(part)
        if path.exists():
            # A folder cannot be renamed onto one that is not empty.
            os.replace(path, old)
        os.replace(part, path)
        _sync(path.parent)
    finally:
        shutil.rmtree(part, ignore_errors=True)
        if path.exists():
            shutil.rmtree(old, ignore_errors=True)
        # The second rename failed: the earlier folder returns to its name.
        elif old.exists():
            os.replace(old, path)


def check_replaceable(path: Path, marker: str, failure: type[BindLLMError], *, kind: str) -> None:
    """Refuse to write a folder over a file, or over a folder of another kind: it may be a user's work.

    Args:
        path: may be missing, or an empty folder.
        kind: kind of the folder, such as "a bindllm checkpoint".

    Raises:
        BindLLMError: a ``failure``.
    """
    is_empty = path.is_dir() and not any(path.iterdir())
    if path.exists() and not is_empty and not (path / marker).is_file():
        raise failure(
            f"{path} exists and is not {kind} (no {marker}); nothing was written. Choose another folder or empty it"
        )


def remove_leftovers(path: str | Path) -> None:
    """Remove the files that killed writers left next to ``path``. The caller makes sure that no process writes it."""
    path = Path(path).resolve()
    for part in path.parent.glob(f".{path.name}.*.part"):
        if part.is_dir():
            shutil.rmtree(part)
        else:
            part.unlink()


@contextmanager
def locked(path: str | Path, busy: BindLLMError) -> Iterator[None]:
    """Lock a file or a folder for one writer, without waiting; the lock of a process that dies is released.

    The lock is a file next to it that exists only while it is held, so that a copy of the parent folder does not
    contain it.

    Raises:
        BindLLMError: ``busy``, if another process holds the lock.
        OSError: the parent folder cannot be written.
    """
    from filelock import FileLock, Timeout

    # Two paths to one folder (a symbolic link, for example) must share one lock.
    path = Path(path).resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    file = path.with_name(f".{path.name}.lock")
    lock = FileLock(file, timeout=0)
    try:
        lock.acquire()
    except Timeout as error:
        raise busy from error
    try:
        yield
    finally:
        # Removed while it is held: a process that opens it now notices, and makes a new one.
        with suppress(OSError):
            file.unlink()
        lock.release()


def write_json(path: str | Path, value: Any) -> None:
    """Write ``value`` as indented JSON, atomically."""
    with atomic_file(path) as part:
        part.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def file_sha256(path: str | Path, *, prefix: bytes = b"") -> str:
    """Return the sha256 of a file's content after ``prefix``, in hex; reads it in pieces.

    Examples:
        >>> file_sha256(os.devnull)[:8]
        'e3b0c442'
    """
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, lambda: hashlib.sha256(prefix)).hexdigest()


def write_tensors(path: str | Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors of any device as a safetensors file."""
    from safetensors.torch import save_file

    # safetensors refuses views that share memory.
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    save_file(contiguous, path, metadata={"format": "pt"})


@contextmanager
def open_tensors(
    path: Path, failure: type[BindLLMError], advice: str = "copy the whole folder"
) -> Iterator[safe_open]:
    """Open a safetensors file, whose tensors stay on the disk until they are read.

    Args:
        advice: what to do about a missing or damaged file, as the end of the message.

    Raises:
        BindLLMError: a ``failure``: the file is missing, not a regular file, cut, or not safetensors.
    """
    from safetensors import SafetensorError, safe_open

    require_file(path, failure, advice)
    try:
        with safe_open(path, framework="pt") as stream:
            yield stream
    except (SafetensorError, OSError) as error:
        is_pointer = False
        # A file that may not be read has its reason in the first error.
        with suppress(OSError), path.open("rb") as raw:
            is_pointer = raw.read(len(_POINTER)) == _POINTER
        reason = "it is a pointer of git-lfs, not the weights: run git lfs pull" if is_pointer else error
        raise failure(f"{path}: not a readable safetensors file ({reason}); {advice}") from error


def read_tensors(path: Path, sha256: str | None, failure: type[BindLLMError]) -> dict[str, Tensor]:
    """Read trained tensors from a safetensors file that must have this checksum.

    Raises:
        BindLLMError: a ``failure``: the file is missing, damaged or another one, or a tensor is not finite.
    """
    with open_tensors(path, failure) as stream:
        # The hash finds damage, and weights that were exchanged without their manifest.
        if file_sha256(path) != sha256:
            raise failure(f"{path} is not the file that its folder was written with: damaged or exchanged")
        tensors = {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118 (not a dictionary)
    if wrong := not_finite(tensors):
        raise failure(
            f"{path} holds weights that are not finite ({wrong}): the run that wrote it failed, or the file was "
            "changed. Use an earlier checkpoint"
        )
    return tensors


def not_finite(tensors: Mapping[str, Tensor]) -> str:
    """Return the names of the first tensors that hold infinities or NaN, or "" if there are none."""
    # The smallest and largest value are NaN or infinite if any is, and no tensor of flags is needed.
    wrong = [
        name
        for name, tensor in tensors.items()
        if tensor.is_floating_point() and tensor.numel() and not all(x.isfinite() for x in tensor.aminmax())
    ]
    return listed(wrong)


def read_json(path: Path, failure: type[BindLLMError], advice: str = "copy the whole folder") -> Any:
    """Read a JSON file of an untrusted folder; arguments as for `open_tensors`.

    Raises:
        BindLLMError: a ``failure``: the file is missing, not a regular file, not JSON, or nested too deep.
    """
    require_file(path, failure, advice)
    try:
        # "utf-8-sig" also reads files that an editor has saved with a byte order mark.
        return json.loads(path.read_text(encoding="utf-8-sig"))
    # Deep nesting exceeds the stack.
    except (OSError, ValueError, RecursionError) as error:
        raise failure(f"{path} cannot be read as JSON ({error}); {advice}") from error


def read_object(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file of an untrusted folder; empty if it cannot be read, or is not an object."""
    try:
        content = read_json(path, BindLLMError)
    except BindLLMError:
        return {}
    return content if isinstance(content, dict) else {}


def read_recipe(path: str | Path) -> dict[str, Any]:
    """Return the keys and values of a recipe, unchecked.

    Raises:
        InputError: the file cannot be read, is not YAML, or holds something else.
    """
    import yaml

    try:
        recipe = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    # Deep nesting exceeds the stack.
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise InputError(f"the recipe {path} cannot be read: {error}") from error
    if not isinstance(recipe, dict):
        raise InputError(f"the recipe {path} holds {type(recipe).__name__}, expected keys and values")
    return recipe


def require_file(path: Path, failure: type[BindLLMError], advice: str) -> None:
    """Refuse a missing file, and anything else of its name: reading a FIFO or a device could wait forever."""
    if not path.is_file():
        problem = (
            "is not a regular file" if path.exists() else f"is missing: {path.parent} has no {path.name}"
        )
        raise failure(f"{path} {problem}; {advice}")
