"""From the samples of a shard to rows: the JSON or text of a sample is the row, its other members are media."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice

from bindllm.conversation.messages import RowError
from bindllm.conversation.references import read_media
from bindllm.data import formats
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

    Examples:
        >>> resolve = TarResolver(TarSample("0.tar", "a/cat", 0, {"jpg": b"...", "txt": b"A cat."}))
        >>> resolve("image", "cat.jpg") == resolve("image", "jpg") == resolve("image", None)
        True
    """

    sample: TarSample
    # By member: the unknown name that referred to it, "" if it was named as it is.
    _used: dict[str, str] = field(default_factory=dict, init=False, repr=False)

    def __call__(self, modality: str, value: object) -> Media:
        """Return the media that a value refers to; None refers to the only member of this modality.

        So does a name that no member has: sets that were packed into shards keep the earlier names in their JSON.

        Raises:
            RowError: no such member, several, or two different names that would refer to the same one.
        """
        if value is None:
            return Media(modality, self._content(self._only(modality), modality))
        return read_media(modality, value, lambda name: self._find(modality, name))

    def unnamed(self, modality: str) -> Mapping[str, Sequence[object]]:
        """Return the media of a row that names none: the only member of the modality, if there are such members."""
        return {modality: [None]} if modality != "text" and self._candidates(modality) else {}

    def unused(self) -> tuple[str, ...]:
        """Return the extensions of members that may be media and that no value has referred to."""
        return tuple(end for end in self._media() if end not in self._used)

    def _media(self) -> list[str]:
        return [end for end in self.sample.members if end not in _NOT_MEDIA]

    def _content(self, end: str, modality: str, unknown: str = "") -> bytes:
        # An unknown name can only mean the only member; another name for it would get the same media.
        if self._used.setdefault(end, unknown) != unknown:
            raise RowError(f"several {modality} names for one member", unknown or self._used[end])
        return self.sample.members[end]

    def _find(self, modality: str, name: str) -> bytes:
        media, file = self._media(), self.sample.key.rpartition("/")[2]
        # A name in the JSON may be that of the member, or only its ending.
        for end in (name.rpartition("/")[2].removeprefix(f"{file}."), name.removeprefix(".")):
            if end.lower() in media:
                return self._content(end.lower(), modality)
        return self._content(self._only(modality), modality, name)

    def _only(self, modality: str) -> str:
        """Return the only member of a modality."""
        found = self._candidates(modality)
        if len(found) == 1:
            return found[0]
        if found:
            reason = f"several members that may be its {modality}; name one in the JSON"
        else:
            # Members with an ending that no reader knows are another fault than no members.
            endings = f", only other endings than {', '.join(sorted(SUFFIXES.get(modality, ())))}"
            reason = f"no member that is its {modality}{endings if self._media() else ''}"
        raise RowError(reason, _listed(self.sample))

    def _candidates(self, modality: str) -> list[str]:
        """Return the one member with the modality in its name, else those with an ending that its files have."""
        media = self._media()
        # A suffix does not decide between image, depth and thermal; a name such as 000.depth.png does.
        named = [end for end in media if modality in end.split(".")]
        if len(named) == 1:
            return named
        # Point clouds may be NPY files too, so every member may be one.
        suffixes = None if modality == "point" else SUFFIXES.get(modality)
        return [end for end in media if suffixes is None or f".{end.rpartition('.')[2]}" in suffixes]


def read_row(sample: TarSample, config: SourceConfig, source: int) -> Row:
    """Return the row of a sample.

    Raises:
        InputError: the sample cannot be used.
    """
    if sample.problem:
        raise InputError(sample.problem)
    # One resolver for each sample: it remembers the members that the row has used.
    resolve, record = TarResolver(sample), _record(sample, config)
    row = formats.read_row(
        record,
        config,
        resolve,
        unnamed=lambda: resolve.unnamed(config.modality),
        name=sample.name,
        source=source,
    )
    if unused := resolve.unused():
        remark = f"media next to the row that it does not use ({', '.join(f'.{end}' for end in unused)})"
        row = replace(row, remarks=(*row.remarks, remark))
    return row


def read_stream(
    config: SourceConfig, number: int = 0, *, limit: int | None = None
) -> tuple[dict[str, list[Row]], SourceReport]:
    """Read the first rows of a stream into memory, shard after shard: rows that are evaluated, not trained on.

    Args:
        limit: rows to read; ``config.limit`` by default.

    Returns:
        The rows, all in the split of the source (train, if it has none), and a report of the skipped rows.

    Raises:
        InputError: no sample can be used.
    """
    report = SourceReport(config.path, modality=config.modality, format=config.format)
    rows = list(islice(_rows(config, number, report), limit or config.limit or 1))
    if not rows:
        reasons = "; ".join(report.skipped.lines()) or "it is empty"
        raise InputError(f"data source {config.path} has no sample that can be used: {reasons}")
    report.count(rows)
    # Rows of a stream have no hashed splits: a shard is either trained on or held out.
    return {split: rows if split == (config.split or "train") else [] for split in SPLITS}, report


def _rows(config: SourceConfig, number: int, report: SourceReport) -> Iterator[Row]:
    for shard in expand_shards(config.path):
        try:
            for sample in read_shard(shard):
                try:
                    yield read_row(sample, config, number)
                except InputError as error:
                    report.skipped.add_error(error, sample.name)
        except ShardError as error:
            # Only the rest of this shard is lost.
            report.skipped.add(BAD_SHARD, str(error))


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
    if texts and record.get(config.columns.caption) in (None, "", []):
        try:
            record[config.columns.caption] = texts[0].decode("utf-8-sig").strip()
        except UnicodeDecodeError as error:
            raise InputError("its text is not UTF-8") from error
    if record:
        return record
    # Each way to pack a sample wrongly has its own reason: they need different remedies.
    if "json" in sample.members:
        raise InputError("the member .json is empty")
    if any(end.rpartition(".")[2] in ("json", *_TEXTS) for end in sample.members):
        reason = "a dot in the name of a sample, which ends at its first dot; rename its members"
    else:
        reason = "media without a row, a member .json or .txt of the same name"
    raise RowError(reason, _listed(sample))


def _listed(sample: TarSample) -> str:
    return ", ".join(f".{end}" for end in sample.members)
