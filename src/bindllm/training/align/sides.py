"""The two sides of pairs in memory-bounded form: stored embeddings of frozen encoders, prepared media of a tower."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bindllm.data.embeddings import MediaEmbeddings
from bindllm.encoders import Encoder
from bindllm.errors import MediaError
from bindllm.media import Media
from bindllm.parallel import RunContext

PREPARED_BYTES = 1 << 30
"""Prepared media that are kept from epoch to epoch; what is beyond is prepared again each time."""


class StoredSide:
    """Media of a frozen encoder: embedded once, ever, and read from its store.

    Args:
        encoder: of this side.
        folder: of the stores.
    """

    def __init__(self, encoder: Encoder, folder: str | Path) -> None:
        self._embeddings = MediaEmbeddings([encoder], folder)
        self.encoded = 0

    def find_keys(
        self,
        media: Sequence[Media],
        context: RunContext = RunContext(),  # noqa: B008 (frozen)
    ) -> tuple[dict[Media, str], dict[Media, str]]:
        """Embed what the store lacks.

        Returns:
            The key of each media that is stored, and the reason for each that is not.
        """
        totals = self._embeddings.precompute(media, context)
        self.encoded += totals.encoded
        keys = {item: self._embeddings.key(item) for item in media if item not in totals.failed}
        return keys, totals.failed

    def inputs(self, media: Sequence[Media], keys: Sequence[str]) -> Tensor:
        """Return the embeddings, [N, W]."""
        return self._embeddings.lookup([(item,) for item in media])


class PreparedSide:
    """Media of a tower in training: prepared once as far as memory allows.

    Args:
        tower: prepares them.
        limit: bytes that are kept.
    """

    def __init__(self, tower: Any, *, limit: int = PREPARED_BYTES) -> None:
        self._tower, self._limit = tower, limit
        self._kept: dict[str, Tensor] = {}
        self._bytes = 0
        self.encoded = 0

    def find_keys(
        self,
        media: Sequence[Media],
        context: RunContext = RunContext(),  # noqa: B008 (frozen)
    ) -> tuple[dict[Media, str], dict[Media, str]]:
        """Open all media once, so that one that cannot be read is known before the first step.

        Returns:
            The key of each media that can be read, and the reason for each that cannot.
        """
        keys, failed = {}, {}
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for item, (key, reason) in zip(media, pool.map(self._open, media), strict=True):
                if reason is None:
                    keys[item] = key
                else:
                    failed[item] = reason
        return keys, failed

    def inputs(self, media: Sequence[Media], keys: Sequence[str]) -> list[Tensor]:
        """Return the prepared media."""
        return [self._prepare(item, key) for item, key in zip(media, keys, strict=True)]

    def _open(self, media: Media) -> tuple[str, str | None]:
        try:
            key = media.content_hash()
            if not self._prepare(media, key).isfinite().all():
                return "", f"{media.name}: the tower makes numbers of it that are not finite"
        except MediaError as error:
            return "", str(error)
        return key, None

    def _prepare(self, media: Media, key: str) -> Tensor:
        kept = self._kept.get(key)
        if kept is None:
            kept = self._tower.prepare(media)
            if self._bytes + kept.nbytes <= self._limit:
                self._bytes += kept.nbytes
                self._kept[key] = kept
        return kept


@dataclass(frozen=True)
class PairSet:
    """The pairs of one split, over media and targets that are told apart by content.

    Args:
        media: M different media, and their keys.
        targets: T different targets, those without media last, and their keys.
        links: pairs of numbers (media, target), int64 [N, 2], each once.
    """

    media: tuple[Media, ...]
    media_keys: tuple[str, ...]
    targets: tuple[Media, ...]
    target_keys: tuple[str, ...]
    links: Tensor

    def belongs(self, media: Tensor, targets: Tensor) -> Tensor:
        """Return for media [B] and targets [C], by number, whether they are a pair: bool [B, C]."""
        codes = (self.links[:, 0] * len(self.targets) + self.links[:, 1]).sort().values
        asked = media[:, None] * len(self.targets) + targets
        places = torch.searchsorted(codes, asked).clamp_max(len(codes) - 1)
        return codes[places] == asked

    def targets_of(self) -> list[list[int]]:
        """Return for each media the numbers of its targets."""
        return _grouped(self.links, 0, len(self.media))

    def media_of(self) -> list[list[int]]:
        """Return for each target the numbers of its media."""
        return _grouped(self.links, 1, len(self.targets))


def _grouped(links: Tensor, side: int, count: int) -> list[list[int]]:
    groups: list[list[int]] = [[] for _ in range(count)]
    for link in links.tolist():
        groups[link[side]].append(link[1 - side])
    return groups
