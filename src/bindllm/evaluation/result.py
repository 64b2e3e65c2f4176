"""What a zero-shot evaluation found: a table for the terminal, and JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from bindllm import __version__
from bindllm.atomic import write_json
from bindllm.data.report import Skipped
from bindllm.errors import printable

FORMAT = 1
"""Number of the layout of the JSON file."""


@dataclass(frozen=True)
class Measure:
    """One number.

    Args:
        name: what was measured.
        value: 0..1.
        chance: what a random order would give, 0..1.
        num_queries: over how many it is the mean: media, texts, or classes.
        num_candidates: among how many the right ones were looked for.
    """

    name: str
    value: float
    chance: float
    num_queries: int
    num_candidates: int


@dataclass
class Result:
    """What was measured, on what, and what was left out.

    Args:
        kind: classify, tag or retrieve.
        modality: of the media.
        answer: of what was retrieved, or of the prompts.
        measures: the numbers.
        num_listed: media that the data set lists.
        num_measured: media that were measured.
        left_out: media and rows that were not, and why; a file that cannot be read is one of them.
        classes: for each class its name, how many items it has, and its accuracy or average precision; None where it
            has no item.
        templates: the sentences around each class name or caption.
        encoders: class, modalities, space and fingerprint of the encoders that were used.
        cache: folder and settings of the visual cache, where one was used.
        warnings: why the numbers may mean nothing.
        notes: what else a reader must know.
        num_encoded: media and texts that were encoded by this run; the others were in the store.
        seconds: wall-clock time.
        layout: name of the layout, set by the caller.
        folder: of the data set, set by the caller.
    """

    kind: str
    modality: str
    answer: str
    measures: list[Measure]
    num_listed: int
    num_measured: int
    left_out: Skipped = field(default_factory=Skipped)
    classes: list[dict[str, Any]] = field(default_factory=list)
    templates: Sequence[str] = ()
    encoders: list[dict[str, Any]] = field(default_factory=list)
    cache: Mapping[str, Any] | None = None
    warnings: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    num_encoded: int = 0
    seconds: float = 0.0
    layout: str = ""
    folder: str = ""

    def __getitem__(self, name: str) -> float:
        """Return the value of a measure."""
        return next(measure.value for measure in self.measures if measure.name == name)

    def save(self, path: str | Path) -> None:
        """Write everything as JSON, atomically."""
        write_json(path, {"format": FORMAT, "bindllm": __version__, **asdict(self)})

    def __rich__(self) -> RenderableType:
        """Return a table with chance beside each number, and lines for all that a reader must know."""
        table = Table(title=Text(printable(f"{self.layout} {self.folder}".strip())), title_justify="left")
        table.add_column("measure")
        for column in ("result", "chance", "queries", "candidates"):
            table.add_column(column, justify="right")
        for one in self.measures:
            numbers = (
                f"{one.value:.4f}",
                f"{one.chance:.4f}",
                f"{one.num_queries:,}",
                f"{one.num_candidates:,}",
            )
            table.add_row(one.name, *numbers)
        lines = [f"{self.num_measured:,} of {self.num_listed:,} {self.modality} media measured"]
        lines += [f"  left out: {line}" for line in self.left_out.lines()]
        if self.templates != ("{}",):
            lines.append(f"prompts: {'; '.join(self.templates)}")
        if self.cache is not None:
            lines.append("cache: " + ", ".join(f"{name} {value}" for name, value in self.cache.items()))
        lines += [f"note: {note}" for note in self.notes]
        lines += [f"warning: {warning}" for warning in self.warnings]
        lines.append(f"{self.num_encoded:,} encoded now, {self.seconds:.1f} s")
        return Group(table, *(Text(printable(line)) for line in lines))
