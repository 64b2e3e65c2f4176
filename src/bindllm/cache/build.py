"""Building the index of a visual cache in a folder, or updating the one that is there."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from bindllm.cache.factories import check_factory, choose
from bindllm.cache.folder import MANIFEST, IndexInfo, read_manifest
from bindllm.cache.images import embed_images
from bindllm.cache.index import VectorIndex
from bindllm.errors import BindLLMError, InputError, StoreError

if TYPE_CHECKING:
    from bindllm.embeddings.store import EmbeddingStore
    from bindllm.encoders import Encoder

_REBUILD = "To build it from scratch, add --rebuild"


@dataclass(frozen=True)
class BuiltIndex:
    """An index in a folder.

    Attributes:
        index: The index.
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
        folder: Folder of the index.
        store: The embedding store of the encoder.
        encoder: Embeds images that the store lacks.
        images: Folder of the images to index; None: all images of the store.
        factory: Faiss factory string; "auto" keeps the kind of the index in the folder, or chooses one.
        rebuild: Build from scratch even if the folder has an index, also a damaged one.

    Raises:
        InputError: The index was built with another encoder, or the factory string cannot be used.
        StoreError: The index or the store is damaged.
    """
    # Embedding the images may take hours, so mistakes are found first.
    check_factory(factory, "auto", store.embedding_size)
    before = None if rebuild else _read_info(Path(folder), encoder)
    same_kind = before is not None and factory in ("auto", before.factory)
    keys = embed_images(images, encoder, store) if images else None
    if not same_kind:
        index = VectorIndex.build(folder, store, factory=factory, keys=keys)
        return BuiltIndex(index, "built" if before is None else f"rebuilt, {before.factory} before", [])
    try:
        change = VectorIndex.update(folder, store, keys=keys)
        index = VectorIndex.open(folder)
    except StoreError as error:
        raise StoreError(f"{error}. {_REBUILD}") from error
    hints = []
    if keys is None and index.info.store is not None and index.info.store.chosen:
        hints.append(
            "this index holds chosen images (of --images, or some were removed): the other images of the store are "
            "not added. To index the whole store, add --rebuild"
        )
    fitting = choose(len(index), index.info.embedding_size)[0]
    if factory == "auto" and fitting != index.info.factory:
        hints.append(
            f"for this number of images a new index would be of the kind {fitting}: --factory '{fitting}' builds it"
        )
    return BuiltIndex(index, f"updated: {change.added:,} added, {change.removed:,} removed", hints)


def _read_info(folder: Path, encoder: Encoder) -> IndexInfo | None:
    """Return the manifest of the index in a folder, or None without an index.

    Raises:
        InputError: It was built with another encoder.
        StoreError: Its manifest is damaged or of a newer format.
    """
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
