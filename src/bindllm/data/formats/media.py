"""Media that a row refers to: a file in a folder, bytes in the row itself, or a ``data:`` URI."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from bindllm.conversation.messages import RowError
from bindllm.conversation.references import read_media
from bindllm.data.source_config import SourceConfig
from bindllm.data.tables import HUB
from bindllm.media import Media


@dataclass(frozen=True)
class FolderResolver:
    """Resolves media in a folder.

    Args:
        allow_outside: whether a row may name a file outside the folder.

    Examples:
        >>> FolderResolver.of(SourceConfig("data/qa/train.jsonl")).root
        'data/qa'
    """

    root: str
    allow_outside: bool = True

    @classmethod
    def of(cls, config: SourceConfig) -> FolderResolver:
        """Return the resolver of a source: for the folder that it names, else for that of its table."""
        # The folder of the table is what other tools assume; a recipe may name another one.
        if config.media is not None:
            root = config.media
        elif config.path.startswith(HUB):
            # A dataset of the hub has no folder; its paths start at the working directory.
            root = ""
        else:
            root = config.path if os.path.isdir(config.path) else os.path.dirname(config.path)
        return cls(root, config.allow_outside)

    def __call__(self, modality: str, value: object) -> Media:
        """Return the media that a value refers to.

        Raises:
            RowError: they do not exist, are not a regular file, or are in another folder and must not be.
        """
        return read_media(modality, value, lambda name: self._find(modality, name))

    def key(self, media: Media) -> str:
        """Return the key that decides the split of media: the path in the folder, the text, or the hash of the content.

        Every spelling of a path has the same key, and so does a link to the file.

        Examples:
            >>> FolderResolver("data/qa").key(Media.image("data/./cat.png"))
            '../cat.png'
        """
        if isinstance(media.source, bytes):
            return hashlib.sha256(media.source).hexdigest()
        if media.modality == "text":
            return str(media.source)
        # Relative to the folder, so that a data set keeps its splits when it moves.
        return os.path.relpath(os.path.realpath(media.source), self._real_root)

    @cached_property
    def _real_root(self) -> str:
        return os.path.realpath(self.root)

    def _find(self, modality: str, name: str) -> str:
        # Path removes "./" and "//", but not "..", which may follow a link.
        file = str(Path(self.root, name))
        # Not a folder, a pipe or a device.
        if not os.path.isfile(file):
            raise RowError(f"no such {modality} file", name)
        if not self.allow_outside and not Path(os.path.realpath(file)).is_relative_to(self._real_root):
            raise RowError(f"{modality} file outside the folder of the source", name)
        return file
