"""What is wrong with the data of a recipe: rows that are left out, media that cannot be opened, texts too long."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console

from bindllm.cli.problems import Problems
from bindllm.data.report import Skipped, SourceReport
from bindllm.data.rows import Row, Sample, make_sample
from bindllm.data.source_config import SourceConfig
from bindllm.data.sources import read_source
from bindllm.data.stream.loader import check_streams, is_training_stream
from bindllm.data.stream.samples import read_stream
from bindllm.data.stream.shards import expand_shards, is_stream
from bindllm.encoders import Encoder, encoder_for
from bindllm.errors import BindLLMError, InputError
from bindllm.media import Media, open_image

MEASURED_ROWS = 2000
"""Rows whose length is counted: enough for the statistics, and seconds at most."""
OPENED_PICTURES, OPENED_MEDIA = 200, 20
"""Pictures of a source, or media of another modality, that are opened, evenly spread over its training rows."""
STREAMED_ROWS = 200
"""First rows of a stream that are looked at; their media are in memory."""


def read_sources(
    sources: Sequence[SourceConfig], problems: Problems
) -> list[tuple[dict[str, list[Row]], SourceReport]]:
    """Read every source that can be read: the rows of its splits, and what was left out.

    Of a stream for training only the first rows are read.
    """
    read = []
    with problems.noted():
        check_streams(sources)
    for number, source in enumerate(sources):
        with problems.noted():
            if is_training_stream(source):
                rows, report = read_stream(source, number, limit=STREAMED_ROWS)
                report.shards = len(expand_shards(source.path))
            else:
                rows, report = (read_stream if is_stream(source.path) else read_source)(source, number)
            read.append((rows, report))
    return read


def check_sources(
    read: Sequence[tuple[dict[str, list[Row]], SourceReport]],
    encoders: Sequence[Encoder] | None,
    tokenizer: Any,
    max_length: int,
    problems: Problems,
    console: Console,
) -> None:
    """Say what each source gives and what is left out."""
    num_train, before = 0, len(problems)
    for rows, report in read:
        num_train += len(rows["train"])
        with problems.noted():
            _open_media(rows["train"], report, encoders)
        counts = ", ".join(f"{len(part):,} {split}" for split, part in rows.items())
        if report.shards:
            counts = f"the first {len(rows['train']):,} rows were read"
        console.print(f"{report.path}: {report.counted}; {counts}", markup=False)
        lengths = None
        if tokenizer is not None:
            with problems.noted():
                lengths = _lengths(rows["train"], report.skipped, tokenizer, max_length)
        for line in report.skipped.lines():
            console.print(f"  skipped: {line}", markup=False)
        if lengths is not None:
            console.print(f"  {lengths}", markup=False)
    if read and not num_train and len(problems) == before:
        problems.append("the sources have no row to train on")


def check_store(store: str, problems: Problems) -> None:
    """Note a place for the store where no folder can be made."""
    there = next(place for place in (Path(store), *Path(store).absolute().parents) if place.exists())
    if not there.is_dir():
        problems.append(f"data.store {store} cannot be a folder: {there} is a file; choose another place")


def spread(media: Sequence[Media], modality: str, count: int) -> list[Media]:
    """Return at most this many different media of a modality, evenly spread."""
    all_of_it = list(dict.fromkeys(item for item in media if item.modality == modality))
    return all_of_it[:: max(1, len(all_of_it) // count)][:count]


def _open_media(rows: Sequence[Row], report: SourceReport, encoders: Sequence[Encoder] | None) -> None:
    """Open some media of the rows, of each modality, and count those that cannot be.

    Args:
        rows: of one source.
        report: counts them.
        encoders: the first that serves a modality opens what is no picture; None: they are not known.

    Raises:
        InputError: of a modality not one can be opened, or no encoder serves it.
    """
    media = [item for row in rows for item in row.media]
    for modality in dict.fromkeys(item.modality for item in media):
        encoder = None if encoders is None else encoder_for(modality, encoders)
        noun = "picture" if modality == "image" else f"{modality} media"
        chosen = spread(media, modality, OPENED_PICTURES if modality == "image" else OPENED_MEDIA)
        failed = []
        for item in chosen:
            try:
                if modality == "image":
                    open_image(item.source)
                elif encoder is not None:
                    encoder.prepare(item)
            except BindLLMError as error:
                failed.append(str(error))
                report.skipped.add(f"{noun} that cannot be opened (of {len(chosen):,} tried)", str(error))
        if failed and len(failed) == len(chosen):
            raise InputError(f"{report.path}: not one {noun} can be opened: {failed[0]}")


def _lengths(rows: Sequence[Row], skipped: Skipped, tokenizer: Any, max_length: int) -> str:
    """Return a line about the tokens of rows; those that cannot be used are counted in ``skipped``.

    Raises:
        InputError: there are rows, and none of them can be used.
    """
    if not rows:
        return "no rows to train on"
    samples: list[Sample] = []
    refused = Skipped()
    for row in rows[:MEASURED_ROWS]:
        try:
            samples.append(make_sample(row, tokenizer, max_length))
        except InputError as error:
            refused.add(str(error), row.name)
    skipped.update(refused)
    if not samples:
        reasons = "; ".join(refused.lines())
        raise InputError(
            f"with data.max_length {max_length} none of {refused.total:,} rows can be used: {reasons}"
        )
    # Of a pair the longer side.
    sides = [(sample, sample.rejected or sample) for sample in samples]
    lengths = [max(len(side.input_ids) for side in both) for both in sides]
    supervised = [max(side.num_supervised for side in both) for both in sides]
    cut = sum(sample.truncated for sample in samples)
    return (
        f"tokens a row: {median(lengths):.0f} (longest {max(lengths)}), to learn: {median(supervised):.0f} "
        f"(longest {max(supervised)}); of {len(samples) + refused.total:,} rows {cut} are cut, {refused.total} cannot "
        "be used"
    )
