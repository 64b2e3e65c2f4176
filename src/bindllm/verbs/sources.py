"""What is wrong with the data of a recipe: rows that are left out, media that cannot be opened, texts too long."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console

from bindllm.data.report import SourceReport
from bindllm.data.sources import Row, SourceConfig, read_source
from bindllm.data.tokenise import tokenise
from bindllm.encoders import Encoder, encoder_for
from bindllm.errors import BindLLMError, InputError
from bindllm.media import Media, open_image
from bindllm.verbs.problems import Problems

MEASURED_ROWS = 2000
"""Rows whose length is counted: enough for the statistics, and seconds at most."""
OPENED_PICTURES, OPENED_MEDIA = 200, 20
"""Pictures of a source, or media of another modality, that are opened, evenly spread over its training rows."""


def read_sources(
    sources: Sequence[SourceConfig], problems: Problems
) -> list[tuple[dict[str, list[Row]], SourceReport]]:
    """Read every source that can be read: the rows of its splits, and what was left out."""
    read = []
    for number, source in enumerate(sources):
        with problems.noted():
            read.append(read_source(source, number))
    return read


def check_sources(
    read: Sequence[tuple[dict[str, list[Row]], SourceReport]],
    encoders: Sequence[Encoder] | None,
    tokenizer: Any,
    max_length: int,
    problems: Problems,
    console: Console,
) -> int:
    """Say what each source gives and what is left out; return the number of validation rows."""
    num_train, num_validation, before = 0, 0, len(problems)
    for rows, report in read:
        num_train += len(rows["train"])
        num_validation += len(rows["validation"])
        with problems.noted():
            _open_media(rows["train"], report, encoders)
        counts = ", ".join(f"{len(part):,} {split}" for split, part in rows.items())
        console.print(f"{report.path}: {report.counted}, {counts}", markup=False)
        for line in report.skipped.lines():
            console.print(f"  left out: {line}", markup=False)
        if tokenizer is not None:
            with problems.noted():
                console.print(f"  {_lengths(rows['train'], tokenizer, max_length)}", markup=False)
    if read and not num_train and len(problems) == before:
        problems.append("the sources have no row to train on")
    return num_validation


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
    """Open some media of the rows, and count those that cannot be.

    Args:
        rows: of one source.
        report: counts them.
        encoders: the first that serves the modality opens what is no picture; None: they are not known.

    Raises:
        InputError: not one of them can be opened, or no encoder serves the modality.
    """
    encoder = None if encoders is None else encoder_for(report.modality, encoders)
    if report.modality == "image":
        noun, count = "picture", OPENED_PICTURES
    else:
        noun, count = f"{report.modality} media", OPENED_MEDIA
    chosen = spread([media for row in rows for media in row.media], report.modality, count)
    failed = []
    for media in chosen:
        try:
            if report.modality == "image":
                open_image(media.source)
            elif encoder is not None:
                encoder.prepare(media)
        except BindLLMError as error:
            failed.append(str(error))
            report.skipped.add(f"{noun} that cannot be opened (of {len(chosen):,} tried)", str(error))
    if failed and len(failed) == len(chosen):
        raise InputError(f"{report.path}: not one {noun} can be opened: {failed[0]}")


def _lengths(rows: Sequence[Row], tokenizer: Any, max_length: int) -> str:
    """Return a line about the tokens of rows.

    Raises:
        InputError: there are rows, and none of them fits.
    """
    samples, refused = [], 0
    for row in rows[:MEASURED_ROWS]:
        try:
            samples.append(tokenise(row.conversation, tokenizer, max_length))
        except InputError:
            refused += 1
    if not rows:
        return "no rows to train on"
    if not samples:
        raise InputError(
            f"data.max_length {max_length}: none of {refused:,} rows fits into so few tokens; raise it"
        )
    lengths = [len(sample.input_ids) for sample in samples]
    supervised = [sample.num_supervised for sample in samples]
    cut = sum(sample.truncated for sample in samples)
    return (
        f"tokens a row: {median(lengths):.0f} (longest {max(lengths)}), to learn: {median(supervised):.0f} "
        f"(longest {max(supervised)}); of {len(samples) + refused:,} rows {cut} are cut, {refused} do not fit"
    )
