"""``bindllm index``: build or renew the visual cache."""

from __future__ import annotations

import os
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bindllm.cli.usage import Arguments, UsageError, add_allow
from bindllm.errors import BindLLMError, CheckpointError, InputError, StoreError

if TYPE_CHECKING:
    from bindllm.cache.index import VectorIndex
    from bindllm.cache.settings import CacheConfig
    from bindllm.embeddings.store import EmbeddingStore
    from bindllm.encoders import Encoder

# Letters of a row of the table beside its words.
_LINES = 24


def index(args: list[str]) -> int:
    """Build or renew the index of picture embeddings, and print what it is now."""
    chosen, options = _read_arguments(args)

    from rich.console import Console

    from bindllm.model.checkpoint import name_cache

    console = Console(highlight=False, soft_wrap=True)
    encoder = _find_encoder(chosen, options)
    named = _entry(chosen, encoder) if chosen.name_in else None
    store = _find_store(chosen, encoder)
    started = time.perf_counter()
    rows = _build_milvus(chosen, store) if chosen.milvus else _build_folder(chosen, store, encoder, console)
    rows["seconds"] = f"{time.perf_counter() - started:.1f}"
    if named is not None:
        name_cache(chosen.name_in, asdict(named))
        rows["named in"] = chosen.name_in
    _print(console, {"visual cache": chosen.milvus or chosen.output, **rows})
    return 0


def _read_arguments(args: list[str]) -> tuple[Any, list[str]]:
    """Return what was chosen, and the words that belong to the encoder."""
    parser = Arguments(
        "index",
        "Build the visual cache: an index of picture embeddings (docs/cache.md). Where it is there already, what the "
        "store has more is added, and what it has no longer is removed.",
    )
    parser.epilog = "Example: bindllm index caches/openmoji --name_in checkpoints/quickstart"
    parser.add_argument("output", nargs="?", metavar="OUTPUT", help="folder of the index")
    _add_encoder(parser)
    parser.add_argument(
        "--images", metavar="FOLDER", help="the pictures of a folder and its sub-folders, and no others"
    )
    parser.add_argument(
        "--store",
        default="data/store",
        metavar="FOLDER",
        help="where embeddings are kept; without --images all of its pictures are indexed (%(default)s)",
    )
    parser.add_argument(
        "--factory",
        default="auto",
        help="kind of index in the words of Faiss, such as Flat, SQfp16 or IVF1024,SQ8; auto: what fits the number",
    )
    parser.add_argument(
        "--anew",
        action="store_true",
        help="build from scratch what is there already, also when it is damaged",
    )
    parser.add_argument(
        "--name_in", metavar="CHECKPOINT", help="let this checkpoint answer with it from now on"
    )
    parser.add_argument(
        "--milvus",
        metavar="URI",
        help="instead of a folder: a file of an embedded Milvus (.db), or http://host:port with the token in the "
        "environment as MILVUS_TOKEN",
    )
    chosen, options = parser.parse_known_args(args)
    _check_arguments(chosen, options, parser)
    return chosen, options


def _add_encoder(parser: Arguments) -> None:
    """Add which encoder embeds the pictures, and where."""
    source = parser.add_mutually_exclusive_group()
    source.add_argument(
        "--checkpoint",
        metavar="FOLDER",
        help="take the picture encoder of a folder of bindllm fit (by default that of --name_in)",
    )
    source.add_argument(
        "--encoder",
        metavar="CLASS_OR_FOLDER",
        help="import path or folder of an encoder; --encoder.NAME VALUE are arguments of its constructor",
    )
    add_allow(parser)
    parser.add_argument("--device", help="cpu, cuda, ...: by default the accelerator that torch finds")


def _check_arguments(chosen: Any, options: list[str], parser: Arguments) -> None:
    """Refuse options that do not go together."""
    if any(not option.startswith("--encoder.") for option in options[:1]) or (options and not chosen.encoder):
        parser.error(f"unrecognized arguments: {' '.join(options)}")
    if (chosen.output is None) == (chosen.milvus is None):
        parser.error("give one place: a folder as OUTPUT, or --milvus URI")
    if chosen.milvus and (chosen.images or chosen.factory != "auto" or chosen.anew):
        parser.error(
            "--milvus holds all pictures of the store and is built anew each time: without --images, --factory and "
            "--anew"
        )
    if not (chosen.checkpoint or chosen.encoder or chosen.name_in):
        parser.error(
            "which encoder? Give --checkpoint FOLDER, --encoder CLASS_OR_FOLDER or --name_in CHECKPOINT"
        )


def _find_encoder(chosen: Any, options: list[str]) -> Encoder:
    """Return the encoder of pictures that the command line asks for."""
    from bindllm.cli.encode import find_device
    from bindllm.cli.media import build_encoder
    from bindllm.encoders import encoder_for
    from bindllm.model.checkpoint import read_manifest
    from bindllm.model.pretrained import read_encoders

    device = find_device(chosen.device)
    if chosen.encoder:
        encoders = [build_encoder(chosen.encoder, options, allow=chosen.allow)]
    else:
        folder = chosen.checkpoint or chosen.name_in
        encoders = read_encoders(folder, read_manifest(folder), allow=chosen.allow)
    return encoder_for("image", encoders).to(device)


