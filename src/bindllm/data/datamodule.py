"""Everything between the data section of a recipe and the batches of a run."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from rich.console import Console
from rich.progress import track

from bindllm.data.batches import (
    BatchLoader,
    LengthGroupedBatches,
    ResumableLoader,
    share,
    sorted_batches,
)
from bindllm.data.captions import SPLITS
from bindllm.data.collate import Batch, Lookup, collate
from bindllm.data.embeddings import MediaEmbeddings
from bindllm.data.preview import preview_lines
from bindllm.data.report import DataReport
from bindllm.data.sources import Row, SourceConfig, read_source
from bindllm.data.tokenise import Sample, tokenise
from bindllm.errors import InputError, known_names
from bindllm.media import Media
from bindllm.retrieval.fill import ALONE
from bindllm.retrieval.ranks import Ranks

CANNOT_EMBED = "media that cannot be embedded"


class BindData(LightningDataModule):
    """Reads the sources, embeds their media once, and gives batches.

    Embeddings are read from the memory-mapped store when a batch is made, which takes so little time that there
    are no worker processes. Validation and test batches have twice the rows of a training batch.

    Args:
        sources: where rows come from.
        store: folder of the embedding stores.
        batch_size: rows of a training batch, per device.
        max_length: longest row in tokens; a longer answer is cut.
        seed: of the order of rows.
        tokenizer: of the decoder; the command line hands it over.
        encoders: serve the modalities of the data; the command line hands them over.

    Attributes:
        report: what was read, left out and embedded.

    Raises:
        InputError: no sources, or a size below 1.
    """

    def __init__(
        self,
        sources: list[SourceConfig],
        store: str = "data/store",
        batch_size: int = 16,
        max_length: int = 128,
        seed: int = 0,
        tokenizer: Any = None,
        encoders: Any = None,
    ) -> None:
        super().__init__()
        if not sources:
            raise InputError("data.sources is empty; name at least one source, such as {path: data/openmoji}")
        for name, value in (("batch_size", batch_size), ("max_length", max_length)):
            if value < 1:
                raise InputError(f"data.{name} must be at least 1, not {value}")
        self.sources, self.store = sources, store
        self.batch_size, self.max_length, self.seed = batch_size, max_length, seed
        self.tokenizer, self.encoders = tokenizer, encoders
        self.report = DataReport()
        self._rows: dict[str, list[Row]] | None = None
        self._embeddings: MediaEmbeddings | None = None
        self._samples: dict[str, list[Sample]] | None = None

    def read(self) -> None:
        """Read the sources, once.

        Raises:
            InputError: a source that is missing or has no row that can be used.
        """
        if self._rows is not None:
            return
        started = time.perf_counter()
        rows: dict[str, list[Row]] = {split: [] for split in SPLITS}
        for number, config in enumerate(self.sources):
            found, report = read_source(config, number)
            for split in SPLITS:
                rows[split] += found[split]
            self.report.sources.append(report)
            self.report.skipped.update(report.skipped)
        self._rows = rows
        self.report.seconds += time.perf_counter() - started

    def prepare_data(self) -> None:
        """Read the sources and embed what the stores lack, once. Lightning calls this in one process first."""
        self.embed("cpu" if self.trainer is None else self.trainer.strategy.root_device)

    def embed(self, device: torch.device | str, ranks: Ranks = ALONE) -> None:
        """Read the sources and embed what the stores lack, once.

        Args:
            device: where the encoders run.
            ranks: which of several processes this one is; only the first can go on to make samples.
        """
        self.read()
        if self._embeddings is not None:
            return
        embeddings = MediaEmbeddings(self.encoders, self.store)
        media = (item for rows in self._rows.values() for row in rows for item in row.media)
        totals = embeddings.fill(media, device=device, progress=_watched() and ranks.first, ranks=ranks)
        self._rows = {split: self._without(rows, totals.failed) for split, rows in self._rows.items()}
        self._embeddings = embeddings
        self.report.encoded, self.report.reused = totals.encoded, totals.reused
        self.report.seconds_embedding = totals.seconds
        self.report.seconds += totals.seconds

    def setup(self, stage: str | None = None) -> None:
        """Make the samples of all splits, once.

        Raises:
            InputError: not one row of any split can be used.
        """
        self.prepare_data()
        if self._samples is not None:
            return
        started = time.perf_counter()
        samples = {split: self._tokenise(rows) for split, rows in self._rows.items()}
        if not any(samples.values()):
            raise InputError(f"no row of the data can be used: {'; '.join(self.report.skipped.lines())}")
        self._samples = samples
        self._count(samples)
        self.report.seconds += time.perf_counter() - started

    def samples(self, split: str) -> list[Sample]:
        """Return the samples of a split, in the order of the sources.

        Raises:
            InputError: an unknown split.
        """
        if split not in SPLITS:
            raise InputError(f"unknown split {split!r}. {known_names(split, SPLITS)}")
        self.setup()
        return self._samples[split]

    @property
    def lookup(self) -> Lookup:
        """Gives the embeddings of the media groups of any sample, [N, E]."""
        self.prepare_data()
        return self._embeddings.lookup

    def train_dataloader(self) -> ResumableLoader:
        """Return the loader of training batches; it goes on where the trainer stands.

        Raises:
            InputError: there are no training rows.
        """
        samples = self.samples("train")
        if not samples:
            raise InputError(
                f"no training rows; there are {self.report.rows}. Lower held_out, or check the column split"
            )
        rank, world_size = self._process()
        batches = LengthGroupedBatches(
            [len(sample.input_ids) for sample in samples],
            batch_size=self.batch_size,
            seed=self.seed,
            sources=[sample.source for sample in samples],
            weights=[config.weight for config in self.sources],
            world_size=world_size,
            rank=rank,
        )
        return ResumableLoader(batches, lambda rows: self._batch(samples, rows), position=self._position)

    def val_dataloader(self) -> BatchLoader:
        """Return the loader of validation batches."""
        return self._evaluation_loader("validation")

    def test_dataloader(self) -> BatchLoader:
        """Return the loader of test batches."""
        return self._evaluation_loader("test")

    def preview(self, number: int) -> Iterator[str]:
        """Yield lines that show the first training rows with their loss mask and media; embeds nothing."""
        self.read()
        for row in self._rows["train"][:number]:
            try:
                sample = self._sample(row)
            except InputError as error:
                yield f"{row.name}: left out ({error})"
            else:
                yield from preview_lines(sample, self.tokenizer)

    def _without(self, rows: list[Row], failed: dict[Media, str]) -> list[Row]:
        """Leave out rows with failed media, and count them."""
        kept = []
        for row in rows:
            reasons = [failed[item] for item in row.media if item in failed]
            if reasons:
                self.report.skipped.add(CANNOT_EMBED, f"{row.name}: {reasons[0]}")
            else:
                kept.append(row)
        return kept

    def _sample(self, row: Row) -> Sample:
        sample = tokenise(row.conversation, self.tokenizer, self.max_length)
        return replace(sample, references=row.references, name=row.name, source=row.source)

    def _tokenise(self, rows: list[Row]) -> list[Sample]:
        """Make samples; what cannot become one is counted with its reason."""
        samples = []
        for row in track(
            rows, "tokenising", console=Console(stderr=True), transient=True, disable=not _watched()
        ):
            try:
                samples.append(self._sample(row))
            except InputError as error:
                self.report.skipped.add(str(error), row.name)
        return samples

    def _count(self, samples: dict[str, list[Sample]]) -> None:
        """Fill the report with what became of the rows."""
        everything = [sample for split in samples.values() for sample in split]
        self.report.rows = {split: len(samples[split]) for split in SPLITS}
        self.report.truncated = sum(sample.truncated for sample in everything)
        self.report.text_only = sum(not sample.media for sample in everything)
        self.report.supervised_tokens = sum(sample.num_supervised for sample in samples["train"])
        trained = {key for sample in samples["train"] for key in self._content(sample)}
        held_out = samples["validation"] + samples["test"]
        self.report.shared_media = sum(not trained.isdisjoint(self._content(sample)) for sample in held_out)

    def _content(self, sample: Sample) -> list[str]:
        """Content hashes of the media of a sample."""
        return [self._embeddings.key(media) for group in sample.media for media in group]

    def _evaluation_loader(self, split: str) -> BatchLoader:
        samples = self.samples(split)
        rank, world_size = self._process()
        batches = sorted_batches(
            [len(sample.input_ids) for sample in samples], batch_size=2 * self.batch_size
        )
        batches = share(batches, world_size=world_size, rank=rank)
        return BatchLoader(batches, lambda rows: self._batch(samples, rows))

    def _batch(self, samples: list[Sample], rows: list[int]) -> Batch:
        return collate([samples[n] for n in rows], self.lookup, pad_id=self.tokenizer.pad_token_id)

    def _process(self) -> tuple[int, int]:
        """Number of this process and of all."""
        return (0, 1) if self.trainer is None else (self.trainer.global_rank, self.trainer.world_size)

    def _position(self) -> tuple[int, int]:
        """Epoch, and number of its batches that are done."""
        if self.trainer is None:
            return 0, 0
        return self.trainer.current_epoch, self.trainer.fit_loop.epoch_loop.batch_progress.current.ready


def _watched() -> bool:
    """Whether somebody sees a progress bar."""
    return sys.stderr.isatty()
