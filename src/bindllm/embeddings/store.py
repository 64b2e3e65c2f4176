"""The embedding store: each media is encoded once, and its embedding is cached on disk.

Layout: ``<folder>/<first 16 characters of the encoder's fingerprint>/`` holds ``encoder.json``,
``embeddings-*.arrow`` (content hash, modality, source, embedding) and ``files-*.arrow`` (the content hash of each
file in its state of size, times and inode, so that an unchanged file is not read again); and if a recipe asks for
tokens, ``tokens-*.arrow`` (content hash, shape, tokens in half precision). Any Arrow reader opens them.
"""

from __future__ import annotations

import hashlib
import os
import re
import time
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from bindllm.atomic import read_json, write_json
from bindllm.embeddings.shards import (
    KEY,
    KEY_BYTES,
    Shards,
    array_columns,
    array_fields,
    as_hex,
    as_keys,
    read_keys,
)
from bindllm.errors import MediaError, StoreError
from bindllm.media import Media
from bindllm.media.source import open_stream

if TYPE_CHECKING:
    from bindllm.encoders import Encoder

FORMAT = 1
"""Version of the layout; a store of a newer version is refused."""

SETTLED_NS = 2_000_000_000
"""Age in nanoseconds from which a file's time of change is trusted. A file written twice within one tick of the
file system's clock keeps its time, and the coarsest clock in use (FAT) ticks every 2 seconds."""

# Columns: the state of a file (`identify`), and the hash of its content in that state.
_FILES = pa.schema([("file", pa.binary(KEY_BYTES)), ("key", pa.binary(KEY_BYTES))])
# Columns: the content hash, and tokens in the form of `reduce_tokens`, [*grid, C].
_TOKENS = pa.schema([("key", pa.binary(KEY_BYTES)), *array_fields(pa.float16())])