def _entry(chosen: Any, encoder: Encoder) -> CacheConfig:
    """Return what a checkpoint is to say of the cache: how it is mixed in stays as it is there.

    Raises:
        CheckpointError: the checkpoint has another encoder.
        UsageError: the cache would be lost when the checkpoint is saved again.
        InputError: a server's address, which no checkpoint may name.
    """
    from bindllm.cache.settings import CacheConfig
    from bindllm.model.checkpoint import CACHE, read_manifest
    from bindllm.model.pretrained import encoder_fingerprints, read_cache_config

    manifest, place = read_manifest(chosen.name_in), chosen.milvus or chosen.output
    known = encoder_fingerprints(chosen.name_in, manifest)
    if encoder.fingerprint() not in known:
        raise CheckpointError(
            f"{chosen.name_in} was trained with the encoder {', '.join(name[:16] for name in known)}, and this is "
            f"{encoder.fingerprint()[:16]}: a cache of it would mean nothing there. Leave out --name_in, or give "
            f"--checkpoint {chosen.name_in}"
        )
    inside, home = Path(chosen.name_in, CACHE).resolve(), Path(chosen.name_in).resolve()
    if Path(place).resolve().is_relative_to(home) and not Path(place).resolve().is_relative_to(inside):
        raise UsageError(
            f"{place} would be lost when {chosen.name_in} is saved again; inside a checkpoint the cache is called "
            f"{os.path.join(chosen.name_in, CACHE)}"
        )
    try:
        before = read_cache_config(chosen.name_in, manifest)
    except CheckpointError:
        # Naming a cache is what mends the entry.
        before = None
    return CacheConfig(place, **({} if before is None else before.settings))


def _find_store(chosen: Any, encoder: Encoder) -> EmbeddingStore:
    """Open the store of an encoder; without pictures of its own it must be there.

    Raises:
        InputError: there is none.
    """
    from bindllm.embeddings.store import EmbeddingStore

    folder = Path(chosen.store, encoder.fingerprint()[:16])
    if not chosen.images and not folder.is_dir():
        raise InputError(
            f"the store {chosen.store} has nothing of the encoder {encoder.fingerprint()[:16]}: give pictures with "
            "--images FOLDER, another --store, or fill it with `bindllm embed --config RECIPE`"
        )
    return EmbeddingStore.for_encoder(chosen.store, encoder)


def _build_milvus(chosen: Any, store: EmbeddingStore) -> dict[str, str]:
    """Build a collection of all pictures in the store, and return what it is."""
    from bindllm.cache.milvus import MilvusIndex
    from bindllm.cache.settings import MILVUS_TOKEN

    with MilvusIndex.build(chosen.milvus, store, token=os.environ.get(MILVUS_TOKEN)) as built:
        return {"pictures": f"{len(built):,}", "kind": built.info.index_type, "where": built.source}


def _build_folder(chosen: Any, store: EmbeddingStore, encoder: Encoder, console: Any) -> dict[str, str]:
    """Build or renew the index in a folder, and return what it is then."""
    from bindllm.cache.factories import check_factory, choose
    from bindllm.cache.images import embed_images
    from bindllm.cache.index import VectorIndex

    # Ahead of the pictures, which may take hours to embed.
    check_factory(chosen.factory, "auto", store.embedding_size)
    before = None if chosen.anew else _read_before(chosen.output, encoder)
    same = before is not None and chosen.factory in ("auto", before.factory)
    keys = embed_images(chosen.images, encoder, store) if chosen.images else None
    try:
        if same:
            change = VectorIndex.update(chosen.output, store, keys=keys)
            became = f"renewed: {change.added:,} added, {change.removed:,} removed"
            built = VectorIndex.open(chosen.output)
        else:
            built = VectorIndex.build(chosen.output, store, factory=chosen.factory, keys=keys)
            became = "built" if before is None else f"built anew, {before.factory} before"
    except StoreError as error:
        if not same:
            raise
        raise StoreError(f"{error}. To build it from scratch, add --anew") from error
    for line in _hints(chosen, built, choose(len(built), built.info.embedding_size)[0], renewed=same):
        console.print(line, markup=False)
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
        raise StoreError(f"{error}. To build it from scratch, add --anew") from error
    if info.fingerprint != encoder.fingerprint():
        raise InputError(
            f"{folder} was built with the encoder {info.fingerprint[:16]}, and this is {encoder.fingerprint()[:16]}: "
            "choose another OUTPUT, or replace it with --anew"
        )
    return info


def _hints(chosen: Any, built: VectorIndex, fitting: str, *, renewed: bool) -> list[str]:
    """Return what may not be as it was meant."""
    hints = []
    if renewed and not chosen.images and built.info.store is not None and built.info.store.chosen:
        hints.append(
            "this index is of chosen pictures (of --images, or some were removed): what the store has beside them is "
            "not added. To index all of the store, add --anew"
        )
    if renewed and chosen.factory == "auto" and fitting != built.info.factory:
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
