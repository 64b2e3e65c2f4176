"""Sorted Arrow files in one folder, searched as if they were one table.

A shard is an Arrow IPC file (https://arrow.apache.org/docs/format/Columnar.html) of one record batch, sorted by a
32-byte key, written in one step and never changed. It is memory-mapped, so opening it costs nothing, processes
share its pages, and a look-up is a binary search in each shard: there is no index to build, to hold or to lose.
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
"""Keys compare as bytes; all have the same length, so that trailing zero bytes do not matter."""

SMALL_BYTES = 32 * 2**20
"""Shards below this size are merged when there are many: a merge then needs 1 GiB of memory at most."""

MANY_SMALL = 16
"""More small shards than this are merged: every look-up searches each shard."""

ABANDONED_SECONDS = 3600
"""No shard takes this long to write: an older part file is what a killed process left behind."""


class Shards:
    """All shards of one kind in a folder: rows of a key, optional records, and a value of fixed width.

    Any number of processes may read and append at the same time. The same key in two shards is harmless: a key
    stands for content, so both rows hold the same value.

    Args:
        folder: where the shards are; it must exist.
        kind: first part of their file names.
        schema: the columns; the first is the key (32 bytes), the last is the value (bytes or a list of floats,
            of fixed size).
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
        for _, places, _ in self._matches(keys):
            found[places] = True
        return found

    def get(self, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the values of the keys [N], zero where a key is not stored, and where one is, bool [N]."""
        dtype, shape = _layout(self._schema.field(-1).type)
        values = np.zeros((len(keys), *shape), dtype)
        found = np.zeros(len(keys), bool)
        for shard, places, rows in self._matches(keys):
            values[places] = shard.values[rows]
            found[places] = True
        return values, found

    def column(self, keys: np.ndarray, name: str) -> list[Any]:
        """Return what a column holds for each of the keys [N], None where a key is not stored."""
        records: list[Any] = [None] * len(keys)
        for shard, places, rows in self._matches(keys):
            for place, record in zip(places, shard.batch.column(name).take(pa.array(rows)), strict=True):
                records[place] = record.as_py()
        return records

    def append(self, table: pa.Table) -> None:
        """Write the rows whose key is not stored yet as one new shard.

        Raises:
            OSError: the shard cannot be written; nothing of it is left.
        """
        keys = keys_in(table.column(0).combine_chunks())
        keys, first = np.unique(keys, return_index=True)
        new = first[~self.has(keys)]
        if len(new):
            self._write(table.take(pa.array(new)), uuid.uuid4().hex)
        self.refresh()

    def compact(self) -> None:
        """Merge small shards while there are many, and remove what killed writers left behind.

        The merged shard is written before the old ones are removed, so a crash leaves some rows twice, until the
        next call. Its name follows from theirs, so two processes that merge the same shards write the same file.
        """
        self._remove_merged()
        while len(small := [shard for shard in self._shards if shard.num_bytes < SMALL_BYTES]) > MANY_SMALL:
            # The smallest, so that rows are not written again with each merge.
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
        """Remove small shards whose rows are all in one larger shard: a killed merge has left them behind."""
        merged = [
            shard
            for place, shard in enumerate(self._shards)
            if shard.num_bytes < SMALL_BYTES
            and any(_contains(larger.keys, shard.keys) for larger in self._shards[:place])
        ]
        for shard in merged:
            shard.path.unlink(missing_ok=True)
        if merged:
            self.refresh()

    def refresh(self) -> None:
        """See the shards that other processes have written or merged since."""
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
        """Yield, shard by shard, the places of the keys it holds and their rows; each key is found once."""
        left = np.arange(len(keys))
        for shard in self._shards:
            wanted = keys[left]
            rows = np.minimum(np.searchsorted(shard.keys, wanted), len(shard.keys) - 1)
            hit = shard.keys[rows] == wanted
            yield shard, left[hit], rows[hit]
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
        """Map one shard; a damaged one (by the file system: our writes are atomic) is moved aside."""
        try:
            return _Shard(path, self._schema)
        except (OSError, ValueError, pa.ArrowException) as error:
            # Arrow also reports damage as an OSError, but only those of the system carry a number.
            if isinstance(error, OSError) and error.errno is not None:
                raise
            aside = path.with_name(path.name + ".damaged")
            os.replace(path, aside)
            warnings.warn(
                f"{path} is damaged ({error}); it was moved aside as {aside.name}, and its rows will be made again",
                stacklevel=2,
            )
            return None


class _Shard:
    """One file, memory-mapped: its keys [N] and values [N, ...] are views of the file."""

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        self.path = path
        self.num_bytes = path.stat().st_size
        reader = pa.ipc.open_file(pa.memory_map(str(path)))
        if not reader.schema.equals(schema) or reader.num_record_batches != 1:
            raise ValueError("its columns are not those of this store")
        self.batch = reader.get_batch(0)
        self.keys = keys_in(self.batch.column(0))
        dtype, shape = _layout(schema.field(-1).type)
        value = self.batch.column(self.batch.num_columns - 1)
        buffer = value.values.buffers()[1] if shape else value.buffers()[1]
        self.values = np.frombuffer(buffer, dtype, count=len(value) * int(np.prod(shape))).reshape(-1, *shape)


def _contains(larger: np.ndarray, smaller: np.ndarray) -> bool:
    """Whether all of some sorted keys are among more sorted keys; most often the first one tells that they are not."""
    if len(larger) <= len(smaller):
        # Of two equal shards both stay: another process may be removing the other one.
        return False
    for keys in (smaller[:1], smaller):
        if (larger[np.minimum(np.searchsorted(larger, keys), len(larger) - 1)] != keys).any():
            return False
    return True


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

    Example:
        >>> as_hex(as_keys(["ab" * 32])) == ["ab" * 32]
        True
    """
    text = keys.tobytes().hex()
    return [text[start : start + 2 * KEY_BYTES] for start in range(0, len(text), 2 * KEY_BYTES)]


def unique(keys: np.ndarray) -> np.ndarray:
    """Return keys sorted, each once."""
    # With the index asked for, numpy sorts, which is several times faster here than its hashing.
    return np.unique(keys, return_index=True)[0]


def missing_from(keys: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Return those of the keys that are not among others; both sorted, each once."""
    if not len(others):
        return keys
    places = np.minimum(np.searchsorted(others, keys), len(others) - 1)
    return keys[others[places] != keys]


def read_keys(folder: Path, modality: str | None) -> np.ndarray:
    """Return the keys of all embeddings of a modality (None: of any) in a store, sorted, each once, [N].

    Args:
        folder: of one encoder in a store: `EmbeddingStore.folder`.
        modality: which embeddings.

    Raises:
        StoreError: a shard that cannot be read.
    """
    while True:
        found = [np.zeros(0, KEY)]
        try:
            for shard in sorted(folder.glob("embeddings-*.arrow")):
                batch = pa.ipc.open_file(pa.memory_map(str(shard))).get_batch(0)
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
            raise StoreError(f"{shard} cannot be read ({error}); open the store to set it aside") from error
        return unique(np.concatenate(found))


def shards_digest(folder: Path) -> str:
    """Return a sha256 over names and sizes of a store's shards, in hex: as long as it stays, so do its rows.

    Shards are never changed, so that no content has to be read. When they are merged it differs although the rows
    are the same.
    """
    digest = hashlib.sha256()
    for shard in sorted(folder.glob("embeddings-*.arrow")):
        try:
            digest.update(f"{shard.name} {shard.stat().st_size}\n".encode())
        except FileNotFoundError:
            # Merged into another since the folder was listed: the digest is of no state, and fits none.
            digest.update(f"{shard.name} gone\n".encode())
    return digest.hexdigest()
