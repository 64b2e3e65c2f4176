"""``bindllm index`` builds or updates the visual cache, ``bindllm datastore`` the records of a model with context."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from bindllm.cli.arguments import refuse_together
from bindllm.cli.options import EncoderOptions, print_whole
from bindllm.data.source_config import Format, SourceConfig, Split
from bindllm.errors import DecoderError, InputError, UsageError, printable_lines

if TYPE_CHECKING:
    from bindllm.embeddings.datastore import Datastore
    from bindllm.embeddings.store import EmbeddingStore
    from bindllm.encoders import Encoder


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


@dataclass(frozen=True)
class DatastoreOptions:
    """Records."""

    format: Format = "caption"
    """format of the rows, as of a data source (docs/data.md)"""
    modality: str = "image"
    """modality of the files, as of a data source"""
    split: Split | None = None
    """only the rows of this split (default: all rows)"""
    inside_only: bool = False
    """skip rows that name files outside of the folder of the table: for tables that you do not trust"""
    store: str = "data/store"
    """folder of the embedding store"""


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

    Example:
        bindllm index caches/openmoji --name_in checkpoints/openmoji
    """
    _check_options(output, encoders, options)

    from rich.table import Table
    from rich.text import Text

    from bindllm.encoders import encoder_for
    from bindllm.model.checkpoint import name_cache
    from bindllm.model.pretrained import new_cache_config

    # How to read this: everything that can fail quickly comes first, because embedding may take hours.
    device = encoders.find_device()
    if not (encoders.encoder or encoders.checkpoint):
        # A checkpoint that will use the cache knows its image encoder.
        encoders = replace(encoders, checkpoint=options.name_in)
    encoder = encoder_for("image", encoders.load(overrides)).to(device)
    folder = options.milvus or output
    # Checked before the build, which may take hours, and written after it.
    named = new_cache_config(options.name_in, folder, encoder) if options.name_in else None
    store = _find_store(options, encoder)
    started = time.perf_counter()
    rows = _build_milvus(folder, store) if options.milvus else _build_folder(folder, options, store, encoder)
    rows["seconds"] = f"{time.perf_counter() - started:.1f}"
    # Last: a checkpoint never names an index that does not exist.
    if named is not None:
        name_cache(options.name_in, asdict(named))
        rows["named in"] = options.name_in
    table = Table("", "", show_header=False)
    for name, value in {"visual cache": folder, **rows}.items():
        table.add_row(name, Text(value, no_wrap=True))
    print_whole(table)
    return 0


def _check_options(output: str | None, encoders: EncoderOptions, options: IndexOptions) -> None:
    """Raise a UsageError for options that do not go together."""
    from bindllm.cache.blend import is_milvus

    refuse_together(encoder=encoders.encoder, checkpoint=encoders.checkpoint)
    # Exactly one of both.
    if (output is None) == (options.milvus is None):
        raise UsageError("give one place for the index: a folder as OUTPUT, or --milvus URI")
    if output is not None and is_milvus(output):
        # Whoever opens the cache tells its kind by its place.
        raise UsageError(
            f"{output} is a place for Milvus: give --milvus {output}, or another name for a folder"
        )
    if options.milvus and (options.images or options.factory != "auto" or options.rebuild):
        raise UsageError(
            "--milvus holds all images of the store and is always rebuilt: leave out --images, --factory and --rebuild"
        )
    if not (encoders.checkpoint or encoders.encoder or options.name_in):
        raise UsageError(
            "which encoder? Give --checkpoint FOLDER, --encoder CLASS_OR_FOLDER or --name_in CHECKPOINT"
        )


def _find_store(options: IndexOptions, encoder: Encoder) -> EmbeddingStore:
    """Open the store of an encoder; it must exist if no images are given."""
    from bindllm.embeddings.store import EmbeddingStore

    # Stores are named by the encoder: embeddings of two encoders never mix.
    folder = Path(options.store, encoder.fingerprint()[:16])
    if not options.images and not folder.is_dir():
        raise InputError(
            f"the store {options.store} has nothing of the encoder {encoder.fingerprint()[:16]}: give images with "
            "--images FOLDER, another --store, or precompute them with `bindllm embed --config RECIPE`"
        )
    return EmbeddingStore.for_encoder(options.store, encoder)


