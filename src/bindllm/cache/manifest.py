"""The manifest of an index folder: what the index is made of, and which files belong to it.

It is the only file of the folder that is ever replaced, in one step: whatever it does not name is not there.
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from bindllm.atomic import write_json
from bindllm.errors import StoreError

FORMAT = 2
"""Number of the layout; an index of another one is refused."""

MANIFEST = "index.json"

_PART = re.compile(r"part-[0-9a-f]{16}\.faiss")
_TRAINED = re.compile(r"trained-[0-9a-f]{16}\.faiss")


@dataclass(frozen=True)
class FileInfo:
    """One file of Faiss.

    Attributes:
        file: its name.
        count: vectors in it; 0 for the trained, empty index.
        num_bytes: its size.
        sha256: over the file, and for a part over the keys after it, in hex.
    """

    file: str
    count: int
    num_bytes: int
    sha256: str

    @property
    def keys_file(self) -> str:
        """Name of the file with the keys of a part."""
        return self.file.removesuffix(".faiss") + ".keys"


@dataclass(frozen=True)
class StoreState:
    """The store that an index was built from, as it was then.

    Attributes:
        path: from the index folder to the encoder's folder in the store.
        digest: what `bindllm.embeddings.shards.shards_digest` said.
        chosen: the index is of chosen keys, not of all that the store has of the modality.
    """

    path: str
    digest: str
    chosen: bool


@dataclass(frozen=True)
class IndexInfo:
    """What an index is made of.

    Attributes:
        fingerprint: of the encoder that made the vectors, in hex.
        count: number of vectors.
        embedding_size: E.
        factory: kind of index, in the words of Faiss's ``index_factory``; "" for a file that does not tell.
        search: settings of Faiss's ``ParameterSpace``, such as ``"nprobe=32"``.
        modality: of what was embedded.
        store: where the vectors came from; None where that is not known.
        trained: the trained, empty index that new parts are copies of; None for kinds without training.
        parts: the files that hold the vectors.
    """

    fingerprint: str
    count: int
    embedding_size: int
    factory: str = ""
    search: str = ""
    modality: str = "image"
    store: StoreState | None = None
    trained: FileInfo | None = None
    parts: tuple[FileInfo, ...] = ()

    @property
    def num_bytes(self) -> int:
        """Size of all files of Faiss that are searched."""
        return sum(part.num_bytes for part in self.parts)

    def files(self) -> set[str]:
        """Return the names of all files that belong to the index, without the manifest."""
        trained = {self.trained.file} if self.trained else set()
        return trained | {name for part in self.parts for name in (part.file, part.keys_file)}


def write_manifest(folder: Path, info: IndexInfo) -> None:
    """Make what the index consists of from now on known, in one step."""
    write_json(folder / MANIFEST, {"format": FORMAT, **asdict(info)})


def read_manifest(folder: Path) -> IndexInfo:
    """Read the manifest of an index folder.

    Raises:
        StoreError: missing, damaged or of another format.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise StoreError(f"{folder} is not the folder of an index (no {MANIFEST}); build one there")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        number = int(found.pop("format"))
        if number > FORMAT:
            raise StoreError(f"{path} has format {number}, this bindllm reads up to {FORMAT}; update bindllm")
        if number < FORMAT:
            raise StoreError(f"{path} has format {number}, of an earlier bindllm; build the index again")
        return _parse(found)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise StoreError(f"{path} is damaged ({error!r}); build the index again") from error


def _parse(found: dict[str, Any]) -> IndexInfo:
    """Check every name and type: a damaged manifest must not be half believed."""
    if set(found) != {part.name for part in fields(IndexInfo)}:
        raise ValueError(f"it holds {', '.join(sorted(found))}")
    store, trained = found["store"], found["trained"]
    info = IndexInfo(
        **{
            **found,
            "store": None if store is None else _checked(StoreState(**store), str, str, bool),
            "trained": None if trained is None else _file(trained, _TRAINED),
            "parts": tuple(_file(part, _PART) for part in found["parts"]),
        }
    )
    _checked_values(
        [info.fingerprint, info.count, info.embedding_size, info.factory, info.search, info.modality],
        [str, int, int, str, str, str],
    )
    if not re.fullmatch("[0-9a-f]{16,}", info.fingerprint):
        raise ValueError(f"no encoder has the fingerprint {info.fingerprint!r}")
    if info.count != sum(part.count for part in info.parts) or info.count < 1:
        raise ValueError(f"count is {info.count}, but its parts hold {[part.count for part in info.parts]}")
    return info


def _file(found: dict[str, Any], name: re.Pattern[str]) -> FileInfo:
    info = _checked(FileInfo(**found), str, int, int, str)
    # A name of its own folder only: a foreign manifest must not point anywhere else.
    if not name.fullmatch(info.file):
        raise ValueError(f"no file of an index is called {info.file!r}")
    return info


def _checked(info: Any, *types: type) -> Any:
    _checked_values(list(asdict(info).values()), list(types))
    return info


def _checked_values(values: list[Any], types: list[type]) -> None:
    if [type(value) for value in values] != types:
        raise TypeError("values of other types than expected")
