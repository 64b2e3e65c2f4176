"""From image files to their keys in an embedding store, embedding the ones it lacks."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from bindllm.embeddings.precompute import precompute_embeddings
from bindllm.errors import InputError
from bindllm.media import SUFFIXES, Media

if TYPE_CHECKING:
    from bindllm.embeddings.store import EmbeddingStore
    from bindllm.encoders import Encoder


def embed_images(
    images: str | Path | Sequence[str | Path], encoder: Encoder, store: EmbeddingStore
) -> list[str]:
    """Embed images into a store, and return their keys, each once, in the order of the images.

    Args:
        images: A folder, including its subfolders, or paths of images.
        encoder: Embeds the images that the store lacks.
        store: The store of this encoder.

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
        problem = "is a file; write it as a list of one path" if folder.exists() else "does not exist"
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
