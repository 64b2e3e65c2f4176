"""The visual cache that a model answers with: named in a recipe or a checkpoint, and opened with the model."""

from __future__ import annotations

import os
from collections.abc import Collection
from dataclasses import asdict, dataclass, field, fields
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from bindllm.cache.blend import check_settings
from bindllm.cache.index import VectorIndex
from bindllm.cache.visual_cache import VisualCache
from bindllm.errors import InputError, StoreError

if TYPE_CHECKING:
    from bindllm.cache.visual_cache import Index

_DEFAULTS: dict[str, Any] = {name: one.default for name, one in signature(VisualCache).parameters.items()}

CacheChoice = VisualCache | Literal[False] | None
"""What a call says of the cache: this one; none; whatever the model has."""

MILVUS_FILE = ".db"
"""Ending of the file of an embedded Milvus."""

MILVUS_TOKEN = "MILVUS_TOKEN"
"""Variable of the environment with the token of a Milvus that asks for one."""


@dataclass
class CacheConfig:
    """Which visual cache a model answers with, and how it is mixed in (see `VisualCache`)."""

    folder: str
    """A folder that `bindllm index` wrote, or a file of Milvus (.db)."""

    top_k: int = _DEFAULTS["top_k"]
    """Neighbours that are mixed in; fewer where the cache is smaller."""

    temperature: float = _DEFAULTS["temperature"]
    """Sharpness of the formula `released`: 0 counts all neighbours alike."""

    weight: float = _DEFAULTS["weight"]
    """Share of the neighbours, from 0 (as without a cache) to 1."""

    formula: Literal["released", "paper"] = _DEFAULTS["formula"]
    """How neighbours are weighed: as the `released` code of ImageBind-LLM does, or as its `paper` says."""

    skip: list[str] = field(default_factory=lambda: list(_DEFAULTS["skip"]))
    """Modalities that are left as they are; pictures need no cache."""

    def __post_init__(self) -> None:
        # A mapping with a misspelt key is a text to the command line.
        if not isinstance(self.folder, str) or not self.folder or self.folder.startswith("{"):
            raise InputError(
                f"cache.folder is {self.folder!r}, expected the path of a folder, or of settings "
                f"{', '.join(one.name for one in fields(self))}"
            )
        if is_address(self.folder):
            # Whoever loads a stranger's checkpoint would send that server what is asked.
            raise InputError(
                f"cache.folder {self.folder!r} is the address of a server, which a recipe or a checkpoint must not "
                "name: give it where the model is used, as cache= or --cache"
            )
        check_settings(self.top_k, self.temperature, self.weight, self.formula)

    @property
    def settings(self) -> dict[str, Any]:
        """How the cache is mixed in: the keywords of `VisualCache`."""
        return {name: value for name, value in asdict(self).items() if name != "folder"}


def is_address(place: str) -> bool:
    """Return whether a cache is at a server and not in a file or folder."""
    return "://" in place


def is_milvus(place: str) -> bool:
    """Return whether a cache is kept by Milvus: a server's address, or the file of an embedded one."""
    return is_address(place) or place.endswith(MILVUS_FILE)


def open_index(place: str) -> Index:
    """Open the index at a place: a folder, the file of an embedded Milvus, or the address of a server.

    Raises:
        StoreError: there is none, or it cannot be used.
        MissingExtraError: the package that reads it is not installed.
    """
    if not is_milvus(place):
        return VectorIndex.open(place)
    from bindllm.cache.milvus import MilvusIndex

    return MilvusIndex.open(place, token=os.environ.get(MILVUS_TOKEN))


def open_cache(
    place: str, fingerprints: Collection[str], *, checkpoint: str | Path = "CHECKPOINT", **settings: Any
) -> VisualCache:
    """Open the cache at a place for a model with these encoders.

    Args:
        place: as for `open_index`.
        fingerprints: of the model's encoders.
        checkpoint: the model's folder, for the command in an error.
        **settings: as for `VisualCache`.

    Raises:
        StoreError: it is missing, damaged, or was built with none of these encoders; tells both ways out.
        InputError: a setting out of its range.
    """
    try:
        cache = VisualCache(open_index(place), **settings)
        cache.check_encoders(fingerprints)
    except StoreError as error:
        output = f"--milvus {place}" if is_milvus(place) else place
        raise StoreError(
            f"the visual cache {place} cannot be used: {error}. Build it with `bindllm index {output} --checkpoint "
            f"{checkpoint}`, or do without it: cache=False, on the command line --no_cache"
        ) from error
    return cache


def choose_cache(
    asked: CacheChoice | str | Path,
    named: CacheConfig | None,
    fingerprints: Collection[str],
    *,
    checkpoint: str | Path,
) -> VisualCache | None:
    """Return the cache that a model answers with.

    Args:
        asked: a cache; the place of one, which is mixed in as the checkpoint says; False: none; None: what the
            checkpoint names.
        named: what the checkpoint names, if anything.
        fingerprints: of the model's encoders.
        checkpoint: its folder, for errors.

    Raises:
        StoreError: the cache cannot be opened, or was built with none of these encoders.
        InputError: what was asked for is no cache.
    """
    settings = {} if named is None else named.settings
    if isinstance(asked, VisualCache):
        asked.check_encoders(fingerprints)
        return asked
    if isinstance(asked, str | Path):
        return open_cache(str(asked), fingerprints, checkpoint=checkpoint, **settings)
    if asked is None and named is not None:
        return open_cache(named.folder, fingerprints, checkpoint=checkpoint, **settings)
    if asked is None or asked is False:
        return None
    raise InputError(f"cache is {asked!r}, expected a VisualCache, the path of one, False or None")