class EmbeddingStore:
    """The embeddings of one encoder, keyed by content.

    Several processes may read and append at the same time. A store can be pickled to a data-loader worker, which
    opens it again by its path.

    Args:
        folder: holds one subfolder for each encoder; created if missing.
        encoder_fingerprint: identifies weights and preprocessing, in hex; each has its own subfolder.
        embedding_size: E, the width of an embedding.
        encoder_class: import path of the encoder, written to ``encoder.json`` for information.

    Raises:
        StoreError: the folder holds another width, another encoder or a newer format, or cannot be used.

    Examples:
        >>> import tempfile
        >>> store = EmbeddingStore(tempfile.mkdtemp(), "0" * 64, 2)
        >>> dog = Media.text("a dog")
        >>> store.append([store.key_of(dog)], torch.tensor([[0.6, 0.8]]), [dog])
        >>> store.get([store.key_of(dog)])
        tensor([[0.6000, 0.8000]])
    """

    def __init__(
        self,
        folder: str | Path,
        encoder_fingerprint: str,
        embedding_size: int,
        *,
        encoder_class: str | None = None,
    ) -> None:
        if not re.fullmatch("[0-9a-f]{16,}", str(encoder_fingerprint)):
            raise StoreError(
                f"a fingerprint must be at least 16 hexadecimal digits, not {encoder_fingerprint!r}; "
                "a sha256 of weights and preprocessing is one"
            )
        self.root = Path(folder).absolute()
        # 16 digits keep paths short; encoder.json holds all of them, and they are compared.
        self.folder = self.root / encoder_fingerprint[:16]
        self.fingerprint = encoder_fingerprint
        self.embedding_size = embedding_size
        # Files whose content was hashed since the last write: state -> key.
        self._hashed: dict[bytes, bytes] = {}
        with self._map_os_errors():
            self._check_encoder(encoder_class)
            self._embeddings = Shards(
                self.folder, kind="embeddings", schema=_embedding_schema(embedding_size)
            )
            self._tokens = Shards(self.folder, kind="tokens", schema=_TOKENS)
            self._files = Shards(self.folder, kind="files", schema=_FILES)

    @classmethod
    def for_encoder(cls, folder: str | Path, encoder: Encoder) -> EmbeddingStore:
        """Open or create the store of an encoder."""
        kind = type(encoder)
        name = f"{kind.__module__}.{kind.__qualname__}"
        return cls(folder, encoder.fingerprint(), encoder.embedding_size, encoder_class=name)

    @classmethod
    def existing(cls, place: Path, fingerprint: str, embedding_size: int) -> EmbeddingStore | None:
        """Return the store whose subfolder for an encoder is ``place``, or None if it does not exist."""
        place = place.resolve()
        # Opening makes a store where none is, and an untrusted index may name any place.
        if place.name != fingerprint[:16] or not (place / "encoder.json").is_file():
            return None
        try:
            return cls(place.parent, fingerprint, embedding_size)
        except StoreError:
            return None

    def __len__(self) -> int:
        """Return the number of embeddings."""
        return len(self._embeddings)

    def __contains__(self, key: str) -> bool:
        return bool(self.has([key])[0])

    def __repr__(self) -> str:
        return f"EmbeddingStore({str(self.folder)!r}, {len(self)} embeddings of size {self.embedding_size})"

    def __reduce__(self) -> tuple:
        # Memory maps and open files are not pickled: the other process opens the store by its path.
        return type(self), (self.root, self.fingerprint, self.embedding_size)

    def key_of(self, media: Media) -> str:
        """Return the key of media: its content hash.

        A file that was hashed before is not read again while its state (`identify`) is the same.

        Raises:
            MediaError: the file cannot be read, or changed while it was read.
        """
        return self.identify(media)[0]

    def identify(self, media: Media) -> tuple[str, bytes | None]:
        """Return the key of media, and 32 bytes for the state of its file; None: it is not a file.

        As long as the state is the same, so is the content: it holds the path, the inode, the size, and the times of
        modification and change. Copying or moving another file there can keep all of them except the last, which only
        the system sets.

        Raises:
            MediaError: as for `key_of`.
        """
        if media.modality == "text" or not isinstance(media.source, str | Path):
            return media.content_hash(), None
        # Reading raises a better error for a path that does not exist.
        with suppress(OSError, ValueError):
            state, settled = _file_state(media, os.stat(media.source))
            if settled and (key := self._known_key(state)):
                return key.hex(), state
        # The state is that of the open file, whose bytes are hashed: another file may have its name by now.
        with open_stream(media.source) as stream:
            state, settled = _file_state(media, os.fstat(stream.fileno()))
            key = media.content_hash(stream)
            if _file_state(media, os.fstat(stream.fileno()))[0] != state:
                raise MediaError(f"{media.name}: the file changed while it was read; run again")
        if settled:
            self._hashed[state] = bytes.fromhex(key)
        return key, state

    def _known_key(self, state: bytes) -> bytes | None:
        """Return the key of a file that this process or an earlier run has hashed in this state."""
        if state in self._hashed:
            return self._hashed[state]
        keys, found = self._files.get(np.array([state], KEY))
        return keys.tobytes() if found[0] else None

    def keys_of(self, media: Iterable[Media], *, token_modalities: Collection[str] = ()) -> dict[Media, str]:
        """Return the key of each media that is stored, without files that cannot be read.

        Args:
            media: any media.
            token_modalities: media of these count as stored only with their tokens.
        """
        keys: dict[Media, str] = {}
        for item in media:
            with suppress(MediaError):
                keys[item] = self.key_of(item)
        found = self.has(list(keys.values()), tokens=[item.modality in token_modalities for item in keys])
        return {item: key for (item, key), stored in zip(keys.items(), found, strict=True) if stored}

    def has(self, keys: Sequence[str], *, tokens: Sequence[bool] = ()) -> np.ndarray:
        """Return for each of the keys [N] whether its embedding is stored, bool [N].

        Args:
            keys: content hashes.
            tokens: whether the tokens of each key must be stored too, N of them; empty: of none.
        """
        wanted = as_keys(keys)
        found = self._embeddings.has(wanted)
        if any(tokens):
            found &= self._tokens.has(wanted) | ~np.array(tokens)
        return found

    def get(self, keys: Sequence[str]) -> Tensor:
        """Return the embeddings of the keys, float32 [N, E], exactly as they were appended.

        Raises:
            StoreError: keys that are not stored; says how many and names the first.
        """
        wanted = as_keys(keys)
        embeddings, found = self._embeddings.get(wanted)
        if not found.all():
            # Another process may have appended them since the last refresh.
            self.refresh()
            embeddings, found = self._embeddings.get(wanted)
        self._require(keys, found, "embeddings")
        return torch.from_numpy(embeddings)

    def get_tokens(self, keys: Sequence[str]) -> list[Tensor]:
        """Return the tokens of the keys, [*grid, C] in float16 each, exactly as they were appended.

        Raises:
            StoreError: keys whose tokens are not stored; says how many and names the first.
        """
        wanted = as_keys(keys)
        arrays = self._tokens.arrays(wanted)
        if any(array is None for array in arrays):
            self.refresh()
            arrays = self._tokens.arrays(wanted)
        self._require(keys, np.array([array is not None for array in arrays], bool), "tokens")
        # Copies: the file is mapped for reading only.
        return [torch.from_numpy(array.copy()) for array in arrays]

    def _require(self, keys: Sequence[str], found: np.ndarray, noun: str) -> None:
        if not found.all():
            missing = np.flatnonzero(~found)
            raise StoreError(
                f"{self.folder}: {len(missing)} of {len(keys)} {noun} are not stored, "
                f"the first with key {keys[missing[0]]}; precompute the {noun} of these media first"
            )

    def keys(self, modality: str | None = None) -> list[str]:
        """Return the keys of all embeddings, or of one modality, sorted, without repetitions."""
        return as_hex(read_keys(self.folder, modality))

    def sources(self, keys: Sequence[str]) -> list[str | None]:
        """Return the path or the text of each embedding; None: it came from memory or is not stored."""
        self.refresh()
        return self._embeddings.column(as_keys(keys), "source")

    def append(
        self,
        keys: Sequence[str],
        embeddings: Tensor,
        media: Sequence[Media],
        *,
        tokens: Sequence[Tensor | None] = (),
    ) -> None:
        """Write embeddings as one new shard, and tokens as another; keys that are stored already are skipped.

        Args:
            keys: `key_of` of each media, N of them.
            embeddings: [N, E].
            media: N of them; modality and source are recorded.
            tokens: from `reduce_tokens`, [*grid, C] each, or None for media without tokens; N of them, or none at all.

        Raises:
            StoreError: shapes that do not fit, an embedding that is not finite (the error names its source), or a
                disk that cannot be written. Nothing of this call is stored then; earlier rows are intact.
        """
        rows = embeddings.detach().to("cpu", torch.float32).numpy()
        if rows.shape != (len(keys), self.embedding_size) or len(media) != len(keys):
            raise StoreError(
                f"{self.folder}: got {len(keys)} keys, {len(media)} media and embeddings {list(rows.shape)}; "
                f"expected one key, one media and {self.embedding_size} numbers for each embedding"
            )
        # A NaN in the store would spoil every batch that reads it.
        broken = np.flatnonzero(~np.isfinite(rows).all(axis=1))
        if len(broken):
            raise StoreError(
                f"{self.folder}: {len(broken)} of {len(rows)} embeddings are not finite, the first that of "
                f"{media[broken[0]].name}; nothing was stored. Check this media, and the encoder's weights and dtype"
            )
        # The columns in the order of the schema: the key first and the embedding last, as `Shards` expects.
        table = pa.table(
            [
                _as_column(as_keys(keys)),
                pa.array([item.modality for item in media], pa.string()),
                pa.array([_source(item) for item in media], pa.string()),
                pa.FixedSizeListArray.from_arrays(pa.array(rows.reshape(-1)), self.embedding_size),
            ],
            schema=_embedding_schema(self.embedding_size),
        )
        given = [(key, item) for key, item in zip(keys, tokens, strict=bool(tokens)) if item is not None]
        with self._map_os_errors():
            # Before the embeddings: a media counts as done only if both are stored.
            if given:
                names, arrays = zip(*given, strict=True)
                columns = array_columns([array.half().cpu().numpy() for array in arrays])
                self._tokens.append(pa.table([_as_column(as_keys(names)), *columns], schema=_TOKENS))
            self._embeddings.append(table)

    def save_files(self) -> None:
        """Write a record of the files that `key_of` has read since the last call, so that later runs skip them.

        Without write permission for the folder nothing is written, and the next run reads the files again.

        Raises:
            StoreError: the disk cannot be written.
        """
        # A copy, because threads may add files meanwhile; these stay for the next call.
        hashed = dict(self._hashed)
        if hashed and os.access(self.folder, os.W_OK):
            columns = (np.array(list(part), KEY) for part in (hashed.keys(), hashed.values()))
            with self._map_os_errors():
                self._files.append(pa.table([_as_column(column) for column in columns], schema=_FILES))
        for file in hashed:
            del self._hashed[file]

    def refresh(self) -> None:
        """Open the shards that other processes have appended since the last call."""
        with self._map_os_errors():
            for shards in (self._embeddings, self._tokens, self._files):
                shards.refresh()

    def compact(self) -> None:
        """Merge small shards if there are many; a crash during the merge loses nothing.

        Raises:
            StoreError: the disk cannot be written; nothing is lost.
        """
        with self._map_os_errors():
            for shards in (self._embeddings, self._tokens, self._files):
                shards.compact()

    def _check_encoder(self, encoder_class: str | None) -> None:
        """Write ``encoder.json``, or compare it with the arguments."""
        path = self.folder / "encoder.json"
        expected = {"fingerprint": self.fingerprint, "embedding_size": self.embedding_size}
        # The first process that opens the folder writes it, all others compare.
        if not path.exists():
            write_json(path, {"format": FORMAT, **expected, "encoder": encoder_class})
            return
        advice = "delete the file if the folder belongs to this encoder, otherwise delete the folder"
        found = read_json(path, StoreError, advice)
        try:
            format_number = int(found["format"])
            found = {name: found[name] for name in expected}
        except (ValueError, KeyError, TypeError, OverflowError) as error:
            raise StoreError(f"{path} is damaged ({error!r}); {advice}") from error
        if format_number > FORMAT:
            raise StoreError(
                f"{path}: the store has format {format_number}, this bindllm reads up to {FORMAT}; "
                "update bindllm or choose another folder"
            )
        for name, value in expected.items():
            if found[name] != value:
                raise StoreError(
                    f"{path}: the store was created with {name} {found[name]}, the encoder has {value}; "
                    "choose another folder"
                )

    @contextmanager
    def _map_os_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise StoreError(
                f"{self.folder}: the store cannot be read or written ({error}); earlier embeddings are intact. "
                "Check the free space and the permissions, then run again"
            ) from error


