"""What a store holds: which keys, read without opening it so that nothing is written or moved, and unit vectors."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from bindllm.cache.blend import unit_rows
from bindllm.embeddings.shards import KEY, KEY_BYTES, keys_in
from bindllm.errors import StoreError

if TYPE_CHECKING:
    from bindllm.embeddings.store import EmbeddingStore


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


def read_units(store: EmbeddingStore, keys: np.ndarray) -> np.ndarray:
    """Return the embeddings of keys [N] at unit length, float32 [N, E].

    Raises:
        StoreError: a key that is not stored, or an embedding without direction; names it.
    """
    names = as_hex(keys)
    rows = unit_rows(store.get(names).numpy())
    broken = np.flatnonzero(~np.isfinite(rows).all(axis=1))
    if len(broken):
        raise StoreError(
            f"{store.folder}: the embedding with key {names[broken[0]]} is zero or not finite, so it has no direction"
        )
    return rows


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
