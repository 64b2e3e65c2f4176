"""Whether a model was tested on media of its training: compared by the hash of their content."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from bindllm.data.source_config import Columns, EpisodeConfig, SourceConfig
from bindllm.data.sources import read_source
from bindllm.errors import BindLLMError, MediaError
from bindllm.evaluation.benchmarks import BENCHMARKS
from bindllm.evaluation.benchmarks.folder import Evaluation
from bindllm.evaluation.task import MODEL
from bindllm.imports import resolve_path
from bindllm.media import Media

TRAIN = "train"


class Overlap:
    """The content hashes of the media of a recipe, by split.

    Args:
        sources: the data sources of a recipe.
        home: the directory that their relative paths start at.
        advance: called after each hashed media.

    Attributes:
        problems: why a source could not be compared.
    """

    def __init__(
        self, sources: Iterable[Mapping[str, Any]], home: Path, advance: Callable[[], Any] = lambda: None
    ) -> None:
        self.advance = advance
        self.problems: list[str] = []
        # With the modality: one file is another media as a depth map.
        self._hashes: dict[Media, str] = {}
        self._splits: dict[str, set[str]] = {}
        for entry in sources:
            try:
                rows, _ = read_source(_config(entry, home))
            except (BindLLMError, OSError, TypeError) as error:
                self.problems.append(f"{entry['path']}: {error}")
                continue
            for split, found in rows.items():
                media = (item for row in found for item in row.media)
                self._splits.setdefault(split, set()).update(self._hashed(media))

    def held_out(self) -> dict[str, tuple[int, int]]:
        """Return for each other split the number of its media that are in training too, and of all its media."""
        return {
            split: (len(found & self._splits.get(TRAIN, set())), len(found))
            for split, found in self._splits.items()
            if split != TRAIN and found
        }

    def of(self, evaluation: Evaluation) -> tuple[int, int] | None:
        """Return the same numbers for the media of an evaluation; None: none of them is a file that is still there."""
        benchmark, root = BENCHMARKS.get(evaluation.name), Path(evaluation.facts["data"])
        names = dict.fromkeys(name for line in evaluation.lines[MODEL] for name in line["media"])
        if benchmark is None or not names:
            return None
        found = set(self._hashed(Media(benchmark.modality, str(root / name)) for name in names))
        return (len(found & self._splits.get(TRAIN, set())), len(found)) if found else None

    def _hashed(self, media: Iterable[Media]) -> Iterable[str]:
        for item in dict.fromkeys(media):
            if item not in self._hashes:
                # Training has counted and skipped files that cannot be read.
                with suppress(MediaError):
                    self._hashes[item] = item.content_hash()
                self.advance()
            if item in self._hashes:
                yield self._hashes[item]


def _config(entry: Mapping[str, Any], home: Path) -> SourceConfig:
    """Return a source of a recipe, with its paths as they are from here."""
    parts = {"columns": Columns, "episodes": EpisodeConfig}
    values = {
        name: parts[name](**value) if name in parts and value is not None else value
        for name, value in entry.items()
    }
    config = SourceConfig(**values)
    return replace(
        config, path=resolve_path(config.path, home), media=config.media and resolve_path(config.media, home)
    )