def _build_milvus(uri: str, store: EmbeddingStore) -> dict[str, str]:
    """Build a collection of all images in the store, and return its facts."""
    from bindllm.cache.blend import MILVUS_TOKEN
    from bindllm.cache.milvus import MilvusIndex

    with MilvusIndex.build(uri, store, token=os.environ.get(MILVUS_TOKEN)) as built:
        return {"images": f"{len(built):,}", "kind": built.info.index_type, "where": built.source}


def _build_folder(
    folder: str, options: IndexOptions, store: EmbeddingStore, encoder: Encoder
) -> dict[str, str]:
    """Build or update the index in a folder, and return its facts."""
    from bindllm.cache.build import build_or_update

    built = build_or_update(
        folder, store, encoder, images=options.images, factory=options.factory, rebuild=options.rebuild
    )
    # Advice of the build, such as a faster kind for this many images.
    for line in built.hints:
        print(line)
    index = built.index
    return {
        "images": f"{len(index):,} ({built.change})",
        "kind": " ".join(filter(None, (index.info.factory, index.info.search))),
        "bytes": f"{index.info.num_bytes:,}",
    }


def datastore(
    output: str,
    table: str,
    *,
    encoders: EncoderOptions = EncoderOptions(),
    options: DatastoreOptions = DatastoreOptions(),
    overrides: Sequence[str] = (),
) -> int:
    """Build a datastore: the records that a model with context retrieves (docs/context.md).

    Each media of the table becomes a record, with the texts of its rows. The
    media are not needed afterwards.

    Args:
        output: folder of the datastore; an earlier datastore there is replaced
        table: table of rows, or a folder, as the path of a data source

    Example:
        bindllm datastore datastores/birds data/birds --checkpoint checkpoints/context
    """
    refuse_together(encoder=encoders.encoder, checkpoint=encoders.checkpoint)
    if not (encoders.checkpoint or encoders.encoder):
        raise UsageError("which encoder? Give --checkpoint FOLDER or --encoder CLASS_OR_FOLDER")

    from bindllm.data.embeddings import MediaEmbeddings, build_datastore
    from bindllm.data.sources import read_source
    from bindllm.data.stream.chunks import CANNOT_EMBED
    from bindllm.embeddings.datastore import check_datastore_folder
    from bindllm.parallel import RunContext

    # How to read this: everything that can fail quickly comes first, because embedding may take hours.
    check_datastore_folder(output)
    config = SourceConfig(
        table, format=options.format, modality=options.modality, allow_outside=not options.inside_only
    )
    found, report = read_source(config)
    rows = [row for split, part in found.items() if options.split in (None, split) for row in part]
    context = RunContext(device=encoders.find_device(), progress=sys.stderr.isatty())
    embeddings = MediaEmbeddings(encoders.load(overrides), options.store)
    totals = embeddings.precompute((item for row in rows for item in row.media), context)
    for reason in totals.failed.values():
        report.skipped.add(CANNOT_EMBED, reason)
    for row in rows:
        if row.desirable is False:
            report.skipped.add("the answer is an unwanted one", row.name)
        elif not row.media:
            report.skipped.add("a row without media, which no media finds", row.name)
    built = build_datastore((row for row in rows if totals.failed.keys().isdisjoint(row.media)), embeddings)
    built.save(output)
    print(f"datastore {output}: {len(built):,} records of {len(rows):,} rows")
    for line in report.skipped.lines():
        print(f"  skipped: {line}")
    if encoders.checkpoint is not None:
        print(printable_lines(_cut_texts(built, encoders.checkpoint)), end="")
    return 0


def _cut_texts(built: Datastore, checkpoint: str) -> str:
    """Return a line about the texts that are longer than a checkpoint reads; empty if there are none."""
    from bindllm.model.checkpoint import read_manifest
    from bindllm.model.context.records import RecordReader
    from bindllm.model.decoder import load_tokenizer
    from bindllm.model.pretrained import read_configs, read_decoder

    manifest = read_manifest(checkpoint)
    # The datastore may be for another model with these encoders.
    if (context := read_configs(checkpoint, manifest)["context"]) is None:
        return ""
    try:
        tokenizer = load_tokenizer(read_decoder(checkpoint, manifest))
    except DecoderError as error:
        # The datastore needs no decoder.
        return f"  note: long texts were not counted: {error}\n"
    length = context.text_length
    cut = RecordReader(built, tokenizer, length).num_cut()
    return f"  note: {cut:,} texts are cut to the {length} tokens that the model reads\n" if cut else ""
