"""The data module: from the data section of a recipe to the batches of a run."""

from __future__ import annotations

import hashlib
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import cached_property
from typing import Any

from lightning.pytorch import LightningDataModule
from lightning.pytorch.trainer.states import TrainerFn
from rich.console import Console
from rich.progress import track
from rich.text import Text

from bindllm.data.batches import (
    BatchLoader,
    LengthGroupedBatches,
    ResumableLoader,
    share,
    sorted_batches,
)
from bindllm.data.collate import Batch, Lookup, collate
from bindllm.data.embeddings import (
    LiveEmbeddings,
    MediaEmbeddings,
    RetrievedRecords,
    build_datastore,
    check_store,
)
from bindllm.data.episodes.draw import check_episodes, draw_episodes
from bindllm.data.preview import preview_rows
from bindllm.data.report import DataReport, Skipped, SourceReport, count_languages
from bindllm.data.rows import Row, Sample, make_sample
from bindllm.data.source_config import SPLITS, SourceConfig
from bindllm.data.sources import read_source
from bindllm.data.stream.chunks import CANNOT_EMBED
from bindllm.data.stream.loader import (
    StreamLoader,
    StreamOptions,
    check_streams,
    is_training_stream,
)
from bindllm.data.stream.samples import read_stream
from bindllm.data.stream.shards import expand_shards, is_stream
from bindllm.errors import InputError, check_choice
from bindllm.media import Media
from bindllm.model.context.records import RecordReader
from bindllm.parallel import SINGLE_PROCESS, Processes, RunContext