def _embedding_schema(embedding_size: int) -> pa.Schema:
    # A list of fixed size keeps all rows in one buffer, which is mapped as an array [N, E].
    return pa.schema(
        [
            ("key", pa.binary(KEY_BYTES)),
            ("modality", pa.string()),
            ("source", pa.string()),
            ("embedding", pa.list_(pa.float32(), embedding_size)),
        ]
    )


def _as_column(keys: np.ndarray) -> pa.Array:
    # Without a copy: the keys are the buffer of the column.
    return pa.FixedSizeBinaryArray.from_buffers(pa.binary(KEY_BYTES), len(keys), [None, pa.py_buffer(keys)])


def _source(media: Media) -> str | None:
    """Return the path or the text of media, None for media from memory."""
    if not isinstance(media.source, str | Path):
        return None
    # File names may hold bytes that are not UTF-8, which Arrow's strings must be.
    return str(media.source).encode("utf-8", "backslashreplace").decode("utf-8")


def _file_state(media: Media, status: os.stat_result) -> tuple[bytes, bool]:
    """Return 32 bytes for the state of a file, and whether it can be trusted: a later change would show in it."""
    # Not the device: its number may change whenever a network drive is mounted, and every file would be read again.
    # The real path: a link whose target changes is another file.
    facts = status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns
    path = os.fsencode(os.path.realpath(media.source))
    digest = hashlib.sha256(f"{media.modality}\n{facts}\n".encode() + path).digest()
    return digest, status.st_ctime_ns <= time.time_ns() - SETTLED_NS
