"""From image files to an index: embedding the ones that a store lacks, then building or updating the index."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import compress
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from bindllm.cache.factories import check_factory, choose
from bindllm.cache.folder import MANIFEST, IndexInfo, read_manifest, refuse_foreign
from bindllm.cache.index import VectorIndex
from bindllm.embeddings.precompute import precompute_embeddings
from bindllm.errors import BindLLMError, InputError, StoreError
from bindllm.media import SUFFIXES, Media

if TYPE_CHECKING:
    from bindllm.embeddings.store import EmbeddingStore
    from bindllm.encoders import Encoder

_REBUILD = "To build it from scratch, add --rebuild"


@dataclass(frozen=True)
class BuiltIndex:
    """An index in a folder.

    Attributes:
        change: What was done, such as "updated: 5 added, 0 removed".
        hints: Sentences about images that are not in it, and about a kind of index that fits better.
    """

    index: VectorIndex
    change: str
    hints: list[str]


def build_or_update(
    folder: str | Path,
    store: EmbeddingStore,
    encoder: Encoder,
    *,
    images: str | Path | None = None,
    factory: str = "auto",
    rebuild: bool = False,
) -> BuiltIndex:
    """Build an index of image embeddings, or update the index in the folder if it is of the same kind.

    Args:
        images: Folder of the images to index; None: all images of the store, or those of an index of chosen images.
        factory: Faiss factory string; "auto" keeps the kind of the index in the folder, or chooses one.
        rebuild: Build from scratch even if the folder has an index, also a damaged one.

    Raises:
        InputError: The index was built with another encoder, or the factory string cannot be used.
        StoreError: The index or the store is damaged, or the folder holds something else.
    """
    # Embedding the images may take hours, so mistakes are found first.
    check_factory(factory, "auto", store.embedding_size)
    refuse_foreign(Path(folder))
    before = None if rebuild else _read_info(Path(folder), encoder)
    same_kind = before is not None and factory in ("auto", before.factory)
    keys = embed_images(images, encoder, store) if images else None
    hints = []
    if keys is None and before is not None and before.store is not None and before.store.chosen:
        hints.append(
            "this index holds chosen images (of --images, or some were removed): the other images of the store are "
            "not added. To index the whole store, add --rebuild"
        )
    if not same_kind:
        # Another kind of the same images: those that were removed do not come back.
        keys = _stored_keys(Path(folder), store) if hints else keys
        index = VectorIndex.build(folder, store, factory=factory, keys=keys)
        return BuiltIndex(index, "built" if before is None else f"rebuilt, {before.factory} before", hints)
    try:
        change = VectorIndex.update(folder, store, keys=keys)
        index = VectorIndex.open(folder)
    except StoreError as error:
        raise StoreError(f"{error}. {_REBUILD}") from error
    fitting = choose(len(index), index.info.embedding_size)[0]
    if factory == "auto" and fitting != index.info.factory:
        hints.append(
            f"for this number of images a new index would be of the kind {fitting}: --factory '{fitting}' builds it"
        )
    return BuiltIndex(index, f"updated: {change.added:,} added, {change.removed:,} removed", hints)


def _read_info(folder: Path, encoder: Encoder) -> IndexInfo | None:
    """Return the manifest of the index in a folder, None without an index; it must be of this encoder."""
    if not (folder / MANIFEST).is_file():
        return None
    try:
        info = read_manifest(folder)
    except BindLLMError as error:
        raise StoreError(f"{error}. {_REBUILD}") from error
    if info.fingerprint != encoder.fingerprint():
        raise InputError(
            f"{folder} was built with the encoder {info.fingerprint[:16]}, and this is {encoder.fingerprint()[:16]}: "
            "choose another OUTPUT, or replace it with --rebuild"
        )
    return info


def _stored_keys(folder: Path, store: EmbeddingStore) -> list[str]:
    """Return the keys of the index in a folder, without those that the store has lost."""
    try:
        index = VectorIndex.open(folder)
    except StoreError as error:
        raise StoreError(f"{error}. {_REBUILD}") from error
    keys = index.keys(np.arange(len(index)))
    return list(compress(keys, store.has(keys)))


def embed_images(
    images: str | Path | Sequence[str | Path], encoder: Encoder, store: EmbeddingStore
) -> list[str]:
    """Embed images into a store, and return their keys, each once, in the order of the images.

    Args:
        images: A folder, including its subfolders, or paths of images.

    Raises:
        InputError: None of the images can be read.
    """
    media = [Media.image(file) for file in find_images(images)]
    report = precompute_embeddings(store, encoder, media)
    if report.failed:
        logging.getLogger("bindllm").warning(
            "%d of %d images cannot be read and are skipped; the first: %s",
            *(len(report.failed), len(media), report.failed[0][1]),
        )
    # Files with the same content have one key, which is indexed once.
    stored = list(dict.fromkeys(store.keys_of(media).values()))
    if not stored:
        raise InputError(f"none of the {len(media)} images can be read; the first: {report.failed[0][1]}")
    return stored


def find_images(images: str | Path | Sequence[str | Path]) -> list[Path]:
    """Return the paths of images; those of a folder are sorted, and its other files are counted in the log.

    Raises:
        InputError: The folder does not exist, is a file, or has no images.
    """
    # Paths in a list are taken as given, whatever their ending.
    if not isinstance(images, str | Path):
        found = [Path(file) for file in images]
        if not found:
            raise InputError("the list of images is empty; give a folder or at least one path")
        return found
    folder = Path(images)
    if not folder.is_dir():
        problem = (
            "is a file; give its folder, or in Python a list of paths"
            if folder.exists()
            else "does not exist"
        )
        raise InputError(f"expected a folder of images, but {str(folder)!r} {problem}")
    # Sorted, because the order of a file system differs between machines.
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    found = [file for file in files if file.suffix.lower() in SUFFIXES["image"]]
    endings = ", ".join(sorted(SUFFIXES["image"]))
    if not found:
        raise InputError(f"{folder} holds {len(files)} files and no images ({endings})")
    if len(found) < len(files):
        logging.getLogger("bindllm").info(
            "%s: %d of %d files are not images (%s)", folder, len(files) - len(found), len(files), endings
        )
    return found
