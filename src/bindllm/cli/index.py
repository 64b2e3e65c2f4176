"""``bindllm index``: build or update the visual cache."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bindllm.cli.arguments import refuse_together
from bindllm.cli.options import EncoderOptions
from bindllm.errors import BindLLMError, CheckpointError, InputError, StoreError, UsageError

if TYPE_CHECKING:
    from bindllm.cache.index import VectorIndex
    from bindllm.cache.settings import CacheConfig
    from bindllm.embeddings.store import EmbeddingStore
    from bindllm.encoders import Encoder

# Width of the lines of the table next to its words.
_LINES = 24


@dataclass(frozen=True)
class IndexOptions:
    """Index."""

    images: str | None = None
    """folder of images: index these and those of its subfolders, and no others"""
    store: str = "data/store"
    """folder of the embedding store; without --images all of its images are indexed"""
    factory: str = "auto"
    """kind of index as a Faiss factory string, such as Flat, SQfp16 or IVF1024,SQ8; auto chooses by the number of
    images"""
    rebuild: bool = False
    """build the index from scratch even if it exists, also if it is damaged"""
    name_in: str | None = None
    """checkpoint folder that uses this visual cache from now on"""
    milvus: str | None = None
    """instead of OUTPUT: file of an embedded Milvus (.db), or http://host:port with the token in the environment
    variable MILVUS_TOKEN"""


def index(
    output: str | None = None,
    *,
    encoders: EncoderOptions = EncoderOptions(),
    options: IndexOptions = IndexOptions(),
    overrides: Sequence[str] = (),
) -> int:
    """Build the visual cache: an index of image embeddings (docs/cache.md).

    If the index exists, new images of the store are added, and images that
    are no longer in the store are removed.

    Args:
        output: folder of the index
        encoders: the encoder of the images (default: that of --name_in)
        options: what is indexed, and how
        overrides: arguments of the encoder

    Example:
        bindllm index caches/openmoji --name_in checkpoints/quickstart
    """
    _check_options(output, encoders, options)

    from rich.console import Console

    from bindllm.encoders import encoder_for
    from bindllm.model.checkpoint import name_cache

    console = Console(highlight=False, soft_wrap=True)
    device = encoders.find_device()
    if not (encoders.encoder or encoders.checkpoint):
        encoders = replace(encoders, checkpoint=options.name_in)
    encoder = encoder_for("image", encoders.load(overrides)).to(device)
    folder = options.milvus or output
    named = _entry(folder, options.name_in, encoder) if options.name_in else None
    store = _find_store(options, encoder)
    started = time.perf_counter()
    rows = _build_milvus(folder, store) if options.milvus else _build_folder(folder, options, store, encoder)
    rows["seconds"] = f"{time.perf_counter() - started:.1f}"
    if named is not None:
        name_cache(options.name_in, asdict(named))
        rows["named in"] = options.name_in
    _print(console, {"visual cache": folder, **rows})
    return 0


def _check_options(output: str | None, encoders: EncoderOptions, options: IndexOptions) -> None:
    """Refuse options that do not go together.

    Raises:
        UsageError: says which.
    """
    refuse_together(encoder=encoders.encoder, checkpoint=encoders.checkpoint)
    if (output is None) == (options.milvus is None):
        raise UsageError("give one place for the index: a folder as OUTPUT, or --milvus URI")
    if options.milvus and (options.images or options.factory != "auto" or options.rebuild):
        raise UsageError(
            "--milvus holds all images of the store and is always rebuilt: leave out --images, --factory and --rebuild"
        )
    if not (encoders.checkpoint or encoders.encoder or options.name_in):
        raise UsageError(
            "which encoder? Give --checkpoint FOLDER, --encoder CLASS_OR_FOLDER or --name_in CHECKPOINT"
        )


def _entry(place: str, checkpoint: str, encoder: Encoder) -> CacheConfig:
    """Return what a checkpoint is to say of the cache: how it is mixed in stays as it is there.

    Raises:
        CheckpointError: the checkpoint has another encoder.
        UsageError: the cache would be lost when the checkpoint is saved again.
        InputError: a server's address, which no checkpoint may name.
    """
    from bindllm.cache.settings import CacheConfig
    from bindllm.model.checkpoint import CACHE, read_manifest
    from bindllm.model.pretrained import encoder_fingerprints, read_cache_config

    manifest = read_manifest(checkpoint)
    known = encoder_fingerprints(checkpoint, manifest)
    if encoder.fingerprint() not in known:
        raise CheckpointError(
            f"{checkpoint} was trained with the encoder {', '.join(name[:16] for name in known)}, and this is "
            f"{encoder.fingerprint()[:16]}: a cache of it would mean nothing there. Leave out --name_in, or give "
            f"--checkpoint {checkpoint}"
        )
    inside, home = Path(checkpoint, CACHE).resolve(), Path(checkpoint).resolve()
    if Path(place).resolve().is_relative_to(home) and not Path(place).resolve().is_relative_to(inside):
        raise UsageError(
            f"{place} would be lost when {checkpoint} is saved again; inside a checkpoint the cache is called "
            f"{os.path.join(checkpoint, CACHE)}"
        )
    try:
        before = read_cache_config(checkpoint, manifest)
    except CheckpointError:
        # Naming a cache is what mends the entry.
        before = None
    return CacheConfig(place, **({} if before is None else before.settings))


def _find_store(options: IndexOptions, encoder: Encoder) -> EmbeddingStore:
    """Open the store of an encoder; without pictures of its own it must be there.

    Raises:
        InputError: there is none.
    """
    from bindllm.embeddings.store import EmbeddingStore

    folder = Path(options.store, encoder.fingerprint()[:16])
    if not options.images and not folder.is_dir():
        raise InputError(
            f"the store {options.store} has nothing of the encoder {encoder.fingerprint()[:16]}: give pictures with "
            "--images FOLDER, another --store, or fill it with `bindllm embed --config RECIPE`"
        )
    return EmbeddingStore.for_encoder(options.store, encoder)


def _build_milvus(uri: str, store: EmbeddingStore) -> dict[str, str]:
    """Build a collection of all pictures in the store, and return what it is."""
    from bindllm.cache.milvus import MilvusIndex
    from bindllm.cache.settings import MILVUS_TOKEN

    with MilvusIndex.build(uri, store, token=os.environ.get(MILVUS_TOKEN)) as built:
        return {"pictures": f"{len(built):,}", "kind": built.info.index_type, "where": built.source}


def _build_folder(
    folder: str, options: IndexOptions, store: EmbeddingStore, encoder: Encoder
) -> dict[str, str]:
    """Build or renew the index in a folder, and return what it is then."""
    from bindllm.cache.factories import check_factory, choose
    from bindllm.cache.images import embed_images
    from bindllm.cache.index import VectorIndex

    # Ahead of the pictures, which may take hours to embed.
    check_factory(options.factory, "auto", store.embedding_size)
    before = None if options.rebuild else _read_before(folder, encoder)
    same = before is not None and options.factory in ("auto", before.factory)
    keys = embed_images(options.images, encoder, store) if options.images else None
    try:
        if same:
            change = VectorIndex.update(folder, store, keys=keys)
            became = f"renewed: {change.added:,} added, {change.removed:,} removed"
            built = VectorIndex.open(folder)
        else:
            built = VectorIndex.build(folder, store, factory=options.factory, keys=keys)
            became = "built" if before is None else f"built anew, {before.factory} before"
    except StoreError as error:
        if not same:
            raise
        raise StoreError(f"{error}. To build it from scratch, add --rebuild") from error
    for line in _hints(options, built, choose(len(built), built.info.embedding_size)[0], renewed=same):
        print(line)
    return {
        "pictures": f"{len(built):,} ({became})",
        "kind": " ".join(filter(None, (built.info.factory, built.info.search))),
        "bytes": f"{built.info.num_bytes:,}",
    }


def _read_before(folder: str, encoder: Encoder) -> Any:
    """Return what the index in a folder was made of, None where there is none.

    Raises:
        InputError: it is of another encoder.
        StoreError: its manifest is damaged or of a newer format.
    """
    from bindllm.cache.folder import MANIFEST, read_manifest

    if not Path(folder, MANIFEST).is_file():
        return None
    try:
        info = read_manifest(Path(folder))
    except BindLLMError as error:
        raise StoreError(f"{error}. To build it from scratch, add --rebuild") from error
    if info.fingerprint != encoder.fingerprint():
        raise InputError(
            f"{folder} was built with the encoder {info.fingerprint[:16]}, and this is {encoder.fingerprint()[:16]}: "
            "choose another OUTPUT, or replace it with --rebuild"
        )
    return info


def _hints(options: IndexOptions, built: VectorIndex, fitting: str, *, renewed: bool) -> list[str]:
    """Return what may not be as it was meant."""
    hints = []
    if renewed and not options.images and built.info.store is not None and built.info.store.chosen:
        hints.append(
            "this index is of chosen pictures (of --images, or some were removed): what the store has beside them is "
            "not added. To index all of the store, add --rebuild"
        )
    if renewed and options.factory == "auto" and fitting != built.info.factory:
        hints.append(
            f"for so many pictures a new index would be of the kind {fitting}: --factory '{fitting}' builds it"
        )
    return hints


def _print(console: Any, rows: dict[str, str]) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table("", "", show_header=False)
    for name, value in rows.items():
        table.add_row(name, Text(value, no_wrap=True))
    # In a pipe there is no screen to fit: places are printed whole.
    console.width = max([console.width, *(len(name) + len(value) + _LINES for name, value in rows.items())])
    console.print(table)
