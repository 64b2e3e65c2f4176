"""Whether a model was tested on media of its training: compared by the hash of their content."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from bindllm.data.source_config import Columns, EpisodeConfig, SourceConfig
from bindllm.data.sources import read_source
from bindllm.errors import BindLLMError, MediaError
from bindllm.evaluation.benchmarks.folder import Evaluation
from bindllm.evaluation.task import MODEL
from bindllm.imports import resolve_path
from bindllm.media import Media
from bindllm.media.source import open_stream

TRAIN = "train"


class Overlap:
    """The hashes of the media of a recipe, by split.

    Args:
        home: the directory that their relative paths start at.

    Attributes:
        problems: why a source could not be compared.
    """

    def __init__(self, sources: Iterable[Mapping[str, Any]], home: Path, advance: Callable[[], Any]) -> None:
        self._advance = advance
        self.problems: list[str] = []
        self._hashes: dict[str, str | None] = {}
        self._splits: dict[str, set[str]] = {TRAIN: set()}
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
            split: (len(found & self._splits[TRAIN]), len(found))
            for split, found in self._splits.items()
            if split != TRAIN and found
        }

    def of(self, evaluation: Evaluation) -> tuple[int, int] | None:
        """Return the same numbers for the media of an evaluation; None: none of them is a file that is still there."""
        root = evaluation.home
        names = dict.fromkeys(name for line in evaluation.lines[MODEL] for name in line["media"])
        found = set(self._hashed(Media.image(root / name) for name in names))
        return (len(found & self._splits[TRAIN]), len(found)) if found else None

    def _hashed(self, media: Iterable[Media]) -> Iterator[str]:
        for item in media:
            is_file = isinstance(item.source, str | Path) and item.modality != "text"
            name = str(item.source)
            if not is_file:
                yield item.content_hash()
            elif name not in self._hashes:
                self._hashes[name] = _file_hash(name)
                self._advance()
            # Training has counted and skipped files that cannot be read.
            if is_file and (found := self._hashes[name]):
                yield found


def _file_hash(path: str) -> str | None:
    """Return the hash of a file, whatever its modality; None if it cannot be read."""
    try:
        with open_stream(path) as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except MediaError:
        return None


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
