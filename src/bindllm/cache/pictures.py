"""From picture files to their keys in a store, embedding what it lacks."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from bindllm.embeddings.embedder import fill
from bindllm.errors import InputError, MediaError
from bindllm.media import ENDINGS, Media

if TYPE_CHECKING:
    from bindllm.embeddings.store import EmbeddingStore
    from bindllm.encoders import Encoder


def embed_pictures(
    pictures: str | Path | Sequence[str | Path], encoder: Encoder, store: EmbeddingStore
) -> list[str]:
    """Embed pictures into a store, and return their keys, each once, in the order of the pictures.

    Args:
        pictures: a folder, with all its sub-folders, or paths of pictures.
        encoder: embeds those that the store lacks.
        store: of this encoder.

    Raises:
        InputError: no picture there that can be read.
    """
    media = [Media.image(file) for file in find_pictures(pictures)]
    report = fill(store, encoder, media)
    if report.failed:
        logging.getLogger("bindllm").warning(
            "%d of %d pictures cannot be read and are left out; the first: %s",
            len(report.failed),
            len(media),
            report.failed[0][1],
        )
    keys: dict[str, None] = {}
    for item in media:
        try:
            keys[store.key_of(item)] = None
        except MediaError:
            continue
    known = list(keys)
    stored = [key for key, has in zip(known, store.has(known), strict=True) if has]
    if not stored:
        raise InputError(f"none of the {len(media)} pictures can be read; the first: {report.failed[0][1]}")
    return stored


def find_pictures(pictures: str | Path | Sequence[str | Path]) -> list[Path]:
    """Return the paths that are meant, those of a folder sorted.

    Other files of a folder are counted in the log.

    Raises:
        InputError: no such folder, a file in its place, or no pictures.
    """
    if not isinstance(pictures, str | Path):
        found = [Path(file) for file in pictures]
        if not found:
            raise InputError("no pictures were named; give a folder or at least one path")
        return found
    folder = Path(pictures)
    if not folder.is_dir():
        what = "is a file; write it as a list of one path" if folder.exists() else "does not exist"
        raise InputError(f"expected a folder of pictures, but {str(folder)!r} {what}")
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    found = [file for file in files if file.suffix.lower() in ENDINGS["image"]]
    endings = ", ".join(sorted(ENDINGS["image"]))
    if not found:
        raise InputError(f"{folder} holds {len(files)} files and no picture ({endings})")
    if len(found) < len(files):
        logging.getLogger("bindllm").info(
            "%s: %d of %d files are no pictures (%s)", folder, len(files) - len(found), len(files), endings
        )
    return found