class BindData(LightningDataModule):
    """Reads the sources, embeds their media once, and makes batches.

    Embeddings are read from the memory-mapped store when a batch is made. This is so fast that worker processes are
    not needed. Validation and test batches have twice the rows of a training batch.

    Tar shards for training are streamed: their embeddings are not stored, and a thread reads, embeds and tokenizes
    them ahead of training. Such a run has no epochs, so its trainer needs ``max_steps``.

    Args:
        sources: tables, folders and streams with the rows.
        store: folder of the embedding stores; null: media are encoded again for every batch, which encoders of class
            `bindllm.encoders.Tuned` need.
        batch_size: rows of a training batch, per device.
        max_length: maximum number of tokens of a row; a longer answer is cut.
        seed: seed of the order of rows.
        chunk: samples of streamed sources that are read, shuffled and grouped by length together; they are in memory
            without their media, but with their tokens if the model reads any (125 kB for an image of 7 x 7 x 1280).
        tokenizer: tokenizer of the decoder; set by the command line.
        encoders: encoders of the modalities in the data; set by the command line.
        token_modalities: modalities whose tokens are in the batches; set by the command line from the bind network.
        context: settings of a model with context, a `ContextConfig`; set by the command line. The training rows are
            the datastore.

    Attributes:
        report: counts of rows that were read and skipped, and of media that were embedded.
        steps_per_batch: how many times in a row each training batch comes; set by an objective.

    Raises:
        InputError: no sources, a size below 1, streams for a model with context, a store for tuned encoders, or
            streams or context without a store.
    """

    def __init__(
        self,
        sources: list[SourceConfig],
        store: str | None = "data/store",
        batch_size: int = 16,
        max_length: int = 128,
        seed: int = 0,
        chunk: int = 1024,
        tokenizer: Any = None,
        encoders: Any = None,
        token_modalities: Any = None,
        context: Any = None,
    ) -> None:
        super().__init__()
        if not sources:
            raise InputError("data.sources is empty; name at least one source, such as {path: data/openmoji}")
        for name, value in (("batch_size", batch_size), ("max_length", max_length), ("chunk", chunk)):
            if value < 1:
                raise InputError(f"data.{name} must be at least 1, not {value}")
        self.sources, self.store = sources, store
        self.batch_size, self.max_length, self.seed, self.chunk = batch_size, max_length, seed, chunk
        self.tokenizer, self.encoders, self.token_modalities = tokenizer, encoders, token_modalities or ()
        self.context = context
        if self.context is not None and self.streamed:
            raise InputError(
                "model.context retrieves from all training rows, so they must be known before training: use a table on "
                "disk instead of streamed shards, or remove model.context"
            )
        check_store(store, encoders or ())
        if store is None and (self.streamed or context is not None):
            other = "streamed shards are" if self.streamed else "the records of model.context are"
            raise InputError(
                f"data.store is null, so media are encoded for every batch, and {other} encoded before training: use "
                "frozen encoders and a store, or a table on disk without model.context"
            )
        self.report = DataReport()
        self.steps_per_batch = 1
        # Each step is done once: rows, embeddings, samples. None: not yet.
        self._rows: dict[str, list[Row]] | None = None
        self._embeddings: MediaEmbeddings | LiveEmbeddings | None = None
        self._samples: dict[str, list[Sample]] | None = None
        self._streaming: StreamLoader | None = None

    @property
    def streamed(self) -> bool:
        """Whether the training rows come from streams; then `samples("train")` is empty."""
        return any(is_training_stream(config) for config in self.sources)

    def read(self) -> None:
        """Read the sources, once.

        Raises:
            InputError: a source that is missing or has no usable row, or streams that cannot be combined.
        """
        if self._rows is not None:
            return
        started = time.perf_counter()
        # Before anything is read: names are enough to find these faults.
        check_episodes(self.sources)
        check_streams(self.sources)
        rows: dict[str, list[Row]] = {split: [] for split in SPLITS}
        for number, config in enumerate(self.sources):
            if is_training_stream(config):
                shards = len(expand_shards(config.path))
                report = SourceReport(config.path, modality=config.modality, shards=shards)
            else:
                found, report = (read_stream if is_stream(config.path) else read_source)(config, number)
                for split in SPLITS:
                    rows[split] += found[split]
            self.report.sources.append(report)
            self.report.skipped.update(report.skipped)
        self._rows = rows
        self.report.seconds += time.perf_counter() - started

    def prepare_data(self) -> None:
        """Read the sources and embed media that are not in the stores, once. Lightning calls this in one process first.

        Raises:
            InputError: a run with streamed sources whose trainer has no ``max_steps``.
        """
        if self.trainer is not None and self.trainer.state.fn == TrainerFn.FITTING:
            self._check_steps()
        # This one process embeds for all of them.
        self.embed(replace(RunContext.of_trainer(self.trainer), processes=SINGLE_PROCESS))

    def embed(self, context: RunContext) -> None:
        """Read the sources and embed media that are not in the stores, once.

        Args:
            context: the processes that share the work, and the device of this one. Only the first process can make
                samples afterwards.
        """
        self.read()
        if self._embeddings is not None:
            return
        tokens = {"token_modalities": self.token_modalities}
        embeddings = (
            LiveEmbeddings(self.encoders, **tokens)
            if self.store is None
            else MediaEmbeddings(self.encoders, self.store, **tokens)
        )
        # All splits at once, so that an encoder is moved to its device once.
        media = (item for rows in self._rows.values() for row in rows for item in row.media)
        totals = embeddings.precompute(media, context)
        # Without the media that failed, every later lookup succeeds.
        self._rows = {split: self._without(rows, totals.failed) for split, rows in self._rows.items()}
        self._embeddings = embeddings
        self.report.embeddings = f"{totals.encoded:,} encoded, {totals.reused:,} from the store"
        if self.store is None:
            self.report.embeddings = "encoded again for every batch"
        elif self.streamed:
            self.report.embeddings += "; those of the stream during training"
        self.report.seconds_embedding = totals.seconds
        self.report.seconds += totals.seconds

    def setup(self, stage: str | None = None) -> None:
        """Make the samples of all splits, once.

        Raises:
            InputError: no row of any split can be used.
        """
        self.prepare_data()
        if self._samples is not None:
            return
        started = time.perf_counter()
        # Hard negatives are neighbors in the space of the embeddings, so episodes come after these.
        rows = draw_episodes(self._rows, self.sources, self.report.skipped, self._embeddings)
        samples = {split: self._tokenize(found) for split, found in rows.items()}
        if not any(samples.values()) and not self.streamed:
            raise InputError(f"no row of the data can be used: {'; '.join(self.report.skipped.lines())}")
        self._samples = samples
        self._count(samples)
        if self.context is not None:
            found = self.retrieved
            self.report.records, self.report.cut_records = len(found.reader.datastore), found.reader.num_cut()
            self.report.excluded_itself, self.report.excluded_equal = found.itself, found.equal
        self.report.seconds += time.perf_counter() - started

    def samples(self, split: str) -> list[Sample]:
        """Return the samples of a split, in the order of the sources.

        Raises:
            InputError: an unknown split.
        """
        check_choice("split", split, SPLITS)
        self.setup()
        return self._samples[split]

    @property
    def lookup(self) -> Lookup:
        """The function that returns the embeddings of media groups, [N, E]; it is a `TokenLookup`."""
        self.prepare_data()
        return self._embeddings if self.context is None else self.retrieved

    @cached_property
    def retrieved(self) -> RetrievedRecords:
        """The embeddings with the records of a datastore, which is made of the training rows.

        Raises:
            InputError: no training row has media.
        """
        self.prepare_data()
        datastore = build_datastore(self._rows["train"], self._embeddings)
        reader = RecordReader(datastore, self.tokenizer, self.context.text_length)
        found = RetrievedRecords(self._embeddings, reader, self.context.records)
        # All at once, before the first batch.
        found.retrieve(
            group for rows in self._rows.values() for row in rows for group in row.conversation.media_groups
        )
        return found

    def train_dataloader(self) -> ResumableLoader | StreamLoader:
        """Return the loader of training batches; it resumes at the trainer's position.

        Raises:
            InputError: there are no training rows.
        """
        if self.streamed:
            return self._stream_loader()
        samples = self.samples("train")
        if not samples:
            raise InputError(
                f"no training rows; there are {self.report.rows}. Lower held_out, or check the column split"
            )
        processes = Processes.of_trainer(self.trainer)
        batches = LengthGroupedBatches(
            [sample.length for sample in samples],
            batch_size=self.batch_size,
            seed=self.seed,
            sources=[sample.source for sample in samples],
            weights=[config.weight for config in self.sources],
            world_size=processes.world_size,
            rank=processes.rank,
        )
        make = lambda rows: self._batch(samples, rows)  # noqa: E731
        # A best step that was chosen on other validation rows would mean nothing.
        content = self._fingerprint(samples + self.samples("validation"))
        return ResumableLoader(
            batches, make, position=self._position, repeat=self.steps_per_batch, content=content
        )

    def val_dataloader(self) -> BatchLoader:
        """Return the loader of validation batches."""
        return self._evaluation_loader("validation")

    def test_dataloader(self) -> BatchLoader:
        """Return the loader of test batches."""
        return self._evaluation_loader("test")

    def preview(self, number: int) -> Iterator[Text]:
        """Yield lines that show a few training rows with their loss mask and media; embeds nothing."""
        self.read()
        rows = draw_episodes(self._rows, self.sources, Skipped())["train"]
        for index, config in enumerate(self.sources):
            if number and is_training_stream(config):
                # Only as many samples as the preview shows.
                rows += read_stream(config, index, limit=number)[0]["train"]
        yield from preview_rows(rows, self.tokenizer, self.max_length, number=number)

    def teardown(self, stage: str) -> None:
        """End the thread of a stream and print its counts; Lightning calls this at the end of a run."""
        if self._streaming is not None:
            self._streaming.close()
            # The counts are those of one process; rank 0 stands for all.
            if self.trainer is None or self.trainer.is_global_zero:
                Console(highlight=False).print("\n".join(self._streaming.report.lines()), markup=False)

    def on_exception(self, exception: BaseException) -> None:
        """End the thread of a stream; Lightning calls this when a run fails or is interrupted."""
        if self._streaming is not None:
            self._streaming.close()

    def _check_steps(self) -> None:
        if self.streamed and self.trainer.max_steps < 1:
            raise InputError("data.sources are streamed, and a stream has no end: set trainer.max_steps")

    def _stream_loader(self) -> StreamLoader:
        self.setup()
        trainer = self.trainer
        if trainer is not None:
            self._check_steps()
            progress = trainer.fit_loop.epoch_loop.batch_progress
        self._streaming = StreamLoader(
            self.sources,
            tokenizer=self.tokenizer,
            encoders=self.encoders,
            options=StreamOptions(self.batch_size, self.max_length, self.seed, self.chunk),
            # A stream has no end; to Lightning, all batches of the run are one epoch.
            length=sys.maxsize if trainer is None else trainer.max_steps * trainer.accumulate_grad_batches,
            position=None if trainer is None else lambda: progress.total.completed,
            context=RunContext.of_trainer(trainer),
            token_modalities=self.token_modalities,
        )
        self.report.stream = self._streaming.report
        return self._streaming

    def _without(self, rows: list[Row], failed: dict[Media, str]) -> list[Row]:
        """Skip rows with media that cannot be embedded, and count them."""
        kept = []
        for row in rows:
            reasons = [failed[item] for item in row.media if item in failed]
            if reasons:
                self.report.skipped.add(CANNOT_EMBED, f"{row.name}: {reasons[0]}")
            else:
                kept.append(row)
        return kept

    def _tokenize(self, rows: list[Row]) -> list[Sample]:
        """Make samples; rows that cannot be used are counted with the reason."""
        samples = []
        # The bar is shown only on a terminal.
        is_hidden = not sys.stderr.isatty()
        for row in track(rows, "tokenizing", console=Console(stderr=True), transient=True, disable=is_hidden):
            try:
                # Numbers count only the samples that are kept: an objective finds a sample by its number.
                sample = make_sample(row, self.tokenizer, self.max_length)
                samples.append(replace(sample, number=len(samples)))
            except InputError as error:
                self.report.skipped.add(str(error), row.name)
        return samples

    def _count(self, samples: dict[str, list[Sample]]) -> None:
        """Count the samples in the report."""
        everything = [sample for split in samples.values() for sample in split]
        # A stream has no fixed number of training rows.
        self.report.rows = {
            split: len(samples[split]) for split in SPLITS if split != "train" or not self.streamed
        }
        self.report.truncated = sum(sample.truncated for sample in everything)
        self.report.languages = count_languages(everything)
        self.report.text_only = sum(not sample.media for sample in everything)
        self.report.supervised_tokens = sum(sample.num_supervised for sample in samples["train"])
        # By content, because one image may have several paths.
        trained = {key for sample in samples["train"] for key in self._content(sample)}
        held_out = samples["validation"] + samples["test"]
        self.report.shared_media = sum(not trained.isdisjoint(self._content(sample)) for sample in held_out)

    def _content(self, sample: Sample) -> list[str]:
        """Content hashes of the media of a sample."""
        return [self._embeddings.key(media) for group in sample.media for media in group]

    def _fingerprint(self, samples: list[Sample]) -> str:
        """Return hex digits that change with every text, medium or judgment of the samples."""
        digest = hashlib.sha256()
        for sample in samples:
            for side in filter(None, (sample, sample.rejected)):
                digest.update(side.input_ids.tobytes() + side.labels.tobytes())
            facts = (sample.references, sample.options, sample.desirable, self._content(sample))
            digest.update(repr(facts).encode())
        return digest.hexdigest()

    def _evaluation_loader(self, split: str) -> BatchLoader:
        samples = self.samples(split)
        processes = Processes.of_trainer(self.trainer)
        # Without gradients, twice as many rows fit.
        batches = sorted_batches([sample.length for sample in samples], batch_size=2 * self.batch_size)
        batches = share(batches, world_size=processes.world_size, rank=processes.rank)
        return BatchLoader(batches, lambda rows: self._batch(samples, rows))

    def _batch(self, samples: list[Sample], rows: list[int]) -> Batch:
        return collate([samples[n] for n in rows], self.lookup, pad_id=self.tokenizer.pad_token_id)

    def _position(self) -> tuple[int, int]:
        """Return the epoch and the number of its completed batches."""
        if self.trainer is None:
            return 0, 0
        return self.trainer.current_epoch, self.trainer.fit_loop.epoch_loop.batch_progress.current.ready
