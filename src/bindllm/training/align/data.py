"""The data of an alignment: pairs in three splits. Frozen encoders embed once; a trained tower gets augmented media."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader

from bindllm.data.embeddings import MediaEmbeddings
from bindllm.data.sources import SPLITS
from bindllm.encoders import Encoder
from bindllm.encoders.trainable import CanMix, is_trainable
from bindllm.errors import InputError, MediaError
from bindllm.media import Media
from bindllm.parallel import SINGLE_PROCESS, RunContext
from bindllm.training.align.pairs import Pair, PairReport, PairSource, read_pairs

CANNOT_READ = "cannot be read or embedded"

Batch = dict[str, Any]
Keys = tuple[dict[Media, str], dict[Media, str]]
"""The key of each media that can be used, and the reason for each of the others."""


class AlignData(LightningDataModule):
    """Pairs of a recipe.

    The signature is the ``data`` section of a recipe.

    Args:
        sources: tables of pairs, all of the same modality and target.
        store: folder of the embedding stores of the frozen encoders.
        batch_size: pairs in a training step; the other pairs of the batch are the negatives.
        mix: share of training rows, 0 to 1, that are mixed with a second media of the same target; for a trained tower
            that can mix.
        seed: seed of order and augmentation.
        tower: the tower of the recipe's model.
        target: the target of the recipe's model.
    """

    def __init__(
        self,
        sources: list[PairSource],
        store: str = "data/store",
        batch_size: int = 256,
        mix: float = 0.0,
        seed: int = 0,
        tower: Any = None,
        target: Any = None,
    ) -> None:
        super().__init__()
        # Refused here, before any encoder is loaded.
        if not sources:
            raise InputError("data.sources is empty; name at least one source of pairs")
        if batch_size < 2:
            raise InputError(
                f"data.batch_size must be at least 2, so that a pair has negatives; not {batch_size}"
            )
        if not 0 <= mix <= 1:
            raise InputError(f"data.mix must be from 0 to 1, not {mix}")
        for name in ("modality", "target"):
            found = sorted({vars(source)[name] for source in sources})
            if len(found) > 1:
                raise InputError(
                    f"all sources of a recipe must have the same {name}; found {', '.join(found)}"
                )
        self.sources, self.store, self.batch_size = sources, store, batch_size
        self.mix, self.seed, self.tower, self.target = mix, seed, tower, target
        self.modality = sources[0].modality
        self.report = PairReport()
        self._splits: dict[str, PairSet] | None = None
        self._sides: tuple[StoredSide | PreparedSide, StoredSide] | None = None

    def setup(self, stage: str | None = None) -> None:
        """Read the pairs, and embed or open all their media, once.

        Raises:
            InputError: an encoder does not serve its side, or too few pairs remain.
        """
        if self._splits is not None:
            return
        # Everything is read and embedded before the first step: a bad file costs seconds now, and hours later.
        self._check_modalities()
        pairs = [pair for source in self.sources for pair in read_pairs(source, self.report.skipped)]
        trained = is_trainable(self.tower)
        # A frozen tower embeds once; a trained one needs the prepared media in every epoch.
        self._sides = (
            PreparedSide(self.tower) if trained else StoredSide(self.tower, self.store),
            StoredSide(self.target, self.store),
        )
        # Every process reads all pairs, so none of them divides the work.
        context = replace(RunContext.of_trainer(self.trainer), processes=SINGLE_PROCESS)
        keys: dict[Media, str] = {}
        failed: dict[Media, str] = {}
        wanted = ([pair.media for pair in pairs if pair.media], [pair.target for pair in pairs])
        for side, items in zip(self._sides, wanted, strict=True):
            found = side.find_keys(list(dict.fromkeys(items)), context)
            keys |= found[0]
            failed |= found[1]
        self._splits = self._sorted(self._readable(pairs, failed), keys)
        self._check_negatives(self._splits["train"])

    def pairs(self, split: str) -> PairSet:
        """Return the pairs of a split."""
        self.setup()
        return self._splits[split]

    def media_inputs(self, pairs: PairSet, numbers: Tensor) -> Tensor | list[Tensor]:
        """Return the inputs of the trained part for some media: vectors [B, W] of a frozen tower, or prepared media."""
        return self._sides[0].inputs([pairs.media[n] for n in numbers.tolist()])

    def target_rows(self, pairs: PairSet, numbers: Tensor) -> Tensor:
        """Return the frozen embeddings of some targets, [B, E]."""
        return self._sides[1].inputs([pairs.targets[n] for n in numbers.tolist()])

    def train_dataloader(self) -> DataLoader:
        """Return the loader of training batches; each call starts again with the same random numbers."""
        pairs = self.pairs("train")
        generator = torch.Generator().manual_seed(self.seed)
        # Two generators: the order of rows must not depend on how much augmentation draws.
        siblings = pairs.media_of()
        return DataLoader(
            range(len(pairs.links)),
            batch_size=self.batch_size,
            shuffle=True,
            generator=torch.Generator().manual_seed(self.seed),
            collate_fn=lambda rows: self._batch(pairs, rows, siblings, generator),
        )

    def _batch(
        self, pairs: PairSet, rows: list[int], siblings: list[list[int]], generator: torch.Generator
    ) -> Batch:
        media, targets = pairs.links[rows].T
        inputs = self.media_inputs(pairs, media)
        # Prepared media of a trained tower; vectors of a frozen one are neither augmented nor mixed.
        if isinstance(inputs, list):
            inputs = [self.tower.augment(item, generator) for item in inputs]
            inputs = self._mixed(pairs, inputs, media, targets, siblings, generator)
        return {
            "inputs": inputs,
            "targets": self.target_rows(pairs, targets),
            "belongs": pairs.belongs(media, targets),
        }

    def _mixed(
        self,
        pairs: PairSet,
        inputs: list[Tensor],
        media: Tensor,
        targets: Tensor,
        siblings: list[list[int]],
        generator: torch.Generator,
    ) -> list[Tensor]:
        """Mix some of the inputs with a second media of the same target."""
        if not isinstance(self.tower, CanMix):
            return inputs
        # Drawn for all rows at once: the sequence is the same, whichever rows are mixed.
        drawn = torch.rand(len(inputs), 2, generator=generator)
        for row, (share, draw) in enumerate(drawn.tolist()):
            others = [n for n in siblings[int(targets[row])] if n != int(media[row])]
            if others and share < self.mix:
                other = torch.tensor([others[int(draw * len(others))]])
                second = self.tower.augment(self.media_inputs(pairs, other)[0], generator)
                inputs[row] = self.tower.mix(inputs[row], second, generator)
        return inputs

    def _check_modalities(self) -> None:
        trained = is_trainable(self.tower)
        for name, served, wanted in (
            ("tower", (self.tower.modality,) if trained else self.tower.modalities, self.modality),
            ("target", self.target.modalities, self.sources[0].target),
        ):
            if wanted not in served:
                raise InputError(
                    f"the {name} of the recipe serves {', '.join(served)} media, but the sources have {wanted} media"
                )

    def _check_negatives(self, train: PairSet) -> None:
        """Refuse training pairs without negatives, such as a single pair."""
        # If every media belongs to every target, the loss is constant.
        num_targets = len(set(train.links[:, 1].tolist()))
        if len(train.links) == len(train.media) * num_targets:
            skipped = "; ".join(self.report.skipped.lines()) or "nothing was skipped"
            raise InputError(
                f"{len(train.links)} training pairs of {len(train.media)} different {self.modality} media and "
                f"{num_targets} different targets: there are no negatives. At least two of each are needed that do not "
                f"all belong together. {skipped}"
            )

    def _readable(self, pairs: list[Pair], failed: dict[Media, str]) -> list[Pair]:
        """Skip and count pairs with media that cannot be read."""
        kept = []
        for pair in pairs:
            reason = failed.get(pair.target) or (failed.get(pair.media) if pair.media else None)
            if reason is None:
                kept.append(pair)
            else:
                self.report.skipped.add(CANNOT_READ, f"{pair.name}: {reason}")
        return kept

    def _sorted(self, pairs: list[Pair], keys: dict[Media, str]) -> dict[str, PairSet]:
        """Return the pairs of each split, deduplicated by content.

        Held-out pairs have no copy in training on either side. If a copy of the target is in the training split, the
        pair is skipped; if a copy of the media is, the target stays in the gallery.
        """
        # Compared by content, not by name: copies of a file in two splits would make retrieval look better than it is.
        trained = {keys[item] for pair in pairs if pair.split == "train" for item in pair[:2] if item}
        by_split: dict[str, list[Pair]] = {split: [] for split in SPLITS}
        for pair in pairs:
            if pair.split != "train" and keys[pair.target] in trained:
                self.report.skipped.add(f"its {pair.target.modality} is in the training split too", pair.name)
                continue
            if pair.split != "train" and pair.media and keys[pair.media] in trained:
                self.report.skipped.add(f"its {pair.media.modality} is in the training split too", pair.name)
                pair = pair._replace(media=None)
            by_split[pair.split].append(pair)
        splits = {split: _pair_set(found, keys) for split, found in by_split.items()}
        for split, found in splits.items():
            self.report.pairs[split] = len(found.links)
            self.report.media[split], self.report.targets[split] = len(found.media), len(found.targets)
            self.report.without_media += len(found.targets) - len(set(found.links[:, 1].tolist()))
        return splits


def _pair_set(pairs: list[Pair], keys: dict[Media, str]) -> PairSet:
    """Index media and targets by their content."""
    media: dict[str, tuple[int, Media]] = {}
    targets: dict[str, tuple[int, Media]] = {}
    links: dict[tuple[int, int], None] = {}
    # Targets without media come last, so that the queries are the first ones.
    for pair in sorted(pairs, key=lambda pair: pair.media is None):
        target, _ = targets.setdefault(keys[pair.target], (len(targets), pair.target))
        if pair.media is not None:
            own, _ = media.setdefault(keys[pair.media], (len(media), pair.media))
            links[own, target] = None
    return PairSet(
        media=tuple(item for _, item in media.values()),
        targets=tuple(item for _, item in targets.values()),
        links=torch.tensor(list(links), dtype=torch.int64).reshape(-1, 2),
    )


PREPARED_BYTES = 1 << 30
"""Bytes of prepared media that are kept between epochs; further media are prepared again each time."""


class StoredSide:
    """Media of a frozen encoder: embedded once, and read from its store.

    Args:
        encoder: encoder of this side.
        folder: folder of the stores.
    """

    def __init__(self, encoder: Encoder, folder: str | Path) -> None:
        self._embeddings = MediaEmbeddings([encoder], folder)

    def find_keys(self, media: Sequence[Media], context: RunContext) -> Keys:
        """Embed media that are not in the store."""
        totals = self._embeddings.precompute(media, context)
        keys = {item: self._embeddings.key(item) for item in media if item not in totals.failed}
        return keys, totals.failed

    def inputs(self, media: Sequence[Media]) -> Tensor:
        """Return the embeddings, [N, W]."""
        return self._embeddings.lookup([(item,) for item in media])


class PreparedSide:
    """Media of a trained tower: prepared once, as far as memory allows."""

    def __init__(self, tower: Any) -> None:
        self._tower = tower
        self._kept: dict[Media, Tensor] = {}
        self._bytes = 0

    def find_keys(self, media: Sequence[Media], context: RunContext) -> Keys:
        """Open all media once, so that unreadable media are found before the first step."""
        keys: dict[Media, str] = {}
        failed: dict[Media, str] = {}

        def open_one(item: Media) -> None:
            try:
                if self._prepare(item).isfinite().all():
                    keys[item] = item.content_hash()
                else:
                    failed[item] = f"{item.name}: the tower prepares values that are not finite"
            except MediaError as error:
                failed[item] = str(error)

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            # The list waits for all of them, and raises any other error.
            list(pool.map(open_one, media))
        return keys, failed

    def inputs(self, media: Sequence[Media]) -> list[Tensor]:
        """Return the prepared media."""
        return [self._prepare(item) for item in media]

    def _prepare(self, media: Media) -> Tensor:
        kept = self._kept.get(media)
        if kept is None:
            kept = self._tower.prepare(media)
            # Beyond the limit media are prepared again in every epoch: slower, and never out of memory.
            if self._bytes + kept.nbytes <= PREPARED_BYTES:
                self._bytes += kept.nbytes
                self._kept[media] = kept
        return kept


@dataclass(frozen=True)
class PairSet:
    """The pairs of one split, with media and targets deduplicated by content.

    Args:
        media: M different media.
        targets: T different targets; those without media are last.
        links: unique pairs of indices (media, target), int64 [N, 2].
    """

    media: tuple[Media, ...]
    targets: tuple[Media, ...]
    links: Tensor

    def belongs(self, media: Tensor, targets: Tensor) -> Tensor:
        """Return whether media [B] and targets [C], given by index, are pairs: bool [B, C]."""
        # A pair as one number, media * T + target, and a binary search: no [M, T] matrix is built.
        codes = (self.links[:, 0] * len(self.targets) + self.links[:, 1]).sort().values
        asked = media[:, None] * len(self.targets) + targets
        found = torch.searchsorted(codes, asked).clamp_max(len(codes) - 1)
        return codes[found] == asked

    def targets_of(self) -> list[list[int]]:
        """Return the indices of the targets of each media."""
        return _grouped(self.links, 0, len(self.media))

    def media_of(self) -> list[list[int]]:
        """Return the indices of the media of each target."""
        return _grouped(self.links, 1, len(self.targets))


def _grouped(links: Tensor, side: int, count: int) -> list[list[int]]:
    groups: list[list[int]] = [[] for _ in range(count)]
    for link in links.tolist():
        groups[link[side]].append(link[1 - side])
    return groups
