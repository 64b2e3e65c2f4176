"""Where the media of a record are: beside its table, inside the record, or inside a shard."""

from __future__ import annotations

import base64
import binascii
import hashlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol
from urllib.parse import unquote, unquote_to_bytes, urlsplit

from bindllm.data.source_config import SourceConfig
from bindllm.data.tables import HUB
from bindllm.errors import InputError
from bindllm.media import Media

LONGEST_DETAIL = 80
"""Letters of a path or a text that messages show."""


class RowError(InputError):
    """A record that cannot be used.

    Args:
        reason: the same words for all records with this fault; what they are counted by.
        detail: what is at fault in this record, such as a path.
    """

    def __init__(self, reason: str, detail: str = "") -> None:
        detail = detail if len(detail) <= LONGEST_DETAIL else detail[: LONGEST_DETAIL - 3] + "..."
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason, self.detail = reason, detail


class Place(Protocol):
    """Finds the media that a record names.

    Attributes:
        config: what the recipe says about the source.
    """

    config: SourceConfig

    def media(self, modality: str, value: object) -> Media:
        """Return the media that a value of a record stands for.

        Args:
            modality: of the media.
            value: a path, a file URL, a ``data:`` URI, the bytes of a file, or ``{"bytes": ..., "path": ...}``; for
                the modality ``text`` the text itself. None, where the record names none: what the place itself holds
                beside the record, if that is one such media.

        Raises:
            RowError: there is no such media, or the value stands for none.
        """


@dataclass
class FolderPlace:
    """Media in a folder: the one that the source names, else that of its table.

    Args:
        config: what the recipe says about the source.

    Attributes:
        root: folder that paths are relative to.

    Example:
        >>> FolderPlace(SourceConfig("data/qa/train.jsonl")).root
        'data/qa'
    """

    config: SourceConfig
    root: str = field(init=False)

    def __post_init__(self) -> None:
        self.root = self.config.media if self.config.media is not None else folder_of(self.config.path)

    def media(self, modality: str, value: object) -> Media:
        """Return the media that a value stands for; paths are relative to the folder."""
        return read_media(modality, value, lambda name: find_file(self.root, modality, name))


def folder_of(table: str | Path) -> str:
    """Return the folder that paths in a table are relative to; for a dataset of the hub the working directory.

    Example:
        >>> folder_of("data/qa/train.jsonl"), folder_of("hf://organisation/dataset")
        ('data/qa', '')
    """
    if str(table).startswith(HUB):
        return ""
    return str(table) if os.path.isdir(table) else os.path.dirname(table)


def find_file(root: str, modality: str, name: str) -> str:
    """Return the path of a file that a record names.

    Raises:
        RowError: it does not exist.
    """
    file = os.path.join(root, name)
    if not os.path.isfile(file):
        raise RowError(f"no such {thing(modality)}", name)
    return file


def media_key(media: Media, root: str) -> str:
    """Return what decides on the split of media: its path in the folder, its text, or the hash of its content.

    Example:
        >>> media_key(Media.image("data/qa/./cat.png"), "data/qa")
        'cat.png'
    """
    if isinstance(media.source, bytes):
        return hashlib.sha256(media.source).hexdigest()
    if media.modality == "text":
        return str(media.source)
    return os.path.normpath(str(media.source).removeprefix(os.path.join(root, "")))


def thing(modality: str) -> str:
    """Return what a file of a modality is called in messages.

    Example:
        >>> thing("image"), thing("audio")
        ('picture', 'audio file')
    """
    return "picture" if modality == "image" else f"{modality} file"


def read_media(modality: str, value: object, find: Callable[[str], str | bytes]) -> Media:
    """Return the media that a value of a record stands for.

    Args:
        modality: of the media.
        value: as `Place.media` takes it.
        find: gives the full path or the bytes of the file of a name, or raises `RowError`.

    Raises:
        RowError: the value stands for no media, or for one on the web.
    """
    if isinstance(value, Mapping):
        value = value["bytes"] if value.get("bytes") is not None else value.get("path")
    if modality == "text":
        if not isinstance(value, str) or not value.strip():
            raise RowError("no text")
        return Media.text(value)
    if isinstance(value, bytes | bytearray | memoryview) and value:
        return Media(modality, bytes(value))
    if not isinstance(value, str) or not value.strip():
        raise RowError(f"no path of a {thing(modality)}")
    scheme = value[: value.find(":")].lower() if ":" in value[:6] else ""
    if scheme in ("http", "https"):
        raise RowError(
            f"a {thing(modality)} on the web; download it first and give its path, for runs are offline",
            value,
        )
    if scheme == "data":
        return Media(modality, _decoded(modality, value))
    return Media(modality, find(unquote(urlsplit(value).path) if scheme == "file" else value))


def from_base64(text: str) -> bytes | None:
    """Return what a text in base64 stands for, or None where it is no such text."""
    try:
        return base64.b64decode("".join(text.split()), validate=True) or None
    except (binascii.Error, ValueError):
        return None


def _decoded(modality: str, uri: str) -> bytes:
    """The content of a ``data:`` URI (RFC 2397)."""
    head, comma, text = uri.partition(",")
    content = from_base64(unquote(text)) if head.lower().endswith(";base64") else unquote_to_bytes(text)
    if not comma or not content:
        raise RowError(f"a data: URI that is no {thing(modality)}; expected data:TYPE;base64,CONTENT", head)
    return content
