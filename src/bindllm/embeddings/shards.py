"""Sorted Arrow files in one folder, searched as if they were one table, and arrays of their keys.

A shard is an Arrow IPC file (https://arrow.apache.org/docs/format/Columnar.html) of one record batch, sorted by a
32-byte key, written atomically and never changed. It is memory-mapped: opening is fast, and processes share its
pages. A lookup is a binary search in each shard, so no index has to be built or kept in memory.
"""

from __future__ import annotations

import hashlib
import os
import time
import uuid
import warnings
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from bindllm.atomic import atomic_file
from bindllm.errors import StoreError

KEY_BYTES = 32
KEY = np.dtype(f"S{KEY_BYTES}")
"""Keys compare as bytes. All have the same length, so trailing zero bytes do not matter."""

SMALL_BYTES = 32 * 2**20
"""Shards below this size are merged if there are many; a merge needs at most 1 GiB of memory."""

MANY_SMALL = 16
"""More small shards than this are merged, because every lookup searches each shard."""

# Axes of an array of any shape: the most that an encoder's tokens have.
_MOST_AXES = 4

ABANDONED_SECONDS = 3600
"""Writing a shard takes less than this: an older part file belongs to a killed process."""


class Shards:
    """All shards of one kind in a folder: rows of a key, optional records, and a value.

    Any number of processes may read and append at the same time. The same key in two shards is harmless: a key is a
    content hash, so both rows hold the same value.

    Args:
        kind: first part of their file names.
        schema: the columns; the first is the key (32 bytes), the last is the value: bytes or a list of floats, of
            fixed size, or an array of any shape (`array_columns`).
    """

    def __init__(self, folder: Path, *, kind: str, schema: pa.Schema) -> None:
        self._folder = folder
        self._kind = kind
        self._schema = schema
        self._shards: tuple[_Shard, ...] = ()
        self.refresh()

    def __len__(self) -> int:
        """Return the number of different keys."""
        if not self._shards:
            return 0
        return len(unique(np.concatenate([shard.keys for shard in self._shards])))

    def has(self, keys: np.ndarray) -> np.ndarray:
        """Return for each of the keys [N] whether it is stored, bool [N]."""
        found = np.zeros(len(keys), bool)
        for _, positions, _ in self._matches(keys):
            found[positions] = True
        return found

    def get(self, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the values of the keys [N] (zero if a key is not stored), and whether each is stored, bool [N]."""
        dtype, shape = _layout(self._schema.field(-1).type)
        values = np.zeros((len(keys), *shape), dtype)
        found = np.zeros(len(keys), bool)
        for shard, positions, rows in self._matches(keys):
            values[positions] = shard.values[rows]
            found[positions] = True
        return values, found

    def arrays(self, keys: np.ndarray) -> list[np.ndarray | None]:
        """Return the array of each of the keys [N], a view of the file; None for keys that are not stored."""
        arrays: list[np.ndarray | None] = [None] * len(keys)
        for shard, positions, rows in self._matches(keys):
            for position, row in zip(positions, rows, strict=True):
                flat = shard.values[shard.offsets[row] : shard.offsets[row + 1]]
                arrays[position] = flat.reshape(shard.shapes[row][shard.shapes[row] > 0])
        return arrays

    def column(self, keys: np.ndarray, name: str) -> list[Any]:
        """Return the value of a column for each of the keys [N], None for keys that are not stored."""
        values: list[Any] = [None] * len(keys)
        for shard, positions, rows in self._matches(keys):
            for position, value in zip(positions, shard.batch.column(name).take(pa.array(rows)), strict=True):
                values[position] = value.as_py()
        return values

    def append(self, table: pa.Table) -> None:
        """Write the rows whose key is not stored yet as one new shard.

        Raises:
            OSError: the shard cannot be written; no part of it remains.
        """
        keys = keys_in(table.column(0).combine_chunks())
        # Sorted, as a shard must be, and each key once.
        keys, first = np.unique(keys, return_index=True)
        new = first[~self.has(keys)]
        if len(new):
            self._write(table.take(pa.array(new)), uuid.uuid4().hex)
        self.refresh()

    def compact(self) -> None:
        """Merge small shards while there are many, and remove the files of killed writers.

        The merged shard is written before the old ones are removed, so a crash leaves some rows twice until the
        next call. Its name is computed from theirs, so two processes that merge the same shards write the same file.
        """
        self._remove_merged()
        while len(small := [shard for shard in self._shards if shard.num_bytes < SMALL_BYTES]) > MANY_SMALL:
            # Shards are in order of size. The smallest ones, so that rows are not written again with each merge.
            small = small[-MANY_SMALL:]
            _, order = np.unique(np.concatenate([shard.keys for shard in small]), return_index=True)
            table = pa.Table.from_batches([shard.batch for shard in small]).combine_chunks()
            names = " ".join(sorted(shard.path.name for shard in small))
            self._write(table.take(pa.array(order)), uuid.uuid5(uuid.NAMESPACE_OID, names).hex)
            for shard in small:
                shard.path.unlink(missing_ok=True)
            self.refresh()
        for part in self._folder.glob(f".{self._kind}-*.part"):
            # Another process may finish its file, and so rename it, at any moment.
            with suppress(FileNotFoundError):
                if part.stat().st_mtime < time.time() - ABANDONED_SECONDS:
                    part.unlink()

    def _remove_merged(self) -> None:
        """Remove small shards whose rows are all in one larger shard: a killed merge left them."""
        merged = [
            shard
            for position, shard in enumerate(self._shards)
            if shard.num_bytes < SMALL_BYTES
            and any(_contains(larger.keys, shard.keys) for larger in self._shards[:position])
        ]
        for shard in merged:
            shard.path.unlink(missing_ok=True)
        if merged:
            self.refresh()

    def refresh(self) -> None:
        """Open the shards that other processes have written or merged since the last call."""
        while True:
            opened = {shard.path: shard for shard in self._shards}
            paths = self._folder.glob(f"{self._kind}-*.arrow")
            try:
                shards = [opened.get(path) or self._open(path) for path in paths]
            except FileNotFoundError:
                # Another process has merged this shard into a new one since the folder was listed.
                continue
            # Most keys are in the largest shard: searching it first leaves few for the others.
            self._shards = tuple(sorted(filter(None, shards), key=lambda shard: -len(shard.keys)))
            return

    def _matches(self, keys: np.ndarray) -> Iterator[tuple[_Shard, np.ndarray, np.ndarray]]:
        """Yield each shard with the positions in ``keys`` that it holds and their rows; each key is found once."""
        left = np.arange(len(keys))
        for shard in self._shards:
            wanted = keys[left]
            # A position past the end is moved to the last row, whose key then differs.
            rows = np.minimum(np.searchsorted(shard.keys, wanted), len(shard.keys) - 1)
            hit = shard.keys[rows] == wanted
            yield shard, left[hit], rows[hit]
            # Keys that were found are not searched for in the smaller shards.
            left = left[~hit]
            if not len(left):
                return

    def _write(self, table: pa.Table, name: str) -> None:
        path = self._folder / f"{self._kind}-{name}.arrow"
        with (
            atomic_file(path) as part,
            pa.OSFile(str(part), "wb") as sink,
            pa.ipc.new_file(sink, self._schema) as writer,
        ):
            writer.write_table(table.combine_chunks())

    def _open(self, path: Path) -> _Shard | None:
        """Map one shard; a damaged one (by the file system, since writes are atomic) is renamed."""
        try:
            return _Shard(path, self._schema)
        except (OSError, ValueError, pa.ArrowException) as error:
            # Arrow also reports damage as an OSError, but only errors of the system have an errno.
            if isinstance(error, OSError) and error.errno is not None:
                raise
            aside = path.with_name(path.name + ".damaged")
            os.replace(path, aside)
            warnings.warn(
                f"{path} is damaged ({error}); it was renamed to {aside.name}, and its rows will be computed again",
                stacklevel=2,
            )
            return None


class _Shard:
    """One file, memory-mapped: its keys [N] and values [N, ...] are views of the file.

    Arrays of any shape lie one after the other in the values: array n has the shape ``shapes[n]`` and the numbers
    from ``offsets[n]`` to ``offsets[n + 1]``.
    """

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        self.path = path
        self.num_bytes = path.stat().st_size
        self.batch = _read_batch(path)
        if not self.batch.schema.equals(schema):
            raise ValueError("its columns are not those of this store")
        self.keys = keys_in(self.batch.column(0))
        value = self.batch.column(self.batch.num_columns - 1)
        if pa.types.is_large_list(value.type):
            self.values, self.offsets, self.shapes = _arrays(self.batch.column("shape"), value)
            return
        dtype, shape = _layout(value.type)
        # A list of fixed size keeps its numbers in a child array.
        buffer = value.values.buffers()[1] if shape else value.buffers()[1]
        self.values = np.frombuffer(buffer, dtype, count=len(value) * int(np.prod(shape))).reshape(-1, *shape)


def array_columns(arrays: Sequence[np.ndarray]) -> tuple[pa.Array, pa.Array]:
    """Return the columns of arrays of any shape, of one floating dtype and at most `_MOST_AXES` axes.

    Returns:
        the shapes, padded with zeros, and the numbers of each array.
    """
    padded = [(*array.shape, *[0] * (_MOST_AXES - array.ndim)) for array in arrays]
    shapes = pa.array(np.array(padded, np.int32).reshape(-1))
    offsets = np.cumsum([0, *(array.size for array in arrays)])
    numbers = np.concatenate([array.reshape(-1) for array in arrays])
    return (
        pa.FixedSizeListArray.from_arrays(shapes, _MOST_AXES),
        pa.LargeListArray.from_arrays(pa.array(offsets, pa.int64()), pa.array(numbers)),
    )


def array_fields(dtype: pa.DataType) -> list[tuple[str, pa.DataType]]:
    """Return the names and types of the columns of `array_columns`."""
    return [("shape", pa.list_(pa.int32(), _MOST_AXES)), ("values", pa.large_list(dtype))]


def _arrays(shapes: pa.Array, lists: pa.Array) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the numbers of all arrays, and of N arrays their offsets [N + 1] and shapes [N, axes], without a copy.

    Raises:
        ValueError: the shapes do not fit the numbers.
    """
    offsets = np.frombuffer(lists.buffers()[1], np.int64, count=len(lists) + 1)
    dtype = np.dtype(lists.values.type.to_pandas_dtype())
    values = np.frombuffer(lists.values.buffers()[1], dtype, count=len(lists.values))
    axes = np.frombuffer(shapes.values.buffers()[1], np.int32, count=len(shapes) * _MOST_AXES)
    axes = axes.reshape(-1, _MOST_AXES)
    sizes = np.where(axes > 0, axes, 1).prod(axis=1, dtype=np.int64)
    if offsets[0] != 0 or offsets[-1] > len(values) or (np.diff(offsets) != sizes).any():
        raise ValueError("the shapes of its arrays do not fit their numbers")
    return values, offsets, axes


def _read_batch(path: Path) -> pa.RecordBatch:
    """Map the rows of one file.

    Raises:
        FileNotFoundError: it does not exist.
        ValueError, pa.ArrowException: it is damaged, or not a file of one batch.
    """
    # Opening a FIFO would wait forever.
    if path.exists() and not path.is_file():
        raise ValueError("it is not a regular file")
    reader = pa.ipc.open_file(pa.memory_map(str(path)))
    if reader.num_record_batches != 1:
        raise ValueError(f"it holds {reader.num_record_batches} batches of rows, expected one")
    batch = reader.get_batch(0)
    # A damaged file may name buffers that are shorter than its columns.
    batch.validate()
    return batch


def _contains(larger: np.ndarray, smaller: np.ndarray) -> bool:
    """Return whether all of some sorted keys are among more sorted keys."""
    # Of two equal shards both stay: another process may be removing the other one.
    if len(larger) <= len(smaller):
        return False
    # The first key is almost always enough to see that they are not.
    return not any(len(missing_from(keys, larger)) for keys in (smaller[:1], smaller))


def keys_in(column: pa.FixedSizeBinaryArray) -> np.ndarray:
    """Return the keys of an Arrow column, without a copy."""
    return np.frombuffer(column.buffers()[1], KEY, count=len(column), offset=column.offset * KEY_BYTES)


def _layout(kind: pa.DataType) -> tuple[np.dtype, tuple[int, ...]]:
    """Return the numpy type and the shape of one value."""
    if pa.types.is_fixed_size_list(kind):
        return np.dtype(kind.value_type.to_pandas_dtype()), (kind.list_size,)
    return np.dtype(f"S{kind.byte_width}"), ()


def as_keys(keys: Sequence[str]) -> np.ndarray:
    """Return content hashes in hex as an array of 32 bytes each, [N].

    Raises:
        StoreError: not a content hash; names the first.
    """
    for key in keys:
        if len(key) != 2 * KEY_BYTES:
            raise StoreError(
                f"a key must be a content hash of {2 * KEY_BYTES} hexadecimal digits, not {key!r}"
            )
    try:
        return np.frombuffer(bytes.fromhex("".join(keys)), KEY)
    except ValueError as error:
        raise StoreError(f"keys must be content hashes in hexadecimal digits ({error})") from error


def as_hex(keys: np.ndarray) -> list[str]:
    """Return keys [N] as content hashes in hex.

    Examples:
        >>> as_hex(as_keys(["ab" * 32])) == ["ab" * 32]
        True
    """
    text = keys.tobytes().hex()
    return [text[start : start + 2 * KEY_BYTES] for start in range(0, len(text), 2 * KEY_BYTES)]


def unique(keys: np.ndarray) -> np.ndarray:
    """Return keys sorted, without repetitions."""
    # With return_index numpy sorts, which is several times faster here than its hashing.
    return np.unique(keys, return_index=True)[0]


def missing_from(keys: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Return the keys that are not among ``others``; both sorted, without repetitions."""
    if not len(others):
        return keys
    positions = np.minimum(np.searchsorted(others, keys), len(others) - 1)
    return keys[others[positions] != keys]


def read_keys(folder: Path, modality: str | None) -> np.ndarray:
    """Return the keys of all embeddings in a store, sorted, without repetitions, [N].

    Reads the shards without opening the store, so nothing is written or renamed.

    Args:
        modality: of the embeddings; None: all.

    Raises:
        StoreError: a shard that cannot be read.
    """
    while True:
        found = [np.zeros(0, KEY)]
        try:
            for shard in sorted(folder.glob("embeddings-*.arrow")):
                batch = _read_batch(shard)
                column = batch.column("key")
                if modality is not None:
                    column = column.filter(pc.equal(batch.column("modality"), modality))
                if len(column):
                    # A copy, so that the shard need not stay mapped.
                    found.append(keys_in(column).copy())
        except FileNotFoundError:
            # Another process has merged this shard into a new one since the folder was listed.
            continue
        except (OSError, ValueError, KeyError, pa.ArrowException) as error:
            raise StoreError(f"{shard} cannot be read ({error}); open the store to repair it") from error
        return unique(np.concatenate(found))


def shards_digest(folder: Path) -> str:
    """Return a sha256 of the names and sizes of a store's shards, in hex; if it is unchanged, so are the rows.

    Shards are never changed, so no content has to be read. After a merge it differs although the rows are the same.
    """
    digest = hashlib.sha256()
    for shard in sorted(folder.glob("embeddings-*.arrow")):
        try:
            digest.update(f"{shard.name} {shard.stat().st_size}\n".encode())
        except FileNotFoundError:
            # Merged into another one since the folder was listed: the digest matches no state of the store.
            digest.update(f"{shard.name} gone\n".encode())
    return digest.hexdigest()
