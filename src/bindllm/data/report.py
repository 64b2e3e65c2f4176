"""What was read, what was left out and why: nothing is dropped without a count."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from bindllm.data.rows import Row
    from bindllm.media import Media

MAX_EXAMPLES = 3
MAX_REASONS = 20
"""Different reasons that are counted apart: words of a row may be part of one, and no report is as long as the data."""
OTHER_REASON = "for other reasons"
NOT_UTF8 = "not UTF-8 text"
"""Why a row of a table was left out."""


@dataclass
class Skipped:
    """Rows left out: how many for each of at most `MAX_REASONS` reasons and for all others, the first few by name."""

    counts: dict[str, int] = field(default_factory=dict)
    examples: dict[str, list[str]] = field(default_factory=dict)

    def add(self, reason: str, name: str) -> None:
        """Count one row."""
        kept = self._kept(reason)
        self.counts[kept] = self.counts.get(kept, 0) + 1
        examples = self.examples.setdefault(kept, [])
        if len(examples) < MAX_EXAMPLES:
            examples.append(name if kept == reason else f"{name}: {reason}")

    def update(self, other: Skipped) -> None:
        """Count the rows of another report as well."""
        for reason, count in other.counts.items():
            kept = self._kept(reason)
            self.counts[kept] = self.counts.get(kept, 0) + count
            examples = self.examples.setdefault(kept, [])
            names = other.examples[reason][: MAX_EXAMPLES - len(examples)]
            examples += [name if kept == reason else f"{name}: {reason}" for name in names]

    def _kept(self, reason: str) -> str:
        """The reason that a row is counted under."""
        return reason if reason in self.counts or len(self.counts) < MAX_REASONS else OTHER_REASON

    @property
    def total(self) -> int:
        """Number of rows left out."""
        return sum(self.counts.values())

    def lines(self) -> Iterator[str]:
        """Yield one line per reason, the most frequent first.

        Example:
            >>> skipped = Skipped()
            >>> skipped.add("empty caption", "line 7")
            >>> list(skipped.lines())
            ['1 x empty caption (line 7)']
        """
        for reason, count in sorted(self.counts.items(), key=lambda item: -item[1]):
            more = ", ..." if count > len(self.examples[reason]) else ""
            yield f"{count} x {reason} ({', '.join(self.examples[reason])}{more})"


@dataclass
class SourceReport:
    """What one source gave.

    Args:
        path: the source.
        pictures: different pictures (or media of another modality) of its rows.
        captions: its rows; of the format caption, one for each caption.
        skipped: rows left out.
        control_characters: captions from which control characters were removed.
        modality: what the source is of.
        format: how its rows were read.
        shards: of a source that is streamed for training; its samples are counted in `StreamReport`.
        media: different media by modality.
        answers: answers of all rows; a conversation may have several.
        pairs: rows with a worse answer beside the better one.
        text_only: rows without media.
    """

    path: str
    pictures: int = 0
    captions: int = 0
    skipped: Skipped = field(default_factory=Skipped)
    control_characters: int = 0
    modality: str = "image"
    format: str = "caption"
    shards: int = 0
    media: dict[str, int] = field(default_factory=dict)
    answers: int = 0
    pairs: int = 0
    text_only: int = 0

    def count(self, rows: Iterable[Row]) -> None:
        """Count the rows that the source gives, of all splits together."""
        found: dict[Media, None] = {}
        for row in rows:
            media = row.media
            found.update(dict.fromkeys(media))
            self.captions += 1
            self.answers += sum(message.role == "assistant" for message in row.conversation.messages)
            self.pairs += row.rejected is not None
            self.text_only += not media
        self.media = dict(Counter(media.modality for media in found))
        self.pictures = len(found)

    @property
    def counted(self) -> str:
        """What there is, in words.

        Example:
            >>> SourceReport("sweeps", pictures=1200, captions=1300, modality="radar").counted
            '1,200 radar media, 1,300 captions'
            >>> SourceReport("talks", captions=90, format="llava", answers=200, media={"image": 80}).counted
            '90 rows (llava), 200 answers, 80 pictures'
        """
        if self.shards:
            return f"{self.shards:,} shards, streamed"
        if self.format == "caption":
            return f"{_count_media(self.modality, self.pictures)}, {self.captions:,} captions"
        parts = [f"{self.captions:,} rows ({self.format})"]
        if self.answers > self.captions:
            parts.append(f"{self.answers:,} answers")
        if self.pairs:
            parts.append(f"{self.pairs:,} pairs of a better and a worse answer")
        parts += [_count_media(modality, count) for modality, count in self.media.items()]
        if self.text_only:
            parts.append(f"{self.text_only:,} rows without media")
        return ", ".join(parts)


def _count_media(modality: str, count: int) -> str:
    return f"{count:,} {'pictures' if modality == 'image' else f'{modality} media'}"


@dataclass
class StreamReport:
    """What a stream gave to one process, since it was started last.

    Args:
        read: samples that were read for the batches which were handed out, and for those that wait.
        rows: rows in these batches.
        batches: their number.
        waiting: rows that were read together with these, and wait for their batches.
        skipped: samples and shards that were left out.
        seconds_first: time until the first batch.
        seconds_waited: time that the training waited for later batches.
        seconds: time from the first batch to the last one.
    """

    read: int = 0
    rows: int = 0
    batches: int = 0
    waiting: int = 0
    skipped: Skipped = field(default_factory=Skipped)
    seconds_first: float = 0.0
    seconds_waited: float = 0.0
    seconds: float = 0.0

    @property
    def waiting_share(self) -> float:
        """Share of the time, 0..1, that the training stood still for want of a batch; the first is not counted."""
        return self.seconds_waited / self.seconds if self.seconds else 0.0

    def lines(self) -> Iterator[str]:
        """Yield what it comes to, and a line for each reason why something was left out.

        Example:
            >>> report = StreamReport(read=9, rows=8, batches=2, seconds_first=1.5)
            >>> list(report.lines())
            ['8 rows of 9 streamed samples in 2 batches; the first after 1.5 s, then training waited 0.0 % of its time']
        """
        yield (
            f"{self.rows:,} rows of {self.read:,} streamed samples in {self.batches:,} batches"
            f"{f' ({self.waiting:,} more were ready)' if self.waiting else ''}; the first after "
            f"{self.seconds_first:.1f} s, then training waited {100 * self.waiting_share:.1f} % of its time"
        )
        for line in self.skipped.lines():
            yield f"  left out: {line}"


@dataclass
class DataReport:
    """What all sources gave, and what became of it.

    Args:
        sources: one report per source.
        rows: samples per split.
        skipped: rows left out, by all steps together.
        truncated: samples of which an answer was cut or left out to keep to the longest length.
        text_only: samples without media.
        supervised_tokens: tokens of the training split that give a loss, in one pass over its samples.
        shared_media: held-out samples of which a file with the same content is in the training split too.
        encoded: files that were encoded now.
        reused: files whose embeddings were in the store.
        seconds_embedding: time of embedding.
        seconds: time of all this together.
        stream: what was streamed for training, by this process; None: nothing.
    """

    sources: list[SourceReport] = field(default_factory=list)
    rows: dict[str, int] = field(default_factory=dict)
    skipped: Skipped = field(default_factory=Skipped)
    truncated: int = 0
    text_only: int = 0
    supervised_tokens: int = 0
    shared_media: int = 0
    encoded: int = 0
    reused: int = 0
    seconds_embedding: float = 0.0
    seconds: float = 0.0
    stream: StreamReport | None = None

    @property
    def modalities(self) -> set[str]:
        """What the sources are of."""
        return {modality for source in self.sources for modality in source.media or (source.modality,)}

    def __rich__(self) -> RenderableType:
        """Return a table for the terminal, and a line for each reason why rows were left out."""
        table = Table(title="data", show_header=False, title_justify="left")
        table.add_column()
        table.add_column(justify="right")
        for source in self.sources:
            table.add_row(source.path, source.counted)
        table.add_row("rows", ", ".join(f"{count:,} {split}" for split, count in self.rows.items()))
        table.add_row("embeddings", f"{self.encoded:,} encoded, {self.reused:,} from the store")
        table.add_row("supervised tokens", f"{self.supervised_tokens:,}")
        notes = {
            "rows cut to max_length": self.truncated,
            "rows without media": self.text_only,
            "captions with control characters removed": sum(s.control_characters for s in self.sources),
            "held-out rows whose media is in train too": self.shared_media,
            "rows left out": self.skipped.total,
        }
        for note, count in notes.items():
            if count:
                table.add_row(note, f"{count:,}")
        table.add_row("seconds", f"{self.seconds:.1f}")
        return Group(table, *(Text(f"  left out: {line}") for line in self.skipped.lines()))
