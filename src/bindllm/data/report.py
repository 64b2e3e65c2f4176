"""Counts of rows that were read, and of rows that were skipped with the reason: no row is dropped without a count."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from bindllm.conversation.messages import RowError
from bindllm.errors import InputError, printable

if TYPE_CHECKING:
    from bindllm.data.rows import Row, Sample
    from bindllm.media import Media

MAX_EXAMPLES = 3
MAX_REASONS = 20
"""Reasons that are counted separately: a reason may quote a row, and a report must stay short."""
OTHER_REASON = "for other reasons"
NOT_UTF8 = "not UTF-8 text"
"""Why a row of a table was skipped."""


@dataclass
class Skipped:
    """Skipped rows: their number and first names for each of at most `MAX_REASONS` reasons and for all others."""

    counts: dict[str, int] = field(default_factory=dict)
    examples: dict[str, list[str]] = field(default_factory=dict)

    def add(self, reason: str, name: str) -> None:
        """Count one row."""
        self._add(reason, 1, [name])

    def add_error(self, error: InputError, name: str) -> None:
        """Count one row by its error; the part that differs from row to row, such as a path, goes with the name."""
        if isinstance(error, RowError) and error.detail:
            self.add(error.reason, f"{name}: {error.detail}")
        else:
            self.add(str(error), name)

    def update(self, other: Skipped) -> None:
        """Add the rows of another report."""
        for reason, count in other.counts.items():
            self._add(reason, count, other.examples[reason])

    def _add(self, reason: str, count: int, names: list[str]) -> None:
        # Beyond the limit, the reason goes with the name.
        is_kept = reason in self.counts or len(self.counts) < MAX_REASONS
        kept = reason if is_kept else OTHER_REASON
        self.counts[kept] = self.counts.get(kept, 0) + count
        examples = self.examples.setdefault(kept, [])
        for name in names[: MAX_EXAMPLES - len(examples)]:
            examples.append(name if kept == reason else f"{name}: {reason}")

    @property
    def total(self) -> int:
        """Number of skipped rows."""
        return sum(self.counts.values())

    def lines(self) -> Iterator[str]:
        """Yield one line per reason, the most frequent first.

        Examples:
            >>> skipped = Skipped()
            >>> skipped.add("empty caption", "line 7")
            >>> list(skipped.lines())
            ['1 x empty caption (line 7)']
        """
        # Sorting is stable: equally frequent reasons stay in the order in which they came.
        for reason, count in sorted(self.counts.items(), key=lambda item: -item[1]):
            more = ", ..." if count > len(self.examples[reason]) else ""
            # Reasons and names quote files and rows of data sets, which may hold escape sequences.
            yield printable(f"{count} x {reason} ({', '.join(self.examples[reason])}{more})")


def count_languages(samples: Iterable[Sample]) -> dict[str, str]:
    """Return the length of the answers in each language, in words; empty if no sample has a language.

    Languages differ in tokens: one character of a script that a tokenizer hardly knows may be three of them.

    Examples:
        >>> count_languages(samples)  # doctest: +SKIP
        {'en': '300 rows, supervised tokens: 3.4 (longest 6), 0 truncated', 'zh': '300 rows, supervised tokens: ...'}
    """
    found: dict[str, list[Sample]] = {}
    for sample in samples:
        found.setdefault(sample.language or "no language", []).append(sample)
    if not any(sample.language for own in found.values() for sample in own[:1]):
        return {}
    return {
        language: f"{len(own):,} rows, supervised tokens: {sum(one.num_supervised for one in own) / len(own):.1f} "
        f"(longest {max(one.num_supervised for one in own)}), {sum(one.truncated for one in own):,} truncated"
        for language, own in found.items()
    }


@dataclass
class SourceReport:
    """Counts of one source.

    Args:
        num_rows: its rows; in the format caption, one for each caption.
        shards: shards of a source that is streamed for training; its samples are counted in `StreamReport`.
        media: different media by modality.
        answers: answers of all rows; a conversation may have several.
    """

    path: str
    num_media: int = 0
    num_rows: int = 0
    skipped: Skipped = field(default_factory=Skipped)
    remarks: Skipped = field(default_factory=Skipped)
    modality: str = "image"
    format: str = "caption"
    shards: int = 0
    media: dict[str, int] = field(default_factory=dict)
    answers: int = 0
    pairs: int = 0
    text_only: int = 0
    warning: str = ""
    classes: int = 0

    def count(self, rows: Iterable[Row]) -> None:
        """Count the rows of the source, of all splits together."""
        # Media count once, however many rows show them.
        found: dict[Media, None] = {}
        for row in rows:
            media, messages = row.media, row.conversation.messages
            found.update(dict.fromkeys(media))
            self.num_rows += 1
            self.answers += sum(message.role == "assistant" for message in messages)
            self.pairs += row.rejected is not None
            self.text_only += not media
            for remark in row.remarks:
                self.remarks.add(remark, row.name)
        self.media = dict(Counter(media.modality for media in found))
        self.num_media = len(found)

    @property
    def counted(self) -> str:
        """The counts in words.

        Examples:
            >>> SourceReport("sweeps", num_media=1200, num_rows=1300, modality="radar").counted
            '1,200 radar media, 1,300 captions'
            >>> SourceReport("talks", num_rows=90, format="llava", answers=200, media={"image": 80}).counted
            '90 rows (llava), 200 answers, 80 images'
        """
        # A stream for training is counted while it is read.
        if self.shards:
            return f"{self.shards:,} shards, streamed"
        if self.format == "caption":
            return f"{_count_media(self.modality, self.num_media)}, {self.num_rows:,} captions"
        if self.classes:
            return f"{_count_media(self.modality, self.num_media)} of {self.classes:,} classes, for episodes"
        # A part that counts nothing new is skipped, so that the line stays short.
        parts = [f"{self.num_rows:,} rows ({self.format})"]
        if self.answers > self.num_rows:
            parts.append(f"{self.answers:,} answers")
        if self.pairs:
            parts.append(f"{self.pairs:,} pairs of a better and a worse answer")
        parts += [_count_media(modality, count) for modality, count in self.media.items()]
        if self.text_only:
            parts.append(f"{self.text_only:,} rows without media")
        return ", ".join(parts)


def _count_media(modality: str, count: int) -> str:
    return f"{count:,} {'images' if modality == 'image' else f'{modality} media'}"


@dataclass
class StreamReport:
    """Counts of a stream in one process, since its last start.

    Args:
        rows: rows of the batches that training has taken.
        seconds_first: time until the first batch.
        seconds_waited: time that the training waited for later batches.
        seconds: time from the first batch to the last one.
    """

    read: int = 0
    rows: int = 0
    batches: int = 0
    waiting: int = 0
    skipped: Skipped = field(default_factory=Skipped)
    remarks: Skipped = field(default_factory=Skipped)
    seconds_first: float = 0.0
    seconds_waited: float = 0.0
    seconds: float = 0.0

    @property
    def waiting_share(self) -> float:
        """Share of the time, 0..1, that training waited for a batch; the first batch is not counted."""
        # The first batch waits for the start of the thread, however fast the stream is.
        return self.seconds_waited / self.seconds if self.seconds else 0.0

    def lines(self) -> Iterator[str]:
        """Yield the counts, and a line for each reason why samples were skipped, and for each remark.

        Examples:
            >>> report = StreamReport(read=9, rows=8, batches=2, seconds_first=1.5)
            >>> list(report.lines())
            ['8 rows of 9 streamed samples in 2 batches; the first after 1.5 s, then training waited 0.0 % of its time']
        """
        yield (
            f"{self.rows:,} rows of {self.read:,} streamed samples in {self.batches:,} batches"
            f"{f' ({self.waiting:,} more were ready)' if self.waiting else ''}; the first after "
            f"{self.seconds_first:.1f} s, then training waited {100 * self.waiting_share:.1f} % of its time"
        )
        yield from (f"  skipped: {line}" for line in self.skipped.lines())
        yield from (f"  note: {line}" for line in self.remarks.lines())


@dataclass
class DataReport:
    """Counts of all sources and of the samples made from them.

    Args:
        skipped: rows skipped in all steps together.
        truncated: samples with an answer that was cut or dropped to keep to the maximum length.
        supervised_tokens: tokens of the training split with a loss, in one pass over its samples.
        languages: length of the answers in each language, see `count_languages`.
        shared_media: held-out samples with a file whose content is in the training split too.
        embeddings: how many embeddings were made and how many were in the store, in words.
        records: records of the datastore, of a model with context.
        cut_records: number of these with a text that is longer than the model reads.
        excluded_itself: pairs of media and record that were not retrieved because both show the same media.
        excluded_equal: the same for records with an equal embedding.
    """

    sources: list[SourceReport] = field(default_factory=list)
    rows: dict[str, int] = field(default_factory=dict)
    skipped: Skipped = field(default_factory=Skipped)
    truncated: int = 0
    text_only: int = 0
    supervised_tokens: int = 0
    languages: dict[str, str] = field(default_factory=dict)
    shared_media: int = 0
    embeddings: str = ""
    seconds_embedding: float = 0.0
    seconds: float = 0.0
    stream: StreamReport | None = None
    records: int = 0
    cut_records: int = 0
    excluded_itself: int = 0
    excluded_equal: int = 0

    @property
    def modalities(self) -> set[str]:
        """Modalities of the sources."""
        # A stream has not counted its media, so its own modality stands for them.
        return {modality for source in self.sources for modality in source.media or (source.modality,)}

    def __rich__(self) -> RenderableType:
        """Return a table for the terminal, and a line for each reason why rows were skipped."""
        table = Table(title="data", show_header=False, title_justify="left")
        table.add_column()
        table.add_column(justify="right")
        for source in self.sources:
            table.add_row(source.path, source.counted)
        table.add_row("rows", ", ".join(f"{count:,} {split}" for split, count in self.rows.items()))
        table.add_row("embeddings", self.embeddings)
        table.add_row("supervised tokens", f"{self.supervised_tokens:,}")
        for language, words in self.languages.items():
            table.add_row(printable(language), words)
        # How to read this: faults that a user should look at, shown only if there are any.
        notes = {
            "rows cut to max_length": self.truncated,
            "rows without media": self.text_only,
            "held-out rows whose media is in train too": self.shared_media,
            "rows skipped": self.skipped.total,
            "records to retrieve": self.records,
            "records cut to context.text_length": self.cut_records,
            "media not shown their own record": self.excluded_itself,
            "media not shown a record with an equal embedding": self.excluded_equal,
        }
        for note, count in notes.items():
            if count:
                table.add_row(note, f"{count:,}")
        table.add_row("seconds", f"{self.seconds:.1f}")
        lines = [f"  skipped: {line}" for line in self.skipped.lines()]
        for source in self.sources:
            lines += [f"  note: {line}" for line in source.remarks.lines()]
            lines += [f"  warning: {source.path}: {source.warning}"] if source.warning else []
        return Group(table, *map(Text, lines))
