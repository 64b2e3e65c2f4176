"""From a sample of a shard to a row: its JSON or text says what there is, its other members show it."""

from __future__ import annotations

import json
from dataclasses import dataclass, field

from bindllm.data.formats import FORMATS, RowError, read_media
from bindllm.data.formats.place import thing
from bindllm.data.rows import Row
from bindllm.data.source_config import SourceConfig, Split
from bindllm.data.stream.shards import TarSample
from bindllm.data.tables import Record
from bindllm.errors import InputError
from bindllm.media import SUFFIXES, Media

_TEXTS = ("txt", "text", "caption")
# What image-text sets keep beside the media and the JSON: none of it is media.
_NO_MEDIA = frozenset(("json", "cls", "id", "index", "url", *_TEXTS))


@dataclass
class TarPlace:
    """The media of a sample: its members, which a row names by their whole name, its end, or not at all.

    Args:
        config: what the recipe says about the source.
        sample: the members.

    Example:
        >>> place = TarPlace(SourceConfig("0.tar"), TarSample("0.tar", "a/cat", 0, {"jpg": b"...", "txt": b"A cat."}))
        >>> place.media("image", "cat.jpg") == place.media("image", "jpg") == place.media("image", None)
        True
    """

    config: SourceConfig
    sample: TarSample
    _strangers: dict[str, str] = field(default_factory=dict, init=False, repr=False)

    def media(self, modality: str, value: object) -> Media:
        """Return the media that a value stands for.

        A name that is no member's stands for the only media of this modality, as sets that were packed into shards
        still have the names of before in their JSON.

        Raises:
            RowError: there is no such member, none alone, or two different names that would mean the same one.
        """
        if value is None:
            return Media(modality, self._only(modality))
        return read_media(modality, value, lambda name: self._find(modality, name))

    def _find(self, modality: str, name: str) -> bytes:
        members, file = self.sample.members, self.sample.key.rpartition("/")[2]
        for end in (name.rpartition("/")[2].removeprefix(f"{file}."), name.removeprefix(".")):
            if end.lower() in members and end.lower() not in _NO_MEDIA:
                return members[end.lower()]
        if self._strangers.setdefault(modality, name) != name:
            raise RowError(f"several names of a {thing(modality)} that no member has", name)
        return self._only(modality)

    def _only(self, modality: str) -> bytes:
        """The only member of a modality: of that name, or of an ending that its files have."""
        media = {end: content for end, content in self.sample.members.items() if end not in _NO_MEDIA}
        # Point clouds may be NPY files too, so every member may be one.
        suffixes = None if modality == "point" else SUFFIXES.get(modality)
        named = [content for end, content in media.items() if modality in end.split(".")]
        fitting = [
            content
            for end, content in media.items()
            if suffixes is None or f".{end.rpartition('.')[2]}" in suffixes
        ]
        for found in (named, fitting):
            if len(found) == 1:
                return found[0]
        if len(fitting) > 1:
            raise RowError(
                f"several members that may be its {modality}; name one in the JSON", self._listed()
            )
        raise RowError(f"no member that is its {modality}", self._listed())

    def _listed(self) -> str:
        return ", ".join(f".{end}" for end in self.sample.members)


def read_row(sample: TarSample, config: SourceConfig, source: int) -> tuple[Row, Split | None]:
    """Return the row that a sample is, and the split that it names, if any.

    Args:
        sample: of a shard.
        config: what the recipe says about the source.
        source: its number in the recipe, from 0.

    Raises:
        InputError: the sample cannot be used.
    """
    if sample.problem:
        raise InputError(sample.problem)
    parsed = FORMATS[config.format](_record(sample, config), TarPlace(config, sample))
    return parsed.row(sample.name, source), parsed.split


def _record(sample: TarSample, config: SourceConfig) -> Record:
    """What the sample says: its JSON, and its text as caption where the JSON has none."""
    record: Record = {}
    if "json" in sample.members:
        try:
            record = json.loads(sample.members["json"].decode("utf-8-sig"))
        except (ValueError, RecursionError) as error:
            raise InputError("the member .json is not valid JSON") from error
        if not isinstance(record, dict):
            raise InputError("the member .json is no JSON object")
    texts = [sample.members[end] for end in _TEXTS if end in sample.members]
    if texts and not record.get(config.columns.caption):
        try:
            record[config.columns.caption] = texts[0].decode("utf-8-sig").strip()
        except UnicodeDecodeError as error:
            raise InputError("its text is not UTF-8") from error
    if not record:
        raise InputError("neither a member .json nor .txt that says something")
    return record
