"""What was read, what was left out and why: nothing is dropped without a count."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

MAX_EXAMPLES = 3


@dataclass
class Skipped:
    """Rows left out: how many for each reason, and the first few by name."""

    counts: dict[str, int] = field(default_factory=dict)
    examples: dict[str, list[str]] = field(default_factory=dict)

    def add(self, reason: str, name: str) -> None:
        """Count one row."""
        self.counts[reason] = self.counts.get(reason, 0) + 1
        examples = self.examples.setdefault(reason, [])
        if len(examples) < MAX_EXAMPLES:
            examples.append(name)

    def update(self, other: Skipped) -> None:
        """Count the rows of another report as well."""
        for reason, count in other.counts.items():
            self.counts[reason] = self.counts.get(reason, 0) + count
            examples = self.examples.setdefault(reason, [])
            examples += other.examples[reason][: MAX_EXAMPLES - len(examples)]

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
        pictures: pictures (or media of another modality) with at least one caption.
        captions: captions of these pictures.
        skipped: rows left out.
        control_characters: captions from which control characters were removed.
        modality: what the source is of.
    """

    path: str
    pictures: int = 0
    captions: int = 0
    skipped: Skipped = field(default_factory=Skipped)
    control_characters: int = 0
    modality: str = "image"

    @property
    def counted(self) -> str:
        """How many media there are, in words.

        Example:
            >>> SourceReport("sweeps", pictures=1200, modality="radar").counted
            '1,200 radar media'
        """
        return f"{self.pictures:,} {'pictures' if self.modality == 'image' else f'{self.modality} media'}"


@dataclass
class DataReport:
    """What all sources gave, and what became of it.

    Args:
        sources: one report per source.
        rows: samples per split.
        skipped: rows left out, by all steps together.
        truncated: samples whose answer was cut.
        text_only: samples without media.
        supervised_tokens: tokens of the training split that give a loss, in one pass over its samples.
        shared_media: held-out samples of which a file with the same content is in the training split too.
        encoded: files that were encoded now.
        reused: files whose embeddings were in the store.
        seconds_embedding: time of embedding.
        seconds: time of all this together.
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

    @property
    def modalities(self) -> set[str]:
        """What the sources are of."""
        return {source.modality for source in self.sources}

    def __rich__(self) -> RenderableType:
        """Return a table for the terminal, and a line for each reason why rows were left out."""
        table = Table(title="data", show_header=False, title_justify="left")
        table.add_column()
        table.add_column(justify="right")
        for source in self.sources:
            table.add_row(source.path, f"{source.counted}, {source.captions:,} captions")
        table.add_row("rows", ", ".join(f"{count:,} {split}" for split, count in self.rows.items()))
        table.add_row("embeddings", f"{self.encoded:,} encoded, {self.reused:,} from the store")
        table.add_row("supervised tokens", f"{self.supervised_tokens:,}")
        notes = {
            "answers cut to max_length": self.truncated,
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
