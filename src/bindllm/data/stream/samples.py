"""From the samples of a shard to rows: the JSON or text of a sample is the row, its other members are media."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from bindllm.data import formats
from bindllm.data.formats.media import read_media
from bindllm.data.messages import RowError
from bindllm.data.report import SourceReport
from bindllm.data.rows import Row
from bindllm.data.source_config import SPLITS, SourceConfig
from bindllm.data.stream.shards import BAD_SHARD, ShardError, TarSample, expand_shards, read_shard
from bindllm.data.tables import Record
from bindllm.errors import InputError
from bindllm.media import SUFFIXES, Media

_TEXTS = ("txt", "text", "caption")
# Members that image-text sets keep next to the media and the JSON.
_NOT_MEDIA = frozenset(("json", "cls", "id", "index", "url", *_TEXTS))


@dataclass
class TarResolver:
    """Resolves media among the members of a sample: by their whole name, their ending, or as the only one.

    Args:
        sample: the members.

    Examples:
        >>> resolve = TarResolver(TarSample("0.tar", "a/cat", 0, {"jpg": b"...", "txt": b"A cat."}))
        >>> resolve("image", "cat.jpg") == resolve("image", "jpg") == resolve("image", None)
        True
    """

    sample: TarSample
    _foreign: dict[str, str] = field(default_factory=dict, init=False, repr=False)

    def __call__(self, modality: str, value: object) -> Media:
        """Return the media that a value refers to; None refers to the only member of this modality.

        So does a name that no member has: sets that were packed into shards keep the earlier names in their JSON.

        Raises:
            RowError: no such member, several, or two different names that would refer to the same one.
        """
        if value is None:
            return Media(modality, self._only(modality))
        return read_media(modality, value, lambda name: self._find(modality, name))

    def unnamed(self, modality: str) -> Mapping[str, Sequence[object]]:
        """Return the media of a row that names none: the only member of the modality, if there are such members."""
        return {modality: [None]} if modality != "text" and self._candidates(modality) else {}

    def _find(self, modality: str, name: str) -> bytes:
        members, file = self.sample.members, self.sample.key.rpartition("/")[2]
        # A name in the JSON may be that of the member, or only its ending.
        for end in (name.rpartition("/")[2].removeprefix(f"{file}."), name.removeprefix(".")):
            if end.lower() in members and end.lower() not in _NOT_MEDIA:
                return members[end.lower()]
        # One unknown name can only mean the only member; a second one would get the same media.
        if self._foreign.setdefault(modality, name) != name:
            raise RowError(f"several {modality} names that are not members", name)
        return self._only(modality)

    def _only(self, modality: str) -> bytes:
        """Return the only member of a modality."""
        found, listed = self._candidates(modality), ", ".join(f".{end}" for end in self.sample.members)
        if len(found) == 1:
            return found[0]
        if found:
            raise RowError(f"several members that may be its {modality}; name one in the JSON", listed)
        raise RowError(f"no member that is its {modality}", listed)

    def _candidates(self, modality: str) -> list[bytes]:
        """Return the one member with the modality in its name, else those with an ending that its files have."""
        media = {end: content for end, content in self.sample.members.items() if end not in _NOT_MEDIA}
        # A suffix does not decide between image, depth and thermal; a name such as 000.depth.png does.
        named = [content for end, content in media.items() if modality in end.split(".")]
        if len(named) == 1:
            return named
        # Point clouds may be NPY files too, so every member may be one.
        suffixes = None if modality == "point" else SUFFIXES.get(modality)
        return [c for end, c in media.items() if suffixes is None or f".{end.rpartition('.')[2]}" in suffixes]


def read_row(sample: TarSample, config: SourceConfig, source: int) -> Row:
    """Return the row of a sample.

    Args:
        sample: of a shard.
        config: the source in the recipe.
        source: its index in the recipe, from 0.

    Raises:
        InputError: the sample cannot be used.
    """
    if sample.problem:
        raise InputError(sample.problem)
    resolve, record = TarResolver(sample), _record(sample, config)
    return formats.read_row(
        record,
        config,
        resolve,
        unnamed=lambda: resolve.unnamed(config.modality),
        name=sample.name,
        source=source,
    )


def read_stream(
    config: SourceConfig, number: int = 0, *, limit: int | None = None
) -> tuple[dict[str, list[Row]], SourceReport]:
    """Read the first rows of a stream into memory, shard after shard: rows that are evaluated, not trained on.

    Args:
        config: the source in the recipe.
        number: its index in the recipe, from 0.
        limit: rows to read; ``config.limit`` by default.

    Returns:
        The rows, all in the split of the source (train, if it has none), and a report of the skipped rows.

    Raises:
        InputError: no sample can be used.
    """
    limit = limit or config.limit or 1
    report = SourceReport(config.path, modality=config.modality, format=config.format)
    rows: list[Row] = []
    for shard in expand_shards(config.path):
        try:
            for sample in read_shard(shard):
                try:
                    rows.append(read_row(sample, config, number))
                except InputError as error:
                    formats.skip(error, sample.name, report.skipped)
                if len(rows) == limit:
                    break
        except ShardError as error:
            # Only the rest of this shard is lost.
            report.skipped.add(BAD_SHARD, str(error))
        if len(rows) == limit:
            break
    if not rows:
        raise InputError(
            f"data source {config.path} has no sample that can be used: {'; '.join(report.skipped.lines())}"
        )
    report.count(rows)
    return {split: rows if split == (config.split or "train") else [] for split in SPLITS}, report


def _record(sample: TarSample, config: SourceConfig) -> Record:
    """Return the JSON of a sample; its text becomes the caption if the JSON has none."""
    record: Record = {}
    if "json" in sample.members:
        try:
            # Some editors put a byte order mark first; utf-8-sig drops it.
            record = json.loads(sample.members["json"].decode("utf-8-sig"))
        except (ValueError, RecursionError) as error:
            raise InputError("the member .json is not valid JSON") from error
        if not isinstance(record, dict):
            raise InputError("the member .json is not a JSON object")
    texts = [sample.members[end] for end in _TEXTS if end in sample.members]
    if texts and not record.get(config.columns.caption):
        try:
            record[config.columns.caption] = texts[0].decode("utf-8-sig").strip()
        except UnicodeDecodeError as error:
            raise InputError("its text is not UTF-8") from error
    if not record:
        raise InputError("neither a member .json nor .txt with content")
    return record
