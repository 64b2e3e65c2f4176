"""The data of an alignment: pairs of media and targets, read from tables, in three splits.

Frozen encoders embed once; a trained tower gets augmented media.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader

from bindllm.data.collate import MediaGroup
from bindllm.data.embeddings import MediaEmbeddings, PrecomputeTotals
from bindllm.data.formats import clean_caption
from bindllm.data.formats.columns import read_split
from bindllm.data.formats.media import FolderResolver
from bindllm.data.report import Skipped
from bindllm.data.source_config import SPLITS, Split
from bindllm.data.sources import hashed_split, require_table
from bindllm.data.tables import Record, read_table
from bindllm.encoders.trainable import CanMix, is_trainable
from bindllm.errors import InputError, MediaError, did_you_mean
from bindllm.media import MODALITIES, Media, is_modality
from bindllm.parallel import SINGLE_PROCESS, RunContext

CANNOT_READ = "cannot be read or embedded"

Batch = dict[str, Any]


@dataclass
class PairSource:
    """One table of pairs."""

    path: str
    """A table (.jsonl, .csv, .tsv, .parquet) or a folder with one named captions.*; paths in it start at its folder."""

    modality: str = "text"
    """The modality to align; the same for all sources of a recipe."""

    columns: list[str] = field(default_factory=list)
    """Columns of that modality, each with a path, a text, or a list of them; by default `caption` for text, else the
    column with the name of the modality. All media of a row belong to its target."""

    target: str = "image"
    """Modality of the frozen side."""

    target_column: str | None = None
    """Column of the frozen side; by default the name of `target`."""

    split: Split | None = None
    """Split of the whole source. Without it, the column `split_column` decides, or else a hash of the target."""

    split_column: str = "split"
    """Optional column with train, validation (or val, valid, dev) or test."""

    held_out: float = 0.1
    """Share of targets, 0 to below 1, that the hash holds out: half for validation, half for test."""

    def __post_init__(self) -> None:
        for name in (self.modality, self.target):
            if not is_modality(name):
                raise InputError(
                    f"{self.path}: a modality is a lower-case word, not {name!r}. "
                    f"{did_you_mean(str(name).lower(), MODALITIES)}"
                )
        if self.split not in (None, *SPLITS):
            raise InputError(f"{self.path}: unknown split {self.split!r}. {did_you_mean(self.split, SPLITS)}")
        if not 0 <= self.held_out < 1:
            raise InputError(f"{self.path}: held_out must be from 0 to below 1, not {self.held_out}")
        self.columns = self.columns or ["caption" if self.modality == "text" else self.modality]
        self.target_column = self.target_column or self.target


class Pair(NamedTuple):
    """A target and one media that belongs to it; None: the target is only a further candidate in the gallery."""

    target: Media
    media: Media | None
    split: str
    name: str


@dataclass
class PairReport:
    """Counts of pairs, and of skipped rows with their reasons.

    Args:
        pairs: pairs per split.
        targets: different targets per split, including targets without media.
        media: different media per split.
        without_media: targets without media, which only enlarge the gallery.
        skipped: skipped pairs and rows.
    """

    pairs: dict[str, int] = field(default_factory=dict)
    targets: dict[str, int] = field(default_factory=dict)
    media: dict[str, int] = field(default_factory=dict)
    without_media: int = 0
    skipped: Skipped = field(default_factory=Skipped)

    def lines(self) -> Iterator[str]:
        """Yield the lines of the report."""
        for split in SPLITS:
            yield (
                f"{split}: {self.pairs[split]:,} pairs of {self.media[split]:,} media and "
                f"{self.targets[split]:,} targets"
            )
        if self.without_media:
            yield f"{self.without_media:,} targets have no media; the held-out ones are in the gallery"
        yield from (f"skipped: {line}" for line in self.skipped.lines())


def read_pairs(source: PairSource, skipped: Skipped) -> list[Pair]:
    """Return the pairs of a source, in its order.

    Raises:
        InputError: the source is missing, is not a table, or has none of the columns.
    """
    table, pairs = require_table(Path(source.path)), []
    seen: set[str] = set()
    splits: dict[str, str] = {}
    # A column counts as present if any row has it: rows of JSON lines may leave empty columns out.
    for name, record in read_table(table, (source.target_column,), skipped):
        seen |= record.keys()
        pairs += _row_pairs(name, record, source, table.parent, splits, skipped)
    missing = [column for column in source.columns if column not in seen]
    if missing and seen:
        raise InputError(f"{table}: no column {missing[0]!r}. {did_you_mean(missing[0], seen)}")
    return pairs


def _row_pairs(
    name: str, record: Record, source: PairSource, folder: Path, splits: dict[str, str], skipped: Skipped
) -> Iterator[Pair]:
    """Yield the pairs of one row; a row whose columns are all empty is a target without media."""
    value = record[source.target_column]
    target = _media(source.target, value, folder, f"{name}: {source.target_column}", skipped)
    if target is None:
        return
    # The key of evaluation too: a target that the hash holds out here is held out there.
    key = value if source.target == "text" else FolderResolver(str(folder)).key(target)
    try:
        split = source.split or read_split(record, source.split_column) or hashed_split(key, source.held_out)
    except InputError as error:
        skipped.add_error(error, name)
        return
    # Two rows of one target share its split, or the target would be in training and in the gallery.
    if splits.setdefault(key, split) != split:
        skipped.add(f"this {source.target} is in another split already", name)
        return
    found = False
    # Every media of every column is a pair of its own with the target.
    for column in source.columns:
        values = record.get(column)
        for each in values if isinstance(values, list) else [values]:
            if each is None or each == "":
                continue
            found = True
            media = _media(source.modality, each, folder, f"{name}: {column}", skipped)
            if media is not None:
                yield Pair(target, media, split, name)
    if not found:
        yield Pair(target, None, split, name)


def _media(modality: str, value: object, folder: Path, name: str, skipped: Skipped) -> Media | None:
    """Return the media of one cell; a cell without media is counted as skipped."""
    if not isinstance(value, str) or not value.strip():
        skipped.add(f"no {'text' if modality == 'text' else f'path of {modality} media'}", name)
        return None
    if modality == "text":
        # As captions of training rows: control characters removed, white space on one line.
        words, _ = clean_caption(value)
        if not words:
            skipped.add("empty text", name)
            return None
        return Media.text(words)
    # An absolute path stays as it is.
    file = os.path.join(folder, value)
    if not os.path.isfile(file):
        skipped.add(f"no such {modality} file", f"{name}: {value}")
        return None
    return Media(modality, file)


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
        if mix and not isinstance(tower, CanMix):
            raise InputError(f"data.mix is {mix}, but {type(tower).__name__} has no method mix; set it to 0")
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
        self._sides: tuple[MediaEmbeddings | PreparedMedia, MediaEmbeddings] | None = None

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
        # A frozen tower embeds once; a trained one needs the prepared media in every epoch.
        trained = is_trainable(self.tower)
        own = PreparedMedia(self.tower) if trained else MediaEmbeddings([self.tower], self.store)
        self._sides = (own, MediaEmbeddings([self.target], self.store))
        # Every process reads all pairs, so none of them divides the work.
        context = replace(RunContext.of_trainer(self.trainer), processes=SINGLE_PROCESS)
        keys: dict[Media, str] = {}
        failed: dict[Media, str] = {}
        wanted = ([pair.media for pair in pairs if pair.media], [pair.target for pair in pairs])
        for side, items in zip(self._sides, wanted, strict=True):
            items = list(dict.fromkeys(items))
            failed |= side.precompute(items, context).failed
            keys |= {item: side.key(item) for item in items if item not in failed}
        self._splits = self._sorted(self._readable(pairs, failed), keys)
        self._check_negatives(self._splits["train"])

    def pairs(self, split: str) -> PairSet:
        """Return the pairs of a split; `setup` comes first."""
        return self._splits[split]

    def media_inputs(self, pairs: PairSet, indices: Tensor) -> Tensor | list[Tensor]:
        """Return the inputs of the trained part for some media: vectors [B, W] of a frozen tower, or prepared media."""
        return self._sides[0].lookup([(pairs.media[n],) for n in indices.tolist()])

    def target_rows(self, pairs: PairSet, indices: Tensor) -> Tensor:
        """Return the frozen embeddings of some targets, [B, E]."""
        return self._sides[1].lookup([(pairs.targets[n],) for n in indices.tolist()])

    def train_dataloader(self) -> DataLoader:
        """Return the loader of training batches; each call starts again with the same random numbers."""
        pairs = self.pairs("train")
        siblings = pairs.media_of()
        # Two generators: the order of rows must not depend on how much augmentation draws.
        generator = torch.Generator().manual_seed(self.seed)
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
            if (reason := failed.get(pair.target) or failed.get(pair.media)) is None:
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


class PreparedMedia:
    """Media of a trained tower, prepared once as far as memory allows; with the methods of `MediaEmbeddings`."""

    def __init__(self, tower: Any) -> None:
        self._tower = tower
        self._kept: dict[Media, Tensor] = {}
        self._keys: dict[Media, str] = {}
        self._bytes = 0

    def precompute(self, media: Sequence[Media], context: RunContext) -> PrecomputeTotals:
        """Open all media once, so that unreadable media are found before the first step."""
        totals = PrecomputeTotals()

        def open_one(item: Media) -> None:
            try:
                if self._prepare(item).isfinite().all():
                    self._keys[item] = item.content_hash()
                else:
                    totals.failed[item] = f"{item.name}: the tower prepares values that are not finite"
            except MediaError as error:
                totals.failed[item] = str(error)

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            # The list waits for all of them, and raises any other error.
            list(pool.map(open_one, media))
        return totals

    def key(self, media: Media) -> str:
        """Return the content hash of opened media."""
        return self._keys[media]

    def lookup(self, groups: Sequence[MediaGroup]) -> list[Tensor]:
        """Return the prepared media, one of each group."""
        return [self._prepare(item) for (item,) in groups]

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
